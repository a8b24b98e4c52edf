"""engine.pt: what DeepSpeed keeps beside tensors (counters, scheduler, hyperparameters), the caller's state.

The only file of a checkpoint that is pickled: it is read with `weights_only=True`, which runs no code, and
what it holds has to have the form of what this run's engine would save.
"""

from __future__ import annotations

import io
import math
import pickle
from pathlib import Path
from typing import Any

import torch

from seft_ds.checkpoint.layout import ENGINE_NAME
from seft_ds.zero import optimizer_state

_COUNTERS = ("global_steps", "global_samples", "skipped_steps")
_MOST = 1 << 53


def engine_bytes(engine: Any, client_state: dict) -> bytes:
    """The file's contents. ValueError for a client_state with objects."""
    scheduler = engine.lr_scheduler
    state = {
        "counters": {name: int(getattr(engine, name)) for name in _COUNTERS},
        "lr_scheduler": scheduler.state_dict() if scheduler is not None else None,
        "hyperparameters": optimizer_state.hyperparameters(engine),
        "client_state": client_state,
    }
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    try:
        torch.load(file, weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            "the checkpoint would need pickle to be read, which can run code: client_state (or the state of "
            f"the scheduler) may hold only plain data and tensors ({reason})"
        ) from None
    return file.getvalue()


def read_engine_state(directory: Path) -> dict[str, Any]:
    """engine.pt, its structure checked. ValueError if it is damaged or would run code."""
    path = directory / ENGINE_NAME
    try:
        state = torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:  # torch.load raises whatever its readers meet
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"{path} can't be read ({reason:.300}); the checkpoint is damaged"
        ) from None
    wanted = {
        "counters": dict,
        "lr_scheduler": (dict, type(None)),
        "hyperparameters": list,
        "client_state": dict,
    }
    fits = isinstance(state, dict) and all(
        name in state and isinstance(state[name], kind)  # type: ignore[arg-type]
        for name, kind in wanted.items()
    )
    counters = state["counters"] if fits else {}
    counted = all(type(n := counters.get(name)) is int and 0 <= n <= _MOST for name in _COUNTERS)
    if not counted or not all(isinstance(group, dict) for group in state["hyperparameters"]):
        raise ValueError(f"{path} doesn't hold an engine's state; the checkpoint is damaged")
    return state


def check_engine_state(engine: Any, state: dict[str, Any], directory: Path) -> None:
    """ValueError unless `restore_engine` can put this state into this engine."""
    path = directory / ENGINE_NAME
    for saved, mine in zip(
        state["hyperparameters"], optimizer_state.hyperparameters(engine), strict=False
    ):
        for name, value in _numbers(saved).items():
            if name == "initial_lr" and name not in mine and _is_number(value):
                continue  # a scheduler sets it, which this run may make after loading
            if name not in mine or not _is_like(value, mine[name]) or not _in_range(name, value):
                raise ValueError(
                    f"{path}: the optimizer has no {name!r:.80} that could be {value!r:.80}"
                )
    scheduler, saved = engine.lr_scheduler, state["lr_scheduler"]
    if None not in (scheduler, saved) and not _is_like(saved, scheduler.state_dict()):
        raise ValueError(
            f"{path}: the state of the learning rate scheduler is not one of {type(scheduler).__name__}; "
            "resume with the scheduler that the run had"
        )


def restore_engine(engine: Any, state: dict[str, Any]) -> None:
    for name in _COUNTERS:
        setattr(engine, name, state["counters"][name])
    optimizer_state.set_hyperparameters(engine, [_numbers(g) for g in state["hyperparameters"]])
    if engine.lr_scheduler is not None and state["lr_scheduler"] is not None:
        engine.lr_scheduler.load_state_dict(state["lr_scheduler"])


def _numbers(group: dict[str, Any]) -> dict[str, Any]:
    """What a run has reached. Flags (fused, foreach ...) are how an optimizer works: this run's stay."""
    return {n: v for n, v in group.items() if v is not None and not isinstance(v, bool)}


def _in_range(name: str, value: Any) -> bool:
    numbers = value if isinstance(value, (list, tuple)) else [value]
    return all(0 <= x < (1 if name == "betas" else math.inf) for x in numbers)


def _is_like(saved: Any, mine: Any) -> bool:
    """Whether a value has the form of the one that this run would save: same keys, lengths and kinds."""
    if isinstance(mine, dict):
        return (
            isinstance(saved, dict)
            and saved.keys() == mine.keys()
            and all(_is_like(saved[key], mine[key]) for key in mine)
        )
    if isinstance(mine, (list, tuple)):
        return (
            isinstance(saved, (list, tuple))
            and len(saved) == len(mine)
            and all(map(_is_like, saved, mine))
        )
    if isinstance(mine, (bool, str)):
        return type(saved) is type(mine)
    if mine is None or isinstance(mine, (int, float)):
        # The same infinity, too: some schedulers start with one.
        same = type(saved) is type(mine) and saved == mine
        return same or (mine is not None and _is_number(saved))
    return type(saved) is type(mine)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and -1 <= value <= _MOST  # NaN is in no range
