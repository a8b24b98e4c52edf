"""Which flat positions of a weight a rank owns.

A weight of n entries is cut into equal contiguous ranges, the last ones shorter or empty. This is
how ZeRO-3 partitions a parameter (read in DeepSpeed 0.19.8), so that under ZeRO-3 the owner of a
position also holds its weight. Under ZeRO 0-2 every rank holds the whole weight and the same ranges
divide the work. For an N:M pattern the borders move up to a multiple of M, so that no group is cut.
"""

from __future__ import annotations


def shard_range(numel: int, rank: int, size: int, multiple: int = 1) -> tuple[int, int]:
    """Positions [lo, hi) of a weight with `numel` entries that `rank` of `size` ranks owns.

    `multiple` rounds both borders up (N:M groups); the ranges of all ranks still tile [0, numel).
    """
    length = -(-numel // size)

    def border(r: int) -> int:
        return min(-(-(r * length) // multiple) * multiple, numel)

    return border(rank), border(rank + 1)
