"""Scores of positions: pure functions of the weight and its window, behind one interface.

Every score is fp32, non-negative, and has one value a position of a shard. Growth takes the largest,
pruning the smallest. `G` is the signed sum of the step gradients over the window and `Q` the sum of
their squares; both were reduced over ranks and micro-batches before any magnitude is taken here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from seft_ds.sparse.curvature import Factors
from seft_ds.sparse.radix import KEY_MAX


@dataclass
class ScoreInputs:
    """One shard of one weight at an event."""

    weight: torch.Tensor  # (n,) the effective weights
    G: torch.Tensor  # (n,) fp32
    Q: torch.Tensor  # (n,) fp32
    lo: int  # flat position in the weight of the first of them
    seed: int  # differs between weights and events
    step: int = 1  # from one position to the next
    factors: Factors | None = None  # of the curvature, if it was measured


Score = Callable[[ScoreInputs], torch.Tensor]


def gradient_magnitude(inputs: ScoreInputs) -> torch.Tensor:
    """|G|: how much the loss falls for a small move of this weight (SEFT, arXiv 2505.24037; RigL)."""
    return inputs.G.abs()


def consistency(inputs: ScoreInputs) -> torch.Tensor:
    """|G| / √Q: how much the window's gradients agree, whatever their size; 0 where there were none."""
    return _over_root(inputs.G.abs(), inputs.Q)


def gain(inputs: ScoreInputs) -> torch.Tensor:
    """(G² - Q) / √Q, at least 0: what a move of Adam's length brings, without what is only noise.

    G² - Q is the sum of g_s · g_t over all pairs of different steps, so that noise of mean 0 cancels, and the
    square of the mean gradient remains. Adam moves along g / √(mean g²).
    """
    return _over_root((inputs.G.square() - inputs.Q).clamp_(min=0), inputs.Q)


def _over_root(numerator: torch.Tensor, Q: torch.Tensor) -> torch.Tensor:
    """fp32 (n,). Kinds of devices that round roots or quotients differently may choose differently."""
    return torch.where(Q > 0, numerator / Q.sqrt(), 0.0)


def random_score(inputs: ScoreInputs) -> torch.Tensor:
    """The same for every rank count; isolates what the gradient criterion is worth."""
    n = inputs.weight.numel()
    position = inputs.lo + inputs.step * torch.arange(n, device=inputs.weight.device)
    return (hash_keys(position, inputs.seed) >> 7).to(torch.float32)  # 24 bits: exact in fp32


def taylor(inputs: ScoreInputs) -> torch.Tensor:
    """|w · G|: first-order change of the loss when the weight is removed (SEFT's sensitivity)."""
    return (inputs.weight.float() * inputs.G).abs_()


def fisher(inputs: ScoreInputs) -> torch.Tensor:
    """w² · Q: second-order change of the loss under the diagonal empirical Fisher."""
    return inputs.weight.float().square().mul_(inputs.Q)


def curvature(inputs: ScoreInputs) -> torch.Tensor:
    """w² · E[dy²] · E[x²]: as `fisher`, but from two vectors a layer (`seft_ds.sparse.curvature`), which are
    means over the tokens of all steps measured so far, where Q knows a few."""
    assert inputs.factors is not None
    return inputs.factors.worth(inputs.weight, inputs.lo, inputs.step)


def weight_magnitude(inputs: ScoreInputs) -> torch.Tensor:
    """|w|."""
    return inputs.weight.float().abs()


GROW: dict[str, Score] = {
    "magnitude": gradient_magnitude,
    "consistency": consistency,
    "gain": gain,
    "random": random_score,
}
PRUNE: dict[str, Score] = {
    "curvature": curvature,
    "taylor": taylor,
    "fisher": fisher,
    "magnitude": weight_magnitude,
}


def hash_keys(position: torch.Tensor, seed: int) -> torch.Tensor:
    """Pseudo-random int32 keys in [0, 2³¹) of positions (n,), int64: a function of position and seed.

    A counter-based generator (the finaliser of splitmix64), so that a shard can compute its part
    without knowing how many ranks there are.
    """
    x = position.long() + _as_int64((seed + 1) * 0x9E3779B97F4A7C15)
    x = (x ^ _shift_right(x, 30)) * _as_int64(0xBF58476D1CE4E5B9)
    x = (x ^ _shift_right(x, 27)) * _as_int64(0x94D049BB133111EB)
    x = x ^ _shift_right(x, 31)
    return (x & KEY_MAX).to(torch.int32)


def _shift_right(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical shift: torch's >> copies the sign bit."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _as_int64(value: int) -> int:
    value %= 1 << 64
    return value - (1 << 64) if value >= 1 << 63 else value
