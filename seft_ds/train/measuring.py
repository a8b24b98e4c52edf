"""What a run measures of itself for its journal: memory by part beside the plan, and the sizes of updates."""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable
from typing import Any

import torch

from seft_ds.memory import Plan
from seft_ds.targets import Target
from seft_ds.zero.engine import SparseEvolution
from seft_ds.zero.memory_use import held

_SHOWN = 6  # names of weights in a line


class MemoryMeter:
    """The most bytes of each part that this rank held, looked at only when more may be held than before.

    Args:
        plan: what was predicted, if it was.
    """

    def __init__(self, plan: Plan | None = None):
        self.plan = plan
        self.highest: dict[str, int] = {}
        self._most_open = -1  # windows that were open at once: all that changes size during a run

    def look(self, engine: Any) -> None:
        """After a step. Walks over all parameters where more windows are open than ever before."""
        seft: SparseEvolution = engine.seft
        is_open = sum(s.window is not None for s in seft.states)
        if is_open <= self._most_open:
            return
        self._most_open = is_open
        for part, size_bytes in held(engine).items():
            self.highest[part] = max(size_bytes, self.highest.get(part, 0))

    def record(self) -> dict[str, Any]:
        """For the journal: planned and measured bytes, and the peak of the process or its GPU."""
        planned: dict[str, int] = {}
        if self.plan is not None:
            for where in (self.plan.device, self.plan.host):
                for part, size_bytes in where.items():
                    planned[part] = planned.get(part, 0) + size_bytes
        return {"planned": planned, "measured": self.highest, **peak()}


def peak() -> dict[str, Any]:
    """The most that this process held at once, and of which memory that is said."""
    if torch.cuda.is_available():
        return {"peak_bytes": torch.cuda.max_memory_allocated(), "peak_of": "GPU, by torch"}
    unit_bytes = 1 if sys.platform == "darwin" else 1024
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit_bytes
    return {"peak_bytes": most, "peak_of": "process, code and libraries included"}


def describe_unreached(targets: list[Target], unreached: list[list[bool]]) -> str | None:
    """A line on the weights that no gradient reached in the whole run; None if every one was.

    unreached: of each target, which of its parts.
    """
    found = [(t, sum(parts)) for t, parts in zip(targets, unreached, strict=True) if any(parts)]
    if not found:
        return None
    if all(all(parts) for parts in unreached):
        return "no slot has moved: no gradient reached a weight, or the learning rate was 0"
    names = [f"{n} of {t.n_parts} parts of {t.name}" if t.experts else t.name for t, n in found]
    more = f" and {len(names) - _SHOWN} others" if len(names) > _SHOWN else ""
    return (
        f"no gradient reached {len(found)} of {len(targets)} sparse weights, which stay as they were: "
        f"{', '.join(names[:_SHOWN])}{more}"
    )


def write_measurements(
    seft: SparseEvolution, meter: MemoryMeter, write: Callable[..., None] | None
) -> None:
    """The `memory` and `deltas` lines. A collective; `write` is the journal's, on the rank that has one."""
    sizes = seft.delta_sizes()
    if write is not None:
        write("memory", step=seft.step, **meter.record())
        write("deltas", step=seft.step, targets=sizes)
