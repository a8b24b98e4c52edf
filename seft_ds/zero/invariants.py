"""What has to be true of all targets between two steps, looked up in the shards themselves."""

from __future__ import annotations

import itertools

import torch

from seft_ds.config import SeftConfig
from seft_ds.distributed.collectives import Ranks
from seft_ds.distributed.selection import gather_lists
from seft_ds.zero import shards
from seft_ds.zero.weight_state import WeightState


def check_invariants(states: list[WeightState], config: SeftConfig, ranks: Ranks) -> None:
    """Dead positions hold +0.0, slots sit on distinct live ones, live counts are what they have to be.

    Reads the shards, not the placeholders that ZeRO-3 leaves in the modules. A few small collectives, and one
    gather of all slot positions.

    Raises:
        RuntimeError: naming the weight.
    """
    problems = []
    positions = _gather_positions(states, ranks)
    counts: list[torch.Tensor] = []
    slot_counts: list[int] = []
    for state, position in zip(states, positions, strict=True):
        name = state.target.name
        _, values = shards.owned(state.weight, state.multiple, ranks)
        live = state.live()
        dead = values[~live.to(values.device)]
        if bool((dead != 0).any()) or bool(torch.signbit(dead).any()):
            problems.append(f"{name}: a dead position is not +0.0")
        at = state.slots.position[state.slots.between(state.lo, state.hi)]
        if not bool(live[at - state.lo].all()):
            problems.append(f"{name}: a slot sits on a dead position")
        if at.unique().numel() != at.numel():
            problems.append(f"{name}: two slots share a position")
        # What the forward pass takes gradients for has to be what the deltas are written to.
        if not torch.equal(position[state.slots.slot], state.slots.position):
            problems.append(f"{name}: slot positions and slot table differ")
        counts.append(state.count_by_part(state.live_bits))
        slot_counts += _slots_by_part(state, at)
    live = ranks.sum_(torch.cat(counts)).tolist()
    slots = ranks.sum_(torch.tensor(slot_counts, device=states[0].live_bits.device)).tolist()
    # By part: every matrix of every expert keeps its own counts.
    live_counts, wanted = live, [n for s in states for n in s.target.live_by_part]
    per_weight = config.scope == "layer"
    off = (per_weight and live_counts != wanted) or sum(live_counts) != sum(wanted)
    if off and config.adapt:
        problems.append(f"live counts {live_counts}, wanted {wanted}")
    wanted_slots = [n for s in states for n in s.target.slots_by_part]
    if slots != wanted_slots:
        problems.append(f"slots {slots}, wanted {wanted_slots}")
    everyone = [p for per_rank in ranks.gather_object(problems) for p in per_rank]
    if everyone:
        raise RuntimeError("sparsity invariant broken: " + "; ".join(everyone))


def _slots_by_part(state: WeightState, position: torch.Tensor) -> list[int]:
    """How many of this rank's slots, at ascending `position`, lie in each part and are numbered so."""
    ends = list(itertools.accumulate(state.target.slots_by_part))
    table = state.slots
    slot = table.slot[table.between(state.lo, state.hi)]
    counts = []
    ranges = state.target.part_ranges(state.lo, state.hi)
    for (begin, end), n, last in zip(ranges, state.target.slots_by_part, ends, strict=True):
        inside = (position >= begin) & (position < end)
        counts.append(int((inside & (slot >= last - n) & (slot < last)).sum()))
    return counts


def _gather_positions(states: list[WeightState], ranks: Ranks) -> list[torch.Tensor]:
    """`seft_position` of every target, int64 (K,), on every rank. One gather."""
    device = states[0].live_bits.device
    held = [shards.held(s.position, ranks)[1].to(device).long() for s in states]
    if not shards.is_partitioned(states[0].position):
        return held
    return gather_lists(held, ranks)
