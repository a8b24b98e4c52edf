"""Adapters beside frozen weights: put in before DeepSpeed sees the model, added to the weights at the end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from seft_ds.baselines.lora import add_lora, lora_delta
from seft_ds.baselines.methods import find_method, rank_of
from seft_ds.baselines.spp import add_spp, spp_delta
from seft_ds.baselines.sqft import add_sqft, sqft_delta
from seft_ds.config import SeftConfig
from seft_ds.distributed.collectives import Ranks
from seft_ds.targets import Target
from seft_ds.zero import shards
from seft_ds.zero.attach import Found, find_targets

# (weight (out, in), A, B, scale) -> what is added to the weight, (out, in)
DELTAS: dict[str, Callable[..., torch.Tensor]] = {
    "lora": lora_delta,
    "spp": spp_delta,
    "sqft": sqft_delta,
}
_ADDERS = {"spp": add_spp, "sqft": add_sqft}


@dataclass
class Adapter:
    """One target weight with the two parameters that train beside it."""

    target: Target  # n_slots: how many entries train
    module: nn.Linear  # whose input is the weight's
    a: nn.Parameter
    b: nn.Parameter


@dataclass
class Adapters:
    """All adapters of a model."""

    method: str
    layers: list[Adapter]
    rank: int
    scale: float

    @property
    def targets(self) -> list[Target]:
        return [layer.target for layer in self.layers]

    @property
    def n_trainable(self) -> int:
        return sum(t.n_slots for t in self.targets)

    def merged(self, kind: str, weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> Any:
        """`weight` (out, in) with its adapter, in fp32: rounded once, when it is written."""
        return weight.float() + DELTAS[kind](weight.float(), a.float(), b.float(), self.scale)


def attach_adapters(
    model: nn.Module,
    method: str,
    config: SeftConfig,
    ranks: Ranks,
    *,
    alpha: float | None = None,
    dropout: float = 0.0,
) -> Adapters:
    """Freeze `model` and put the adapters of `method` beside its pruned weights. A collective.

    Works on whole weights and on weights that `deepspeed.zero.Init` has already partitioned.

    Args:
        config: names the targets, the rank (`trainable: rank=r`) and the seed.
        alpha: the adapters' part is scaled by alpha / rank; default: twice the rank.
        dropout: of the adapters' input.

    Raises:
        ValueError: nothing is pruned, no such target, no rank, or a weight narrower than the rank.
    """
    kind = find_method(method).adapter
    assert kind is not None, f"{method} trains slots"
    rank = rank_of(config.trainable, method)
    found = find_targets(model, config, ranks)
    if any(f.target.experts for f in found):
        raise ValueError(
            f"--method {method} puts adapters beside linear layers, and this model's experts are fused in "
            'one weight; name other layers in "targets", or use a method that trains slots: seft, fixed'
        )
    for target in (f.target for f in found):
        if rank > min(target.shape):
            raise ValueError(
                f"{target.name} is {target.shape[0]} x {target.shape[1]}: rank {rank} would be more than "
                "full; lower --trainable rank=r"
            )
    for param in model.parameters():
        param.requires_grad_(False)
    scale = (2.0 * rank if alpha is None else alpha) / rank
    layers = _put_in(model, kind, found, rank, scale, dropout, config.seed)
    for layer in layers:
        layer.target.n_slots = layer.a.numel() + layer.b.numel()
    # Reentrant checkpointing drops all gradients of a block none of whose inputs needs one.
    model.enable_input_require_grads()  # type: ignore[operator]
    return Adapters(method, layers, rank, scale)


def _put_in(
    model: nn.Module,
    kind: str,
    found: list[Found],
    rank: int,
    scale: float,
    dropout: float,
    seed: int,
) -> list[Adapter]:
    if kind == "lora":
        names = [f.target.name for f in found]
        made = add_lora(model, names, rank, scale * rank, dropout, seed)
        return [Adapter(f.target, *made[f.target.name]) for f in found]
    generator = torch.Generator().manual_seed(seed)  # on the CPU: the same on every rank
    layers = []
    for f in found:
        assert isinstance(f.module, nn.Linear)
        a, b = _ADDERS[kind](f.module, f.target.shape, rank, scale, dropout, generator)
        layers.append(Adapter(f.target, f.module, a, b))
    return layers


def plain_tensors(model: nn.Module, adapters: Adapters) -> dict[str, torch.Tensor]:
    """Everything that the model holds without its adapters, under the names that it had before them."""
    ours = {id(p) for layer in adapters.layers for p in (layer.a, layer.b)}
    named: dict[str, torch.Tensor] = {
        _bare(name): param for name, param in model.named_parameters() if id(param) not in ours
    }
    for prefix, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                named[_bare(f"{prefix}.{name}" if prefix else name)] = buffer
    return named


def _bare(name: str) -> str:
    """peft puts the layer that it wraps one level down."""
    return name.replace(".base_layer.", ".")


def gather(layer: Adapter, ranks: Ranks) -> tuple[torch.Tensor, torch.Tensor]:
    """A and B, whole, on the CPU of every rank. Two collectives under ZeRO-3."""
    return shards.gather_whole(layer.a, ranks), shards.gather_whole(layer.b, ranks)
