"""Where a frozen weight lives under ZeRO 0-3, and how to read and write this rank's part of it.

DeepSpeed's private names for parameters are used here and nowhere else (read in DeepSpeed 0.19.8):
`ds_tensor` this rank's flat part, its tail padded with uninitialised memory; `ds_numel`, `ds_shape` of the
whole; `ds_persist` kept whole on every rank between steps; the coordinator of `parameter_offload` gathers
ahead in the order of the last pass. Under ZeRO 0-2 a frozen weight is a full copy on every rank, and all
ranks apply the same edits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from seft_ds.distributed.collectives import Ranks
from seft_ds.sparse.shard import shard_range


def is_partitioned(param: nn.Parameter) -> bool:
    """Whether ZeRO-3 has cut this parameter up."""
    return getattr(param, "ds_tensor", None) is not None


def shape_of(param: nn.Parameter) -> tuple[int, ...]:
    """The whole parameter's shape, also where only a placeholder is left."""
    return tuple(param.ds_shape) if is_partitioned(param) else tuple(param.shape)


def held(param: nn.Parameter, ranks: Ranks) -> tuple[int, torch.Tensor]:
    """(lo, values): this rank's values are the flat positions [lo, lo + len(values)). A view."""
    if not is_partitioned(param):
        return 0, param.data.view(-1)
    lo, hi = shard_range(param.ds_numel, ranks.rank, ranks.size)
    return lo, param.ds_tensor.data.view(-1)[: hi - lo]  # clip: the tail is uninitialised


def owned(param: nn.Parameter, multiple: int, ranks: Ranks) -> tuple[int, torch.Tensor]:
    """(lo, values) of the positions that this rank decides about (`shard_range` with `multiple`).

    A collective when an N:M pattern moves the borders of partitioned weights: each rank then needs the
    first few values of the following ranks.
    """
    numel = 1
    for d in shape_of(param):
        numel *= d
    lo, hi = shard_range(numel, ranks.rank, ranks.size, multiple)
    start, values = held(param, ranks)
    if not is_partitioned(param) or multiple == 1:
        return lo, values[lo - start : hi - start]
    whole = torch.empty(hi - lo, dtype=values.dtype, device=values.device)
    heads = ranks.gather(values[: multiple - 1])
    pieces = [(shard_range(numel, r, ranks.size)[0], head) for r, head in enumerate(heads)]
    for begin, piece in [*pieces, (start, values)]:
        a, b = max(lo, begin), min(hi, begin + piece.numel())
        if a < b:
            whole[a - lo : b - lo] = piece[a - begin : b - begin]
    return lo, whole


def write(param: nn.Parameter, position: torch.Tensor, value: torch.Tensor, ranks: Ranks) -> None:
    """Write `value` (k,) at flat `position` (k,), int64, where this rank holds them; skip the rest."""
    lo, values = held(param, ranks)
    mine = (position >= lo) & (position < lo + values.numel())
    values[(position[mine] - lo).to(values.device)] = value[mine].to(values)


def gather_whole(param: nn.Parameter, ranks: Ranks) -> torch.Tensor:
    """The whole parameter in its shape, on the CPU, on every rank. A collective under ZeRO-3."""
    _, values = held(param, ranks)
    if not is_partitioned(param):
        return param.data.cpu()
    flat = torch.cat(ranks.gather(values))
    return flat.view(shape_of(param)).cpu()


def never_persist(engine: Any, params: list[nn.Parameter]) -> None:
    """Have ZeRO-3 gather these parameters anew in every forward pass, however small they are.

    A parameter under `stage3_param_persistence_threshold` stays whole on every rank, and what we write into
    its shard would reach the forward pass never.
    """
    optimizer = engine.optimizer
    ours = {id(p) for p in params if is_partitioned(p) and p.ds_persist}
    if not ours:
        return
    lists = [optimizer.persistent_parameters, optimizer.parameter_offload.persistent_parameters]
    for persistent in lists:
        persistent[:] = [p for p in persistent if id(p) not in ours]
    for p in params:
        if id(p) in ours:
            p.ds_persist = False
            p.partition()


def forget_order(engine: Any) -> None:
    """Have ZeRO-3 learn anew in which order the layers come.

    It gathers ahead what came next in the last pass. After a pass of another kind that may be a parameter
    that nobody takes from it, and the run ends with "Cannot partition a param in flight".
    """
    offload = getattr(engine.optimizer, "parameter_offload", None)
    if offload is None:
        return
    coordinator = offload.get_param_coordinator()
    if not coordinator.is_invalid_trace():
        coordinator._invalidate_trace()
