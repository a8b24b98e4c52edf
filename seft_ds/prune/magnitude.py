"""Magnitude pruning: the smallest |w| of a weight die.

The ranking is over the whole weight, as in Han et al. (arXiv 1506.02626); no data is needed. It is the
floor that any other method has to beat: at 50 % and above it ruins most language models.
"""

from __future__ import annotations

import torch

from seft_ds.prune.choose import (
    Budget,
    check_scores,
    dead_count,
    lowest,
    lowest_of_groups,
)
from seft_ds.targets import parse_pattern


def magnitude_dead(weight: torch.Tensor, budget: Budget, name: str) -> torch.Tensor:
    """Bool (out, in): the entries of `weight` (out, in) that die.

    With a sparsity exactly floor(sparsity * out * in) of the weight, wherever they lie; with N:M all but
    N of every M consecutive inputs. Lower positions die first among equals.

    Raises:
        ValueError: M does not divide the inputs, or a weight is not finite; `name` is in the message.
    """
    scores = weight.detach().abs().float()
    check_scores(scores, name)
    if budget.pattern is not None:
        return lowest_of_groups(scores, *parse_pattern(budget.pattern), name)
    assert budget.sparsity is not None
    whole = scores.reshape(1, -1)
    return lowest(whole, dead_count(budget.sparsity, whole.shape[1])).view_as(weight)
