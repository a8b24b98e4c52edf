"""Gradients of single entries of a weight, and of whole row blocks.

For y = x Wᵀ the gradient is dL/dW = dyᵀ x. Training needs it only at the K slots (1 % of the entries):
g[j] = Σ_tokens dy[:, row_j] · x[:, col_j]. Three exact ways to get there:

* `sampled` dot products (`torch.sparse.sampled_addmm`): work K · tokens;
* a `dense` GEMM in row blocks, followed by a gather: work out · in · tokens, but at GEMM speed;
* `triton` dot products, on a GPU (`seft_ds/sparse/triton_slot_grad.py`): work K · tokens, fp32 sums.

Which one is fastest depends on shape, density, dtype, tokens and device: `seft_ds/sparse/kernel_costs.py`
measures it, `benchmarks/slot_grad.py` shows it. Without a measurement `by_rule` decides. On a CPU with bf16
matrix units a dense bf16 GEMM beats fp32 sampling at model shapes; in fp32 sampling wins by 2 to 6 times.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

import torch

_BLOCK_ENTRIES = 1 << 24  # entries of a dense block: bounds the transient memory at 64 MiB of fp32
_SAMPLED_MAX_DENSITY = (
    0.05  # fp32 on CPU: above it the dense GEMM is faster (benchmarks/slot_grad.py)
)


def by_rule(dtype: torch.dtype, device: torch.device, slots: int, numel: int) -> str:
    """The kernel for a weight of `numel` entries where nothing has been measured."""
    few = slots <= _SAMPLED_MAX_DENSITY * numel
    return "sampled" if dtype == torch.float32 and device.type == "cpu" and few else "dense"


def slot_gradient(
    dy: torch.Tensor, x: torch.Tensor, position: torch.Tensor, kernel: str | None = None
) -> torch.Tensor:
    """dL/dW at `position`, fp32 (K,), in the order of `position`.

    dy: (tokens, out); x: (tokens, in); position: (K,) int, flat positions row·in + col, any order.
    kernel: one of `available`; None: `by_rule`.
    """
    return KERNELS[kernel or _ruled(dy, x, position.numel())](dy, x, position)


def _ruled(dy: torch.Tensor, x: torch.Tensor, slots: int) -> str:
    return by_rule(dy.dtype, dy.device, slots, dy.shape[1] * x.shape[1])


def whole_product(
    dy: torch.Tensor, x: torch.Tensor, slots: int, kernel: str | None
) -> torch.Tensor | None:
    """dyᵀx, (out, in), if `slot_gradient` would form just that: what a window needs of it as well then has it
    for nothing, and the slots' gradients are the same to the bit. None otherwise."""
    fits = dy.shape[1] * x.shape[1] <= _BLOCK_ENTRIES
    return dy.t() @ x if fits and (kernel or _ruled(dy, x, slots)) == "dense" else None


def gather_slots(product: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    """fp32 (K,): the entries of dyᵀx (out, in) at the flat positions (K,)."""
    return product.view(-1)[position.long()].float()


def available(device: torch.device) -> list[str]:
    """The kernels that can run on `device`."""
    if device.type == "cpu":
        return ["sampled", "dense"]
    return ["dense", "triton"] if importlib.util.find_spec("triton") else ["dense"]


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
    if dy.shape[1] * in_features <= _BLOCK_ENTRIES:
        return gather_slots(dy.t() @ x, position)
    ordered, order = position.long().sort()
    rows = max(1, _BLOCK_ENTRIES // in_features)
    starts = torch.arange(0, dy.shape[1] + rows, rows, device=ordered.device)
    bounds = torch.searchsorted(ordered, starts * in_features).tolist()
    result = torch.empty(ordered.numel(), dtype=torch.float32, device=dy.device)
    for row, first, last in zip(range(0, dy.shape[1], rows), bounds, bounds[1:]):
        block = (dy[:, row : row + rows].t() @ x).view(-1)
        result[order[first:last]] = block[ordered[first:last] - row * in_features].float()
    return result


def _triton(dy: torch.Tensor, x: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    from seft_ds.sparse.triton_slot_grad import dot_products  # triton is there with CUDA only

    return dot_products(dy, x, position)


KERNELS = {"sampled": sampled, "dense": dense_then_gather, "triton": _triton}


def rows_a_piece(parts: int, columns: int) -> int:
    """Rows of each of several parts that are formed at a time, so that all of them stay within a block.

    At least 4: a part begins and ends inside of rows, so that of r rows r + 1 are computed.
    """
    return max(4, _BLOCK_ENTRIES // (parts * columns))


def dense_parts(
    dy: torch.Tensor,
    x: torch.Tensor,
    parts: list[tuple[int, int]],
    ends: Sequence[int] | None = None,
) -> torch.Tensor:
    """The dense gradient at several ranges [lo, hi) of flat positions, as fp32 (parts, longest), 0 beyond.

    One GEMM over the rows of all ranges, which should be of about the same length.

    ends: of a fused weight (seft_ds.sparse.experts), where each expert's tokens end; dy is then
        (tokens, rows of one expert), and expert e's rows are e · rows and those after it. One GEMM a range
        and expert.
    """
    columns = x.shape[1]
    if ends is not None:
        result = torch.zeros(len(parts), max(hi - lo for lo, hi in parts), device=dy.device)
        for into, (lo, hi) in zip(result, parts, strict=True):
            first = lo // columns
            block = _expert_rows(dy, x, first, -(-hi // columns), ends).view(-1)
            into[: hi - lo] = block[lo - first * columns : hi - first * columns]
        return result
    first = [lo // columns for lo, _ in parts]
    count = max(
        -(-hi // columns) - row for row, (lo, hi) in zip(first, parts, strict=True) if hi > lo
    )
    starts = torch.tensor(first, device=dy.device).clamp_(max=dy.shape[1] - 1)
    rows = starts[:, None] + torch.arange(count, device=dy.device)
    chosen = dy.index_select(1, rows.clamp_(max=dy.shape[1] - 1).view(-1))
    blocks = (chosen.t() @ x).view(len(parts), count * columns)
    within = [(lo - r * columns, hi - r * columns) for r, (lo, hi) in zip(first, parts)]
    return _padded([block[lo:hi] for block, (lo, hi) in zip(blocks, within, strict=True)])


def parts_of_product(product: torch.Tensor, parts: list[tuple[int, int]]) -> torch.Tensor:
    """What `dense_parts` gives, from dyᵀx (out, in)."""
    return _padded([product.view(-1)[lo:hi] for lo, hi in parts])


def _padded(pieces: list[torch.Tensor]) -> torch.Tensor:
    """fp32 (pieces, longest): 1-D pieces as rows, 0 beyond."""
    longest = max(piece.numel() for piece in pieces)
    rows = torch.empty(len(pieces), longest, dtype=torch.float32, device=pieces[0].device)
    for row, piece in zip(rows, pieces, strict=True):
        row[: piece.numel()] = piece
        row[piece.numel() :] = 0.0
    return rows


def _expert_rows(
    dy: torch.Tensor, x: torch.Tensor, first: int, stop: int, ends: Sequence[int]
) -> torch.Tensor:
    """Rows [first, stop) of a fused weight's dense gradient, (stop - first, in); 0 for an expert without
    tokens. See `dense_parts`."""
    height = dy.shape[1]
    block = torch.zeros(max(stop - first, 0), x.shape[1], dtype=dy.dtype, device=dy.device)
    for expert in range(first // height, -(-stop // height)):
        begin, end = (ends[expert - 1] if expert else 0), ends[expert]
        if begin == end:
            continue
        top = expert * height
        lo, hi = max(first, top), min(stop, top + height)
        part = dy[begin:end, lo - top : hi - top].t()
        torch.mm(part, x[begin:end], out=block[lo - first : hi - first])
    return block
