"""Nothing is lost between a save and a load: any step, any ranks to any others, any ZeRO stage to any other.

One launch a rank count runs many engines after each other: starting the ranks costs more than they do.
With SEFT_FULL=1 every combination is tried (9 minutes on 2 cores); without it, a part that covers each step,
stage, setting and pair of rank counts.
"""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoint.saved import differences, whole_state
from tests.ranks import run_processes
from tests.tiny import tiny_model
from tests.zero.test_engine import config, tokens

STEPS = 14
FULL = bool(os.environ.get("SEFT_FULL"))
# What exercises the state: events in waves with a window of 3 every 5 steps, moments, folds and reverts.
SETTINGS: dict[str, dict[str, Any]] = {
    "fold": {"prune": "curvature"},
    "revert": {"release": "revert", "grow": "random", "start": "gradient"},
    "global": {"scope": "global", "waves": False, "release": "revert"},
    "2:4": {"release": "revert", "prune": "curvature"},
    "reference": {"checkpoint_base": "reference"},
    "8bit": {"density": 0.1},  # bitsandbytes: several 8-bit blocks on each rank
}


def start(stage: int, bf16: bool, name: str, accumulate: int = 1) -> Any:
    import seft_ds

    torch.manual_seed(0)
    kind = "llama24" if name == "2:4" else "llama"
    model = tiny_model(kind, torch.bfloat16 if bf16 else torch.float32)
    settings = config(stage, bf16, total_steps=STEPS, **SETTINGS[name])
    settings["gradient_accumulation_steps"] = accumulate
    settings["scheduler"] = {
        "type": "WarmupDecayLR",
        "params": {"total_num_steps": STEPS, "warmup_num_steps": 3, "warmup_max_lr": 5e-3},
    }
    if name != "8bit":
        return seft_ds.initialize(model=model, config=settings)[0]
    import bitsandbytes

    del settings["optimizer"]
    seft_ds.attach(model, settings)
    deltas = [p for p in model.parameters() if p.requires_grad]
    optimizer = bitsandbytes.optim.AdamW8bit(deltas, lr=5e-3, min_8bit_size=64)
    return seft_ds.initialize(model=model, config=settings, optimizer=optimizer)[0]


def steps(engine: Any, first: int, last: int, save: Any = None) -> None:
    gas = engine.gradient_accumulation_steps()
    for step in range(first, last):
        for micro in range(gas):
            ids = tokens(step, row=engine.seft.ranks.rank * gas + micro)
            engine.backward(engine(input_ids=ids, labels=ids).loss)
            engine.step()
        if save is not None:
            save(step + 1)


def record(engine: Any) -> list[dict]:
    """Journal records from now on, without the times."""
    records: list[dict] = []
    skip = ("seconds", "bytes")
    engine.seft.listeners.append(
        lambda r: records.append({k: v for k, v in r.items() if k not in skip})
    )
    return records


def every_step(folder: str, cases: list[tuple[int, bool, str]]) -> list[tuple[str, list[str]]]:
    """Save after every step of one run; resume each and go on to the end. What differed, by case."""
    results = []
    for n, (stage, bf16, name) in enumerate(cases):
        home = f"{folder}/{stage}-{bf16}-{name.replace(':', '')}"
        whole = start(stage, bf16, name)
        journal = record(whole)
        whole.save_checkpoint(home, "0", client_state={"seen": 0})
        steps(
            whole,
            0,
            STEPS,
            lambda n, w=whole, h=home: w.save_checkpoint(h, str(n), {"seen": n * 2}),
        )
        final = whole_state(whole)
        for stop in range(STEPS + 1) if FULL else range(n % 5, STEPS + 1, 5):
            resumed = start(stage, bf16, name)
            again = record(resumed)
            path, client = resumed.load_checkpoint(home, str(stop))
            assert path.endswith(f"/{stop}") and client == {"seen": stop * 2}
            assert resumed.seft.step == resumed.global_steps == stop
            steps(resumed, stop, STEPS)
            resumed.seft.check()
            found = differences(final, whole_state(resumed))
            if again != [r for r in journal if r["step"] > stop]:
                found.append("journal")
            results.append((f"stage {stage}, bf16 {bf16}, {name}, stopped after {stop}", found))
    return results


@pytest.mark.timeout(600)
def test_stopping_after_any_step_changes_nothing(tmp_path: Path) -> None:
    cases = [
        (0, False, "fold"),
        (1, True, "revert"),
        (2, False, "global"),
        (3, True, "2:4"),
        (3, False, "reference"),
        (3, True, "8bit"),
    ]
    if FULL:
        cases += [(3, True, "fold"), (2, True, "8bit"), (3, False, "8bit")]
    for said, found in run_processes(2, every_step, str(tmp_path), cases)[0]:
        assert not found, (said, found)


PAIRS = [(0, "fold"), (3, "fold"), (1, "2:4"), (3, "reference")]
if FULL:
    PAIRS = list(itertools.product((0, 1, 2, 3), ("fold", "2:4", "reference")))


def save_all(folder: str) -> dict:
    """On this number of ranks: for each stage a checkpoint in the middle of windows; its whole state."""
    states = {}
    for stage, name in PAIRS:
        engine = start(stage, stage % 2 == 1, name)
        steps(engine, 0, 8)
        size = engine.seft.ranks.size
        engine.save_checkpoint(f"{folder}/{name.replace(':', '')}-{stage}-{size}", "here")
        states[name, stage] = whole_state(engine)
    return states


def load_all(folder: str, saved: dict) -> list[tuple[str, list[str]]]:
    """On this number of ranks: every checkpoint of `saved` under the next stage, and one step more."""
    results = []
    for (name, stage, size), state in saved.items():
        engine = start((stage + 2) % 4, stage % 2 == 1, name)
        engine.load_checkpoint(f"{folder}/{name.replace(':', '')}-{stage}-{size}", "here")
        found = differences(state, whole_state(engine))
        engine.seft.check()
        steps(engine, 8, 10)  # with events
        engine.seft.check()
        results.append((f"{name}: stage {stage} on {size} ranks to {(stage + 2) % 4}", found))
    return results


def load_and_save(folder: str, saved: dict) -> tuple[list[tuple[str, list[str]]], dict]:
    return load_all(folder, saved), save_all(folder)


@pytest.mark.timeout(900)
def test_any_ranks_to_any_ranks_and_any_stage(tmp_path: Path) -> None:
    """Each round loads what the round before saved; with SEFT_FULL what all other rounds saved."""
    saved: dict = {}
    for size in (1, 2, 3, 4, 1, 2, 3) if FULL else (1, 3, 2, 1):
        others = {key: state for key, state in saved.items() if key[2] != size}
        results, states = run_processes(size, load_and_save, str(tmp_path), others)[0]
        for said, found in results:
            assert not found, (size, said, found)
        if not FULL:
            saved = {}
        saved |= {(name, stage, size): state for (name, stage), state in states.items()}
