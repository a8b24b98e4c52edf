"""Bytes that this rank holds in a running engine, by the parts that `seft_ds/memory.py` predicts."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from seft_ds.memory import HELD
from seft_ds.sparse.linear import is_slot_parameter
from seft_ds.zero import optimizer_state, shards


def held(engine: Any) -> dict[str, int]:
    """Bytes of each part of `seft_ds.memory.HELD`. Tensors that share storage count once.

    Gradients are counted where ZeRO keeps a buffer for them (stage 3); elsewhere they come and go.
    """
    states = engine.seft.states
    deltas = {id(s.delta) for s in states}
    positions = {id(s.position) for s in states}
    named = dict(engine.module.named_parameters())
    frozen = [p for n, p in named.items() if not is_slot_parameter(n)]
    buffer = getattr(engine.optimizer, "grad_partitions_flat_buffer", None)
    flats = optimizer_state.flats([s.slot_shard for s in states])
    masters = [f.parts[0][1].flat for f in flats]
    windows = [s.window for s in states if s.window is not None]
    kept = [s.curvature for s in states if s.curvature is not None and s.keeps_curvature]
    tensors: dict[str, Iterable[torch.Tensor | None]] = {
        "weights": _pieces(frozen),
        "deltas": _pieces([p for p in named.values() if id(p) in deltas]),
        "positions": _pieces([p for p in named.values() if id(p) in positions]),
        "gradients": [buffer],
        "masters": [m for m in masters if m is not None and id(m) not in deltas],
        "moments": [t for f in flats for m in f.moments().values() for t in m.tensors()],
        "masks": [b for s in states for b in (s.live_bits, s.start_bits, s.touched_bits)],
        "slot tables": [
            t
            for s in states
            for t in (s.slots.position, s.slots.slot, s.slots.base, s.slots.born_dead)
        ],
        "windows": [t for w in windows for t in w.tensors()],
        "curvature": [t for c in kept for t in c.tensors()],
    }
    assert set(tensors) == set(HELD)
    return {part: _bytes(tensors[part]) for part in HELD}


def _pieces(params: list[torch.nn.Parameter]) -> list[torch.Tensor]:
    """This rank's shard of each parameter, and the whole of those that ZeRO-3 keeps whole."""
    found = []
    for p in params:
        if shards.is_partitioned(p):
            found.append(p.ds_tensor.data)
        if p.data.numel():
            found.append(p.data)
    return found


def _bytes(tensors: Iterable[torch.Tensor | None]) -> int:
    """Views of one flat buffer count with their own lengths; the same view counts once."""
    distinct = {(t.data_ptr(), t.numel()): t.nbytes for t in tensors if t is not None}
    return sum(distinct.values())
