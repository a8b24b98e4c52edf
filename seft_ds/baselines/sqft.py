"""SparsePEFT, the sparse part of SQFT (Muñoz et al., arXiv 2410.03750): LoRA under the mask of the weight.

    y = x Wᵀ + s · x ((B A) ⊙ [W ≠ 0])ᵀ        (section 3.2)

W (out, in) is frozen, A is (r, in), B (out, r), s = alpha / r. What is 0 in W stays 0 when the adapter is
merged. A starts as the weight of a linear layer does, B at 0. The search over ranks and the quantised part of
SQFT are left out: they are about other questions than how well a sparse model is repaired.

Every layer forms B A, an (out, in) tensor, in each forward pass; that is the price of the mask, as published.
"""

from __future__ import annotations

import torch
from torch import nn

from seft_ds.sparse.linear import swap_class


def sqft_delta(
    weight: torch.Tensor,  # (out, in)
    a: torch.Tensor,  # (r, in)
    b: torch.Tensor,  # (out, r)
    scale: float,
) -> torch.Tensor:
    """(out, in): what SparsePEFT adds to `weight`; 0 wherever `weight` is."""
    return (b @ a).mul(scale) * (weight != 0)


class SqftLinear(nn.Linear):
    """`nn.Linear` with a masked adapter. Made from an existing layer by `add_sqft`, never constructed."""

    sqft_a: nn.Parameter  # (r, in)
    sqft_b: nn.Parameter  # (out, r)
    adapter_scale: float
    adapter_dropout: float

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        plain = nn.functional.linear(input, self.weight, self.bias)
        dropped = nn.functional.dropout(input, self.adapter_dropout, self.training)
        delta = sqft_delta(self.weight, self.sqft_a, self.sqft_b, self.adapter_scale)
        return plain + nn.functional.linear(dropped, delta)


def add_sqft(
    module: nn.Linear,
    shape: tuple[int, int],  # (out, in): ZeRO-3 leaves only a placeholder in the weight
    rank: int,
    scale: float,
    dropout: float,
    generator: torch.Generator,
) -> tuple[nn.Parameter, nn.Parameter]:
    """Turn a linear layer into a `SqftLinear` in place; returns A and B. The weight object stays."""
    swap_class(module, SqftLinear)
    assert isinstance(module, SqftLinear)
    like, (out_features, in_features) = module.weight, shape
    a = torch.empty(rank, in_features)
    a.uniform_(-(in_features**-0.5), in_features**-0.5, generator=generator)
    module.sqft_a = nn.Parameter(a.to(like.device, like.dtype))
    b = torch.zeros(out_features, rank, device=like.device, dtype=like.dtype)
    module.sqft_b = nn.Parameter(b)
    module.adapter_scale, module.adapter_dropout = scale, dropout
    return module.sqft_a, module.sqft_b
