"""The run-time state of one target weight on one rank, and how a planned change is applied to it.

A rank keeps the live mask and window sums of the positions that it owns, and a table of the slots that
lie in what it holds (under ZeRO 0-2 that is the whole weight). Nothing here decides anything.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from seft_ds.distributed.collectives import Ranks
from seft_ds.distributed.event import Change
from seft_ds.distributed.exchange import Exchange, Stakes
from seft_ds.distributed.selection import gather_lists
from seft_ds.distributed.window import Window
from seft_ds.sparse import mask
from seft_ds.sparse.curvature import Curvature, Factors
from seft_ds.sparse.kernel_costs import KernelCosts, Problem
from seft_ds.sparse.shard import shard_range
from seft_ds.sparse.topology import Shard
from seft_ds.zero import optimizer_state, shards
from seft_ds.zero.attach import AttachedTarget
from seft_ds.zero.dense_model import DenseModel


@dataclass
class SlotTable:
    """The slots in the range of positions that a rank must know, by ascending position."""

    position: torch.Tensor  # (s,) int64
    slot: torch.Tensor  # (s,) int64, index into the delta vector
    base: torch.Tensor  # (s,) in the weight's dtype
    born_dead: torch.Tensor  # (s,) bool

    def take(self, index: torch.Tensor) -> SlotTable:
        return SlotTable(
            self.position[index], self.slot[index], self.base[index], self.born_dead[index]
        )

    def between(self, lo: int, hi: int) -> slice:
        """The rows whose positions lie in [lo, hi)."""
        bounds = torch.tensor([lo, hi], device=self.position.device)
        first, last = torch.searchsorted(self.position, bounds).tolist()
        return slice(first, last)


class WeightState:
    """One target weight: mask, slots, window; what the forward pass of its module asks for."""

    def __init__(self, attached: AttachedTarget, engine: Any, ranks: Ranks):
        self.target = attached.target
        self.weight = attached.weight
        self.delta = attached.delta
        self.position = attached.position
        attached.connect(self)
        self.multiple = attached.target.multiple
        self.ranks = ranks
        numel = self.target.numel
        self.lo, self.hi = shard_range(numel, ranks.rank, ranks.size, self.multiple)
        held_lo, held = shards.held(self.weight, ranks)
        self.held_lo, self.held_hi = held_lo, held_lo + held.numel()
        # Masks, windows and events are on the device that computes, even if the weight is offloaded.
        self.live_bits = attached.live_bits.to(engine.device)
        self.start_bits = self.live_bits.clone()
        self.slots = self._first_slots()
        # Owned positions whose value may differ from the model that the run started from.
        self.touched_bits = torch.zeros_like(self.live_bits)
        self.touch(self.slots.position)
        self.slot_shard = optimizer_state.find(engine, self.delta, ranks.rank, ranks.size)
        self.window: Window | None = None
        self.curvature: Curvature | None = None
        self.measures = False  # whether the coming step adds to it
        self.keeps_curvature = False  # events weigh by it, and every window adds to it
        self.rates: torch.Tensor | None = None  # fp32 (in,): on the learning rate, by input
        self.n_events = 0
        # Moments of fresh slots beyond what their 8-bit block holds, so far, of the slots optimized here.
        self.cut_moments = torch.zeros((), dtype=torch.int64, device=engine.device)
        self.fresh_slots: torch.Tensor | None = None  # placed by the last event, not stepped yet
        self.fresh_rates: torch.Tensor | None = None  # theirs, if there are any
        self.not_finite = torch.zeros((), dtype=torch.bool, device=engine.device)  # by backward
        n = max(1, self.target.experts)  # of fused experts one at a time
        shape = (self.target.shape[0] // n, self.target.shape[1])
        self.problem = Problem.of(shape, self.target.n_slots // n, self.weight.dtype)
        self.kernel_costs = KernelCosts()

    def _first_slots(self) -> SlotTable:
        position = shards.gather_whole(self.position, self.ranks).long().to(self.live_bits.device)
        order = position.argsort()
        table = SlotTable(
            position[order],
            order,
            torch.zeros(position.numel(), dtype=self.weight.dtype, device=position.device),
            torch.zeros_like(position, dtype=torch.bool),
        )
        table = table.take(self._known(table.position).nonzero().squeeze(1))
        # A base beyond the held range is never written by this rank; events read it for scoring.
        lo, owned = shards.owned(self.weight, self.multiple, self.ranks)
        for begin, values in [(lo, owned), shards.held(self.weight, self.ranks)]:
            rows = table.between(begin, begin + values.numel())
            at = (table.position[rows] - begin).to(values.device)
            table.base[rows] = values[at].to(table.base.device)
        return table

    @property
    def known_range(self) -> tuple[int, int]:
        """The positions [lo, hi) whose slots this rank keeps in its table (held, or owned)."""
        lo, hi = self.held_lo, self.held_hi
        if self.hi > self.lo:
            lo, hi = (min(lo, self.lo), max(hi, self.hi)) if hi > lo else (self.lo, self.hi)
        return lo, hi

    def _known(self, position: torch.Tensor) -> torch.Tensor:
        lo, hi = self.known_range
        return (position >= lo) & (position < hi)

    # What SeftLinear and SeftExperts ask for.
    def open_sinks(self) -> list[Window | Curvature]:
        curvature = self.curvature if self.measures else None
        return [sink for sink in (self.window, curvature) if sink is not None]

    def step_sums(self) -> list[torch.Tensor]:
        """What the window and the curvature have of the step that is not closed yet."""
        return [x for sink in self.open_sinks() for x in sink.unfinished()]

    def kernel(self, tokens: int) -> str:
        return self.kernel_costs.fastest(self.problem, tokens, self.live_bits.device)

    def begin_window(self) -> None:
        if self.window is None:
            device = self.live_bits.device
            self.window = Window(self.target.numel, self.multiple, self.ranks, device)

    def begin_curvature(self) -> None:
        if self.curvature is None:
            self.curvature = Curvature(
                *self.target.shape, self.live_bits.device, self.target.experts
            )

    def end_curvature(self) -> None:
        """What it was measured for is done."""
        if not self.keeps_curvature:
            self.curvature = None

    def rates_at(self, position: torch.Tensor) -> torch.Tensor | None:
        """fp32 (k,): the factors on the learning rate of slots at `position` (k,); None: all are 1."""
        return None if self.rates is None else self.rates[position % self.target.shape[1]]

    def largest_fresh_update(self, delta: torch.Tensor) -> float | None:
        """Of the slots that the last event placed, which started at δ = 0, after their first step, over the
        factor on the learning rate. delta: fp32 (K,), all slots. None: there are none."""
        slots, rates = self.fresh_slots, self.fresh_rates
        self.fresh_slots = self.fresh_rates = None
        if slots is None or not slots.numel():
            return None
        update = delta[slots].abs()
        return float((update if rates is None else update / rates).max())

    def write_through(self, delta: torch.Tensor) -> None:
        """Put base + δ into the weight at this rank's slots. delta: fp32 (K,), all slots."""
        lo, values = shards.held(self.weight, self.ranks)
        rows = self.slots.between(lo, lo + values.numel())
        new = self.slots.base[rows].float() + delta[self.slots.slot[rows]]
        values[(self.slots.position[rows] - lo).to(values.device)] = new.to(values)

    def touch(self, position: torch.Tensor) -> None:
        """Note that the weight may change at `position` (k,), distinct; others' positions are skipped."""
        mine = position[(position >= self.lo) & (position < self.hi)]
        mask.put(self.touched_bits, mine - self.lo, True)

    def live(self) -> torch.Tensor:
        """Bool (hi - lo,): the live mask of the owned positions."""
        return mask.unpack(self.live_bits, self.hi - self.lo)

    def changed(self) -> int:
        """Owned positions whose live bit differs from the start. A host-device sync."""
        return mask.count(self.live_bits ^ self.start_bits)

    def count_by_part(self, bits: torch.Tensor) -> torch.Tensor:
        """int64 (parts,): how many of `bits`, packed, over the owned positions, are set in each part."""
        if not self.target.experts:
            return torch.tensor([mask.count(bits)], device=bits.device)
        flags, lo = mask.unpack(bits, self.hi - self.lo), self.lo
        ranges = self.target.part_ranges(lo, self.hi)
        return torch.stack([flags[a - lo : b - lo].count_nonzero() for a, b in ranges])

    def views(self, delta: torch.Tensor, seed: int) -> list[Shard]:
        """This rank's view of each part for an event. delta: fp32 (K,). A collective for N:M.

        Slots that take shorter steps stay smaller: their deltas are compared in units of their own steps.
        """
        assert self.window is not None and self.window.steps > 0
        lo, weight = shards.owned(self.weight, self.multiple, self.ranks)
        weight, live = weight.to(self.live_bits.device), self.live()
        ranges = self.target.part_ranges(lo, lo + weight.numel())
        borders = torch.tensor([lo, *(end for _, end in ranges)], device=self.slots.position.device)
        rows_of = torch.searchsorted(self.slots.position, borders).tolist()
        moved, rates = delta[self.slots.slot], self.rates_at(self.slots.position)
        if rates is not None:
            moved /= rates
        factors = self.factors() if self.keeps_curvature else [None] * len(ranges)
        views = []
        for p, ((begin, end), n_slots) in enumerate(
            zip(ranges, self.target.slots_by_part, strict=True)
        ):
            rows, here = slice(rows_of[p], rows_of[p + 1]), slice(begin - lo, end - lo)
            view = Shard(
                name=self.target.name,
                lo=begin,
                weight=weight[here],
                live=live[here],
                G=self.window.G[here],
                Q=self.window.Q[here],
                position=self.slots.position[rows],
                slot=self.slots.slot[rows],
                delta=moved[rows],
                base=self.slots.base[rows],
                born_dead=self.slots.born_dead[rows],
                n_slots=n_slots,
                seed=seed,
                pattern=self.target.pattern,
                factors=factors[p],
            )
            views.append(view)
        return views

    def apply(self, change: Change) -> None:
        """Carry out a planned change on this rank: mask, weight, slots, optimizer. No collective."""
        assert self.window is not None
        if change.left_out(self.target.n_parts):
            self.window = None
            return
        self._update_mask(change)
        self.touch(change.fresh)
        self.touch(change.pruned)
        leaving = torch.isin(self.slots.position, change.released)
        gone = self.slots.take(leaving.nonzero().squeeze(1))
        fold = change.folded[torch.searchsorted(change.released, gone.position)]
        shards.write(self.weight, gone.position[~fold], gone.base[~fold], self.ranks)
        shards.write(self.weight, change.pruned, torch.zeros_like(change.pruned), self.ranks)
        self._replace_slots(change, ~leaving)
        self._reset_master(change, self.window.steps)
        self._move_positions(change)
        self.n_events += 1
        self.fresh_slots = change.released_slot
        self.fresh_rates = self.rates_at(change.fresh)
        self.window = None

    def factors(self) -> list[Factors]:
        """The curvature's two vectors of each part, as means over the steps that were measured."""
        assert self.curvature is not None
        output = self.curvature.output.view(self.target.n_parts, -1) / self.curvature.steps
        input = self.curvature.input.view(max(1, self.target.experts), -1) / self.curvature.steps
        matrices = len(output) // len(input)  # gate and up of an expert read the same
        return [
            Factors(p * self.target.part_numel, output[p], input[p // matrices])
            for p in range(self.target.n_parts)
        ]

    def stakes(self, dense: DenseModel) -> list[Stakes]:
        """This rank's view of each part for an exchange. A weight comes back as it was in `dense`.

        Raises:
            ValueError: a value of this rank's is not finite, in the dense model most likely.
        """
        assert self.curvature is not None and self.multiple == 1
        lo, weight = shards.owned(self.weight, self.multiple, self.ranks)
        device, live = self.live_bits.device, self.live()
        before = dense.read(self.target.name, lo, lo + weight.numel()).to(weight.dtype)
        value = torch.where(live, weight.to(device), before.to(device))
        if not bool(value.isfinite().all()):
            raise ValueError(
                f"{self.target.name}: a weight of the dense model {dense.folder} or of the run itself is not "
                "finite; give a dense model whose weights are"
            )
        held_at = self.slots.position[self.slots.between(self.lo, self.hi)]
        found = []
        for factors, (begin, end) in zip(
            self.factors(), self.target.part_ranges(lo, lo + weight.numel()), strict=True
        ):
            score = factors.worth(value[begin - lo : end - lo], max(begin, factors.origin))
            held = held_at[(held_at >= begin) & (held_at < end)] - begin
            found.append(Stakes(score, mask.cut(self.live_bits, begin - lo, end - lo), held))
        return found

    def exchange(self, changes: list[Exchange], dense: DenseModel) -> None:
        """Carry out a planned exchange: mask and weight. A collective where ranks hold whole weights.

        changes: of each part, in terms of this rank's view of it.
        """
        starts = [begin - self.lo for begin, _ in self.target.part_ranges(self.lo, self.hi)]
        back, gone = (
            torch.cat([getattr(c, kind) + s for c, s in zip(changes, starts, strict=True)])
            for kind in ("revived", "pruned")
        )
        mask.put(self.live_bits, back, True)
        mask.put(self.live_bits, gone, False)
        revived, pruned = back + self.lo, gone + self.lo
        self.touch(revived)
        self.touch(pruned)
        if not shards.is_partitioned(self.weight):
            revived, pruned = gather_lists([revived, pruned], self.ranks)
        before = dense.read(self.target.name, self.held_lo, self.held_hi)
        shards.write(self.weight, revived, before[(revived - self.held_lo).cpu()], self.ranks)
        shards.write(self.weight, pruned, torch.zeros_like(pruned), self.ranks)

    def _update_mask(self, change: Change) -> None:
        for position, live in [
            (change.fresh[change.revived], True),
            (change.released[change.died], False),
            (change.pruned, False),
        ]:
            mine = position[(position >= self.lo) & (position < self.hi)]
            mask.put(self.live_bits, mine - self.lo, live)

    def _replace_slots(self, change: Change, stays: torch.Tensor) -> None:
        """Slot `released_slot[i]` now sits at `fresh[i]`, with the current weight as its base."""
        known = self._known(change.fresh)
        old = self.slots.take(stays.nonzero().squeeze(1))
        position = torch.cat([old.position, change.fresh[known]])
        table = SlotTable(
            position,
            torch.cat([old.slot, change.released_slot[known]]),
            torch.cat([old.base, change.fresh_base[known].to(old.base.dtype)]),
            torch.cat([old.born_dead, change.revived[known]]),
        )
        self.slots = table.take(position.argsort())

    def _reset_master(self, change: Change, window_steps: int) -> None:
        """δ = 0 and state from the window, for the fresh slots that this rank optimizes."""
        part = self.slot_shard
        mine = (change.released_slot >= part.lo) & (change.released_slot < part.hi)
        device = part.master.device
        index = (change.released_slot[mine] - part.lo).to(device)
        if index.numel():
            G, Q = (x[mine].to(device) for x in (change.fresh_G, change.fresh_Q))
            self.cut_moments += part.repair(index, G, Q, window_steps).to(self.cut_moments.device)

    def _move_positions(self, change: Change) -> None:
        lo, values = shards.held(self.position, self.ranks)
        mine = (change.released_slot >= lo) & (change.released_slot < lo + values.numel())
        at = (change.released_slot[mine] - lo).to(values.device)
        values[at] = change.fresh[mine].to(values)


def never_moved(delta: torch.Tensor, slots: list[int], touched: list[int]) -> list[bool]:
    """Of each part of a weight, whether all its slots are where and what they were at the start.

    Args:
        delta: fp32 (K,), by part.
        slots: how many of them each part has.
        touched: how many positions of each part may have changed; at the start they are those of its slots.
    """
    moved = [bool(d.any()) for d in delta.split(slots)]
    return [n > 0 and n == t and not m for n, t, m in zip(slots, touched, moved, strict=True)]


def finish_curvature(states: list[WeightState], applied: bool, ranks: Ranks) -> None:
    """Close the step of the weights that are measured: one sum over the ranks, of two vectors a weight."""
    measured = [s.curvature for s in states if s.curvature is not None and s.measures]
    if not measured:
        return
    if not applied:
        for curvature in measured:
            curvature.discard_step()
        return
    sums = ranks.sum_(torch.cat([c.step_sums for c in measured]))
    parts = sums.split([c.step_sums.numel() for c in measured])
    for curvature, part in zip(measured, parts, strict=True):
        curvature.step_sums.copy_(part)
        curvature.finish_step(ranks.size)
