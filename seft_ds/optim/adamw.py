"""State repair for AdamW: what a fresh slot's moments become.

All slots share one step count, so Adam's bias correction won't help a slot that starts late: with zero
moments its first step would be (1 - β₁) / √(1 - β₂) ≈ 3.2 times a normal one. The window has already
measured the gradient there: first moment = mean gradient, second moment = mean square gradient.
(The square of the mean alone would be far too small a second moment.)
"""

from __future__ import annotations

import torch

MOMENTS = ("exp_avg", "exp_avg_sq")


def repair(
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    index: torch.Tensor,
    G: torch.Tensor,
    Q: torch.Tensor,
    window_steps: int,
) -> None:
    """Set, in place, the moments (n,) of fresh slots at `index` (m,) from their sums G, Q (m,)."""
    exp_avg[index] = (G / window_steps).to(exp_avg.dtype)
    exp_avg_sq[index] = (Q / window_steps).to(exp_avg_sq.dtype)
