"""engine.pt of any scheduler's run is taken by a new run of the same kind, and by no other."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler

from seft_ds.checkpoint.engine_file import check_engine_state, restore_engine

SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda step: 1 / (step + 1)),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 5),
    "steps": lambda o: lr_scheduler.MultiStepLR(o, [2, 3]),
    "plateau": lambda o: lr_scheduler.ReduceLROnPlateau(o),  # holds infinities
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, 0.1, 10),
}


def engine(name: str, lr: float = 1e-3) -> Any:
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(2))], lr=lr)
    counters = {"global_steps": 0, "global_samples": 0, "skipped_steps": 0}
    return SimpleNamespace(
        optimizer=optimizer, lr_scheduler=SCHEDULERS[name](optimizer), **counters
    )


def state_of(e: Any) -> dict:
    group = {k: v for k, v in e.optimizer.param_groups[0].items() if k != "params"}
    return {
        "counters": {"global_steps": 4, "global_samples": 8, "skipped_steps": 0},
        "lr_scheduler": e.lr_scheduler.state_dict(),
        "hyperparameters": [group],
        "client_state": {},
    }


@pytest.mark.parametrize("name", SCHEDULERS)
def test_what_a_run_has_reached_is_taken(name: str) -> None:
    old, new = engine(name), engine(name)
    for _ in range(4):
        old.optimizer.step()
        old.lr_scheduler.step(*([1.0] if name == "plateau" else []))
    state = state_of(old)
    check_engine_state(new, state, Path("tag"))
    restore_engine(new, state)
    assert new.lr_scheduler.state_dict() == old.lr_scheduler.state_dict()
    assert new.optimizer.param_groups[0]["lr"] == old.optimizer.param_groups[0]["lr"]
    assert new.global_steps == 4
    for other in set(SCHEDULERS) - {name}:
        with pytest.raises(ValueError, match="tag/engine.pt"):
            check_engine_state(engine(other), state, Path("tag"))


@pytest.mark.parametrize(
    "key, value",
    [("last_epoch", "4"), ("last_epoch", float("nan")), ("last_epoch", 10**400), ("last_epoch", -5),
     ("T_max", None), ("base_lrs", [1e-3, 1e-3]), ("base_lrs", 1e-3), ("step", 5),
     ("optimizer", None), ("_last_lr", ["x"])],
)  # fmt: skip
def test_a_scheduler_is_not_filled_with_anything(key: str, value: Any) -> None:
    state = state_of(engine("cosine"))
    state["lr_scheduler"][key] = value
    with pytest.raises(ValueError, match="scheduler"):
        check_engine_state(engine("cosine"), state, Path("tag"))


@pytest.mark.parametrize(
    "key, value",
    [("lr", "x"), ("lr", -1.0), ("lr", float("inf")), ("betas", 0.9), ("betas", (0.9, 1.0)), ("eps", (1, 2)),
     ("params", []), ("unknown", 1.0), ("weight_decay", torch.zeros(3))],
)  # fmt: skip
def test_hyperparameters_have_to_be_possible(key: str, value: Any) -> None:
    state = state_of(engine("cosine"))
    state["hyperparameters"][0][key] = value
    with pytest.raises(ValueError, match=f"no '{key}'"):
        check_engine_state(engine("cosine"), state, Path("tag"))


def test_how_the_optimizer_works_is_up_to_this_run() -> None:
    """A run saved on a GPU has fused kernels; flags of a checkpoint can't switch on what has no state."""
    state = state_of(engine("cosine"))
    state["hyperparameters"][0] |= {"fused": True, "amsgrad": True, "capturable": True, "lr": 0.5}
    new = engine("cosine")
    check_engine_state(new, state, Path("tag"))
    restore_engine(new, state)
    group = new.optimizer.param_groups[0]
    assert (group["fused"], group["amsgrad"], group["capturable"], group["lr"]) == (
        None,
        False,
        False,
        0.5,
    )
