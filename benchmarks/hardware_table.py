"""The README's table: how many 80 GiB GPUs a repair takes, by model and by what trains.

    python benchmarks/hardware_table.py             # prints it
    python benchmarks/hardware_table.py --write     # and puts it into README.md

Nothing is measured and no weight is read: the planner of launch/plan.py is asked for 1, 2, 4 ... GPUs until a
GPU holds at most 72 GiB. A test compares the README with this output.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.blocks import put_block
from benchmarks.config_table import CONFIGS, LENGTH_TOKENS, MODELS, model_of
from seft_ds.config import load_deepspeed_config, parse_seft
from seft_ds.memory import Setup
from seft_ds.train.planning import GIB, Work, plan_run, shapes_of_model

ROOT = Path(__file__).resolve().parent.parent
BLOCK = "hardware"
GPUS = (1, 2, 4, 8, 16, 32, 64)
LIMIT_GIB = 72  # of 80: buffers of NCCL and fragments are not planned


@dataclass(frozen=True)
class Way:
    """A column: a config, and entries of its "seft" block."""

    title: str
    config: str
    settings: dict[str, Any] = field(default_factory=dict)


WAYS = [
    Way("SEFT, 1 % of the weights train", "zero3"),
    Way("the same, moments in 8 bits", "zero3_8bit"),
    Way("SEFT with exchanges", "zero3", {"dense_model": "DENSE", "drop_fraction": 0.0}),
    Way("all live weights train", "zero3", {"trainable": "live", "drop_fraction": 0.0}),
]


def gib_of(model: Any, way: Way, gpus: int) -> float:
    """What a GPU has to hold."""
    settings = load_deepspeed_config(CONFIGS / f"{way.config}.json")
    config = parse_seft({**settings.get("seft", {}), **way.settings})
    shapes = shapes_of_model(model, config, 0.5)
    setup = Setup.from_config(settings, gpus, 2, "adamw_torch", shapes.hidden)
    result = plan_run(shapes, setup, Work(1, LENGTH_TOKENS, checkpointing=True), config)
    return result.device_total / GIB


def cell(model: Any, way: Way) -> str:
    """The fewest GPUs that hold it, and what each holds."""
    for gpus in GPUS:
        needed = gib_of(model, way, gpus)
        if needed <= LIMIT_GIB:
            return f"{gpus} × {needed:.1f} GiB"
    return f"more than {GPUS[-1]}"


def table() -> str:
    """Markdown: a row a model, a column a way."""
    lines = [f"| | {' | '.join(way.title for way in WAYS)} |", f"|---{'|---' * len(WAYS)}|"]
    for name in MODELS:
        model = model_of(name)
        lines.append(f"| {name} | {' | '.join(cell(model, way) for way in WAYS)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--write", action="store_true", help="put it into README.md")
    text = table()
    print(text)
    if parser.parse_args().write:
        put_block(ROOT / "README.md", BLOCK, text)


if __name__ == "__main__":
    main()
