"""Exchanges of a run: dead weights come back from the dense model and take the places of live ones.

A few steps are measured (`sparse/curvature.py`), then all weights decide together
(`distributed/exchange.py`). Weights with an N:M pattern take no part: there each group would have to pay for
itself. A matrix of an expert exchanges within itself, whatever the scope: how many tokens of a few steps
reached it says little of what it is worth beside others.

A weight or matrix that no token reached in what was measured is idle: all its positions are worth 0, which
says nothing, so it takes no part. Nor does one whose curvature overflowed.
"""

from __future__ import annotations

import itertools
import math
import time
import warnings
from typing import Any

import torch

from seft_ds.distributed.agreement import all_or_none
from seft_ds.distributed.collectives import Ranks
from seft_ds.distributed.exchange import Exchange, Stakes, plan_exchange
from seft_ds.sparse import mask
from seft_ds.zero.dense_model import DenseModel
from seft_ds.zero.weight_state import WeightState


class Exchanges:
    """Without a dense model nothing happens."""

    def __init__(
        self, states: list[WeightState], dense: DenseModel | None, scope: str, ranks: Ranks
    ):
        self.states = [s for s in states if dense is not None and s.target.pattern is None]
        self._dense, self._ranks = dense, ranks
        self._group = _groups(self.states, scope)  # of each part of each weight
        ends = list(itertools.accumulate(s.target.n_parts for s in self.states))
        self._parts = [slice(end - s.target.n_parts, end) for end, s in zip(ends, self.states)]

    def run(self, rate: float) -> dict[str, Any] | None:
        """Exchange up to `rate` of all positions; the journal's record, or None: nothing was measured."""
        measured = all(s.curvature is not None and s.curvature.steps for s in self.states)
        if not measured:
            self._warn("every step of its window was skipped, so there is no exchange")
            self._close()
            return None
        assert self._dense is not None
        started, bytes_before = time.perf_counter(), self._ranks.bytes
        largest = self._largest_curvatures()
        busy = [0 < x < math.inf for x in largest]
        changes, most, paying = self._plan(rate, busy)
        for state, part in zip(self.states, self._parts, strict=True):
            if any(busy[part]):
                state.exchange(changes[part], self._dense)
        self._close()
        targets = self._count(changes, largest)
        revived, pruned = (sum(t[kind] for t in targets.values()) for kind in ("revived", "pruned"))
        assert revived == pruned, "an exchange must not change the number of live weights"
        if overflowed := [name for name, t in targets.items() if t["not_finite"]]:
            names = ", ".join(overflowed)
            self._warn(
                f"the curvature of {names} overflowed; live positions there stay as they are"
            )
        return {
            "exchanged": revived,
            "most": sum(most),
            "paying": sum(paying),
            "targets": targets,
            "seconds": time.perf_counter() - started,
            "bytes": self._ranks.bytes - bytes_before,
        }

    def _largest_curvatures(self) -> list[float]:
        """The largest curvature of each part: the same on every rank, as all sums are. One host sync."""
        return torch.stack([f.largest() for s in self.states for f in s.factors()]).tolist()

    def _plan(self, rate: float, busy: list[bool]) -> tuple[list[Exchange], list[int], list[int]]:
        """The changes of each part, and of each group how many positions may come back and how many paid."""
        sizes = [0] * (max(self._group) + 1)
        parts = [n for s in self.states for n in [s.target.part_numel] * s.target.n_parts]
        for g, n, takes_part in zip(self._group, parts, busy, strict=True):
            sizes[g] += n if takes_part else 0
        most = [int(rate * n) for n in sizes]
        nothing = torch.empty(0, dtype=torch.int64, device=self.states[0].live_bits.device)
        if not any(busy):
            return [Exchange(nothing, nothing) for _ in busy], most, [0] * len(most)
        stakes = all_or_none(self._ranks, lambda: self._weigh(busy))
        group = list(itertools.compress(self._group, busy))
        planned, paying = plan_exchange(stakes, group, most, self._ranks)
        left = iter(planned)
        changes = [next(left) if takes_part else Exchange(nothing, nothing) for takes_part in busy]
        return changes, most, paying

    def _weigh(self, busy: list[bool]) -> list[Stakes]:
        """Of the parts that take part. ValueError for values that are not finite."""
        assert self._dense is not None
        stakes: list[Stakes] = []
        for state, part in zip(self.states, self._parts, strict=True):
            if any(busy[part]):
                stakes += itertools.compress(state.stakes(self._dense), busy[part])
        return stakes

    def _close(self) -> None:
        for state in self.states:
            state.end_curvature()

    def _count(self, changes: list[Exchange], largest: list[float]) -> dict[str, dict[str, int]]:
        """Of each weight, over all ranks: positions that came, went, are live, or whose live bit differs from
        the start; its parts that took no part. One sum."""
        rows = [
            [
                sum(c.revived.numel() for c in changes[part]),
                sum(c.pruned.numel() for c in changes[part]),
                mask.count(state.live_bits),
                state.changed(),
            ]
            for state, part in zip(self.states, self._parts, strict=True)
        ]
        device = self.states[0].live_bits.device
        sums = self._ranks.sum_(torch.tensor(rows, dtype=torch.int64, device=device)).tolist()
        keys = ("revived", "pruned", "live", "changed", "idle", "not_finite")
        found = {}
        for state, part, counts in zip(self.states, self._parts, sums, strict=True):
            idle = sum(x == 0 for x in largest[part])
            not_finite = sum(not math.isfinite(x) for x in largest[part])
            found[state.target.name] = dict(zip(keys, [*counts, idle, not_finite], strict=True))
        return found

    def _warn(self, what: str) -> None:
        if self._ranks.rank == 0:
            warnings.warn(f"exchange: {what}", stacklevel=2)


def _groups(states: list[WeightState], scope: str) -> list[int]:
    """The group of each part of each weight: within a group positions change places."""
    groups: dict[object, int] = {}
    keys: list[object] = []
    for i, state in enumerate(states):
        alone = scope == "layer" or state.target.experts
        keys += [(i, p) if alone else "all" for p in range(state.target.n_parts)]
    return [groups.setdefault(key, len(groups)) for key in keys]
