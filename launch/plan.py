"""How much memory a repair run will take on each GPU and host, before it starts; no weights are needed.

    python launch/plan.py --model_name_or_path DIR_OR_CONFIG --nodes 4 --gpus_per_node 8 \\
        --deepspeed ds_configs/zero3_8bit.json --max_length 2048 --gpu_memory_gib 80

Prints bytes by part, those of the rank that holds most, and whether it fits; if not, what would.
Exit status: 0; 1 if `--gpu_memory_gib` is given and it does not fit; 2 for a mistake in the input.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

from seft_ds.console import run
from seft_ds.errors import RunError


@dataclass
class PlanArguments:
    """The run that is planned, in the words of launch/finetune.py, and the machines."""

    model_name_or_path: str = field(metadata={"help": "a model's folder, or a config.json"})
    deepspeed: str = field(metadata={"help": "the DeepSpeed config of the run"})
    nodes: int = field(default=1, metadata={"help": "machines"})
    gpus_per_node: int = field(default=1, metadata={"help": "ranks on each"})
    sparsity: float = field(default=0.5, metadata={"help": "of the weights that are repaired"})
    dtype: str = field(default="bfloat16", metadata={"help": "bfloat16 or float32"})
    optim: str = field(default="adamw_torch", metadata={"help": "as for launch/finetune.py"})
    max_steps: int = field(default=1000, metadata={"help": "optimizer steps of the run"})
    max_length: int = field(default=2048, metadata={"help": "tokens of a row"})
    per_device_train_batch_size: int = field(default=1, metadata={"help": "rows a rank at a time"})
    gradient_checkpointing: bool = field(default=True, metadata={"help": "keep block inputs only"})
    gpu_memory_gib: float | None = field(default=None, metadata={"help": "what a GPU has"})
    json: str | None = field(default=None, metadata={"help": "write the plan to this file too"})


def check(options: PlanArguments) -> None:
    """Raises ValueError for numbers that no run could have."""
    for name in (
        "nodes",
        "gpus_per_node",
        "max_steps",
        "max_length",
        "per_device_train_batch_size",
    ):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name} {getattr(options, name)}: wanted at least 1")
    if not 0 < options.sparsity < 1:
        raise ValueError(f"--sparsity {options.sparsity}: wanted a share between 0 and 1")
    if options.gpu_memory_gib is not None and options.gpu_memory_gib <= 0:
        raise ValueError(f"--gpu_memory_gib {options.gpu_memory_gib}: wanted more than 0")


def show(options: PlanArguments, seft_flags: dict) -> None:
    """Print the plan. RunError if it was asked whether it fits, and it does not."""
    from seft_ds.config import load_deepspeed_config, parse_seft, with_overrides
    from seft_ds.console import torch_dtype
    from seft_ds.memory import Setup
    from seft_ds.train import planning

    check(options)
    settings = with_overrides(load_deepspeed_config(options.deepspeed), seft_flags)
    config = parse_seft(settings.get("seft", {}))
    shapes = planning.shapes_of_config(options.model_name_or_path, config, options.sparsity)
    dtype = torch_dtype(options.dtype)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"--dtype {options.dtype}: wanted bfloat16 or float32")
    ranks = options.nodes * options.gpus_per_node
    setup = Setup.from_config(settings, ranks, dtype.itemsize, options.optim, shapes.hidden)
    work = planning.Work(
        options.per_device_train_batch_size, options.max_length, options.gradient_checkpointing
    )
    result = planning.plan_run(shapes, setup, work, config, options.max_steps)
    slots, trained = sum(t.n_slots for t in shapes.targets), sum(t.numel for t in shapes.targets)
    print(
        f"{shapes.numel:,} parameters, {trained:,} of them in {len(shapes.targets)} sparse weights; "
        f"{slots:,} slots; ZeRO-{setup.stage} on {options.nodes} x {options.gpus_per_node} ranks, "
        f"{setup.optimizer}, {options.dtype}\n" + planning.table(result, options.gpus_per_node)
    )
    if options.json:
        facts = asdict(result) | {"parameters": shapes.numel, "slots": slots, "ranks": ranks}
        Path(options.json).write_text(json.dumps(facts, indent=2) + "\n")
    if options.gpu_memory_gib is None:
        return
    bytes_there = options.gpu_memory_gib * planning.GIB
    if result.device_total > bytes_there:
        ways = planning.what_would_fit(shapes, setup, work, config, bytes_there)
        raise RunError(
            f"does not fit into {options.gpu_memory_gib:g} GiB a GPU; " + "; ".join(ways)
        )
    print(f"fits into {options.gpu_memory_gib:g} GiB a GPU")


def main() -> None:
    from transformers import HfArgumentParser

    from seft_ds.train.arguments import _split_seft_flags

    rest, seft_flags = _split_seft_flags(sys.argv[1:])
    parser = HfArgumentParser(PlanArguments, description=(__doc__ or "").splitlines()[0])
    (options,) = parser.parse_args_into_dataclasses(args=rest)
    show(options, seft_flags)


if __name__ == "__main__":
    sys.exit(run(main))
