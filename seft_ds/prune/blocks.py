"""The decoder blocks of a model and the linear layers in them: what a pruner works on."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from seft_ds.prune.choose import Budget, Quota, check_group_divides, quota_of
from seft_ds.targets import parse_pattern


@dataclass
class Block:
    """One decoder block and the linear layers in it, by their full names in the model."""

    prefix: str  # "model.layers.0"
    module: nn.Module
    linears: dict[str, nn.Linear]  # "model.layers.0.self_attn.q_proj" -> layer


def decoder_blocks(model: nn.Module) -> list[Block]:
    """The decoder blocks of a causal language model, in order.

    Raises:
        ValueError: no list of `config.num_hidden_layers` blocks, no linear layers in them, or weights
            that are stacked per expert.
    """
    depth = int(getattr(model.config, "num_hidden_layers", 0))
    for prefix, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            blocks = [_block(f"{prefix}.{i}", child) for i, child in enumerate(module)]
            if all(block.linears for block in blocks):
                return blocks
    raise ValueError(
        f"found no list of {depth} decoder blocks with linear layers in {type(model).__name__}; "
        "wanted a decoder-only model such as LLaMA, Mistral, Qwen2, Qwen3 or Gemma"
    )


def _block(prefix: str, module: nn.Module) -> Block:
    for name, parameter in module.named_parameters():
        if parameter.ndim > 2:
            raise ValueError(
                f"{prefix}.{name} has shape {tuple(parameter.shape)}: experts stacked in one tensor "
                "are not supported; prune a dense model"
            )
    linears = {
        f"{prefix}.{name}": child
        for name, child in module.named_modules()
        if isinstance(child, nn.Linear)
    }
    return Block(prefix, module, linears)


def weight_shapes(blocks: list[Block]) -> dict[str, tuple[int, int]]:
    """(out, in) of every weight that is pruned, by the full name of the tensor, in the model's order."""
    return {
        f"{name}.weight": (linear.out_features, linear.in_features)
        for block in blocks
        for name, linear in block.linears.items()
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
