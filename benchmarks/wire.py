"""Bytes that each rank puts on the wire in a step: counted in a real run, beside what the planner says.

    python benchmarks/wire.py --ranks 3 --output TABLE.md

Tiny LLaMA models with a DeepSpeed engine on each of several processes (gloo). Every collective that
torch.distributed is asked for is caught below DeepSpeed and ourselves, so nothing is left out. What a rank
sends for one is taken from the ring algorithms: for n ranks and a whole of B bytes, all-gather and
reduce-scatter (n - 1)/n · B, all-reduce twice that, a reduction to one rank or a broadcast (n - 1)/n · B on
average.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("DS_ACCELERATOR", "cpu")

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from seft_ds.memory import Setup
from seft_ds.train.wire import wire_bytes

METHODS = ("seft", "fixed", "lora", "full")


class WireCounter(TorchDispatchMode):
    """Adds up what the collectives of torch.distributed send from this rank, by kind."""

    def __init__(self, size: int):
        super().__init__()
        self.size = size
        self.sent: dict[str, float] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = func._schema.name.removeprefix("c10d::").strip("_")
            self.sent[name] = self.sent.get(name, 0.0) + self._sent(name, args)
        return func(*args, **(kwargs or {}))

    def _sent(self, name: str, args: Any) -> float:
        share = (self.size - 1) / self.size
        if name in ("barrier", "monitored_barrier"):
            return 0.0
        if name.startswith("allreduce"):
            return 2 * share * _bytes(args[0])
        if name.startswith(("allgather", "reduce_scatter")):
            # The whole is the longer of what goes in and what comes out.
            return share * max(_bytes(args[0]), _bytes(args[1]))
        if name.startswith(("reduce", "broadcast")):
            return share * _bytes(args[0])
        raise ValueError(f"the collective {name} isn't counted yet")


def _bytes(value: Any) -> int:
    """Of all tensors in nested lists."""
    if isinstance(value, torch.Tensor):
        return value.nbytes
    return sum(_bytes(v) for v in value) if isinstance(value, (list, tuple)) else 0


def tiny_model(width: int, layers: int) -> Any:
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=width, intermediate_size=3 * width, num_hidden_layers=layers, vocab_size=512,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    for module in model.model.layers.modules():
        if isinstance(module, torch.nn.Linear):
            module.weight.data.mul_(torch.rand(module.weight.shape) > 0.6)
    return model


def count(
    method: str,
    stage: int,
    size: int,
    width: int,
    layers: int,
    steps: int,
    reuse: int = 10**9,
    micro_batches: int = 1,
) -> dict[str, float]:
    """Bytes a step of this rank, by collective; the first steps warm up ZeRO-3's prefetching."""
    import deepspeed

    import seft_ds
    from seft_ds.baselines.adapters import attach_adapters
    from seft_ds.baselines.methods import find_method
    from seft_ds.config import parse_seft
    from seft_ds.distributed.collectives import init_ranks

    ranks = init_ranks()
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": micro_batches,
        "bf16": {"enabled": True},
        "zero_optimization": {
            "stage": stage,
            "stage3_param_persistence_threshold": 0,
            "stage3_max_reuse_distance": reuse,
            "stage3_prefetch_bucket_size": min(reuse, 50_000_000),
        },
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "torch_adam": True}},
        "steps_per_print": 10**9,
    }
    model = tiny_model(width, layers)
    if method in ("full", "lora"):
        if method == "lora":
            attach_adapters(model, method, parse_seft({"trainable": "rank=4"}), ranks)
        trained = [p for p in model.parameters() if p.requires_grad]
        engine = deepspeed.initialize(model=model, config=settings, model_parameters=trained)[0]
    else:
        block = {"trainable": "rank=4", "interval": 10, "window": 2, "total_steps": 10**6}
        settings["seft"] = block | find_method(method).settings
        engine = seft_ds.initialize(model=model, config=settings)[0]
    rows = torch.arange(64)[None] + ranks.rank

    def step() -> None:
        for _ in range(micro_batches):
            engine.backward(engine(input_ids=rows, labels=rows).loss)
            engine.step()

    for _ in range(10):  # a whole interval
        step()
    with WireCounter(size) as counter:
        for _ in range(steps):
            step()
    return {name: sent / steps for name, sent in sorted(counter.sent.items())}


def planned(
    method: str,
    stage: int,
    size: int,
    width: int,
    layers: int,
    reuse: int = 10**9,
    micro_batches: int = 1,
) -> float:
    """The planner's figure for the same run."""
    from seft_ds.config import parse_seft
    from seft_ds.train.planning import shapes_of_model

    config = parse_seft({"trainable": "rank=4", "interval": 10, "window": 2})
    if method == "fixed":
        config = config.model_copy(update={"drop_fraction": 0.0})
    with torch.device("meta"):
        model = tiny_model(width, layers)
    shapes = shapes_of_model(model, config, 0.6)
    setup = Setup(stage=stage, ranks=size, persistent_below=0, reuse_distance=reuse, prefetched=0)
    trained = {"lora": sum(4 * sum(t.shape) for t in shapes.targets), "full": shapes.numel}
    parts = wire_bytes(
        shapes.targets, shapes.others, setup, config, trained.get(method), micro_batches
    )
    return sum(parts.values())


def main() -> None:
    from tests.ranks import run_processes

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--ranks", type=int, default=3)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--steps", type=int, default=20, help="counted, after 10")
    parser.add_argument("--stages", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--output", help="write the table to this file too")
    options = parser.parse_args()
    lines = [
        "| ZeRO | method | MB a step, counted | planned | ratio | by collective |",
        "|---|---|--:|--:|--:|---|",
    ]
    for stage in options.stages:
        for method in METHODS:
            size = (options.ranks, options.width, options.layers)
            by_rank = run_processes(options.ranks, count, method, stage, *size, options.steps)
            counted = max(sum(sent.values()) for sent in by_rank)
            said = planned(method, stage, *size)
            kinds = ", ".join(f"{k} {v / 1e6:.3f}" for k, v in by_rank[0].items() if v >= 1e3)
            lines.append(
                f"| {stage} | {method} | {counted / 1e6:.3f} | {said / 1e6:.3f} | "
                f"{said / counted:.3f} | {kinds} |"
            )
            print(lines[-1], flush=True)
    if options.output:
        Path(options.output).write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
