"""Gradients of single entries of a weight, and of whole row blocks.

For y = x Wᵀ the gradient is dL/dW = dyᵀ x. Training needs it only at the K slots (1 % of the entries):
g[j] = Σ_tokens dy[:, row_j] · x[:, col_j]. Two exact ways to get there:

* sampled dot products (`torch.sparse.sampled_addmm`): work K · tokens;
* a dense GEMM in row blocks, followed by a gather: work out · in · tokens, but at GEMM speed.

Which one is faster depends on dtype and device (`benchmarks/slot_grad.py`). On a CPU with bf16 matrix
units a dense bf16 GEMM beats fp32 sampling at model shapes; in fp32 sampling wins by 2 to 6 times.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

_BLOCK_ENTRIES = 1 << 24  # entries of a dense block: bounds the transient memory at 64 MiB of fp32
_SAMPLED_MAX_DENSITY = (
    0.05  # fp32 on CPU: above it the dense GEMM is faster (benchmarks/slot_grad.py)
)


def slot_gradient(dy: torch.Tensor, x: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    """dL/dW at `position`, fp32 (K,), in the order of `position`.

    dy: (tokens, out); x: (tokens, in); position: (K,) int, flat positions row·in + col, any order.
    """
    numel = dy.shape[1] * x.shape[1]
    few = position.numel() <= _SAMPLED_MAX_DENSITY * numel
    if dy.dtype == torch.float32 and dy.device.type == "cpu" and few:
        return sampled(dy, x, position)
    return dense_then_gather(dy, x, position)


def sampled(dy: torch.Tensor, x: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    """`slot_gradient` by sampled dot products: no (out, in) tensor is ever formed."""
    out_features, in_features = dy.shape[1], x.shape[1]
    ordered, order = position.long().sort()
    rows = ordered // in_features
    first = torch.searchsorted(rows, torch.arange(out_features + 1, device=rows.device))
    pattern = torch.sparse_csr_tensor(
        first,
        ordered % in_features,
        torch.zeros(ordered.numel(), dtype=torch.float32, device=dy.device),
        size=(out_features, in_features),
        check_invariants=False,
    )
    values = torch.sparse.sampled_addmm(pattern, dy.float().t(), x.float(), beta=0.0).values()
    return torch.empty_like(values).index_copy_(0, order, values)


def dense_then_gather(dy: torch.Tensor, x: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    """`slot_gradient` by dense row blocks of bounded size."""
    in_features = x.shape[1]
    numel = dy.shape[1] * in_features
    if numel <= _BLOCK_ENTRIES:
        return (dy.t() @ x).view(-1)[position.long()].float()
    ordered, order = position.long().sort()
    parts = []
    for lo, hi, block in dense_blocks(dy, x, 0, numel):
        first, last = torch.searchsorted(ordered, torch.tensor([lo, hi], device=ordered.device))
        parts.append(block[ordered[first:last] - lo])
    return torch.empty_like(torch.cat(parts)).index_copy_(0, order, torch.cat(parts))


def dense_blocks(
    dy: torch.Tensor, x: torch.Tensor, lo: int, hi: int, block_entries: int | None = None
) -> Iterator[tuple[int, int, torch.Tensor]]:
    """The dense gradient at flat positions [lo, hi), piece by piece: (from, to, fp32 (to - from,)).

    A piece covers whole rows except where [lo, hi) cuts one; at least one row is formed at a time.
    """
    in_features = x.shape[1]
    rows_at_once = max(1, (block_entries or _BLOCK_ENTRIES) // in_features)
    for row in range(lo // in_features, -(-hi // in_features), rows_at_once):
        stop = min(row + rows_at_once, -(-hi // in_features))
        block = (dy[:, row:stop].t() @ x).view(-1).float()
        begin, end = max(lo, row * in_features), min(hi, stop * in_features)
        yield begin, end, block[begin - row * in_features : end - row * in_features]
