"""SPP (Lu et al., arXiv 2405.16057): each weight is scaled by a factor of its row and one of its column.

    y = x Wᵀ + s · x (W ⊙ A' ⊙ b)ᵀ        (section 3, equation 5)

W (out, in) is frozen; A (g, in) is repeated over the rows so that each of its rows serves out / g of them; b
(out,) multiplies rows. What is 0 in W stays 0, in training and merged. A starts as the weight of a linear
layer does, b at 0, so that training starts at the pruned model. As in the paper's code, s = alpha / rank, and
the two products are formed apart: in bf16 W · (1 + small) would lose the small part.

Budget: SPP has g · in + out trainable entries. `groups_for(rank)` takes the g that comes nearest to LoRA's
rank · (out + in); the rest, at most half of `in`, stays unused. Where g doesn't divide the rows (the paper's
always does), row i uses row floor(i · g / out) of A, which is the same where it divides.

The frozen weight times a factor is an (out, in) tensor per layer that autograd keeps for the backward pass.
The paper's memory-saving form (one product per row of A) gives the same numbers.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from seft_ds.sparse.linear import swap_class


def groups_for(rank: int, shape: tuple[int, int]) -> int:
    """g such that g · in + out is nearest to rank · (out + in), for a weight of `shape` (out, in)."""
    out_features, in_features = shape
    exact = (rank * (out_features + in_features) - out_features) / in_features
    return min(max(1, math.floor(exact + 0.5)), out_features)


def spp_delta(
    weight: torch.Tensor,  # (out, in)
    a: torch.Tensor,  # (g, in)
    b: torch.Tensor,  # (out,)
    scale: float,
) -> torch.Tensor:
    """(out, in): what SPP adds to `weight`; 0 wherever `weight` is."""
    rows = torch.arange(weight.shape[0], device=weight.device) * a.shape[0] // weight.shape[0]
    return weight * (a[rows] * (scale * b).unsqueeze(1))


class SppLinear(nn.Linear):
    """`nn.Linear` with SPP's factors. Made from an existing layer by `add_spp`, never constructed."""

    spp_a: nn.Parameter  # (g, in)
    spp_b: nn.Parameter  # (out,)
    adapter_scale: float
    adapter_dropout: float

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        # The Parameters themselves go into the products: ZeRO-3 gathers and releases them around this call.
        plain = nn.functional.linear(input, self.weight, self.bias)
        dropped = nn.functional.dropout(input, self.adapter_dropout, self.training)
        delta = spp_delta(self.weight, self.spp_a, self.spp_b, self.adapter_scale)
        return plain + nn.functional.linear(dropped, delta)


def add_spp(
    module: nn.Linear,
    shape: tuple[int, int],  # (out, in): ZeRO-3 leaves only a placeholder in the weight
    rank: int,
    scale: float,
    dropout: float,
    generator: torch.Generator,
) -> tuple[nn.Parameter, nn.Parameter]:
    """Turn a linear layer into an `SppLinear` in place; returns A and b. The weight object stays."""
    swap_class(module, SppLinear)
    assert isinstance(module, SppLinear)
    like, (out_features, in_features) = module.weight, shape
    a = torch.empty(groups_for(rank, shape), in_features)
    a.uniform_(-(in_features**-0.5), in_features**-0.5, generator=generator)
    module.spp_a = nn.Parameter(a.to(like.device, like.dtype))
    module.spp_b = nn.Parameter(torch.zeros(out_features, device=like.device, dtype=like.dtype))
    module.adapter_scale, module.adapter_dropout = scale, dropout
    return module.spp_a, module.spp_b
