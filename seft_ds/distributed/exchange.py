"""Which dead weights come back for which live ones, over all ranks and several weights at once.

Every position has a worth (`seft_ds.sparse.curvature`): of the value that it holds if it is live, of the one
that it would come back with if it is dead. As long as the best dead position is worth more than the worst
live one that no slot holds, the two change places. The live count of a group stays exactly what it was, and
the choice is the same on any number of ranks (ties: lowest position first).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch

from seft_ds.distributed.collectives import Ranks
from seft_ds.distributed.selection import above_cut, find_cuts, select
from seft_ds.sparse import mask, radix


@dataclass
class Stakes:
    """This rank's shard of one weight: little for each position, since all weights are weighed at once."""

    worth: torch.Tensor  # fp32 (n,), at least 0; of a dead position that can't come back: 0
    live_bits: torch.Tensor  # packed (n,)
    held_at: torch.Tensor  # (s,) int64, indices of positions that a slot holds, so that they stay

    @property
    def live(self) -> torch.Tensor:
        """Bool (n,)."""
        return mask.unpack(self.live_bits, self.worth.numel())

    @property
    def held(self) -> torch.Tensor:
        """Bool (n,)."""
        held = torch.zeros(self.worth.numel(), dtype=torch.bool, device=self.worth.device)
        held[self.held_at] = True
        return held


@dataclass
class Exchange:
    """What changes in one weight: ascending indices into this rank's shard."""

    revived: torch.Tensor  # int64
    pruned: torch.Tensor  # int64


def plan_exchange(
    stakes: list[Stakes], group: list[int], most: list[int], ranks: Ranks
) -> tuple[list[Exchange], list[int]]:
    """Decide one exchange. A collective: one small sum and three selections.

    Args:
        stakes: this rank's shard of each weight, in order.
        group: the group of each weight; positions change places within a group.
        most: of each group, how many may come back.

    Returns:
        The changes of each weight, and of each group how many would have paid off.
    """
    device = stakes[0].worth.device
    counts = torch.zeros(len(most), dtype=torch.int64, device=device)
    for g, s in zip(group, stakes, strict=True):
        counts[g] += s.live.sum()
    live = ranks.sum_(counts).tolist()
    every = [partial(_keys_of_all, s) for s in stakes]
    counts.zero_()
    for g, s, keys, cut in zip(group, stakes, every, find_cuts(every, group, live, ranks)):
        counts[g] += (~s.live[above_cut(keys, cut)]).sum()
    paying = ranks.sum_(counts).tolist()
    k = [min(a, b) for a, b in zip(paying, most, strict=True)]
    revived = select([partial(_keys_of_dead, s) for s in stakes], group, k, ranks)
    pruned = select([partial(_keys_of_live, s) for s in stakes], group, k, ranks)
    return [Exchange(r, p) for r, p in zip(revived, pruned, strict=True)], paying


def _keys_of_all(s: Stakes) -> torch.Tensor:
    keys = torch.where(s.held, radix.KEY_MAX, radix.largest_first(s.worth))
    return torch.where(s.live | (s.worth > 0), keys, radix.EXCLUDED)


def _keys_of_dead(s: Stakes) -> torch.Tensor:
    return torch.where(~s.live & (s.worth > 0), radix.largest_first(s.worth), radix.EXCLUDED)


def _keys_of_live(s: Stakes) -> torch.Tensor:
    return torch.where(s.live & ~s.held, radix.smallest_first(s.worth), radix.EXCLUDED)
