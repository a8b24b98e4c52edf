"""Wanda (Sun et al., arXiv 2306.11695): prune by |w| times the size of the input it multiplies.

    score[i, j] = |W[i, j]| * ||x_j||_2        (section 3, equation 1)

where ||x_j|| is the norm of input feature j over all calibration tokens. Scores are compared within an
output row, so that every row keeps the same number of inputs. Nothing is updated afterwards: the
surviving weights keep their dense values.
"""

from __future__ import annotations

import torch

from seft_ds.prune.choose import Quota, dead_positions


def square_sums(x: torch.Tensor) -> torch.Tensor:
    """float64 (in,): sum over all tokens of x² for `x` (..., in) of any floating dtype.

    Squares are taken in fp32 (bf16 would lose most digits) and added in float64.
    """
    return x.detach().reshape(-1, x.shape[-1]).float().square().sum(dim=0, dtype=torch.float64)


def wanda_scores(weight: torch.Tensor, sums: torch.Tensor) -> torch.Tensor:
    """fp32 (out, in): |W| * ||x|| of `weight` (out, in) and the inputs' sums of squares (in,)."""
    return weight.detach().abs().float() * sums.sqrt().float()


def wanda_dead(weight: torch.Tensor, sums: torch.Tensor, quota: Quota, name: str) -> torch.Tensor:
    """Bool (out, in): the entries of `weight` (out, in) that die, given the sums of squares (in,).

    Lower positions die first among equals.

    Raises:
        ValueError: M does not divide the inputs, or a score is not finite; `name` is in the message.
    """
    return dead_positions(wanda_scores(weight, sums), quota, name)
