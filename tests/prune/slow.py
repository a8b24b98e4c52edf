"""The pruners' formulas, slow and in float64, as the papers write them."""

from __future__ import annotations

import torch

from seft_ds.prune.choose import Budget, dead_count


def slow_obs(
    weight: torch.Tensor, h: torch.Tensor, budget: Budget, columns: int = 128
) -> tuple[torch.Tensor, torch.Tensor]:
    """SparseGPT by the OBS formula: the inverse is updated explicitly, column by column.

    arXiv 2301.00774: removing w_j costs w_j² / [H⁻¹]_jj over the columns not yet passed, and changes the
    others by -w_j / [H⁻¹]_jj · [H⁻¹]_j,: ; then column j leaves the inverse (a step of Gaussian elimination).

    weight (out, in), h (in, in) undamped, both float64. Returns the new weight and what died, bool.
    """
    weight, h = weight.clone(), h.clone()
    out, inputs = weight.shape
    unused = h.diagonal() == 0
    h[unused, unused] = 1.0
    weight[:, unused] = 0.0
    h += 0.01 * h.diagonal().mean() * torch.eye(inputs, dtype=h.dtype)
    inverses = [torch.linalg.inv(h)]  # [j]: the inverse without the columns before j
    for j in range(inputs - 1):
        inverse = inverses[-1]
        inverses.append(inverse - torch.outer(inverse[:, j], inverse[j]) / inverse[j, j])
    dead = torch.zeros_like(weight, dtype=torch.bool)
    keep, group = (int(p) for p in (budget.pattern or "0:0").split(":"))
    total = 0 if group else dead_count(budget.sparsity, out * inputs)
    for j in range(inputs):
        if not group and j % columns == 0:
            hi = min(j + columns, inputs)
            losses = [(float(weight[i, k] ** 2 / inverses[k][k, k]), i, k)
                      for i in range(out) for k in range(j, hi)]  # fmt: skip
            for _, i, k in sorted(losses)[: total * hi // inputs - total * j // inputs]:
                dead[i, k] = True
        if group and j % group == 0:
            for i in range(out):
                losses = [(float(weight[i, k] ** 2 / inverses[k][k, k]), k)
                          for k in range(j, j + group)]  # fmt: skip
                for _, k in sorted(losses)[: group - keep]:
                    dead[i, k] = True
        inverse = inverses[j]
        for i in range(out):
            if dead[i, j]:
                weight[i, j:] -= weight[i, j] / inverse[j, j] * inverse[j, j:]
                weight[i, j] = 0.0
    return weight, dead


def slow_wanda_dead(weight: torch.Tensor, x: torch.Tensor, budget: Budget) -> torch.Tensor:
    """Wanda, arXiv 2306.11695: |w| · ||x|| per output row, or in groups of M; (out, in), x (tokens, in)."""
    norms = [sum(float(v) ** 2 for v in column) ** 0.5 for column in x.T]
    dead = torch.zeros_like(weight, dtype=torch.bool)
    keep, group = (int(p) for p in (budget.pattern or f"0:{weight.shape[1]}").split(":"))
    count = group - keep if budget.pattern else int(dead_count(budget.sparsity, group))
    for i, row in enumerate(weight.tolist()):
        scores = [abs(w) * n for w, n in zip(row, norms)]
        for lo in range(0, len(row), group):
            for j in sorted(range(lo, lo + group), key=lambda j: (scores[j], j))[:count]:
                dead[i, j] = True
    return dead
