"""Optimizer state in 8 bits, block by block, as bitsandbytes keeps it: edits of single entries.

A moment of n entries is n codes (uint8) and, for each block of 256, one fp32 `absmax`; entry j is
qmap[code[j]] · absmax[j // 256]. `qmap` is a sorted table of 256 numbers in [-1, 1] (first moments) or [0, 1]
(second moments); zero is not code 0 in the signed one. (Dettmers et al., arXiv 2110.02861; read in
bitsandbytes 0.50.2.)

An edit rewrites the codes of the edited entries and nothing else. The block's absmax stays, because the
other entries' values hang on it; so what lies beyond it is cut to it, and counted.
"""

from __future__ import annotations

import torch

BLOCK = 256


def read(
    codes: torch.Tensor, absmax: torch.Tensor, qmap: torch.Tensor, index: torch.Tensor
) -> torch.Tensor:
    """fp32 values (m,) of the entries at `index` (m,) int64. codes: uint8 (n,); absmax: (blocks,)."""
    return qmap[codes[index].long()] * absmax[index // BLOCK]


def write(
    codes: torch.Tensor,
    absmax: torch.Tensor,
    qmap: torch.Tensor,
    index: torch.Tensor,
    values: torch.Tensor,
) -> torch.Tensor:
    """Set, in place, the entries at `index` (m,), distinct, to the codes nearest to `values` (m,).

    Returns how many were cut to their block's absmax, int64 (): no host sync here. In a block that has
    never seen a gradient absmax is 0, and every value but 0 is cut.
    """
    limit = absmax[index // BLOCK]
    scaled = torch.where(limit > 0, values / limit, 0.0)
    codes[index] = nearest(scaled, qmap)
    return (values.abs() > limit).sum()


def nearest(scaled: torch.Tensor, qmap: torch.Tensor) -> torch.Tensor:
    """Codes, uint8, of the table entries nearest to `scaled` (any shape); ties to the lower code.

    Beyond the table's ends it is the end, as in bitsandbytes.
    """
    middles = (qmap[1:] + qmap[:-1]) / 2
    return torch.bucketize(scaled.clamp(-1, 1), middles).to(torch.uint8)


def largest(values: torch.Tensor) -> torch.Tensor:
    """fp32 (blocks,): the largest magnitude in each block of `values` (n,), its absmax."""
    n = values.numel()
    blocks = -(-n // BLOCK)
    padded = torch.zeros(blocks * BLOCK, dtype=torch.float32, device=values.device)
    padded[:n] = values
    return padded.view(blocks, BLOCK).abs().amax(dim=1)
