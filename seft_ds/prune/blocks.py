"""The decoder blocks of a model and the matrices in them: what a pruner works on.

A matrix is the weight of a linear layer, or one expert's part of a fused weight (`seft_ds.naming`). Both go
by the name that the files have for them, without ".weight". Routers are left out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from seft_ds.naming import Naming, naming_of_model
from seft_ds.prune.choose import Budget, Quota, check_group_divides, quota_of
from seft_ds.sparse.layers import Layer, layers_of, names_that_tell
from seft_ds.targets import matches, parse_pattern


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


def decoder_blocks(
    model: nn.Module, naming: Naming | None = None, targets: Sequence[str] | str = "auto"
) -> list[Block]:
    """The decoder blocks of a causal language model, in order.

    Args:
        naming: of the model's files; default: the family's usual one.
        targets: the layers that are pruned, by what their names end in; "auto": all of them.

    Raises:
        ValueError: no list of blocks with linear layers, a target that no layer has, or a layer that can't be
            pruned (`seft_ds.sparse.layers`) and is not left out by `targets`.
    """
    naming = naming or naming_of_model(model)
    layers = list(layers_of(model, naming))
    blocks = _find_blocks(model, layers)
    inside = [layer for layer in layers if any(_is_in(layer, block) for block in blocks)]
    _check(inside, targets)
    chosen = [layer for layer in inside if matches(layer.name, _as_wanted(targets))]
    for block in blocks:
        for layer in (c for c in chosen if _is_in(c, block)):
            _put_in(block, layer, naming)
    return blocks


def _as_wanted(targets: Sequence[str] | str) -> list[str] | str:
    return targets if isinstance(targets, str) else list(targets)


def _find_blocks(model: nn.Module, layers: list[Layer]) -> list[Block]:
    """The list of modules that is as long as the config says, and holds layers in each."""
    config = getattr(model, "config", None)
    depths = [int(getattr(config, name, 0) or 0) for name in ("num_hidden_layers", "num_layers")]
    for depth in (d for d in depths if d):
        for prefix, module in model.named_modules():
            if isinstance(module, nn.ModuleList) and len(module) == depth:
                blocks = [Block(f"{prefix}.{i}", child) for i, child in enumerate(module)]
                if all(any(_is_in(layer, block) for layer in layers) for block in blocks):
                    return blocks
    raise ValueError(
        f"found no list of {depths[0]} decoder blocks with linear layers in {type(model).__name__}; "
        "wanted a decoder-only model such as LLaMA, Mistral, Qwen2, Qwen3, Gemma or DeepSeek"
    )


def _is_in(layer: Layer, block: Block) -> bool:
    return layer.name.startswith(f"{block.prefix}.")


def _check(inside: list[Layer], targets: Sequence[str] | str) -> None:
    """ValueError for a target that no layer of the blocks has, and for one that can't be pruned."""
    if not isinstance(targets, str):
        for target in targets:
            if not any(matches(layer.name, [target]) for layer in inside):
                kinds = sorted({layer.name.rpartition(".")[2] for layer in inside})
                raise ValueError(
                    f"--targets {target}: no layer of the blocks ends in it; they end in {', '.join(kinds)} "
                    "(routers are never pruned)"
                )
    wanted = [layer for layer in inside if matches(layer.name, _as_wanted(targets))]
    broken = next((layer for layer in wanted if layer.problem is not None), None)
    if broken is None:
        return
    able = [layer for layer in inside if layer.problem is None]
    said = f"{broken.name} can't be pruned: {broken.problem}"
    if not able:
        raise ValueError(f"{said}; no other layer of this model can")
    unable = [layer for layer in inside if layer.problem is not None]
    sizes = [sum(math.prod(one.shape) for one in group) for group in (able, unable)]
    raise ValueError(
        f"{said}. To prune the other layers only, {sizes[0] / sum(sizes):.0%} of these weights, name them: "
        f"--targets {' '.join(names_that_tell(able, unable))}"
    )


def _put_in(block: Block, layer: Layer, naming: Naming) -> None:
    """Put a layer's matrices into its block."""
    if layer.is_linear:
        stored = naming.in_files(f"{layer.name}.weight").removesuffix(".weight")
        block.matrices[stored] = Matrix(layer.module)
        return
    stored_names = naming.part_names(layer.name, layer.shape[0])
    names = [name.removesuffix(".weight") for name in stored_names]
    block.matrices |= {
        name: Matrix(layer.module, layer.parameter, part, len(names))
        for part, name in enumerate(names)
    }
    of_expert = [
        names[e * layer.matrices : (e + 1) * layer.matrices] for e in range(layer.shape[0])
    ]
    block.experts.setdefault(layer.module, {})[layer.parameter] = of_expert


def left_dense(blocks: list[Block]) -> tuple[float, list[str]]:
    """The share of the blocks' weights that is not pruned, and what those are called.

    Of a block's tensors only those count that hold a matrix; "mlp.gate.weight" stands for all blocks'.
    """
    dense = total = 0
    kinds: dict[str, None] = {}
    for block in blocks:
        pruned = {(id(m.module), m.parameter) for m in block.matrices.values()}
        for name, module in block.module.named_modules():
            for parameter, weight in module._parameters.items():
                if weight is None or weight.ndim < 2 or min(weight.shape[-2:]) < 2:
                    continue
                total += weight.numel()
                if (id(module), parameter) not in pruned:
                    dense += weight.numel()
                    kinds[f"{name}.{parameter}"] = None
    return dense / max(total, 1), list(kinds)


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
