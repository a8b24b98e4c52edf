"""The planner beside real engines: bytes held, and the most that tensors took at once.

    python benchmarks/planned.py --output TABLE.md

LLaMA models of several sizes with random weights, ZeRO 1, 2, 3 and offload; nine steps, windows open at the
end. The peak is counted by torch's profiler, which sees every allocation of a tensor: what
`torch.cuda.max_memory_allocated` would say on a GPU. (A process's resident set is no measure of it: memory
that was allocated and never touched, as most of a reduction bucket, is not in it.)
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("DS_ACCELERATOR", "cpu")

import torch

from seft_ds.memory import HELD

# hidden, intermediate, blocks, vocabulary
SIZES = {
    "4M": (256, 704, 4, 2048),
    "26M": (512, 1376, 6, 8192),
    "134M": (768, 2048, 12, 32000),
}
SETUPS = {"1": {"stage": 1}, "2": {"stage": 2}, "3": {"stage": 3}}
SETUPS["3, offloaded"] = {
    "stage": 3, "offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"},
}  # fmt: skip


def model_config(size: str) -> Any:
    from transformers import LlamaConfig

    hidden, intermediate, blocks, vocabulary = SIZES[size]
    return LlamaConfig(
        hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=blocks,
        vocab_size=vocabulary, num_attention_heads=8, num_key_value_heads=8,
        tie_word_embeddings=False,
    )  # fmt: skip


def settings_of(setup: str, length: int, checkpointing: bool) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": True},
        "zero_optimization": {
            **SETUPS[setup],
            "reduce_bucket_size": 1_000_000,
            "stage3_param_persistence_threshold": 0,
        },
        "zero_force_ds_cpu_optimizer": False,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "torch_adam": True}},
        "steps_per_print": 10**9,
        "seft": {"interval": 10, "window": 3, "waves": False, "total_steps": 100},
    }


def measure(size: str, setup: str, length: int, checkpointing: bool) -> tuple[int, int]:
    """(bytes held, the most bytes of tensors at once) of this rank, in a run of nine steps."""
    from transformers import AutoModelForCausalLM

    import seft_ds
    from seft_ds.zero.memory_use import held

    rows = torch.randint(0, SIZES[size][3], (1, length))
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(model_config(size), dtype=torch.bfloat16)
        for module in model.model.layers.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight.data.mul_(torch.rand(module.weight.shape) > 0.5)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        settings = settings_of(setup, length, checkpointing)
        engine = seft_ds.initialize(model=model, config=settings)[0]
        most = dict.fromkeys(HELD, 0)
        started = None
        for step in range(9):  # windows are open from step 8 on; the event of step 10 is not in it
            if step == 1:
                started = torch.autograd.profiler.record_function("steps")
                started.__enter__()
            engine.backward(engine(input_ids=rows, labels=rows, use_cache=False).loss)
            engine.step()
            most = {p: max(n, most[p]) for p, n in held(engine).items()}
        assert started is not None
        started.__exit__(None, None, None)
    return sum(most.values()), peak_of(profile)


def peak_of(profile: Any) -> int:
    """The most bytes allocated at once from the mark "steps" on.

    The profiler's own total doesn't see what other threads free, such as gloo's, and grows with every
    message. So allocations are followed by their address: an address that is given out again was free.
    The copies that gloo's threads make for themselves are left out: NCCL has none.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    begin, thread = min((e["ts"], e["tid"]) for e in events if e.get("name") == "steps")
    memory = sorted((e for e in events if e.get("name") == "[memory]"), key=lambda e: e["ts"])
    there: dict[int, int] = {}
    total = most = 0
    for e in memory:
        address, size = e["args"]["Addr"], max(0, e["args"]["Bytes"])
        size *= e["tid"] == thread
        total += size - there.get(address, 0)
        there[address] = size
        if e["ts"] >= begin:
            most = max(most, total)
    return most


def planned(size: str, setup: str, length: int, checkpointing: bool, ranks: int) -> tuple[int, int]:
    """The planner's (bytes held, bytes in all)."""
    from transformers import AutoModelForCausalLM

    from seft_ds.config import parse_seft
    from seft_ds.memory import Setup
    from seft_ds.train.planning import Work, plan_run, shapes_of_model

    settings = settings_of(setup, length, checkpointing)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(model_config(size))
    config = parse_seft(settings["seft"])
    shapes = shapes_of_model(model, config, 0.5)
    chosen = Setup.from_config(settings, ranks, 2, "AdamW", shapes.hidden)
    result = plan_run(shapes, chosen, Work(1, length, checkpointing), config, 100)
    parts = result.device | {p: result.device.get(p, 0) + n for p, n in result.host.items()}
    return sum(parts[p] for p in HELD), sum(parts.values())


def main() -> None:
    from tests.ranks import run_processes

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=SIZES)
    parser.add_argument("--setups", nargs="+", default=list(SETUPS), choices=SETUPS)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--output", help="write the table to this file too")
    options = parser.parse_args()
    lines = [
        "| model | ZeRO | checkpointing | held, MB | planned | ratio | peak, MB | planned | ratio |",
        "|---|---|---|" + "--:|" * 6,
    ]
    print("\n".join(lines))
    for size in options.sizes:
        for setup in options.setups:
            for checkpointing in (False, True):
                case = (size, setup, options.length, checkpointing)
                found = run_processes(options.ranks, measure, *case)
                held, peak = (max(of_all) for of_all in zip(*found, strict=True))
                said_held, said_peak = planned(*case, options.ranks)
                lines.append(
                    f"| {size} | {setup} | {'yes' if checkpointing else 'no'} | {held / 1e6:.1f} | "
                    f"{said_held / 1e6:.1f} | {said_held / held:.3f} | {peak / 1e6:.1f} | "
                    f"{said_peak / 1e6:.1f} | {said_peak / peak:.3f} |"
                )
                print(lines[-1], flush=True)
    if options.output:
        Path(options.output).write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
