"""Which dead weights come back for which live ones, over all ranks and several weights at once.

Every position has a worth (`seft_ds.sparse.curvature`): of the value that it holds if it is live, of the one
that it would come back with if it is dead. As long as the best dead position is worth more than the worst
live one that no slot holds, the two change places; two of equal worth never do. The live count of a group
stays exactly what it was, and the choice is the same on any number of ranks (ties: lowest position first).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch

from seft_ds.distributed.collectives import Ranks
from seft_ds.distributed.selection import KeysOnDemand, blocks, find_cuts, select
from seft_ds.sparse import mask, radix
from seft_ds.sparse.topology import masked_keys


@dataclass
class Stakes:
    """This rank's shard of one weight: little for each position, since all weights are weighed at once."""

    worth: torch.Tensor  # fp32 (n,), at least 0; of a dead position that can't come back: 0
    live_bits: torch.Tensor  # packed (n,)
    held_at: (
        torch.Tensor
    )  # (s,) int64, ascending indices of positions that a slot holds, so that they stay

    @property
    def live(self) -> torch.Tensor:
        """Bool (n,)."""
        return mask.unpack(self.live_bits, self.worth.numel())

    def live_at(self, where: slice) -> torch.Tensor:
        """Bool: the live mask of the positions `where`."""
        first = where.start // 8 * 8  # unpacked by whole bytes
        bits = self.live_bits[first // 8 : -(-where.stop // 8)]
        flags = mask.unpack(bits, where.stop - first)
        return flags[where.start - first :: where.step]

    def held_among(self, where: slice) -> torch.Tensor:
        """Bool: which of the positions `where` a slot holds."""
        bounds = torch.tensor([where.start, where.stop], device=self.held_at.device)
        first, last = torch.searchsorted(self.held_at, bounds).tolist()
        held = torch.zeros(where.stop - where.start, dtype=torch.bool, device=self.worth.device)
        held[self.held_at[first:last] - where.start] = True
        return held[:: where.step]


@dataclass
class Exchange:
    """What changes in one weight: ascending indices into this rank's shard."""

    revived: torch.Tensor  # int64
    pruned: torch.Tensor  # int64


def plan_exchange(
    stakes: list[Stakes], group: list[int], most: list[int], ranks: Ranks
) -> tuple[list[Exchange], list[int]]:
    """Decide one exchange. A collective: two small sums and three selections.

    Args:
        stakes: this rank's shard of each weight, in order.
        group: the group of each weight; positions change places within a group.
        most: of each group, how many may come back.

    Returns:
        The changes of each weight, and of each group how many would have paid off: the most pairs, best dead
        with worst live and so on, whose dead position is worth strictly more.
    """
    paying = _count_paying(stakes, group, len(most), ranks)
    k = [min(a, b) for a, b in zip(paying, most, strict=True)]
    dead = [_on_demand(s, _keys_of_dead) for s in stakes]
    revived = select(dead, group, k, ranks, few=True)
    free = [_on_demand(s, _keys_of_live) for s in stakes]
    pruned = select(free, group, k, ranks, few=True)
    return [Exchange(r, p) for r, p in zip(revived, pruned, strict=True)], paying


def _count_paying(stakes: list[Stakes], group: list[int], n_groups: int, ranks: Ranks) -> list[int]:
    """How many exchanges of each group pay off. Two small sums and a selection.

    Of the dead and the free live positions together the best would stay, as many as there are free live
    ones. v: the worth of the last of them. k pairs pay if some worth t lies between them: k dead ones above
    it, and k free ones not above it. Beyond v the dead ones are too few, below it the free ones. So
    t = v gives the number of dead ones above v, t just below v that of free ones below it.
    """
    device = stakes[0].worth.device
    live = torch.zeros(n_groups, dtype=torch.int64, device=device)
    for g, s in zip(group, stakes, strict=True):
        live[g] += s.live.sum()
    every = [_on_demand(s, _keys_of_all) for s in stakes]
    cuts = find_cuts(every, group, ranks.sum_(live).tolist(), ranks)
    counts = torch.zeros(n_groups, 2, dtype=torch.int64, device=device)
    for g, s, keys, (threshold, _) in zip(group, stakes, every, cuts, strict=True):
        for begin, block in blocks(keys):
            alive = s.live_at(slice(begin, begin + block.numel(), 1))
            counts[g, 0] += ((block > threshold) & ~alive).sum()
            counts[g, 1] += ((block < threshold) & alive).sum()  # held ones have the highest key
    return ranks.sum_(counts).amax(1).tolist()


# worth, live and held of some positions -> their keys
_KeysOf: TypeAlias = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def _on_demand(s: Stakes, keys_of: _KeysOf) -> KeysOnDemand:
    def make(where: slice) -> torch.Tensor:
        return keys_of(s.worth[where], s.live_at(where), s.held_among(where))

    return KeysOnDemand(s.worth.numel(), s.worth.device, make)


def _keys_of_all(worth: torch.Tensor, live: torch.Tensor, held: torch.Tensor) -> torch.Tensor:
    keys = torch.where(held, radix.KEY_MAX, radix.largest_first(worth))
    return masked_keys(keys, live | (worth > 0))


def _keys_of_dead(worth: torch.Tensor, live: torch.Tensor, held: torch.Tensor) -> torch.Tensor:
    return masked_keys(radix.largest_first(worth).clone(), ~live & (worth > 0))


def _keys_of_live(worth: torch.Tensor, live: torch.Tensor, held: torch.Tensor) -> torch.Tensor:
    return masked_keys(radix.smallest_first(worth), live & ~held)
