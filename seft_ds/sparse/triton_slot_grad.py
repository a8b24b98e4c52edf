"""Slot gradients on a GPU by one dot product a slot, without the dense gradient.

A program takes a block of slots and walks over the tokens, with fp32 sums whatever the dtype. Both
operands are read along the tokens, so they are transposed first: a slot then reads two contiguous rows, and
slots in ascending order share theirs in the cache. It reads 2 · K · tokens numbers where the dense GEMM does
2 · out · in · tokens operations on matrix units: it pays at low densities and small token counts only, and
`seft_ds/sparse/kernel_costs.py` finds out where. Tested with Triton's interpreter; not on a GPU yet.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl


@triton.jit
def _kernel(
    dy_t,  # (out, tokens)
    x_t,  # (in, tokens)
    position,  # (K,) int64
    result,  # (K,) fp32
    n_slots,
    n_tokens,
    columns,
    SLOTS: tl.constexpr,
    TOKENS: tl.constexpr,
):
    slot = tl.program_id(0).to(tl.int64) * SLOTS + tl.arange(0, SLOTS)
    real = slot < n_slots
    at = tl.load(position + slot, mask=real, other=0)
    row, column = at // columns, at % columns
    total = tl.zeros((SLOTS,), dtype=tl.float32)
    for begin in range(0, n_tokens, TOKENS):
        token = begin + tl.arange(0, TOKENS)
        inside = real[:, None] & (token < n_tokens)[None, :]
        a = tl.load(dy_t + row[:, None] * n_tokens + token[None, :], mask=inside, other=0.0)
        b = tl.load(x_t + column[:, None] * n_tokens + token[None, :], mask=inside, other=0.0)
        total += tl.sum(a.to(tl.float32) * b.to(tl.float32), axis=1)
    tl.store(result + slot, total, mask=real)


@functools.cache
def _tuned() -> Any:
    """The kernel that tries its block sizes at first use. Not made on import: that needs a GPU."""
    sizes = [(16, 128, 4), (32, 64, 4), (32, 128, 8), (64, 64, 8)]
    configs = [
        triton.Config({"SLOTS": slots, "TOKENS": tokens}, num_warps=warps)
        for slots, tokens, warps in sizes
    ]
    return triton.autotune(configs, key=["n_tokens", "columns"])(_kernel)


def dot_products(
    dy: torch.Tensor, x: torch.Tensor, position: torch.Tensor, blocks: tuple[int, int] | None = None
) -> torch.Tensor:
    """`seft_ds.sparse.slot_grad.slot_gradient` by this kernel: fp32 (K,), in the order of `position`.

    blocks: (slots, tokens) of a program, powers of 2; None: the fastest, found at the first call of a shape.
    """
    ordered, order = position.long().sort()
    values = torch.empty(ordered.numel(), dtype=torch.float32, device=dy.device)
    if ordered.numel():
        operands = dy.t().contiguous(), x.t().contiguous(), ordered, values
        sizes = ordered.numel(), dy.shape[0], x.shape[1]
        if blocks is None:
            _tuned()[lambda meta: (triton.cdiv(sizes[0], meta["SLOTS"]),)](*operands, *sizes)
        else:
            _kernel[(triton.cdiv(sizes[0], blocks[0]),)](*operands, *sizes, *blocks)
    return torch.empty_like(values).index_copy_(0, order, values)
