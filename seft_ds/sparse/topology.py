"""One shard of one weight at an event, and the pure steps of drop, grow, release and adapt.

Positions are flat (row · in + col) and absolute; "index" means relative to the shard's start. What a step
chooses over all ranks is found by `seft_ds.distributed.selection` from the keys made here; the steps
are put together in `seft_ds.distributed.event`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from seft_ds.sparse import radix
from seft_ds.sparse.curvature import Factors


@dataclass
class Shard:
    """The positions [lo, lo + n) of one weight, as their owner sees them when an event starts."""

    name: str
    lo: int
    weight: torch.Tensor  # (n,) effective weights
    live: torch.Tensor  # (n,) bool
    G: torch.Tensor  # (n,) fp32, signed sum of the window's step gradients
    Q: torch.Tensor  # (n,) fp32, sum of their squares
    # The slots that lie in this shard, by ascending position.
    position: torch.Tensor  # (s,) int64
    slot: torch.Tensor  # (s,) int64, index into the weight's delta vector
    delta: torch.Tensor  # (s,) fp32, in units of the slot's own steps
    base: torch.Tensor  # (s,) what the weight goes back to on `revert`
    born_dead: torch.Tensor  # (s,) bool: the position was dead when the slot was placed
    # The same on every rank.
    n_slots: int
    seed: int
    pattern: tuple[int, int] | None = None
    factors: Factors | None = None  # of the curvature, if it was measured

    def index(self, position: torch.Tensor) -> torch.Tensor:
        return position - self.lo

    def flags(self, position: torch.Tensor) -> torch.Tensor:
        """Bool (n,): True at the given positions."""
        flags = torch.zeros(self.weight.numel(), dtype=torch.bool, device=self.weight.device)
        flags[self.index(position)] = True
        return flags


def drop_keys(shard: Shard) -> torch.Tensor:
    """Keys of the shard's slots (s,): the smallest |δ| first."""
    return radix.smallest_first(shard.delta.abs())


def masked_keys(keys: torch.Tensor, candidate: torch.Tensor) -> torch.Tensor:
    """Keys (n,) with everything that is not a candidate (n,), bool, excluded. Writes into `keys`."""
    # EXCLUDED has all bits set. `where` and `masked_fill_` would take ten times as long on a CPU.
    return keys.bitwise_or_(candidate.to(torch.int32).sub_(1))


def split_dropped(
    shard: Shard, dropped: torch.Tensor, grown: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(released, fresh): released slots as ascending indices into the shard's slots, fresh positions.

    A position that is both dropped and grown is in neither: it is simply kept.
    dropped: (d,) indices into the shard's slots; grown: (g,) positions.
    """
    dropped_at = shard.position[dropped]
    return dropped[~torch.isin(dropped_at, grown)], grown[~torch.isin(grown, dropped_at)]


def released_weight(shard: Shard, released: torch.Tensor, fold: torch.Tensor) -> torch.Tensor:
    """The shard's weights (n,) after releasing slots: back to base where `fold` (m,) is False. Not to be
    written to: they may be the shard's own."""
    back = released[~fold]
    if back.numel() == 0:
        return shard.weight
    weight = shard.weight.clone()
    weight[shard.index(shard.position[back])] = shard.base[back].to(weight.dtype)
    return weight
