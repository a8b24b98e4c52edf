"""A linear layer whose weight is frozen, exactly sparse, and trained through its slots.

The weight that the module holds is always the effective one, so the forward pass is the plain dense
product: no copy of W, no adapter branch. The deltas enter the graph only to receive a gradient: their
values are already in W (written there after each optimizer step), which is why forward never reads
them. Backward forms the input gradient and g[j] = Σ_tokens dy[row_j] · x[col_j] at the K slots; inside
a scoring window it also hands (dy, x) to the window, which sums the dense gradient of this one weight.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import nn

from seft_ds.sparse.slot_grad import gather_slots, slot_gradient, whole_product

DELTA = "seft_delta"
POSITION = "seft_position"


def is_slot_parameter(name: str) -> bool:
    """Whether a parameter holds deltas or positions, and is no weight of the model."""
    return name.endswith((DELTA, POSITION))


class GradientSink(Protocol):
    """Takes what a weight's dense gradient is made of, while the weight is in a window."""

    uses_product: bool  # whether `add` is quicker with `product`

    def add(
        self,
        dy: torch.Tensor,
        x: torch.Tensor,
        ends: Sequence[int] | None = None,
        product: torch.Tensor | None = None,
    ) -> None:
        """dy: (tokens, out); x: (tokens, in); their product dyᵀx is this micro-batch's gradient.

        ends: of a fused weight, where each expert's tokens end (`slot_grad.dense_parts`).
        product: dyᵀx, (out, in), if it is there already.
        """
        ...


class SlotLinear(torch.autograd.Function):
    """y = x Wᵀ + b, with a gradient for x and for the deltas, never for W."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        x: torch.Tensor,  # (..., in)
        weight: torch.Tensor,  # (out, in), the effective weight
        bias: torch.Tensor | None,  # (out,)
        delta: torch.Tensor,  # (K,)
        position: torch.Tensor,  # (K,) flat positions
        sinks: Sequence[GradientSink],
        not_finite: torch.Tensor | None = None,  # (), bool: set if a slot gradient isn't finite
        kernel: Callable[[int], str] | None = None,  # tokens -> kernel of the slot gradients
    ) -> torch.Tensor:
        # The Parameter objects themselves are saved, never a view or `.data`: ZeRO-3 empties them
        # after forward and fills them again before this module's backward.
        ctx.save_for_backward(x, weight, position)
        ctx.delta_dtype = delta.dtype
        ctx.sinks, ctx.not_finite, ctx.kernel = sinks, not_finite, kernel
        return nn.functional.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple:  # type: ignore[override]
        x, weight, position = ctx.saved_tensors
        dx = dy @ weight if ctx.needs_input_grad[0] else None
        flat_dy, flat_x = dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1])
        d_delta = product = None
        if ctx.needs_input_grad[3]:
            kernel = ctx.kernel(len(flat_x)) if ctx.kernel is not None else None
            if any(sink.uses_product for sink in ctx.sinks):
                product = whole_product(flat_dy, flat_x, position.numel(), kernel)
            if product is None:
                gradient = slot_gradient(flat_dy, flat_x, position, kernel)
            else:
                gradient = gather_slots(product, position)
            d_delta = gradient.to(ctx.delta_dtype)
            if ctx.not_finite is not None:  # no host sync here: the flag is read once a step
                ctx.not_finite.logical_or_(~d_delta.isfinite().all())
        for sink in ctx.sinks:
            sink.add(flat_dy, flat_x, None, product)
        return dx, None, None, d_delta, None, None, None, None


class SeftLinear(nn.Linear):
    """`nn.Linear` with slots. Made from an existing layer by `add_slots`, never constructed."""

    seft_delta: nn.Parameter
    seft_position: nn.Parameter
    # Set by the engine extension; None means that nobody writes the deltas into the weight.
    seft_runtime: Any

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        # Not `self.training`: a model straight from `from_pretrained` is in eval mode and may well train.
        if not torch.is_grad_enabled() or (self.seft_runtime is None and not self.training):
            return nn.functional.linear(input, self.weight, self.bias)
        if self.seft_runtime is None:
            raise ValueError(
                "This model has SEFT slots but no DeepSpeed engine that applies them, so training would "
                "change nothing. Pass the model to seft_ds.initialize() or deepspeed.initialize() first."
            )
        return SlotLinear.apply(
            input,
            self.weight,
            self.bias,
            self.seft_delta,
            self.seft_position,
            self.seft_runtime.open_sinks(),
            self.seft_runtime.not_finite,
            self.seft_runtime.kernel,
        )


_CLASSES: dict[tuple[type, type], type] = {}  # (what is added, class) -> the class with it


def swap_class(module: nn.Module, ours: type[nn.Module]) -> None:
    """Have `ours` come before a module's own class, in place; of a plain `nn.Linear` take its place.

    Parameters, names and hooks stay. A subclass of `nn.Linear` keeps what it has besides its forward pass,
    which has to be x Wᵀ + b (`seft_ds.sparse.layers`).
    """
    kind = type(module)
    if kind is nn.Linear:
        module.__class__ = ours
        return
    if (ours, kind) not in _CLASSES:
        _CLASSES[ours, kind] = type(f"Seft{kind.__name__}", (ours, kind), {})
    module.__class__ = _CLASSES[ours, kind]


def add_slots(module: nn.Linear, position: torch.Tensor) -> None:
    """Turn a linear layer into a `SeftLinear` in place, with one slot at each of `position` (K,).

    The class is swapped and two parameters are added; names, weight object and hooks stay, so that a
    layer that ZeRO-3 has already partitioned can be converted without touching its weight.
    """
    assert not isinstance(module, SeftLinear)
    swap_class(module, SeftLinear)
    assert isinstance(module, SeftLinear)
    # ZeRO-3 keeps an empty placeholder in `weight`, but its device and dtype are the real ones.
    like = module.weight
    delta = torch.zeros(position.numel(), dtype=like.dtype, device=like.device)
    module.seft_delta = nn.Parameter(delta)
    module.seft_position = nn.Parameter(position.to(like.device), requires_grad=False)
    module.seft_runtime = None
