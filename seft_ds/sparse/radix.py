"""Exact k-th largest by digits: the pure steps.

Non-negative fp32 values order like their bit patterns read as integers, so a score becomes an int32 key
in [0, 2³¹). The k-th largest key is found digit by digit from the left (11 + 10 + 10 bits): count how
many keys have each digit, find the digit that holds the k-th, keep only the keys with that digit, go
on. The counts of several shards add up, which is what makes the search distributable: three small
sums, whatever the number of keys (see `seft_ds.distributed.selection`).
"""

from __future__ import annotations

import torch

DIGITS = ((20, 11), (10, 10), (0, 10))  # (shift, bits) of each digit, leading digit first
KEY_MAX = 2**31 - 1
EXCLUDED = -1  # the key of an entry that must not be chosen


def largest_first(scores: torch.Tensor) -> torch.Tensor:
    """Keys, int32 (n,), under which the largest score is chosen first. scores: fp32 (n,), ≥ 0.

    The keys share the memory of `scores`: no copy.
    """
    assert scores.dtype == torch.float32
    return scores.view(torch.int32)


def smallest_first(scores: torch.Tensor) -> torch.Tensor:
    """Keys, int32 (n,), under which the smallest score is chosen first. scores: fp32 (n,), ≥ 0."""
    assert scores.dtype == torch.float32
    return KEY_MAX - scores.view(torch.int32)


def digit(keys: torch.Tensor, shift: int, bits: int) -> torch.Tensor:
    """The digit, int32 (n,), of non-negative keys (n,)."""
    return (keys >> shift) & ((1 << bits) - 1)


def histogram(keys: torch.Tensor, shift: int, bits: int) -> torch.Tensor:
    """How many of the keys (n,) have each value of the digit: int64 (2^bits,)."""
    return torch.bincount(digit(keys, shift, bits), minlength=1 << bits)


def narrow(counts: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The digit that holds the k-th largest key, and how many of that digit are still to be taken.

    counts: int64 (groups, 2^bits); k: int64 (groups,), at most the row sums. Both results: int64
    (groups,). For k = 0 the result is the highest digit with nothing to take.
    """
    at_least = counts.flip(1).cumsum(1).flip(1)  # keys whose digit is this one or higher
    chosen = (at_least >= k.unsqueeze(1)).sum(1) - 1
    above = at_least - counts
    return chosen, k - above.gather(1, chosen.unsqueeze(1)).squeeze(1)
