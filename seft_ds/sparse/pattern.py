"""N:M patterns: in every group of M consecutive inputs exactly N weights are live.

Groups lie along the input dimension, so a group is M consecutive flat positions; `shard_range` moves the
borders between owners to multiples of M, and every function here sees whole groups only.
"""

from __future__ import annotations

import torch

# What is looked for in the zeros. 1:2 also passes as 2:4, and 1:4 as 2:8: the stricter one comes first.
COMMON = ((1, 2), (2, 4), (4, 8), (1, 4), (2, 8))
_NEARLY_ALL = (
    0.99  # of the pattern's live weights: a few may happen to be exactly 0 in a real model
)


def holds(live: torch.Tensor, n: int, m: int) -> bool:
    """Whether every group of M of live (k·M,), bool, has exactly N live members."""
    return bool((live.view(-1, m).sum(1) == n).all())


def at_most(live: torch.Tensor, n: int, m: int) -> bool:
    """Whether no group of M of live (k·M,), bool, has more than N live members."""
    return bool((live.view(-1, m).sum(1) <= n).all())


def fill(live: torch.Tensor, n: int, m: int) -> torch.Tensor:
    """Bool like live (k·M,): groups with fewer than N live members get their first dead ones as well.

    A pruned weight may hold an exact zero among those that it kept; to the pattern it is live.
    """
    groups = live.view(-1, m)
    missing = n - groups.sum(dim=1, keepdim=True)
    return (groups | ((~groups).cumsum(dim=1) <= missing) & ~groups).view_as(live)


def plausible(live_count: int, numel: int, columns: int) -> list[tuple[int, int]]:
    """The common patterns that the live count of a weight allows; cheap, before looking at groups."""
    return [
        (n, m)
        for n, m in COMMON
        if columns % m == 0 and _NEARLY_ALL * n * numel <= live_count * m <= n * numel
    ]


def swap_candidates(
    growth: torch.Tensor,
    sensitivity: torch.Tensor,
    live: torch.Tensor,
    held: torch.Tensor,
    m: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Which positions may grow without breaking the pattern, and who pays for a revival.

    A dead position may enter only if its own group gives up a live member that no slot holds. Each
    group offers at most one such swap an event: its dead position with the largest growth score against
    its unheld live member with the smallest sensitivity (ties: the lower position). The member that
    would pay is itself not a candidate, so the two choices can't collide.

    Args:
        growth, sensitivity: fp32 (k·m,), ≥ 0. live, held: bool (k·m,).

    Returns:
        candidate: bool (k·m,). victim: int64 (k,), the paying index in each group, -1 where no swap.
    """
    free = (live & ~held).view(-1, m)
    dead = ~live.view(-1, m)
    swaps = free.any(1) & dead.any(1)
    victim = _first_best(-sensitivity.view(-1, m), free)
    entrant = _first_best(growth.view(-1, m), dead)
    group = swaps.nonzero().squeeze(1)
    candidate = free.clone()
    candidate[group, victim[group]] = False
    candidate[group, entrant[group]] = True
    return candidate.view(-1), torch.where(swaps, victim, -1)


def _first_best(score: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
    """Column of the largest allowed score of each row, the first one of equals: (k,).

    A row without an allowed score gets some column; callers ignore it.
    """
    score = score.masked_fill(~allowed, -torch.inf)
    best = (score == score.amax(1, keepdim=True)) & allowed
    return best.int().cumsum(1).eq(0).sum(1).clamp(max=score.shape[1] - 1)
