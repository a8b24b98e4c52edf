"""Each optimizer's state a slot, measured beside predicted, and how far fresh slots step after an event.

    python benchmarks/optimizers.py --model_name_or_path PRUNED --train_file TEXT --output TABLE.md

For every optimizer the same run on the same tokens, in one process with ZeRO-3: once with the state of fresh
slots repaired, once with zeros, which is what they would have without a repair. After `--warm_steps` the
optimizer is aged: its moments are freed of their bias and its step count set to 10,000, which is the state
that a long stationary run would have. (In a run's first steps bias correction hides what is wrong.) From
then on every fresh slot's first update is recorded, as a multiple of the learning rate.
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
from transformers import AutoModelForCausalLM, AutoTokenizer

import seft_ds
from seft_ds.distributed.collectives import close_ranks
from seft_ds.memory import Setup, moment_bytes, optimizer_flats
from seft_ds.optim import families
from seft_ds.prune.calibrate import read_texts, sequences
from seft_ds.zero.memory_use import held
from seft_ds.zero.optimizer_state import flats

OPTIMIZERS = ("AdamW", "AdamW8bit", "Adam8bit", "AdEMAMix8bit", "Lion8bit")
AGE_STEPS = 10_000
LEARNING_RATE = 1e-3


def make_engine(folder: str, name: str, interval: int, steps: int) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    params = {"lr": LEARNING_RATE} | ({"torch_adam": True} if name == "AdamW" else {})
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 3},
        "optimizer": {"type": name, "params": params},
        "steps_per_print": 10**9,
        "seft": {
            "interval": interval, "window": 5, "drop_fraction": 0.2, "total_steps": steps, "stop": 1.0,
            "lr_scale": "none",
        },
    }  # fmt: skip
    return seft_ds.initialize(model=model, config=settings)[0]


def age(engine: Any) -> None:
    """The moments as they would be after AGE_STEPS steps with gradients like those so far."""
    for flat in flats([s.slot_shard for s in engine.seft.states]):
        part = flat.parts[0][1]
        taken = part.steps()
        betas = part.optimizer.param_groups[part.group]["betas"]
        decay = {families.MEAN: betas[0], families.SQUARE: betas[1], families.SLOW: betas[-1]}
        for name, moment in flat.moments().items():
            factor = (1 - decay[name] ** AGE_STEPS) / (1 - decay[name] ** taken)
            scaled = moment.absmax if isinstance(moment, families.Blocks) else moment.values
            scaled.mul_(factor)
        part.prepare(AGE_STEPS)


def bytes_of(engine: Any, name: str) -> tuple[float, float]:
    """(measured, predicted) bytes of optimizer state a slot."""
    slots = [s.target.n_slots for s in engine.seft.states]
    setup = Setup(stage=3, ranks=1, optimizer=name)
    predicted = sum(moment_bytes(n, setup) for n in optimizer_flats(slots, setup))
    return held(engine)["moments"] / sum(slots), predicted / sum(slots)


def first_updates(engine: Any, rows: torch.Tensor, warm_steps: int) -> torch.Tensor:
    """|first update| / learning rate of every fresh slot placed after the optimizer was aged."""
    found = []
    for step, row in enumerate(rows):
        if step == warm_steps:
            age(engine)
        fresh = [(s, s.fresh_slots) for s in engine.seft.states if s.fresh_slots is not None]
        engine.backward(engine(input_ids=row[None], labels=row[None]).loss)
        engine.step()
        if step > warm_steps:  # slots placed by the step before it were repaired before the ageing
            found += [s.slot_shard.master[slots].abs() for s, slots in fresh]
    return torch.cat(found) / LEARNING_RATE


def without_repair(name: str, G: torch.Tensor, *_: Any) -> torch.Tensor:
    return torch.zeros_like(G)


def measure(folder: str, name: str, rows: torch.Tensor, warm: int, repaired: bool) -> str:
    """One row of the table."""
    repair = families.fresh
    families.fresh = repair if repaired else without_repair  # type: ignore[assignment]
    try:
        engine = make_engine(folder, name, interval=10, steps=len(rows))
        updates = first_updates(engine, rows, warm)
        real, predicted = bytes_of(engine, name)
        engine.seft.check()
        cut = sum(int(s.cut_moments) for s in engine.seft.states)
    finally:
        families.fresh = repair  # type: ignore[assignment]
    assert cut == 0, "events take the count out"
    shares = torch.tensor([0.5, 0.9, 0.99, 0.999])
    cells = [f"{x:.2f}" for x in torch.quantile(updates, shares).tolist()]
    over = float((updates >= 2).float().mean())
    return (
        f"| {name} | {'yes' if repaired else 'no'} | {updates.numel():,} | {' | '.join(cells)} | "
        f"{float(updates.max()):.2f} | {over:.2%} | {real:.3f} | {predicted:.3f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model_name_or_path", required=True, help="a pruned model's folder")
    parser.add_argument("--train_file", required=True, help="text, as for launch/prune.py")
    parser.add_argument("--optimizers", nargs="+", default=OPTIMIZERS, choices=OPTIMIZERS)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--warm_steps", type=int, default=12)
    parser.add_argument("--length", type=int, default=256, help="tokens a step")
    parser.add_argument("--output", help="write the table to this file too")
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.model_name_or_path)
    rows = sequences(tokenizer, read_texts(options.train_file), options.steps, options.length, 0)
    lines = [
        "| optimizer | repaired | fresh slots | median | 90 % | 99 % | 99.9 % | largest | of 2 lr or more | "
        "bytes a slot | predicted |",
        "|" + "---|" * 11,
    ]
    for name in options.optimizers:
        for repaired in (True, False):
            folder = options.model_name_or_path
            lines.append(measure(folder, name, rows, options.warm_steps, repaired))
            print("\n".join(lines[:2] + lines[-1:] if len(lines) == 3 else lines[-1:]), flush=True)
    if options.output:
        Path(options.output).write_text("\n".join(lines) + "\n")
    close_ranks()


if __name__ == "__main__":
    main()
