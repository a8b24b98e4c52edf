"""What a repair or a pruning run will take, before it starts: memory, messages, time; no weights are needed.

    python launch/plan.py --model_name_or_path llama2-70b --nodes 4 --gpus_per_node 8 --gpu_memory_gib 80
    python launch/plan.py --model_name_or_path DIR_OR_CONFIG --deepspeed ds_configs/zero3_8bit.json \\
        --max_length 4096 --gpu_memory_gib 80 --tflops 400 --bandwidth_gbs 50
    python launch/plan.py --model_name_or_path DIR_OR_CONFIG --gpus_per_node 8 --prune sparsegpt

Prints bytes by part, those of the rank that holds most, and the bytes that a rank sends a step. With
`--gpu_memory_gib` it says whether the run fits, how many rows and how few GPUs would, or what has to change.
With `--tflops` (or `--probe`, which measures a step on the device at hand) it says how long the run takes.
Exit status: 0; 1 if `--gpu_memory_gib` is given and it does not fit; 2 for a mistake in the input.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from seft_ds.console import run
from seft_ds.devices import settle_accelerator
from seft_ds.errors import RunError

DEFAULT_CONFIG = Path(__file__).resolve().parent.parent / "ds_configs" / "zero3.json"


@dataclass
class PlanArguments:
    """The run that is planned, in the words of launch/finetune.py, and the machines."""

    model_name_or_path: str = field(
        metadata={
            "help": "a model's folder, a config.json, or a name such as llama3-8b, llama2-70b"
        }
    )
    deepspeed: str | None = field(
        default=None,
        metadata={"help": "DeepSpeed config of a repair; default: ds_configs/zero3.json"},
    )
    prune: str | None = field(
        default=None, metadata={"help": "instead: wanda, sparsegpt, magnitude"}
    )
    calibration_samples: int = field(default=128, metadata={"help": "sequences that prune uses"})
    nodes: int = field(default=1, metadata={"help": "machines"})
    gpus_per_node: int = field(default=1, metadata={"help": "ranks on each"})
    sparsity: float = field(default=0.5, metadata={"help": "of the weights that are repaired"})
    dtype: str = field(default="bfloat16", metadata={"help": "bfloat16 or float32"})
    optim: str = field(default="adamw_torch", metadata={"help": "as for launch/finetune.py"})
    max_steps: int = field(default=1000, metadata={"help": "optimizer steps of the run"})
    max_length: int = field(default=2048, metadata={"help": "tokens of a row"})
    per_device_train_batch_size: int = field(default=1, metadata={"help": "rows a rank at a time"})
    gradient_accumulation_steps: int = field(default=1, metadata={"help": "micro-batches a step"})
    gradient_checkpointing: bool = field(default=True, metadata={"help": "keep block inputs only"})
    gpu_memory_gib: float | None = field(
        default=None, metadata={"help": "what a GPU has by its name: 24, 40, 80, 141"}
    )
    tflops: float | None = field(
        default=None, metadata={"help": "TFLOP/s that a GPU sustains, for an estimate of time"}
    )
    bandwidth_gbs: float | None = field(
        default=None, metadata={"help": "GB/s that a GPU sends to others, for an estimate of time"}
    )
    probe: bool = field(
        default=False,
        metadata={"help": "measure on this device how long a step takes (some seconds)"},
    )
    json: str | None = field(default=None, metadata={"help": "write the plan to this file too"})


def check(options: PlanArguments) -> None:
    """Raises ValueError for numbers that no run could have."""
    if options.deepspeed is not None and options.prune is not None:
        raise ValueError("give one of --deepspeed (the plan of a repair) and --prune (of pruning)")
    for name in (
        "calibration_samples",
        "nodes",
        "gpus_per_node",
        "max_steps",
        "max_length",
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
    ):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name} {getattr(options, name)}: wanted at least 1")
    if not 0 < options.sparsity < 1:
        raise ValueError(f"--sparsity {options.sparsity}: wanted a share between 0 and 1")
    for name in ("gpu_memory_gib", "tflops", "bandwidth_gbs"):
        value = getattr(options, name)
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"--{name} {value}: wanted more than 0")


def show(options: PlanArguments, seft_flags: dict) -> None:
    """Print the plan. RunError if it was asked whether it fits, and it does not."""
    from seft_ds.config import load_deepspeed_config, parse_seft, with_overrides
    from seft_ds.console import prepare_device, torch_dtype
    from seft_ds.memory import Setup
    from seft_ds.train import fitting, planning
    from seft_ds.train.probing import probe
    from seft_ds.train.wire import wire_bytes

    check(options)
    model = planning.model_of_config(options.model_name_or_path)
    dtype = torch_dtype(options.dtype)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"--dtype {options.dtype}: wanted bfloat16 or float32")
    ranks = options.nodes * options.gpus_per_node
    if options.prune is not None:
        show_pruning(options, model, dtype, ranks)
        return
    deepspeed = options.deepspeed or str(DEFAULT_CONFIG)
    settings = with_overrides(load_deepspeed_config(deepspeed), seft_flags)
    config = parse_seft(settings.get("seft", {}))
    shapes = planning.shapes_of_model(model, config, options.sparsity)
    setup = Setup.from_config(settings, ranks, dtype.itemsize, options.optim, shapes.hidden)
    work = planning.Work(
        options.per_device_train_batch_size,
        options.max_length,
        options.gradient_checkpointing,
        options.gradient_accumulation_steps,
    )
    result = planning.plan_run(shapes, setup, work, config, options.max_steps)
    slots, trained = sum(t.n_slots for t in shapes.targets), sum(t.numel for t in shapes.targets)
    print(
        f"{shapes.numel:,} parameters, {trained:,} of them in {len(shapes.targets)} sparse weights; "
        f"{slots:,} slots; ZeRO-{setup.stage} on {options.nodes} x {options.gpus_per_node} ranks, "
        f"{setup.optimizer}, {options.dtype}, {Path(deepspeed).name}\n"
        + planning.table(result, options.gpus_per_node)
    )
    count = partial(
        wire_bytes, shapes.targets, shapes.others, setup, config,
        micro_batches=work.micro_batches, total_steps=options.max_steps,
    )  # fmt: skip
    sent = count()
    print(wire_table(sent, count, shapes))
    took = None
    if options.probe:
        took = probe(model.config, shapes.targets, work, dtype, prepare_device())
        print(probe_lines(took, options))
    lines, fit, memory_bytes = [], None, (options.gpu_memory_gib or 0) * planning.GIB
    if took is not None or options.tflops is not None:
        lines.append(time_line(options, shapes, work, sum(sent.values()), took))
    if options.gpu_memory_gib is not None:
        fit = fitting.verdict(result.device_total, memory_bytes)
    if options.json:
        facts = asdict(result) | {"parameters": shapes.numel, "slots": slots, "ranks": ranks}
        facts |= {"wire_bytes": sent, "probe": asdict(took) if took else None, "fit": fit}
        Path(options.json).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    if options.gpu_memory_gib is not None:
        lines += size_lines(options, shapes, setup, work, config)
    print("\n".join(lines))
    ways: list[str] = []
    if fit == "no":
        ways = fitting.what_would_fit(
            shapes, setup, work, config, options.max_steps, memory_bytes,
            options.gpus_per_node,
        )  # fmt: skip
    tell_fit(options, result.device_total, ways)


def size_lines(
    options: PlanArguments, shapes: Any, setup: Any, work: Any, config: Any
) -> list[str]:
    """The largest batch and the fewest GPUs with which the run fits."""
    from seft_ds.train import fitting

    memory = (options.gpu_memory_gib or 0) * 2**30
    rows = fitting.largest_batch(shapes, setup, work, config, options.max_steps, memory)
    lines = []
    if rows:
        lines.append(f"largest --per_device_train_batch_size that fits: {rows}")
    ranks = fitting.fewest_ranks(
        shapes, setup, work, config, options.max_steps, memory, options.gpus_per_node
    )
    if ranks is not None:
        lines.append(f"fewest GPUs on which it fits, with {work.micro_batch} rows each: {ranks}")
    return lines


def time_line(options: PlanArguments, shapes: Any, work: Any, sent_bytes: float, took: Any) -> str:
    """How long the run takes, from a rate that was given or probed."""
    from seft_ds.train.fitting import step_seconds

    computing, sending = step_seconds(
        shapes,
        work,
        sent_bytes,
        None if options.tflops is None else options.tflops * 1e12,
        None if options.bandwidth_gbs is None else options.bandwidth_gbs * 1e9,
        None if took is None else took.step,
    )
    hours = options.max_steps * (computing + sending) / 3600
    basis = "probed" if took is not None else f"{options.tflops:g} TFLOP/s"
    wire = "without sending (--bandwidth_gbs)"
    if options.bandwidth_gbs is not None:
        wire = f"{sending:.2f} s sending at {options.bandwidth_gbs:g} GB/s"
    return (
        f"about {hours:.1f} hours for {options.max_steps:,} steps: {computing:.2f} s computing ({basis}), "
        f"{wire}; attention, slot gradients, events and saving come on top, overlap is not counted"
    )


def wire_table(sent: dict[str, float], count: Callable[..., dict], shapes: Any) -> str:
    """What a rank sends a step, beside LoRA of the same budget and full fine-tuning."""
    parts = ", ".join(f"{name} {number / 1e6:,.1f}" for name, number in sent.items())
    slots = sum(t.n_slots for t in shapes.targets)
    others = {
        name: sum(count(trained=trained).values())
        for name, trained in (("as many trained in LoRA", slots), ("full", shapes.numel))
    }
    beside = ", ".join(f"{name} {number / 1e6:,.1f}" for name, number in others.items())
    return f"MB that a rank sends a step: {sum(sent.values()) / 1e6:,.1f} ({parts}); {beside}"


def probe_lines(took: Any, options: PlanArguments) -> str:
    """The measured step time, in words."""
    tokens = options.max_length * options.per_device_train_batch_size
    return (
        f"forward and backward here, a micro-batch: about {took.step:.2f} s for {tokens:,} tokens "
        f"({tokens / took.step:,.0f} a second; {took.blocks} blocks of {took.block:.3f} s, "
        f"the rest {took.rest:.3f} s), without sums over ranks"
    )


def show_pruning(options: PlanArguments, model: Any, dtype: torch.dtype, ranks: int) -> None:
    """The same for launch/prune.py, which holds one block at a time."""
    from seft_ds.prune.plan import pruning_plan
    from seft_ds.prune.recipe import UNITS

    if options.prune not in UNITS:
        raise ValueError(f"--prune {options.prune}: wanted one of {', '.join(UNITS)}")
    result = pruning_plan(
        model, options.prune, sequences=options.calibration_samples,
        length_tokens=options.max_length, dtype=dtype, ranks=ranks,
    )  # fmt: skip
    print("\n".join(result.lines()))
    tell_fit(options, result.device_bytes, ["--max_length and the model's blocks decide"])


def tell_fit(options: PlanArguments, device_bytes: float, ways: list[str]) -> None:
    """Say whether it fits, if that was asked. RunError, with `ways` to change it, if not."""
    from seft_ds.train import fitting

    if options.gpu_memory_gib is None:
        return
    size = options.gpu_memory_gib
    need = fitting.needed_bytes(device_bytes) / 2**30
    fit = fitting.verdict(device_bytes, options.gpu_memory_gib * 2**30)
    counted = f"{need:.1f} GiB, {fitting.BEYOND_PLAN_BYTES / 2**30:g} of them for CUDA and NCCL"
    if fit == "no":
        raise RunError(
            f"does not fit into {size:g} GiB a GPU; it needs {counted}; " + "; ".join(ways)
        )
    if fit == "tight":
        print(
            f"tight in {size:g} GiB a GPU: {counted}; a peak that is no estimate of ours may not fit"
        )
    else:
        print(f"fits into {size:g} GiB a GPU: {counted}")


def main() -> None:
    settle_accelerator()  # before transformers, which imports DeepSpeed
    from seft_ds.train.flags import parse_options, split_seft_flags

    rest, seft_flags = split_seft_flags(sys.argv[1:])
    show(parse_options(PlanArguments, __doc__, rest), seft_flags)


if __name__ == "__main__":
    sys.exit(run(main))
