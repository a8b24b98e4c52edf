"""Live masks as packed bits: one bit a position, lowest bit first.

Layout contract: bit `i % 8` of byte `i // 8` is position `lo + i` of a range that starts at `lo`;
bits past the end of the range are 0, so that counts and digests need no length.
"""

from __future__ import annotations

import torch

_BIT = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8)
_ONES_IN_BYTE = torch.tensor([bin(b).count("1") for b in range(256)], dtype=torch.uint8)
_CHUNK = 1 << 24  # bytes looked up at a time: bounds the transient memory of `count`


def pack(live: torch.Tensor) -> torch.Tensor:
    """Packed bits, uint8 (ceil(n / 8),), of a bool tensor (n,)."""
    n = live.numel()
    bits = torch.zeros(-(-n // 8) * 8, dtype=torch.uint8, device=live.device)
    bits[:n] = live
    return (bits.view(-1, 8) * _BIT.to(live.device)).sum(dim=1, dtype=torch.uint8)


def unpack(bits: torch.Tensor, n: int) -> torch.Tensor:
    """Bool tensor (n,) of packed bits, uint8 (ceil(n / 8),)."""
    return (bits.unsqueeze(1) & _BIT.to(bits.device)).ne(0).view(-1)[:n]


def cut(bits: torch.Tensor, lo: int, hi: int) -> torch.Tensor:
    """The packed bits of the positions [lo, hi) of packed bits: a copy."""
    first = lo // 8
    inside = bits[first : -(-hi // 8)]
    if lo % 8 == 0 and (hi % 8 == 0 or hi - first * 8 == 8 * inside.numel()):
        return inside.clone()
    return pack(unpack(inside, hi - first * 8)[lo - first * 8 :])


def count(bits: torch.Tensor) -> int:
    """How many bits are set, exactly (int64 sums). One host-device sync."""
    ones = _ONES_IN_BYTE.to(bits.device)
    return sum(int(ones[chunk.int()].sum(dtype=torch.int64)) for chunk in bits.split(_CHUNK))


def put(bits: torch.Tensor, index: torch.Tensor, live: bool) -> None:
    """Set or clear, in place, the bits at the distinct positions `index` (k,), int64."""
    if index.numel() == 0:
        return
    # Several positions may share a byte: sum their (distinct) bits per byte before touching it.
    value = _BIT.to(bits.device)[index % 8].to(torch.int32)
    change = torch.zeros(bits.numel(), dtype=torch.int32, device=bits.device)
    change.index_add_(0, index // 8, value)
    change = change.to(torch.uint8)
    if live:
        bits.bitwise_or_(change)
    else:
        bits.bitwise_and_(change.bitwise_not_())
