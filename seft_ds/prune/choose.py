"""Which entries of a weight a pruner gives up, once every entry has a score.

A method (magnitude, Wanda) only scores; this file turns scores into an exact set of dead positions.
Exact means: the count is met in every row, group or weight, and among equal scores the lower position
dies first, so that the same scores give the same mask on every machine and every number of ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import torch

from seft_ds.targets import parse_pattern

_CHUNK = 1 << 24  # scores looked at in one go: bounds the transient memory (about 10 bytes a score)


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
    if k == 0:
        return chosen
    step = max(1, _CHUNK // n)
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
    if in_features % group:
        raise ValueError(
            f"{name} has {in_features} inputs, which pattern {keep}:{group} cannot divide into groups "
            f"of {group}; choose a pattern whose M divides {in_features}, or --sparsity"
        )
    dead = torch.empty(scores.numel(), dtype=torch.bool, device=scores.device)
    step = _CHUNK - _CHUNK % group
    for part, out in zip(scores.reshape(-1).split(step), dead.split(step)):
        # With a handful of entries a row, a stable sort is much faster than a selection per row.
        order = part.view(-1, group).argsort(dim=1, stable=True)
        out.view(-1, group).scatter_(1, order, _last_are_live(order, keep))
    return dead.view(out_features, in_features)


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
