"""What an engine's run is, in one comparable piece, on any number of ranks and any ZeRO stage."""

from __future__ import annotations

from typing import Any

import torch


def whole_state(engine: Any) -> dict[str, torch.Tensor]:
    """Everything that training goes on from, by name, whole, on every rank. A collective."""
    from seft_ds.zero import optimizer_state, shards

    seft = engine.seft
    found: dict[str, torch.Tensor] = {}
    for i, state in enumerate(seft.states):
        name = state.target.name
        found[f"{name}.weight"] = shards.gather_whole(state.weight, seft.ranks)
        found[f"{name}.position"] = shards.gather_whole(state.position, seft.ranks)
        found[f"{name}.live"] = seft.live_bits(i)
        found[f"{name}.delta"] = seft.gather_deltas([i])[0]
        touched = torch.cat(seft.ranks.gather(unpacked(state, "touched_bits")))
        assert not bool((touched.bool() < live_change(seft, state)).any())
        for moment in ("mean", "square"):
            part = state.slot_shard
            mine = part.moment(moment)
            pieces = seft.ranks.gather_object((part.lo, part.hi, mine))
            whole = torch.full((state.target.n_slots,), float("nan"))
            for lo, hi, values in pieces:
                if values is not None:
                    whole[lo:hi] = values
            found[f"{name}.{moment}"] = whole
        if optimizer_state.is_replicated(engine):
            assert not found[f"{name}.mean"].isnan().any() or seft.step == 0
        base = torch.zeros(state.target.n_slots, dtype=state.weight.dtype)
        born = torch.zeros(state.target.n_slots, dtype=torch.bool)
        rows = state.slots.between(state.lo, state.hi)
        table = (state.slots.slot[rows], state.slots.base[rows], state.slots.born_dead[rows])
        for slot, b, dead in seft.ranks.gather_object(table):
            base[slot], born[slot] = b, dead
        found[f"{name}.base"], found[f"{name}.born_dead"] = base, born
        if state.window is not None:
            found[f"{name}.window_steps"] = torch.tensor(state.window.steps)
            found[f"{name}.G"] = torch.cat(seft.ranks.gather(state.window.G))
            found[f"{name}.Q"] = torch.cat(seft.ranks.gather(state.window.Q))
        if state.curvature is not None:
            found[f"{name}.curvature_steps"] = torch.tensor(state.curvature.steps)
            found[f"{name}.output"] = state.curvature.output.clone()
            found[f"{name}.input"] = state.curvature.input.clone()
        if state.fresh_slots is not None:
            found[f"{name}.fresh"] = state.fresh_slots
    steps = [s.slot_shard.steps() for s in seft.states if s.slot_shard.steps() is not None]
    every = {x for per_rank in seft.ranks.gather_object(steps) for x in per_rank}
    found["optimizer_steps"] = torch.tensor(sorted(every))
    found["counters"] = torch.tensor(
        [seft.step, engine.global_steps, engine.global_samples, engine.skipped_steps]
    )
    return found


def unpacked(state: Any, name: str) -> torch.Tensor:
    from seft_ds.sparse import mask

    return mask.unpack(getattr(state, name), state.hi - state.lo).to(torch.uint8)


def live_change(seft: Any, state: Any) -> torch.Tensor:
    from seft_ds.sparse import mask

    changed = mask.unpack(state.live_bits ^ state.start_bits, state.hi - state.lo)
    return torch.cat(seft.ranks.gather(changed.to(torch.uint8))).bool()


def differences(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> list[str]:
    """Names that are missing or not bit-identical (NaN equals NaN)."""
    names = sorted(set(a) ^ set(b))
    for name in sorted(set(a) & set(b)):
        x, y = a[name], b[name]
        same = x.shape == y.shape and x.dtype == y.dtype and torch.equal(x, y)
        if not same and x.shape == y.shape and x.is_floating_point():
            same = torch.equal(torch.nan_to_num(x, 7.25), torch.nan_to_num(y, 7.25))
        if not same:
            names.append(name)
    return names
