"""Exchanges of a run: dead weights come back from the dense model and take the places of live ones.

A few steps are measured (`sparse/curvature.py`), then all weights decide together
(`distributed/exchange.py`). Weights with an N:M pattern take no part: there each group would have to pay for
itself. A matrix of an expert exchanges within itself, whatever the scope: how many tokens of a few steps
reached it says little of what it is worth beside others.
"""

from __future__ import annotations

import time
from typing import Any

import torch

from seft_ds.distributed.collectives import Ranks
from seft_ds.distributed.exchange import plan_exchange
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

    def run(self, rate: float) -> dict[str, Any] | None:
        """Exchange up to `rate` of all positions; the journal's record, or None: nothing was measured."""
        measured = all(s.curvature is not None and s.curvature.steps for s in self.states)
        if not measured:  # every step of the window was skipped
            self._close()
            return None
        assert self._dense is not None
        started, bytes_before = time.perf_counter(), self._ranks.bytes
        sizes = [0] * (max(self._group) + 1)
        parts = [n for s in self.states for n in [s.target.part_numel] * s.target.n_parts]
        for g, n in zip(self._group, parts, strict=True):
            sizes[g] += n
        most = [int(rate * n) for n in sizes]
        stakes = [part for state in self.states for part in state.stakes(self._dense)]
        changes, paying = plan_exchange(stakes, self._group, most, self._ranks)
        del stakes
        left = iter(changes)
        by_state = [[next(left) for _ in range(s.target.n_parts)] for s in self.states]
        for state, mine in zip(self.states, by_state, strict=True):
            state.exchange(mine, self._dense)
        self._close()
        counts = [
            [sum(getattr(c, kind).numel() for c in mine) for mine in by_state]
            for kind in ("revived", "pruned")
        ]
        revived, pruned, live, changed = self._totals(counts)
        assert sum(revived) == sum(pruned), "an exchange must not change the number of live weights"
        names = [s.target.name for s in self.states]
        return {
            "exchanged": sum(revived),
            "most": sum(most),
            "paying": sum(paying),
            "targets": {
                name: {"revived": r, "pruned": p, "live": n, "changed": c}
                for name, r, p, n, c in zip(names, revived, pruned, live, changed, strict=True)
            },
            "seconds": time.perf_counter() - started,
            "bytes": self._ranks.bytes - bytes_before,
        }

    def _close(self) -> None:
        for state in self.states:
            state.end_curvature()

    def _totals(self, counts: list[list[int]]) -> list[list[int]]:
        """Counts of each weight over all ranks, behind them its live positions and those whose live bit
        differs from the start. One sum."""
        device = self.states[0].live_bits.device
        live = [mask.count(s.live_bits) for s in self.states]
        rows = [*counts, live, [s.changed() for s in self.states]]
        return self._ranks.sum_(torch.tensor(rows, dtype=torch.int64, device=device)).tolist()


def _groups(states: list[WeightState], scope: str) -> list[int]:
    """The group of each part of each weight: within a group positions change places."""
    groups: dict[object, int] = {}
    keys: list[object] = []
    for i, state in enumerate(states):
        alone = scope == "layer" or state.target.experts
        keys += [(i, p) if alone else "all" for p in range(state.target.n_parts)]
    return [groups.setdefault(key, len(groups)) for key in keys]
