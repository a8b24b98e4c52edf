"""Slots step by rates of their own, whatever the optimizer: its updates are scaled after each step.

The rates (`seft_ds/sparse/input_rates.py`) follow from the inputs of the first step that is taken, and stay.
"""

from __future__ import annotations

import torch

from seft_ds.distributed.collectives import Ranks
from seft_ds.sparse.input_rates import input_rates
from seft_ds.zero import shards
from seft_ds.zero.weight_state import WeightState


class SlotRates:
    """Of one engine. `states[i].rates` is where the factors are: None until they are known."""

    def __init__(self, states: list[WeightState], ranks: Ranks, wanted: bool):
        self._states, self._ranks, self._wanted = states, ranks, wanted
        # The deltas that this rank optimizes, as the step finds them.
        self._before: list[torch.Tensor] = []

    def before_step(self) -> None:
        if self._wanted:
            self._before = [s.slot_shard.master.clone() for s in self._states]

    def measure(self, applied: bool) -> None:
        """The rates, from the sums of the step just taken, which are those of all ranks by now."""
        if not applied or not self.missing:
            return
        measured = [s.curvature for s in self._states]
        means = [c.mean_square_inputs() for c in measured if c is not None]
        slots = [s.target.n_slots for s in self._states]
        for state, rates in zip(self._states, input_rates(means, slots), strict=True):
            state.rates = rates

    def scale(self) -> None:
        """Turn the update that the optimizer made into the one that each slot is to take."""
        for state, before in zip(self._states, self._before):
            rates = state.rates_at(self._positions(state))
            if rates is not None and before.numel():
                master = state.slot_shard.master
                torch.add(before, (master - before).mul_(rates.to(master.device)), out=master)
        self._before = []

    @property
    def missing(self) -> bool:
        """Whether the next step has to be measured."""
        return self._wanted and self._states[0].rates is None

    def _positions(self, state: WeightState) -> torch.Tensor:
        """int64: of the slots that this rank optimizes."""
        lo, position = shards.held(state.position, self._ranks)
        part = state.slot_shard
        return position[part.lo - lo : part.hi - lo].long().to(state.live_bits.device)
