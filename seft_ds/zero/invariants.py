"""What has to be true of all targets between two steps, looked up in the shards themselves."""

from __future__ import annotations

import torch

from seft_ds.config import SeftConfig
from seft_ds.distributed.collectives import Ranks
from seft_ds.distributed.selection import gather_lists
from seft_ds.sparse import mask
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
    counts = []
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
        counts += [mask.count(state.live_bits), at.numel()]
    device = states[0].live_bits.device
    totals = ranks.sum_(torch.tensor(counts, dtype=torch.int64, device=device)).tolist()
    live_counts, slots = totals[0::2], totals[1::2]
    wanted = [s.target.target_live for s in states]
    per_weight = config.scope == "layer"
    off = (per_weight and live_counts != wanted) or sum(live_counts) != sum(wanted)
    if off and config.adapt:
        problems.append(f"live counts {live_counts}, wanted {wanted}")
    if slots != [s.target.n_slots for s in states]:
        problems.append(f"slots {slots}, wanted {[s.target.n_slots for s in states]}")
    everyone = [p for per_rank in ranks.gather_object(problems) for p in per_rank]
    if everyone:
        raise RuntimeError("sparsity invariant broken: " + "; ".join(everyone))


def _gather_positions(states: list[WeightState], ranks: Ranks) -> list[torch.Tensor]:
    """`seft_position` of every target, int64 (K,), on every rank. One gather."""
    device = states[0].live_bits.device
    held = [shards.held(s.position, ranks)[1].to(device).long() for s in states]
    if not shards.is_partitioned(states[0].position):
        return held
    return gather_lists(held, ranks)
