"""Learning rates of slots by the size of their inputs.

Adam moves every slot by about one learning rate, whatever its gradient's size. What a move does to the
output is its length times the input, and inputs differ: between the features of one layer, and more between
layers. So slots on large inputs take shorter steps, and those on small inputs longer ones:

    rate of a slot on input j = learning rate · (r_j / r)^-POWER

r_j: root mean square of the input; r: geometric mean of r_j over all slots, as if a weight's slots lay evenly
over its columns, so that the learning rate keeps its meaning. Between no correction (0) and moving all
outputs alike (1) results hardly differ from 1/2 on (docs/results.md).
"""

from __future__ import annotations

import torch

POWER = 0.75
_FARTHEST = 10.0  # a rate is never more than ten times the learning rate, nor less than a tenth


def input_rates(
    mean_squares: list[torch.Tensor], slots: list[int], power: float = POWER
) -> list[torch.Tensor]:
    """The factor on the learning rate of each input of each weight: fp32 (in,), in [0.1, 10].

    Args:
        mean_squares: of each weight, fp32 (in,): mean of x_j² over tokens. An input that was 0 in all of
            them has a factor of 1.
        slots: how many slots each weight has.
    """
    logs = [0.5 * x.double().log() for x in mean_squares]  # of the root mean square
    known = [log.isfinite() for log in logs]
    total, weight = 0.0, 0.0
    for log, ok, n in zip(logs, known, slots, strict=True):
        if bool(ok.any()):
            total += n * float(log[ok].mean())
            weight += n
    middle = total / weight if weight else 0.0
    return [
        torch.where(ok, (-power * (log - middle)).exp(), 1.0)
        .clamp(1 / _FARTHEST, _FARTHEST)
        .float()
        for log, ok in zip(logs, known, strict=True)
    ]
