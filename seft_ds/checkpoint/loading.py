"""A SEFT run's state out of a checkpoint's files (checkpoint/layout.py says what they hold).

Each rank reads the ranges that it needs now, under whatever number of ranks and ZeRO stage. Everything is
looked at before anything is changed.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import torch

from seft_ds.checkpoint.contents import check_contents_together
from seft_ds.checkpoint.engine_file import check_engine_state, read_engine_state, restore_engine
from seft_ds.checkpoint.layout import CheckpointMeta, TargetMeta
from seft_ds.checkpoint.model import model_tensors
from seft_ds.checkpoint.pieces import Pieces
from seft_ds.checkpoint.saving import flat_layout, others_of, target_metas
from seft_ds.distributed.agreement import all_or_none
from seft_ds.distributed.window import Window
from seft_ds.optim.families import FAMILIES, Blocks, family_of
from seft_ds.zero import optimizer_state, shards
from seft_ds.zero.engine import SparseEvolution
from seft_ds.zero.weight_state import WeightState


def load_state(seft: SparseEvolution, directory: Path, meta: CheckpointMeta) -> dict[str, Any]:
    """Put the run into the state that was saved; returns the caller's client_state.

    Call `check_same_run` first. A collective.

    Raises:
        ValueError: on every rank: files that can't be right. Then nothing has been changed.
    """
    pieces = all_or_none(seft.ranks, lambda: Pieces(directory, meta))
    check_contents_together(pieces, seft.ranks)
    engine_state = all_or_none(seft.ranks, lambda: _checked_engine_state(seft, pieces))
    for i, state in enumerate(seft.states):
        _restore_weight(state, pieces, i, meta)
        _restore_slots(state, pieces, i)
        _restore_masks(state, pieces, i)
        _restore_window(state, pieces, i, meta.window_steps[i])
        _restore_curvature(state, pieces, i, meta.curvature_steps[i])
        state.rates = pieces.rates(i).to(state.live_bits.device) if meta.rates else None
        if state.fresh_slots is not None:
            positions = pieces.slot_positions(i).to(state.fresh_slots.device)
            state.fresh_rates = state.rates_at(positions[state.fresh_slots])
        _restore_optimizer(state, pieces, i, meta)
        state.n_events = meta.target_events[i]
    _restore_moments(seft, pieces, meta)
    _restore_buffers(seft, pieces, meta)
    restore_engine(seft.engine, engine_state)
    seft.step = meta.step
    seft.resumed_total_steps = meta.total_steps
    seft.n_exchanges = meta.n_exchanges
    seft.n_events, seft.event_seconds, seft.event_bytes = (
        meta.n_events,
        meta.event_seconds,
        meta.event_bytes,
    )
    seft.skipped_steps, seft.skipped_in_a_row = meta.skipped_steps, meta.skipped_in_a_row
    seft.guard.reset()
    if seft.schedule is not None:
        seft.begin(seft.schedule.total_steps)
    return engine_state["client_state"]


def _checked_engine_state(seft: SparseEvolution, pieces: Pieces) -> dict[str, Any]:
    """engine.pt, once all that is compared with this engine itself is found to fit."""
    engine_state = read_engine_state(pieces.directory)
    check_engine_state(seft.engine, engine_state, pieces.directory)
    saved = {o.name: (o.shape, o.dtype) for o in pieces.meta.others if o.buffer}
    mine = {o.name: (o.shape, o.dtype) for o, _ in others_of(seft) if o.buffer}
    for name in sorted(saved.keys() | mine.keys()):
        if saved.get(name) != mine.get(name):
            raise ValueError(
                f"{pieces.directory}: the buffer {name} is {saved.get(name)} there and {mine.get(name)} in "
                "this model"
            )
    if _blocks_as_before(seft, pieces.meta):
        for k, flat in enumerate(optimizer_state.flats([s.slot_shard for s in seft.states])):
            for name in pieces.meta.moments:  # ValueError if they can't be right
                pieces.block_scales(seft.ranks.rank, k, name, flat.numel)
    for i, state in enumerate(seft.states):
        start = pieces.bits(i, "start_bits", state.lo, state.hi)
        if pieces.meta.base == "reference" and not torch.equal(start, state.start_bits.cpu()):
            raise ValueError(
                f"{pieces.directory}: {state.target.name} did not start with this model's zeros"
            )
    return engine_state


def check_same_run(seft: SparseEvolution, meta: CheckpointMeta) -> None:
    """Is this checkpoint one of this run? No collective; the answer is the same on every rank.

    Raises:
        ValueError: another model, other settings, another dtype, or (for a checkpoint without the base
            weights) an engine that has already trained.
    """
    pairs = itertools.zip_longest(target_metas(seft), meta.targets)
    mine, saved = next(((a, b) for a, b in pairs if a != b), (None, None))
    if mine != saved:
        raise ValueError(
            "the checkpoint belongs to another model or another number of slots: its targets differ from "
            f"this run's ({_brief(saved)} there, {_brief(mine)} here); start from the same pruned model with "
            "the same density"
        )
    dtype = str(seft.states[0].weight.dtype).removeprefix("torch.")
    if dtype != meta.dtype:
        raise ValueError(
            f"the checkpoint was trained in {meta.dtype} and this run in {dtype}; give --dtype {meta.dtype}"
        )
    family = str(family_of(seft.states[0].slot_shard.optimizer))
    if meta.moments and meta.moments != sorted(FAMILIES[family]):
        raise ValueError(
            f"the checkpoint's optimizer kept {meta.moments} of each slot, this run's ({family}) keeps "
            f"{sorted(FAMILIES[family])}; resume with an optimizer of the same kind"
        )
    _check_settings(seft.config.model_dump(), meta.config)
    _check_base(seft, meta)


def _brief(target: TargetMeta | None) -> str:
    if target is None:
        return "no further one"
    return (
        f"{target.name} of {target.shape} with {target.target_live} live and {target.n_slots} slots"
    )


def _check_settings(mine: dict[str, Any], saved: dict[str, Any]) -> None:
    free = {"checkpoint_base", "max_skipped_steps", "total_steps"}  # `begin` checks the total
    mine = json.loads(json.dumps(mine))
    for settings in (mine, saved := dict(saved)):  # the folder may have moved
        settings["dense_model"] = settings.get("dense_model") is not None
    changed = sorted(k for k in (set(mine) | set(saved)) - free if mine.get(k) != saved.get(k))
    if changed:
        was, now = {k: saved.get(k) for k in changed}, {k: mine.get(k) for k in changed}
        raise ValueError(f'the "seft" settings changed since the checkpoint: was {was}, now {now}')


def _check_base(seft: SparseEvolution, meta: CheckpointMeta) -> None:
    """Is the model that this run loaded the one that the checkpoint's run started from?

    A copy holds the targets whole, so only the weights that a load doesn't touch have to be the same.
    """
    targets = {s.target.weight_name for s in seft.states}
    names = set(meta.fingerprints) | set(seft.base_fingerprints)
    if meta.base == "copy":
        names -= targets
    elif seft.step:
        raise ValueError(
            "this engine has already trained, and the checkpoint holds only what differs from its base "
            "model; make a new engine from the pruned model and load the checkpoint into that"
        )
    for name in sorted(names):
        if meta.fingerprints.get(name) != seft.base_fingerprints.get(name):
            raise ValueError(
                f"the model differs from the one that the checkpoint's run started from ({name}); start "
                f"from {meta.source_dir!r} as it was then"
            )


def _restore_weight(state: WeightState, pieces: Pieces, i: int, meta: CheckpointMeta) -> None:
    """The effective weights that this rank holds, and which of its own may differ from the base model's."""
    lo, held = shards.held(state.weight, state.ranks)
    if meta.base == "copy":
        _, before = shards.owned(state.weight, state.multiple, state.ranks)
        before = before.clone()
        held.copy_(pieces.weight(i, lo, lo + held.numel()))
        _, after = shards.owned(state.weight, state.multiple, state.ranks)
        changed = (before != after).nonzero().squeeze(1).to(state.live_bits.device)
        state.touch(changed + state.lo)
        return
    position, value = pieces.touched(i, lo, lo + held.numel())
    held[position.to(held.device) - lo] = value.to(held.device)
    saved = pieces.bits(i, "touched_bits", state.lo, state.hi)
    state.touched_bits |= saved.to(state.touched_bits.device)


def _restore_slots(state: WeightState, pieces: Pieces, i: int) -> None:
    device = state.live_bits.device
    lo, hi = state.known_range
    table = pieces.slots(i, lo, hi)
    state.slots = type(table)(
        *(x.to(device) for x in (table.position, table.slot, table.base, table.born_dead))
    )
    state.touch(state.slots.position)
    begin, held = shards.held(state.position, state.ranks)
    positions = pieces.slot_positions(i)
    held.copy_(positions[begin : begin + held.numel()])
    fresh = pieces.fresh_slots(i)
    state.fresh_slots = None if fresh is None else fresh.to(device)


def _restore_masks(state: WeightState, pieces: Pieces, i: int) -> None:
    for name in ("live_bits", "start_bits"):
        getattr(state, name).copy_(pieces.bits(i, name, state.lo, state.hi))


def _restore_window(state: WeightState, pieces: Pieces, i: int, steps: int | None) -> None:
    state.window = None
    if steps is None:
        return
    device = state.live_bits.device
    state.window = Window(state.target.numel, state.multiple, state.ranks, device)
    state.window.G.copy_(pieces.window(i, "G", state.lo, state.hi))
    state.window.Q.copy_(pieces.window(i, "Q", state.lo, state.hi))
    state.window.steps = steps


def _restore_curvature(state: WeightState, pieces: Pieces, i: int, steps: int | None) -> None:
    state.curvature = None
    if steps is None:
        return
    state.begin_curvature()
    assert state.curvature is not None
    output, input = pieces.curvature(i)
    state.curvature.output.copy_(output)
    state.curvature.input.copy_(input)
    state.curvature.steps = steps


def _restore_optimizer(state: WeightState, pieces: Pieces, i: int, meta: CheckpointMeta) -> None:
    part = state.slot_shard
    if part.hi > part.lo:
        part.master.copy_(pieces.by_slot(i, "delta", part.lo, part.hi))
    if meta.optimizer_steps is None:
        part.forget()
    else:
        part.prepare(meta.optimizer_steps)


def _blocks_as_before(seft: SparseEvolution, meta: CheckpointMeta) -> bool:
    """Whether the slots share blocks of 8-bit state on this rank as they did when it was saved."""
    same_ranks = meta.ranks == seft.ranks.size
    return same_ranks and meta.flat_layouts[seft.ranks.rank] == flat_layout(seft)


def _restore_moments(seft: SparseEvolution, pieces: Pieces, meta: CheckpointMeta) -> None:
    """The optimizer's moments, flat tensor by flat tensor: 8-bit blocks hold slots of several targets.

    Where the blocks are cut as they were, their scales are put back too, and with them every code.
    Elsewhere the blocks are quantised anew.
    """
    rank, as_before = seft.ranks.rank, _blocks_as_before(seft, meta)
    for k, flat in enumerate(optimizer_state.flats([s.slot_shard for s in seft.states])):
        for name, moment in flat.moments().items():
            values = torch.zeros(flat.numel)
            for i, part in flat.parts:
                end = part.offset + part.hi - part.lo
                values[part.offset : end] = pieces.by_slot(i, f"moment.{name}", part.lo, part.hi)
            as_kept = as_before and isinstance(moment, Blocks)
            moment.assign(
                values, pieces.block_scales(rank, k, name, flat.numel) if as_kept else None
            )


def _restore_buffers(seft: SparseEvolution, pieces: Pieces, meta: CheckpointMeta) -> None:
    buffers = dict(model_tensors(seft.engine.module))
    for k, other in enumerate(meta.others):
        if other.buffer:
            mine = buffers[other.name]
            mine.copy_(pieces.other(k, 0, other.numel).view(mine.shape))
