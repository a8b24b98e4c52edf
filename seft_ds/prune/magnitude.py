"""Magnitude pruning: the smallest |w| die.

The ranking is over the whole weight, as in Han et al. (arXiv 1506.02626), or over all weights together
(`global_quotas`); no data is needed. It is the floor that any other method has to beat: at 50 % and above
it ruins most language models.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from seft_ds.distributed.collectives import Ranks
from seft_ds.prune.choose import Quota, check_scores, dead_positions

# |w| in fp32 has 31 bits that order like an integer: two digits, so two passes over the weights.
_LOW_BITS = 15
_HIGH_DIGITS = 1 << 16
_LOW_DIGITS = 1 << _LOW_BITS


def magnitude_dead(weight: torch.Tensor, quota: Quota, name: str) -> torch.Tensor:
    """Bool (out, in): the entries of `weight` (out, in) that die, the smallest |w| within the quota's unit.

    Lower positions die first among equals.

    Raises:
        ValueError: M does not divide the inputs, or a weight is not finite; `name` is in the message.
    """
    return dead_positions(weight.detach().abs().float(), quota, name)


def global_quotas(
    names: Sequence[str],
    read: Callable[[str], torch.Tensor],  # the weight (out, in) of a name
    dead: int,
    ranks: Ranks,
) -> dict[str, Quota]:
    """How many entries each weight gives up when the `dead` smallest |w| of all of them die.

    Ties go to the earlier weight, and within it to the lower position. Two passes over the weights, one of
    which is in memory at a time; each rank reads its part. The histograms of the second pass are kept per
    weight, 128 KiB each. Two collectives.

    Raises:
        ValueError: a weight is not finite; it is named.
    """
    mine = range(ranks.rank, len(names), ranks.size)
    high = torch.zeros(_HIGH_DIGITS, dtype=torch.int64)
    for i in mine:
        magnitudes = read(names[i]).abs().float()
        check_scores(magnitudes, names[i])
        high += torch.bincount(_keys(magnitudes) >> _LOW_BITS, minlength=_HIGH_DIGITS).cpu()
    digit, left = _digit_of(ranks.sum_(high), dead)
    low = torch.zeros(len(names), _LOW_DIGITS, dtype=torch.int32)
    below = torch.zeros(len(names), dtype=torch.int32)
    for i in mine:
        keys = _keys(read(names[i]))
        leading = keys >> _LOW_BITS
        below[i] = (leading < digit).sum()
        tail = keys[leading == digit] & (_LOW_DIGITS - 1)
        low[i] = torch.bincount(tail, minlength=_LOW_DIGITS)
    ranks.sum_(low)
    ranks.sum_(below)
    digit, left = _digit_of(low.sum(dim=0), left)
    quotas = {}
    for name, certain, counts in zip(names, below.tolist(), low):
        tied = min(left, int(counts[digit]))  # earlier weights first
        left -= tied
        quotas[name] = Quota(certain + int(counts[:digit].sum()) + tied)
    return quotas


def _keys(weight: torch.Tensor) -> torch.Tensor:
    """int32 (n,), in the order of |w|: fp32 that is not negative orders like its bits."""
    return weight.detach().abs().float().reshape(-1).view(torch.int32)


def _digit_of(counts: torch.Tensor, k: int) -> tuple[int, int]:
    """The digit of the k-th smallest key, and how many of that digit are among the k smallest.

    counts: (digits,), how many keys have each digit.
    """
    upto = counts.cumsum(0)
    digit = int((upto < k).sum())
    return digit, k - int(upto[digit]) + int(counts[digit])
