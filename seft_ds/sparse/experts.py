"""Fused experts of transformers 5 whose weights are frozen, exactly sparse, and trained through their slots.

All experts of a layer share two weights, `gate_up_proj` (E, 2I, H) and `down_proj` (E, H, I). Tokens are
sorted by expert, and expert e's rows of x meet its matrix only: a grouped product. As in
`seft_ds.sparse.linear` the weight is the effective one, the deltas enter the graph only to receive a
gradient, and backward forms

    dx of expert e's tokens = dy · W_e,      g[j] = Σ over the tokens of slot j's expert: dy[row_j] · x[col_j]

expert by expert, so that no dense gradient of more than a block of rows is ever there. An expert without
tokens gets zeros; its slots stay in the graph, so that every rank runs the same one whatever it routes where.

A fused weight is looked at as one matrix of E · rows rows: flat positions, masks and shards need to know
nothing of experts. Slots come expert by expert (`seft_ds.targets`), so that those of expert e are a slice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from seft_ds.naming import FUSED
from seft_ds.sparse.linear import DELTA, POSITION, GradientSink, swap_class
from seft_ds.sparse.slot_grad import slot_gradient

# (name of a fused weight, x (rows, in) sorted by expert, where each expert's rows end) -> (rows, out)
Product = Callable[[str, torch.Tensor, list[int]], torch.Tensor]


# What transformers says of the form of fused experts: (wanted, what it is otherwise).
_FORMS = {
    "has_gate": (True, "experts without a gate"),
    "has_bias": (False, "experts with biases"),
    "is_transposed": (False, "experts whose weights are transposed"),
    "is_concatenated": (True, "experts whose gate and up projections are interleaved"),
    "has_post_expert_norm": (False, "experts with a norm of their own"),
    "_is_expert_parallel": (False, "experts that are spread over ranks"),
}


def is_fused_experts(module: nn.Module) -> bool:
    """Whether a module holds all experts of a layer in fused weights."""
    return all(name in module._parameters for name in FUSED)


def unsupported(module: nn.Module) -> str | None:
    """Why a module of fused experts can't be handled, or None."""
    for name, (wanted, problem) in _FORMS.items():
        if getattr(module, name, wanted) != wanted:
            return f"{problem} are not supported"
    known = hasattr(module, "_apply_gate")
    return None if known else "experts of another form than transformers 5's are not supported"


def experts_forward(
    module: Any,
    hidden: torch.Tensor,  # (tokens, hidden)
    top_k_index: torch.Tensor,  # (tokens, k), which experts
    top_k_weights: torch.Tensor,  # (tokens, k)
    product: Product,
) -> torch.Tensor:
    """What a module of fused experts computes, (tokens, hidden), its two products by `product`.

    One host-device sync: how many tokens each expert has.
    """
    tokens, k = top_k_index.shape
    expert, order = top_k_index.reshape(-1).sort(stable=True)
    counts = torch.bincount(expert, minlength=module.num_experts)
    ends = counts.cumsum(0).tolist()
    x = product("gate_up_proj", hidden[order // k], ends)
    x = product("down_proj", module._apply_gate(x), ends)
    x = x * top_k_weights.reshape(-1)[order].unsqueeze(-1)
    back = torch.empty_like(order)
    back[order] = torch.arange(order.numel(), device=order.device)
    return x[back].view(tokens, k, -1).sum(dim=1).to(hidden.dtype)


def grouped(x: torch.Tensor, weight: torch.Tensor, ends: Sequence[int]) -> torch.Tensor:
    """x_e W_eᵀ of each expert's rows. x: (rows, in) by expert; weight: (E, out, in); (rows, out)."""
    y = x.new_empty(x.shape[0], weight.shape[1])
    begin = 0
    for e, end in enumerate(ends):
        if end > begin:
            torch.mm(x[begin:end], weight[e].t(), out=y[begin:end])
        begin = end
    return y


class SlotExperts(torch.autograd.Function):
    """`grouped`, with a gradient for x and for the deltas, never for the weight."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        x: torch.Tensor,  # (rows, in), sorted by expert
        weight: torch.Tensor,  # (E, out, in), the effective weight
        delta: torch.Tensor | None,  # (K,), by expert; None: no slots
        position: torch.Tensor | None,  # (K,) flat positions in the weight
        slot_ends: Sequence[int],  # where each expert's slots end
        ends: Sequence[int],  # where each expert's rows end
        sinks: Sequence[GradientSink],
        not_finite: torch.Tensor | None,  # (), bool: set if a slot gradient isn't finite
        kernel: Callable[[int], str] | None = None,  # an expert's tokens -> kernel of its gradients
    ) -> torch.Tensor:
        # The Parameter objects themselves are saved: see SlotLinear.
        ctx.save_for_backward(x, weight, position)
        ctx.delta = None if delta is None else (delta.numel(), delta.dtype)
        ctx.slot_ends, ctx.ends, ctx.sinks, ctx.not_finite = slot_ends, ends, sinks, not_finite
        ctx.kernel = kernel
        return grouped(x, weight, ends)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple:  # type: ignore[override]
        x, weight, position = ctx.saved_tensors
        dy = dy.contiguous()
        dx = grouped(dy, weight.transpose(1, 2), ctx.ends) if ctx.needs_input_grad[0] else None
        d_delta = None
        if ctx.needs_input_grad[2]:
            size, dtype = ctx.delta
            gradient = experts_slot_gradient(dy, x, position, ctx.slot_ends, ctx.ends, ctx.kernel)
            d_delta = gradient.to(dtype)
            assert d_delta.numel() == size
            if ctx.not_finite is not None:  # no host sync here: the flag is read once a step
                ctx.not_finite.logical_or_(~d_delta.isfinite().all())
        for sink in ctx.sinks:
            sink.add(dy, x, ctx.ends)
        return dx, None, d_delta, None, None, None, None, None, None


def experts_slot_gradient(
    dy: torch.Tensor,
    x: torch.Tensor,
    position: torch.Tensor,
    slot_ends: Sequence[int],
    ends: Sequence[int],
    kernel: Callable[[int], str] | None = None,
) -> torch.Tensor:
    """dL/dW of a fused weight at `position`, fp32 (K,): expert by expert, 0 for those without tokens.

    dy: (rows, out) and x: (rows, in), sorted by expert; position: (K,) flat positions in the fused weight, by
    expert: those of expert e end at slot_ends[e]. kernel: of `slot_gradient`, by an expert's tokens.
    """
    out = torch.zeros(position.numel(), dtype=torch.float32, device=dy.device)
    numel = dy.shape[1] * x.shape[1]
    row = slot = 0
    for e, (row_end, slot_end) in enumerate(zip(ends, slot_ends, strict=True)):
        if row_end > row and slot_end > slot:
            at = position[slot:slot_end].long() - e * numel
            way = kernel(row_end - row) if kernel is not None else None
            out[slot:slot_end] = slot_gradient(dy[row:row_end], x[row:row_end], at, way)
        row, slot = row_end, slot_end
    return out


class SeftExperts(nn.Module):
    """What the class of a module of fused experts gains by `add_expert_slots`."""

    seft_runtimes: dict[str, Any]  # fused weight -> its run-time state, set by the engine extension
    seft_slot_ends: dict[str, list[int]]  # fused weight with slots -> where each expert's end

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        runs = len(self.seft_runtimes) == len(self.seft_slot_ends)
        if not torch.is_grad_enabled() or (not runs and not self.training):
            return super().forward(hidden_states, top_k_index, top_k_weights)  # type: ignore[misc]
        if not runs:
            raise ValueError(
                "This model has SEFT slots but no DeepSpeed engine that applies them, so training would "
                "change nothing. Pass the model to seft_ds.initialize() or deepspeed.initialize() first."
            )
        return experts_forward(self, hidden_states, top_k_index, top_k_weights, self._product)

    def _product(self, name: str, x: torch.Tensor, ends: list[int]) -> torch.Tensor:
        weight = self._parameters[name]
        x = x.to(weight.dtype)  # type: ignore[union-attr]
        runtime = self.seft_runtimes.get(name)
        if runtime is None:
            return SlotExperts.apply(x, weight, None, None, (), ends, (), None)
        delta, position = (self._parameters[f"{name}_{part}"] for part in (DELTA, POSITION))
        slot_ends = self.seft_slot_ends[name]
        return SlotExperts.apply(
            x, weight, delta, position, slot_ends, ends, runtime.open_sinks(), runtime.not_finite,
            runtime.kernel,
        )  # fmt: skip


def add_expert_slots(
    module: nn.Module, name: str, position: torch.Tensor, slot_ends: list[int]
) -> None:
    """Give the fused weight `name` of a module one slot at each of `position` (K,), in place.

    slot_ends: where each expert's slots end. The class is swapped and two parameters are added, as by
    `seft_ds.sparse.linear.add_slots`.
    """
    if not isinstance(module, SeftExperts):
        swap_class(module, SeftExperts)
        assert isinstance(module, SeftExperts)
        module.seft_runtimes, module.seft_slot_ends = {}, {}
    like = module._parameters[name]
    assert like is not None
    delta = torch.zeros(position.numel(), dtype=like.dtype, device=like.device)
    module.register_parameter(f"{name}_{DELTA}", nn.Parameter(delta))
    fixed = nn.Parameter(position.to(like.device), requires_grad=False)
    module.register_parameter(f"{name}_{POSITION}", fixed)
    module.seft_slot_ends[name] = slot_ends
