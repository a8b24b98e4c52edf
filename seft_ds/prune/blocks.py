"""The decoder blocks of a model and the matrices in them: what a pruner works on.

A matrix is the weight of a linear layer, or one expert's part of a fused weight (`seft_ds.naming`). Both go
by the name that the files have for them, without ".weight". Routers are left out.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import nn

from seft_ds.naming import FUSED, WITH_EXPERTS, Naming, is_router, naming_of_model
from seft_ds.prune.choose import Budget, Quota, check_group_divides, quota_of
from seft_ds.sparse.experts import is_fused_experts, unsupported
from seft_ds.targets import parse_pattern


@dataclass(frozen=True)
class Matrix:
    """The weight of a layer, or part `part` of `n_parts` of a fused weight."""

    module: nn.Module
    parameter: str = "weight"
    part: int = 0
    n_parts: int = 1

    @property
    def is_expert(self) -> bool:
        """Whether only some of the tokens reach it."""
        return self.parameter != "weight"

    def value(self) -> torch.Tensor:
        """(out, in), a view of the parameter."""
        whole = self.module._parameters[self.parameter]
        assert whole is not None
        return whole.data.view(self.n_parts, -1, whole.shape[-1])[self.part]

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        whole = self.module._parameters[self.parameter]
        assert whole is not None
        return whole.numel() // whole.shape[-1] // self.n_parts, whole.shape[-1]


@dataclass
class Block:
    """One decoder block and the matrices in it, by their full names."""

    prefix: str  # "model.layers.0"
    module: nn.Module
    matrices: dict[str, Matrix] = field(default_factory=dict)  # "model.layers.0.self_attn.q_proj"
    # Module of fused experts -> fused weight -> the names of each expert's matrices, which read the same.
    experts: dict[nn.Module, dict[str, list[list[str]]]] = field(default_factory=dict)

    @property
    def linears(self) -> dict[str, nn.Module]:
        """The linear layers, by name."""
        return {name: m.module for name, m in self.matrices.items() if not m.is_expert}


def decoder_blocks(model: nn.Module) -> list[Block]:
    """The decoder blocks of a causal language model, in order.

    Raises:
        ValueError: no list of `config.num_hidden_layers` blocks, no linear layers in them, or weights
            that are stacked per expert in a way that is not known.
    """
    depth, naming = int(getattr(model.config, "num_hidden_layers", 0)), naming_of_model(model)
    for prefix, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            blocks = [_block(f"{prefix}.{i}", child, naming) for i, child in enumerate(module)]
            if all(block.matrices for block in blocks):
                return blocks
    raise ValueError(
        f"found no list of {depth} decoder blocks with linear layers in {type(model).__name__}; "
        "wanted a decoder-only model such as LLaMA, Mistral, Qwen2, Qwen3, Gemma or DeepSeek"
    )


def _block(prefix: str, module: nn.Module, naming: Naming) -> Block:
    block, known = Block(prefix, module), set()
    for name, child in module.named_modules():
        full = f"{prefix}.{name}"
        if isinstance(child, nn.Linear) and not is_router(full):
            block.matrices[full] = Matrix(child)
        elif is_fused_experts(child) and naming.matrices and unsupported(child) is None:
            block.experts[child] = _add_experts(block, full, child, naming)
            known |= {f"{name}.{parameter}" for parameter in FUSED}
    for name, parameter in module.named_parameters():
        if parameter.ndim > 2 and name not in known:
            raise ValueError(
                f"{prefix}.{name} has shape {tuple(parameter.shape)}: experts stacked in one tensor in a way "
                f"that was not tried; wanted a dense model, or model_type {', '.join(WITH_EXPERTS)}"
            )
    return block


def _add_experts(
    block: Block, full: str, module: nn.Module, naming: Naming
) -> dict[str, list[list[str]]]:
    """Put each expert's matrices into the block; their names by fused weight and expert."""
    found = {}
    for parameter, matrices in FUSED.items():
        experts = int(module._parameters[parameter].shape[0])  # type: ignore[union-attr]
        names = [
            name.removesuffix(".weight")
            for name in naming.part_names(f"{full}.{parameter}", experts)
        ]
        block.matrices |= {
            name: Matrix(module, parameter, part, len(names)) for part, name in enumerate(names)
        }
        found[parameter] = [names[e * matrices : (e + 1) * matrices] for e in range(experts)]
    return found


def weight_shapes(blocks: list[Block]) -> dict[str, tuple[int, int]]:
    """(out, in) of every weight that is pruned, by the full name of its tensor, in the model's order."""
    return {
        f"{name}.weight": matrix.shape
        for block in blocks
        for name, matrix in block.matrices.items()
    }


def check_pattern_fits(blocks: list[Block], budget: Budget) -> None:
    """Refuse, before any time is spent, a pattern that some weight cannot hold.

    Raises:
        ValueError: M does not divide the inputs of a weight, which is named.
    """
    if budget.pattern is None:
        return
    for name, (_, in_features) in weight_shapes(blocks).items():
        check_group_divides(in_features, *parse_pattern(budget.pattern), name)


def uniform_quotas(blocks: list[Block], budget: Budget, by_row: bool) -> dict[str, Quota]:
    """The same budget for every weight, by the full name of the tensor.

    Raises:
        ValueError: see `check_pattern_fits`.
    """
    check_pattern_fits(blocks, budget)
    return {name: quota_of(budget, shape, by_row) for name, shape in weight_shapes(blocks).items()}
