"""Exact global top-k over shards that nobody gathers.

For all weights of an event at once: each rank counts the digits of its shard's keys, one sum over the
ranks adds the counts, every rank finds the digit that holds the k-th best, and the next digit follows.
Keys above the k-th are chosen; ties at the k-th go to the lowest positions, by a prefix over the ranks'
tie counts. Four small collectives, whatever the model's size; no rank sees another's scores. The result
is the k best by (key, then lower position first), whatever the number of ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch

from seft_ds.distributed.collectives import Ranks
from seft_ds.sparse import radix

# The keys of one weight, or what makes them anew each time (three times), so that not all are there at once.
Keys: TypeAlias = torch.Tensor | Callable[[], torch.Tensor]


def select(
    keys: Sequence[Keys], group: list[int], k: list[int], ranks: Ranks
) -> list[torch.Tensor]:
    """Choose the k[g] largest keys among all weights w with group[w] == g, over all ranks.

    Args:
        keys: one int32 (n_w,) a weight: this rank's shard in position order; `radix.EXCLUDED` entries
            are never chosen. Shards of rank r lie before those of rank r + 1; may be empty.
        group: the group of each weight; within a group, weights come in position order too.
        k: how many to choose in each group, over all ranks; the same on every rank.

    Returns:
        One int64 tensor a weight: ascending indices into this rank's shard.
    """
    cuts = find_cuts(keys, group, k, ranks)
    return [above_cut(shard, cut) for shard, cut in zip(keys, cuts, strict=True)]


def find_cuts(
    keys: Sequence[Keys], group: list[int], k: list[int], ranks: Ranks
) -> list[tuple[int, int]]:
    """What `select` chooses, as one (key of the k-th, how many of that key this rank takes) a weight."""
    device = _read(keys[0]).device
    remaining = torch.tensor(k, dtype=torch.int64, device=device)
    threshold = torch.zeros(len(k), dtype=torch.int64, device=device)
    candidates = list(keys)
    for shift, bits in radix.DIGITS:
        counts = torch.zeros(len(k), 1 << bits, dtype=torch.int64, device=device)
        for g, shard in zip(group, candidates, strict=True):
            counts[g] += radix.histogram(_possible(shard), shift, bits)
        ranks.sum_(counts)
        chosen, remaining = radix.narrow(counts, remaining)
        threshold = (threshold << bits) | chosen
        candidates = [
            _with_digit(shard, shift, bits, chosen[g])
            for g, shard in zip(group, candidates, strict=True)
        ]
    ties = torch.tensor([_read(s).numel() for s in candidates], dtype=torch.int64, device=device)
    share = _share_ties(ranks.gather(ties), group, remaining.tolist(), ranks.rank)
    return [(int(threshold[g]), take) for g, take in zip(group, share, strict=True)]


def _read(keys: Keys) -> torch.Tensor:
    return keys if isinstance(keys, torch.Tensor) else keys()


def _possible(keys: Keys) -> torch.Tensor:
    """The keys (m,) that may be chosen."""
    found = _read(keys)
    return found[found >= 0]


def _with_digit(keys: Keys, shift: int, bits: int, wanted: torch.Tensor) -> torch.Tensor:
    """The keys (m,) that may be chosen and have this digit."""
    found = _possible(keys)
    return found[radix.digit(found, shift, bits) == wanted]


def _share_ties(
    ties: list[torch.Tensor], group: list[int], remaining: list[int], rank: int
) -> list[int]:
    """How many of its ties `rank` takes in each weight. ties: one (weights,) tensor a rank."""
    by_rank = [t.tolist() for t in ties]
    left = list(remaining)
    share = []
    for w, g in enumerate(group):
        mine = 0
        for r, counts in enumerate(by_rank):
            take = min(left[g], counts[w])
            left[g] -= take
            if r == rank:
                mine = take
        share.append(mine)
    return share


def above_cut(keys: Keys, cut: tuple[int, int]) -> torch.Tensor:
    """Ascending indices into this rank's shard of what a cut chooses."""
    (threshold, take), found = cut, _read(keys)
    above = (found > threshold).nonzero().squeeze(1)
    if take == 0:
        return above
    ties = (found == threshold).nonzero().squeeze(1)[:take]
    return torch.cat([above, ties]).sort().values


def gather_lists(lists: list[torch.Tensor], ranks: Ranks) -> list[torch.Tensor]:
    """Join over the ranks, in rank order, each of several 1-D lists of one dtype: two collectives."""
    lengths = torch.tensor([part.numel() for part in lists], dtype=torch.int64)
    by_rank = ranks.gather(lengths.to(lists[0].device))
    pieces = [
        flat.split(counts.tolist())
        for flat, counts in zip(ranks.gather(torch.cat(lists)), by_rank, strict=True)
    ]
    return [torch.cat([piece[w] for piece in pieces]) for w in range(len(lists))]
