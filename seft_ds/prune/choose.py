"""Which entries of a weight a pruner gives up, once every entry has a score.

A method (magnitude, Wanda) only scores; this file turns scores into an exact set of dead positions.
Exact means: the count is met in every row, group or weight, and among equal scores the lower position
dies first, so that the same scores give the same mask on every machine and every number of ranks.

A `Budget` is what the user asks for; a `Quota` is what that means for one weight, as a count.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import torch

from seft_ds.targets import parse_pattern

SCORES_AT_ONCE = (
    1 << 24
)  # scores looked at in one go: bounds the transient memory (about 10 bytes a score)


@dataclass(frozen=True)
class Budget:
    """How much to prune: a fraction of the entries, or an N:M pattern. Exactly one of the two is set."""

    sparsity: float | None = None
    pattern: str | None = None  # "N:M": N of every M consecutive inputs stay live

    def __post_init__(self) -> None:
        if (self.sparsity is None) == (self.pattern is None):
            raise ValueError(
                f"got sparsity={self.sparsity} and pattern={self.pattern}; give exactly one of them, "
                "such as --sparsity 0.6 or --pattern 2:4"
            )
        if self.sparsity is not None and not 0 < self.sparsity < 1:
            raise ValueError(
                f"got sparsity {self.sparsity}; it is the share of weights to prune and lies between "
                "0 and 1, both excluded: write 0.6 for 60 %"
            )
        if self.pattern is not None:
            parse_pattern(self.pattern)


@dataclass(frozen=True)
class Quota:
    """What one weight (out, in) gives up: exactly `dead` entries, or by an N:M pattern."""

    dead: int
    by_row: bool = (
        False  # as many from every row; where it doesn't divide, the first rows give one more
    )
    pattern: str | None = None  # then `dead` follows from it


def quota_of(budget: Budget, shape: tuple[int, int], by_row: bool) -> Quota:
    """The quota of a weight of `shape` (out, in) where all weights have the same budget.

    By row it is floor(sparsity * in) of each, otherwise floor(sparsity * out * in) of the weight.
    """
    out_features, in_features = shape
    if budget.pattern is not None:
        keep, group = parse_pattern(budget.pattern)
        return Quota(out_features * in_features // group * (group - keep), pattern=budget.pattern)
    assert budget.sparsity is not None
    if by_row:
        return Quota(out_features * dead_count(budget.sparsity, in_features), by_row=True)
    return Quota(dead_count(budget.sparsity, out_features * in_features))


def dead_positions(scores: torch.Tensor, quota: Quota, name: str) -> torch.Tensor:
    """Bool like `scores` (out, in): the entries that die, the lowest scores within the quota's unit.

    Raises:
        ValueError: M of a pattern does not divide the inputs, or a score is not finite; with `name`.
    """
    check_scores(scores, name)
    if quota.pattern is not None:
        return lowest_of_groups(scores, *parse_pattern(quota.pattern), name)
    if not quota.by_row:
        return lowest(scores.reshape(1, -1), quota.dead).view_as(scores)
    each, more = divmod(quota.dead, scores.shape[0])
    return torch.cat([lowest(scores[:more], each + 1), lowest(scores[more:], each)])


def apportion(total: int, shares: list[float]) -> list[int]:
    """`total` split in proportion to `shares`, in whole numbers that add up; ties to the earlier.

    Largest remainders first. The shares are positive.
    """
    exact = [total * Fraction(share) / sum(map(Fraction, shares)) for share in shares]
    parts = [int(part) for part in exact]
    order = sorted(range(len(parts)), key=lambda i: (parts[i] - exact[i], i))
    for i in order[: total - sum(parts)]:
        parts[i] += 1
    return parts


def dead_count(sparsity: float, numel: int) -> int:
    """floor(sparsity * numel), with the sparsity read as the decimal that the user wrote.

    In binary floating point 0.29 * 100 is 28.999..., and a plain floor would lose an entry.
    """
    return int(Fraction(str(sparsity)) * numel)


def lowest(scores: torch.Tensor, k: int) -> torch.Tensor:
    """Bool (rows, n): the `k` lowest of each row of `scores` (rows, n); ties go to the lower position.

    Exactly `k` entries of every row are set. Scores must not be NaN. No host-device sync.
    """
    rows, n = scores.shape
    chosen = torch.zeros(rows, n, dtype=torch.bool, device=scores.device)
    if k == 0 or rows == 0:
        return chosen
    step = max(1, SCORES_AT_ONCE // n)
    for lo in range(0, rows, step):
        part = scores[lo : lo + step]
        threshold = part.kthvalue(k, dim=1, keepdim=True).values
        below, tied = part < threshold, part == threshold
        # Entries below the threshold are fewer than k; the first tied ones fill the row up to k.
        missing = k - below.sum(dim=1, keepdim=True)
        chosen[lo : lo + step] = below | (tied & (tied.cumsum(dim=1, dtype=torch.int32) <= missing))
    return chosen


def lowest_of_groups(scores: torch.Tensor, keep: int, group: int, name: str) -> torch.Tensor:
    """Bool (out, in): all but the `keep` best of every `group` consecutive inputs of `scores` (out, in).

    Raises:
        ValueError: the inputs of weight `name` do not divide into groups.
    """
    out_features, in_features = scores.shape
    check_group_divides(in_features, keep, group, name)
    dead = torch.empty(scores.numel(), dtype=torch.bool, device=scores.device)
    step = SCORES_AT_ONCE - SCORES_AT_ONCE % group
    for part, out in zip(scores.reshape(-1).split(step), dead.split(step)):
        # With a handful of entries a row, a stable sort is much faster than a selection per row.
        order = part.view(-1, group).argsort(dim=1, stable=True)
        out.view(-1, group).scatter_(1, order, _last_are_live(order, keep))
    return dead.view(out_features, in_features)


def check_group_divides(in_features: int, keep: int, group: int, name: str) -> None:
    """Raises ValueError, naming the weight, unless its inputs divide into groups of the pattern."""
    if in_features % group:
        raise ValueError(
            f"{name} has {in_features} inputs, which pattern {keep}:{group} cannot divide into groups "
            f"of {group}; choose a pattern whose M divides {in_features}, or --sparsity"
        )


def _last_are_live(order: torch.Tensor, keep: int) -> torch.Tensor:
    """Bool like `order` (groups, group), by rank within a group: True except for the last `keep`."""
    group = order.shape[1]
    return (torch.arange(group, device=order.device) < group - keep).expand_as(order)


def check_scores(scores: torch.Tensor, name: str) -> None:
    """Refuse scores that cannot be ranked. One host-device sync.

    Raises:
        ValueError: a score of weight `name` is NaN or infinite.
    """
    # The sum is finite only if all are: non-negative scores cannot cancel, float64 cannot overflow.
    if not torch.isfinite(scores.sum(dtype=torch.float64)):
        raise ValueError(
            f"{name} has scores that are not finite; the weights or the activations overflowed: "
            "check the model, or prune in --dtype float32"
        )


def zero_(weight: torch.Tensor, dead: torch.Tensor) -> torch.Tensor:
    """Set the `dead` (out, in) entries of `weight` (out, in) to +0.0, in place.

    Negative zeros among the others become +0.0 too: a zero on disk is a dead position, and the file
    must not hold two kinds of them.
    """
    return weight.masked_fill_(dead | (weight == 0), 0.0)
