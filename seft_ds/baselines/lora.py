"""LoRA (Hu et al., arXiv 2106.09685) by peft, on exactly the weights that SEFT would repair.

    y = x Wᵀ + s · x Aᵀ Bᵀ,   merged: W + s · B A

Merging fills the zeros of W: the usual way to lose the sparsity.
"""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

_ADAPTER = "default"  # peft's name for it


def lora_delta(
    weight: torch.Tensor,  # (out, in)
    a: torch.Tensor,  # (r, in)
    b: torch.Tensor,  # (out, r)
    scale: float,
) -> torch.Tensor:
    """(out, in): what LoRA adds to `weight`."""
    return (b @ a).mul(scale)


def add_lora(
    model: nn.Module, names: list[str], rank: int, alpha: float, dropout: float, seed: int
) -> dict[str, tuple[nn.Linear, nn.Parameter, nn.Parameter]]:
    """Give the layers `names` a LoRA adapter; returns of each the layer that holds W, A and B.

    The adapters are put into the model itself, so that trainers and DeepSpeed see an ordinary model. peft
    moves the layer W belongs to one level down, to `NAME.base_layer`.
    """
    # A list of suffixes would match other layers too; peft takes full names as they are.
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=names,
        bias="none",  # type: ignore[arg-type]
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        inject_adapter_in_model(config, model, adapter_name=_ADAPTER)
    found = {}
    for name in names:
        layer: Any = model.get_submodule(name)
        a, b = (part[_ADAPTER].weight for part in (layer.lora_A, layer.lora_B))
        for param in (a, b):  # peft may keep adapters in fp32, which a bf16 engine would mix
            param.data = param.data.to(layer.base_layer.weight.dtype)
        found[name] = (layer.base_layer, a, b)
    return found
