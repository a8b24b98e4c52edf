"""A SEFT run's state into a checkpoint's files (checkpoint/layout.py says what they hold).

Each rank writes its own range of everything; nothing is gathered but small lists. DeepSpeed's own
checkpoint files are not used: they can't change the number of ranks, lose frozen weights when they do,
hold every frozen weight a second time, and need pickle (read in DeepSpeed 0.19.8). What DeepSpeed would
have kept there beside tensors (counters, scheduler, hyperparameters, the caller's state) is in engine.pt.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path

import torch

from seft_ds.checkpoint.engine_file import engine_bytes
from seft_ds.checkpoint.export import versions
from seft_ds.checkpoint.layout import (
    ENGINE_NAME,
    META_NAME,
    CheckpointMeta,
    OtherMeta,
    TargetMeta,
    rank_file,
)
from seft_ds.checkpoint.manifest import FileEntry, write_bytes, write_tensors
from seft_ds.checkpoint.model import model_tensors
from seft_ds.checkpoint.pieces import index_dtype
from seft_ds.optim.families import Blocks
from seft_ds.sparse import mask
from seft_ds.sparse.shard import shard_range
from seft_ds.zero import optimizer_state, shards
from seft_ds.zero.engine import SparseEvolution
from seft_ds.zero.weight_state import WeightState


def save_state(
    seft: SparseEvolution, directory: Path, source_dir: str, client_state: dict, base: str
) -> dict[str, FileEntry]:
    """Write this rank's files into an existing directory; returns what was written. A collective.

    base: "copy" (all frozen weights) or "reference" (only what may differ from the base model).

    Raises:
        ValueError: client_state holds more than plain data and tensors.
    """
    rank, size = seft.ranks.rank, seft.ranks.size
    moments = _moment_names(seft)
    others = others_of(seft)
    slot_ranges = seft.ranks.gather_object([_saved_slots(seft, s) for s in seft.states])
    tensors: dict[str, torch.Tensor] = {}
    for i, state in enumerate(seft.states):
        found = _tensors_of(state, base)
        found |= _slot_values(state, slot_ranges[rank][i], moments)
        if rank == 0 and state.fresh_slots is not None:
            found["fresh_slots"] = state.fresh_slots
        if rank == 0 and (curvature := state.curvature) is not None:  # the same on every rank
            found |= {"curvature.output": curvature.output, "curvature.input": curvature.input}
        if rank == 0 and state.rates is not None:  # likewise
            found["rates"] = state.rates
        tensors |= {f"{i}.{name}": tensor for name, tensor in found.items()}
    tensors |= _block_scales(seft)
    layouts = seft.ranks.gather_object(flat_layout(seft))
    for other, tensor in others:
        if other.buffer or base == "copy":
            tensors[f"other.{other.name}"] = _share(tensor, rank, size, seft)
    name = rank_file(rank, size)
    written = {name: write_tensors(directory / name, tensors)}
    if rank == 0:
        kept = [other for other, _ in others if other.buffer or base == "copy"]
        meta = _meta(seft, kept, slot_ranges, moments, source_dir, base)
        meta.flat_layouts = layouts
        text = json.dumps(meta.model_dump(), indent=1)
        written[META_NAME] = write_bytes(directory / META_NAME, text.encode())
        written[ENGINE_NAME] = write_bytes(
            directory / ENGINE_NAME, engine_bytes(seft.engine, client_state)
        )
    return written


def _moment_names(seft: SparseEvolution) -> list[str]:
    """Which moments the optimizer keeps, on any rank (one without slots has none). One gather."""
    names = [n for s in seft.states for n in s.slot_shard.moment_names()]
    return sorted({n for per_rank in seft.ranks.gather_object(set(names)) for n in per_rank})


def _saved_slots(seft: SparseEvolution, state: WeightState) -> tuple[int, int]:
    """The slots [lo, hi) whose master values this rank writes."""
    if optimizer_state.is_replicated(seft.engine):
        return shard_range(state.target.n_slots, seft.ranks.rank, seft.ranks.size)
    return state.slot_shard.lo, state.slot_shard.hi


def _slot_values(
    state: WeightState, saved: tuple[int, int], moments: list[str]
) -> dict[str, torch.Tensor]:
    """fp32 deltas and moments of the slots in `saved`, which lie in this rank's slot shard."""
    part = state.slot_shard
    cut = slice(saved[0] - part.lo, saved[1] - part.lo)
    values = {"delta": part.master[cut].float()}
    for name in moments:
        moment = part.moment(name)
        assert moment is not None or saved[0] == saved[1], f"{state.target.name} has no {name}"
        values[f"moment.{name}"] = torch.empty(0) if moment is None else moment[cut].float()
    return values


def _block_scales(seft: SparseEvolution) -> dict[str, torch.Tensor]:
    """The absmax of 8-bit moments, block by block of this rank's flat tensors."""
    return {
        f"flat.{k}.absmax.{name}": moment.absmax
        for k, flat in enumerate(optimizer_state.flats([s.slot_shard for s in seft.states]))
        for name, moment in flat.moments().items()
        if isinstance(moment, Blocks)
    }


def flat_layout(seft: SparseEvolution) -> str:
    """A digest of which slots share blocks on this rank."""
    found = [f.layout() for f in optimizer_state.flats([s.slot_shard for s in seft.states])]
    return hashlib.sha256(json.dumps(found).encode()).hexdigest()


def _tensors_of(state: WeightState, base: str) -> dict[str, torch.Tensor]:
    """Masks, slots, window and weights at the positions that this rank owns. A collective for N:M."""
    _, weight = shards.owned(state.weight, state.multiple, state.ranks)
    rows = state.slots.between(state.lo, state.hi)
    index = index_dtype(state.target.numel)
    tensors = {
        "live_bits": state.live_bits,
        "start_bits": state.start_bits,
        "slots.position": state.slots.position[rows].to(index),
        "slots.slot": state.slots.slot[rows].to(index),
        "slots.base": state.slots.base[rows],
        "slots.born_dead": state.slots.born_dead[rows],
    }
    if base == "copy":
        tensors["weight"] = weight
    else:
        touched = mask.unpack(state.touched_bits, state.hi - state.lo)
        tensors |= {
            "touched_bits": state.touched_bits,
            "touched_values": weight[touched.to(weight.device)],
        }
    if state.window is not None:
        tensors |= {"window.G": state.window.G, "window.Q": state.window.Q}
    return tensors


def others_of(seft: SparseEvolution) -> list[tuple[OtherMeta, torch.Tensor]]:
    """Every weight that is no target, and every buffer that a saved model holds."""
    ours = {s.target.weight_name for s in seft.states}
    return [
        (
            OtherMeta(
                name=name,
                shape=list(shards.shape_of(tensor)),  # type: ignore[arg-type]
                dtype=str(tensor.dtype).removeprefix("torch."),  # type: ignore[arg-type]
                buffer=not isinstance(tensor, torch.nn.Parameter),
            ),
            tensor,
        )
        for name, tensor in model_tensors(seft.engine.module)
        if name not in ours
    ]


def _share(tensor: torch.Tensor, rank: int, size: int, seft: SparseEvolution) -> torch.Tensor:
    """This rank's part of a tensor that may be whole or partitioned, flat."""
    if isinstance(tensor, torch.nn.Parameter):
        return shards.owned(tensor, 1, seft.ranks)[1]
    lo, hi = shard_range(tensor.numel(), rank, size)
    return tensor.detach().reshape(-1)[lo:hi]


def _meta(
    seft: SparseEvolution,
    others: list[OtherMeta],
    slot_ranges: list[list[tuple[int, int]]],
    moments: list[str],
    source_dir: str,
    base: str,
) -> CheckpointMeta:
    steps = [x for s in seft.states if (x := s.slot_shard.steps()) is not None]
    return CheckpointMeta(
        format="seft_ds-checkpoint-4",
        base=base,  # type: ignore[arg-type]
        step=seft.step,
        total_steps=seft.schedule.total_steps if seft.schedule else None,
        ranks=seft.ranks.size,
        zero_stage=seft.engine.zero_optimization_stage(),
        train_batch_size=seft.engine.train_batch_size(),
        dtype=str(seft.states[0].weight.dtype).removeprefix("torch."),  # type: ignore[arg-type]
        targets=target_metas(seft),
        others=others,
        fingerprints=seft.base_fingerprints,
        slot_ranges=[[list(r) for r in ranges] for ranges in slot_ranges],
        flat_layouts=[],
        moments=moments,
        # Rank 0 may hold no slot; then all steps were taken, so that the two counts agree.
        optimizer_steps=(
            (steps[0] if steps else float(seft.step - seft.skipped_steps)) if moments else None
        ),
        window_steps=[s.window.steps if s.window is not None else None for s in seft.states],
        rates=seft.states[0].rates is not None,
        curvature_steps=[
            s.curvature.steps if s.curvature is not None else None for s in seft.states
        ],
        target_events=[s.n_events for s in seft.states],
        source_dir=source_dir,
        config=seft.config.model_dump(),
        n_events=seft.n_events,
        n_exchanges=seft.n_exchanges,
        event_seconds=seft.event_seconds,
        event_bytes=seft.event_bytes,
        skipped_steps=seft.skipped_steps,
        skipped_in_a_row=seft.skipped_in_a_row,
        versions=versions(),
    )


def target_metas(seft: SparseEvolution) -> list[TargetMeta]:
    plain = json.loads(json.dumps([asdict(s.target) for s in seft.states]))
    return [TargetMeta.model_validate(t) for t in plain]
