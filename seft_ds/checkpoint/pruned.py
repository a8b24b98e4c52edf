"""A pruned model that is whole in memory, written as a sparse model directory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from seft_ds.checkpoint.export import TargetInfo, TensorInfo, write_sparse_model
from seft_ds.checkpoint.parts import stored_pieces
from seft_ds.naming import naming_of_model
from seft_ds.sparse import mask
from seft_ds.sparse.pattern import at_most, fill
from seft_ds.targets import parse_pattern


def save_pruned(
    model: Any,
    source_dir: str | Path,
    output_dir: str | Path,
    targets: dict[str, str | None],
    about: dict[str, Any],
    max_shard_bytes: int = 5 * 2**30,
) -> dict[str, Any]:
    """Write a pruned Hugging Face model that is whole in memory; returns the sparsity record.

    `targets`: tensor name -> "N:M" or None; what is not zero is live. In an N:M weight a group with
    fewer than N nonzero entries (a dead input column, say) has its first zeros declared live, and a
    group with more is a ValueError. Names are those in the files: of fused experts one a matrix. Tied
    copies are written once, under the name that ties them.
    """
    naming = naming_of_model(model)
    state = {
        n: t for name, x in _distinct_tensors(model) for n, t in stored_pieces(naming, name, x)
    }
    missing = sorted(set(targets) - set(state))
    if missing:
        raise ValueError(
            f"targets {missing[:3]} are no tensors of the model; use the names that its files have"
        )
    infos = {}
    for name, pattern in targets.items():
        live = nonzero_live(name, state[name], pattern)
        infos[name] = TargetInfo(
            pattern=pattern,
            target_live=int(torch.count_nonzero(live)),
            live_bits=mask.pack(live.view(-1)),
        )
    layout = [TensorInfo(name, tuple(t.shape), t.dtype) for name, t in state.items()]
    return write_sparse_model(
        output_dir,
        state.items(),
        layout=layout,
        targets=infos,
        source_dir=source_dir,
        about=about,
        max_shard_bytes=max_shard_bytes,
    )


def nonzero_live(name: str, weight: torch.Tensor, pattern: str | None) -> torch.Tensor:
    """Bool like `weight` (out, in): its nonzero entries, groups of an N:M pattern filled up to N.

    Raises ValueError naming the weight where a group has more than N, or the width is no multiple of M.
    """
    live = weight != 0
    if pattern is None:
        return live
    n, m = parse_pattern(pattern)
    if weight.dim() != 2 or weight.shape[1] % m:
        raise ValueError(f"{name} of shape {tuple(weight.shape)} can't have the pattern {pattern}")
    if not at_most(live, n, m):
        over = int((live.view(-1, m).sum(dim=1) > n).sum())
        raise ValueError(
            f"{name} is not {pattern}: {over} groups have more than {n} nonzero; prune it"
        )
    return fill(live, n, m)


def _distinct_tensors(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """state_dict entries, each storage once and without what is not meant to be saved."""
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    ignored = set(getattr(model, "_keys_to_ignore_on_save", None) or ())
    state = {n: t.detach() for n, t in model.state_dict().items() if n not in ignored}
    same: dict[tuple, list[str]] = {}
    for name, tensor in state.items():
        same.setdefault((tensor.data_ptr() or name, tensor.shape, tensor.stride()), []).append(name)
    # Of names that share a storage, the one that the others are tied to; else the first.
    kept = {min(names, key=lambda name: name in tied) for names in same.values()}
    return ((name, tensor) for name, tensor in state.items() if name in kept)
