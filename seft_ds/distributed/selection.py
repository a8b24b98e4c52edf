"""Exact global top-k over shards that nobody gathers.

For all weights of an event at once: each rank counts the digits of its shard's keys, one sum over the
ranks adds the counts, every rank finds the digit that holds the k-th best, and the next digit follows.
Keys above the k-th are chosen; ties at the k-th go to the lowest positions, by a prefix over the ranks'
tie counts. Four small collectives, whatever the model's size; no rank sees another's scores. The result
is the k best by (key, then lower position first), whatever the number of ranks.

Where few of many are wanted, a sample of the keys first tells about where the k-th lies, and only what is
not clearly below is looked at again. The sample decides how long it takes, never what is chosen: as long as
k keys reach the floor that it sets, the k-th does, and where they don't, all keys are gone through.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch

from seft_ds.distributed.collectives import Ranks
from seft_ds.sparse import radix


@dataclass(frozen=True)
class KeysOnDemand:
    """The keys of one weight, made where they are looked at, up to three times each, so that they need no
    memory and their parts are still in the cache when they are compared."""

    n: int
    device: torch.device
    make: Callable[[slice], torch.Tensor]  # indices, in a slice with start and stop -> their keys


Keys: TypeAlias = torch.Tensor | KeysOnDemand

# Keys that are looked at together. On a CPU what is made of them stays in the cache; a GPU wants long calls.
_BLOCK_ON_CPU = 1 << 18
_BLOCK_ELSEWHERE = 1 << 26
_SAMPLE_EVERY = 61  # a prime, so that a sample meets every column of a weight
SAMPLE_DIGIT = (21, 10)  # its digit: the exponent and two bits behind it


def select(
    keys: Sequence[Keys], group: list[int], k: list[int], ranks: Ranks, few: bool = False
) -> list[torch.Tensor]:
    """Choose the k[g] largest keys among all weights w with group[w] == g, over all ranks.

    Args:
        keys: one int32 (n_w,) a weight: this rank's shard in position order; `radix.EXCLUDED` entries
            are never chosen. Shards of rank r lie before those of rank r + 1; may be empty.
        group: the group of each weight; within a group, weights come in position order too.
        k: how many to choose in each group, over all ranks; the same on every rank.
        few: k is a small part of the keys, so that a sample is worth its pass and its collective.

    Returns:
        One int64 tensor a weight: ascending indices into this rank's shard.
    """
    if few:
        floors = _floors(keys, group, k, ranks)
        short = [_reaching(shard, floors[g]) for g, shard in zip(group, keys, strict=True)]
        cuts = _cuts([found for _, found in short], group, k, ranks)
        if cuts is not None:
            return [at[above_cut(found, cut)] for (at, found), cut in zip(short, cuts, strict=True)]
    cuts = find_cuts(keys, group, k, ranks)
    return [above_cut(shard, cut) for shard, cut in zip(keys, cuts, strict=True)]


def find_cuts(
    keys: Sequence[Keys], group: list[int], k: list[int], ranks: Ranks
) -> list[tuple[int, int]]:
    """What `select` chooses, as one (key of the k-th, how many of that key this rank takes) a weight."""
    cuts = _cuts(keys, group, k, ranks)
    assert cuts is not None, "asked for more entries than there are candidates"
    return cuts


def _cuts(
    keys: Sequence[Keys], group: list[int], k: list[int], ranks: Ranks
) -> list[tuple[int, int]] | None:
    """`find_cuts`; None, on every rank, if a group has fewer than k keys that may be chosen."""
    device = keys[0].device
    remaining = torch.tensor(k, dtype=torch.int64, device=device)
    threshold = torch.zeros(len(k), dtype=torch.int64, device=device)
    candidates = list(keys)
    for shift, bits in radix.DIGITS:
        counts = torch.zeros(len(k), 1 << bits, dtype=torch.int64, device=device)
        for g, shard in zip(group, candidates, strict=True):
            for _, block in blocks(shard):
                counts[g] += radix.histogram(_possible(block), shift, bits)
        ranks.sum_(counts)
        if bool((counts.sum(1) < remaining).any()):
            return None
        chosen, remaining = radix.narrow(counts, remaining)
        threshold = (threshold << bits) | chosen
        candidates = [
            _with_digit(shard, shift, bits, chosen[g])
            for g, shard in zip(group, candidates, strict=True)
        ]
    ties = torch.tensor([_numel(s) for s in candidates], dtype=torch.int64, device=device)
    share = _share_ties(ranks.gather(ties), group, remaining.tolist(), ranks.rank)
    return [(int(threshold[g]), take) for g, take in zip(group, share, strict=True)]


def _floors(keys: Sequence[Keys], group: list[int], k: list[int], ranks: Ranks) -> list[int]:
    """For each group a key that k keys probably reach, and few more, on every rank the same. A small sum."""
    device = keys[0].device
    shift, bits = SAMPLE_DIGIT
    counts = torch.zeros(len(k), 1 << bits, dtype=torch.int64, device=device)
    for g, shard in zip(group, keys, strict=True):
        sample = _at(shard, slice(0, _numel(shard), _SAMPLE_EVERY))
        counts[g] += radix.histogram(sample[sample >= 0], shift, bits)
    ranks.sum_(counts)
    expected = torch.tensor(k, dtype=torch.float64, device=device) / _SAMPLE_EVERY
    # Six standard deviations on the safe side, and a little for samples too small to have any.
    wanted = (expected + 6 * expected.sqrt() + 8).ceil().long()
    at_least = counts.flip(1).cumsum(1).flip(1)
    digit = ((at_least >= wanted.unsqueeze(1)).sum(1) - 1).clamp_(min=0)
    return (digit << shift).tolist()


def _numel(keys: Keys) -> int:
    return keys.n if isinstance(keys, KeysOnDemand) else keys.numel()


def _at(keys: Keys, where: slice) -> torch.Tensor:
    return keys.make(where) if isinstance(keys, KeysOnDemand) else keys[where]


def blocks(keys: Keys) -> Iterator[tuple[int, torch.Tensor]]:
    """(index of the first, keys) of runs of the keys; one at least, so that there is something to join."""
    size = _BLOCK_ON_CPU if keys.device.type == "cpu" else _BLOCK_ELSEWHERE
    n = _numel(keys)
    for begin in range(0, max(n, 1), size):
        yield begin, _at(keys, slice(begin, min(begin + size, n), 1))


def _reaching(keys: Keys, floor: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(indices, keys), ascending by index, of the keys that are at least `floor`."""
    indices, found = [], []
    for begin, block in blocks(keys):
        index = (block >= floor).nonzero().squeeze(1)
        found.append(block[index])
        indices.append(index + begin)
    return torch.cat(indices), torch.cat(found)


def _possible(keys: torch.Tensor) -> torch.Tensor:
    """The keys (m,) that may be chosen."""
    return keys[keys >= 0]


def _with_digit(keys: Keys, shift: int, bits: int, wanted: torch.Tensor) -> torch.Tensor:
    """The keys (m,) that may be chosen and have this digit."""
    found = []
    for _, block in blocks(keys):
        same = radix.digit(block, shift, bits) == wanted
        found.append(block[same & (block >= 0)])
    return torch.cat(found)


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
    threshold, take = cut
    chosen = []
    for begin, block in blocks(keys):
        above = (block > threshold).nonzero().squeeze(1)
        if take:
            ties = (block == threshold).nonzero().squeeze(1)[:take]
            take -= ties.numel()
            above = torch.cat([above, ties]).sort().values
        chosen.append(above + begin)
    return torch.cat(chosen)


def gather_lists(lists: list[torch.Tensor], ranks: Ranks) -> list[torch.Tensor]:
    """Join over the ranks, in rank order, each of several 1-D lists of one dtype: two collectives."""
    lengths = torch.tensor([part.numel() for part in lists], dtype=torch.int64)
    by_rank = ranks.gather(lengths.to(lists[0].device))
    pieces = [
        flat.split(counts.tolist())
        for flat, counts in zip(ranks.gather(torch.cat(lists)), by_rank, strict=True)
    ]
    return [torch.cat([piece[w] for piece in pieces]) for w in range(len(lists))]
