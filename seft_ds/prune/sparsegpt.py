"""SparseGPT (Frantar & Alistarh, arXiv 2301.00774): prune, and make up for it with the weights that stay.

With H = 2/N Σ x xᵀ of the layer's inputs (section 3.1), removing weight w_j of a row and updating the
columns after it loses w_j² / [H_j⁻¹]_jj, where H_j is H without the columns before j; the best update of
the columns after it is -w_j / [H_j⁻¹]_jj · [H_j⁻¹]_j,:. All rows go through the columns in the same order, so
that they share the inverses, which are read off one triangular matrix U with H⁻¹ = UᵀU (section 3.3 and its
algorithm 1):

    [H_j⁻¹]_j,:  =  U_jj · U_j,:            loss of w_j  =  (w_j / U_jj)²

Which entries die is decided for 128 columns at a time, over all rows together (section 3.4), or group by
group with an N:M pattern; the error is carried on within the columns of the block at once, and into all
later columns in one product at the block's end.

Departures from the paper's code: U comes from one factorisation in float64 and a triangular inverse (the
code factorises, inverts and factorises again in fp32), and the count of a block is exact (the code also
drops the entry at the threshold), such that the counts of all blocks add up to the weight's quota.
"""

from __future__ import annotations

import warnings

import torch

from seft_ds.prune.choose import Quota, check_group_divides, lowest, lowest_of_groups
from seft_ds.targets import parse_pattern

BLOCK_COLUMNS = 128
DAMPING = 0.01  # of the mean of H's diagonal
_DAMPING_TRIES = 4  # each ten times the one before


def inverse_factor(gram: torch.Tensor, name: str, damping: float = DAMPING) -> torch.Tensor:
    """U, fp32 (in, in) upper triangular with (H + damping)⁻¹ = UᵀU, of `gram` H, fp32 (in, in).

    An input that is always 0 counts as one of size 1 that has nothing to do with the others. H is damped by
    `damping` times the mean of its diagonal; if it can't be factorised even so, by up to 1000 times that,
    with a warning. Transient: three float64 and one fp32 matrix of its shape.

    Raises:
        ValueError: H is not finite, or no damping helped; `name` (of a layer with this input) is said.
    """
    diagonal = gram.diagonal().double()
    if not torch.isfinite(gram.sum(dtype=torch.float64)):
        raise ValueError(
            f"the inputs of {name} are not finite for the calibration text; check the model, or prune in "
            "--dtype float32"
        )
    diagonal = torch.where(diagonal == 0, 1.0, diagonal)
    mean = diagonal.mean()
    for attempt in range(_DAMPING_TRIES):
        share = damping * 10**attempt
        # H = JMMᵀJ with J the reversal: then U = M⁻¹ reversed is upper triangular, and UᵀU = H⁻¹.
        reverse = gram.flip(0, 1).double()
        reverse.diagonal().copy_((diagonal + share * mean).flip(0))
        lower, failed = torch.linalg.cholesky_ex(reverse)
        del reverse
        if not int(failed):
            identity = torch.eye(len(gram), dtype=torch.float64, device=gram.device)
            inverse = torch.linalg.solve_triangular(lower, identity, upper=False)
            del lower, identity
            return inverse.float().flip(0, 1)
        warnings.warn(
            f"the inputs of {name} can't be factorised with a damping of {share:g}; trying 10 times that",
            stacklevel=2,
        )
    raise ValueError(
        f"the inputs of {name} can't be factorised, not even with a damping of {share:g} of their mean size; "
        "give more calibration text (--calibration_samples), or use --method wanda"
    )


def sparsegpt(
    weight: torch.Tensor,  # (out, in)
    gram: torch.Tensor,  # fp32 (in, in)
    factor: torch.Tensor,  # of `inverse_factor(gram)`
    quota: Quota,
    name: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The pruned and updated weight, fp32 (out, in), and which of its entries died, bool (out, in).

    A live entry may have become 0 (those of an input that is always 0 do): the mask says what is live.

    Raises:
        ValueError: M does not divide the inputs, or the result is not finite; with `name`.
    """
    out_features, in_features = weight.shape
    if quota.pattern is not None:
        check_group_divides(in_features, *parse_pattern(quota.pattern), name)
    # Columns as rows: each step reads and writes whole columns, which are contiguous this way.
    columns = weight.detach().float().t().contiguous()  # (in, out)
    columns[gram.diagonal() == 0] = 0.0
    dead = torch.zeros_like(columns, dtype=torch.bool)
    width = _block_columns(quota)
    for lo in range(0, in_features, width):
        hi = min(lo + width, in_features)
        block, u = columns[lo:hi], factor[lo:hi, lo:hi]
        if quota.pattern is None:
            count = quota.dead * hi // in_features - quota.dead * lo // in_features
            loss = (block / u.diagonal().unsqueeze(1)).square()
            # As (out, columns): the lower position of two equals is the one in the earlier row.
            dead[lo:hi] = lowest(loss.t().reshape(1, -1), count).view(out_features, -1).t()
        error = _prune_columns(block, dead[lo:hi], u, quota.pattern, name)
        columns[hi:] -= factor[lo:hi, hi:].t() @ error
    if not torch.isfinite(columns.sum(dtype=torch.float64)):
        raise ValueError(
            f"{name} is not finite after its update; check the model and the calibration text, or use "
            "--method wanda"
        )
    return columns.t().contiguous(), dead.t().contiguous()


def _prune_columns(
    block: torch.Tensor,  # fp32 (columns, out), changed in place
    dead: torch.Tensor,  # bool (columns, out): which die; with a pattern filled in here
    u: torch.Tensor,  # (columns, columns) upper triangular
    pattern: str | None,
    name: str,
) -> torch.Tensor:
    """Column by column, fp32 (columns, out): the errors that the later columns have to make up for."""
    error = torch.empty_like(block)
    keep, group = parse_pattern(pattern) if pattern is not None else (0, 0)
    diagonal = u.diagonal()
    for j in range(len(block)):
        if group and j % group == 0:
            # Only now, with the updates of all columns before the group.
            loss = (block[j : j + group] / diagonal[j : j + group].unsqueeze(1)).square()
            dead[j : j + group] = lowest_of_groups(loss.t().contiguous(), keep, group, name).t()
        error[j] = torch.where(dead[j], block[j] / diagonal[j], 0.0)
        block[j].masked_fill_(dead[j], 0.0)
        block[j + 1 :].addr_(u[j, j + 1 :], error[j], alpha=-1)
    return error


def _block_columns(quota: Quota) -> int:
    """Columns decided together: 128, or as many whole groups of a pattern as that holds."""
    if quota.pattern is None:
        return BLOCK_COLUMNS
    _, group = parse_pattern(quota.pattern)
    return max(group, BLOCK_COLUMNS - BLOCK_COLUMNS % group)
