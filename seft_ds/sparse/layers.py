"""Which weights of a model can be pruned and repaired: one rule for the pruner, the repair and the planner.

Supported are linear layers, and fused experts of the families in `seft_ds.naming`. A subclass of `nn.Linear`
counts as linear if it computes x Wᵀ + b, which is tried. Routers and convolutions are never among them.
What multiplies tokens by a matrix in another way is listed with the problem that it has.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from seft_ds.naming import FUSED, ROUTERS, Naming, separate_experts
from seft_ds.sparse.experts import is_fused_experts, unsupported
from seft_ds.targets import Target, matches

ShapeOf = Callable[[nn.Parameter], tuple[int, ...]]
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass
class Layer:
    """A weight that multiplies tokens: a matrix, or the matrices of all experts of a layer."""

    name: str  # of the module for a plain matrix; of the parameter for stacked ones
    module: nn.Module
    parameter: str
    shape: tuple[int, ...]  # (out, in), or of stacked experts what the parameter has
    problem: str | None = None  # why it can be neither pruned nor repaired

    @property
    def is_fused(self) -> bool:
        """Whether it holds the matrices of all experts in the form that is supported."""
        return self.parameter in FUSED and len(self.shape) == 3

    @property
    def is_linear(self) -> bool:
        """Whether it is the one matrix of a layer, and not those of experts."""
        return self.parameter == "weight" and len(self.shape) == 2

    @property
    def weight(self) -> nn.Parameter:
        weight = self.module._parameters[self.parameter]
        assert weight is not None
        return weight

    @property
    def matrices(self) -> int:
        """How many matrices each expert has in this fused weight."""
        return FUSED[self.parameter]


def shape_as_it_is(parameter: nn.Parameter) -> tuple[int, ...]:
    """The shape of a parameter that is not partitioned."""
    return tuple(parameter.shape)


def layers_of(
    model: nn.Module, naming: Naming, shape_of: ShapeOf = shape_as_it_is
) -> Iterator[Layer]:
    """The weights of a model that multiply tokens, in its order, but for routers and convolutions.

    Args:
        shape_of: of a parameter, where ZeRO-3 leaves only a placeholder.
    """
    experts = _number_of_experts(model)
    for name, module in _called(model):
        if is_fused_experts(module):
            problem = _problem_of_experts(module, naming)
            for parameter in FUSED:
                yield _stacked(name, module, parameter, shape_of, problem)
        elif _looks_linear(module):
            weight = module._parameters["weight"]
            assert weight is not None
            yield Layer(name, module, "weight", shape_of(weight), _problem_of_linear(name, module))
        elif not isinstance(module, _ConvNd):
            for parameter, weight in module._parameters.items():
                if weight is None:
                    continue
                full, kind = f"{name}.{parameter}", type(module).__name__
                if _holds_experts(full, kind, shape_of(weight), experts):
                    yield _stacked(name, module, parameter, shape_of, _OTHER_EXPERTS)


def choose_layers(
    model: nn.Module,
    naming: Naming,
    wanted: list[str] | str,
    shape_of: ShapeOf = shape_as_it_is,
) -> list[Layer]:
    """The layers that may be repaired, in the model's order.

    Args:
        wanted: "auto", or names that theirs end in. With "auto" the output head and tied weights are left
            out, and what has a problem is there with it.

    Raises:
        ValueError: a name that no layer has, or that of a tied weight or of a layer with a problem; a
            quantised layer.
    """
    head = getattr(model, "get_output_embeddings", lambda: None)()
    layers = {layer.name: layer for layer in layers_of(model, naming, shape_of)}
    owners = Counter(
        id(w) for m in model.modules() if (w := m._parameters.get("weight")) is not None
    )
    if isinstance(wanted, str):
        chosen = [
            c for c in layers.values() if c.module is not head and owners.get(id(c.weight), 1) == 1
        ]
    else:
        chosen = _named(layers, wanted)
        for layer in chosen:
            if owners.get(id(layer.weight), 1) > 1:
                raise ValueError(
                    f"target {layer.name} shares its weight with another layer; leave it out"
                )
            if layer.problem is not None:
                raise ValueError(f'target {layer.name}: {layer.problem}; leave it out of "targets"')
    for layer in chosen:
        if layer.weight.dtype not in _DTYPES:
            raise ValueError(f"{layer.name}: {layer.problem}")
    return chosen


def _named(layers: dict[str, Layer], wanted: list[str]) -> list[Layer]:
    for one in wanted:
        if not any(matches(name, [one]) for name in layers):
            kinds = sorted({name.rsplit(".", 1)[-1] for name in layers})
            raise ValueError(
                f"target {one!r} matches no linear layer of this model; layers end in: {', '.join(kinds)} "
                "(routers are never targets)"
            )
    return [layer for name, layer in layers.items() if matches(name, wanted)]


def names_that_tell(layers: list[Layer], others: list[Layer]) -> list[str]:
    """The shortest ends of the names of `layers` that none of the `others` has."""
    found: list[str] = []
    for layer in layers:
        parts = layer.name.split(".")
        ends = (".".join(parts[-n:]) for n in range(1, len(parts) + 1))
        end = next(e for e in ends if not any(matches(other.name, [e]) for other in others))
        found.append(end)
    return list(dict.fromkeys(found))


def as_target(layer: Layer) -> Target:
    """A layer as a target that nothing is known of yet; a fused weight has a part for each matrix."""
    *stacked, columns = layer.shape
    target = Target(layer.name, (math.prod(stacked), columns), 0)
    if layer.is_fused:
        target.experts = layer.shape[0]
        target.part_live = [0] * (target.experts * layer.matrices)
    return target


_OTHER_EXPERTS = (
    "experts stacked in one tensor in a way that was not tried (docs/families.md lists what was)"
)


def _stacked(
    owner: str, module: nn.Module, parameter: str, shape_of: ShapeOf, problem: str | None
) -> Layer:
    weight = module._parameters[parameter]
    assert weight is not None
    return Layer(f"{owner}.{parameter}", module, parameter, shape_of(weight), problem)


def _called(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Named modules, but for routers with what is in them, and for layers whose weight is read elsewhere."""
    modules = dict(model.named_modules())
    routers: list[str] = []
    for name, module in modules.items():
        if any(name.startswith(f"{router}.") for router in routers):
            continue
        owner, _, last = name.rpartition(".")
        if _is_router(last, module):
            routers.append(name)
        # A Mamba mixer multiplies by this weight itself: the layer is never called.
        elif not (last == "dt_proj" and "Mamba" in type(modules[owner]).__name__):
            yield name, module


def has_routers(model: nn.Module) -> bool:
    """Whether a model chooses among experts."""
    names = ((name.rpartition(".")[2], module) for name, module in model.named_modules())
    return any(_is_router(last, module) for last, module in names)


def _is_router(last_name: str, module: nn.Module) -> bool:
    return last_name in ROUTERS or type(module).__name__.endswith(("Router", "Gating"))


def _looks_linear(module: nn.Module) -> bool:
    """Whether a module with a matrix in `weight` is, or stands for, a linear layer."""
    if module._parameters.get("weight") is None:
        return False
    sizes = (getattr(module, name, None) for name in ("in_features", "out_features"))
    return isinstance(module, nn.Linear) or _is_conv1d(module) or all(type(n) is int for n in sizes)


def _is_conv1d(module: nn.Module) -> bool:
    """Whether a module is transformers' Conv1D: a linear layer whose weight is (in, out)."""
    return any(kind.__name__ == "Conv1D" for kind in type(module).__mro__)


def _problem_of_linear(name: str, module: nn.Module) -> str | None:
    kind = type(module).__name__
    weight = module._parameters["weight"]
    assert weight is not None
    if weight.dtype not in _DTYPES:
        return f"it is quantised ({kind}, {weight.dtype}); wanted a model in bf16 or fp32"
    if _is_conv1d(module):
        return f"{kind} keeps its weight transposed, (in, out), which is not supported"
    if not isinstance(module, nn.Linear) or "forward" in module.__dict__:
        return f"{kind} is no torch.nn.Linear; only those are supported"
    if separate_experts([f"{name}."]) is not None:
        return (
            "it belongs to one of experts that are modules of their own, which run or don't depending on "
            "the tokens, so that ranks would wait for each other; load the model with transformers 5's own "
            "class, which fuses them"
        )
    if not computes_linear(module):
        return f"{kind} is a torch.nn.Linear that computes something else than x Wᵀ + b"
    return None


def _problem_of_experts(module: nn.Module, naming: Naming) -> str | None:
    problem = unsupported(module)
    if problem is None and not naming.matrices:
        problem = "experts of a family that was not tried (docs/families.md lists those that were)"
    return problem


def _number_of_experts(model: nn.Module) -> int:
    """How many routed experts a layer of a transformers model has; 0: not known, or none."""
    config: Any = getattr(model, "config", None)
    names = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
    found = (getattr(config, name, None) for name in names)
    return next((n for n in found if isinstance(n, int) and n > 1), 0)


def _holds_experts(name: str, kind: str, shape: tuple[int, ...], experts: int) -> bool:
    """Whether a parameter that is no linear layer's holds a matrix for each expert."""
    if len(shape) < 2 or min(shape[-2:]) < 2:  # a vector, whatever its form
        return False
    named = "expert" in f"{name}.{kind}".lower()
    return named or (len(shape) == 3 and shape[0] == experts)


def computes_linear(module: nn.Linear) -> bool:
    """Whether a layer's forward pass is x Wᵀ + b, tried with a small weight in place of its own.

    Forward and backward are compared, in training and in evaluation; the layer's own weight is not touched,
    so that it may be partitioned or on the meta device.
    """
    kind = type(module)
    if kind.forward is nn.Linear.forward:
        return True
    if module._modules or not set(module._parameters) <= {"weight", "bias"}:
        return False
    generator = torch.Generator().manual_seed(0)
    weight, bias = (torch.randn(shape, generator=generator) for shape in ((3, 5), (3,)))
    own = {"weight": nn.Parameter(weight), "bias": nn.Parameter(bias)}
    if module._parameters.get("bias") is None:
        own["bias"] = None  # type: ignore[assignment]
    probe = object.__new__(kind)
    probe.__dict__ = module.__dict__ | {"_parameters": own, "in_features": 5, "out_features": 3}
    for training in (True, False):
        probe.__dict__["training"] = training
        for shape in ((4, 5), (2, 3, 5)):
            x = torch.randn(shape, generator=generator, requires_grad=True)
            try:
                with torch.random.fork_rng(devices=[]):
                    came = probe.forward(x)
                wanted = nn.functional.linear(x, own["weight"], own["bias"])
                if not _same_with_gradients(came, wanted, [x, own["weight"]]):
                    return False
            except Exception:  # a forward pass that wants something else may fail in any way
                return False
    return True


def _same_with_gradients(
    one: torch.Tensor, other: torch.Tensor, inputs: list[torch.Tensor]
) -> bool:
    if one.shape != other.shape or not torch.allclose(one, other, rtol=1e-4, atol=1e-5):
        return False
    dy = torch.arange(one.numel(), dtype=one.dtype).view(one.shape).cos()
    gradients = (torch.autograd.grad(y, inputs, dy) for y in (one, other))
    return all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(*gradients, strict=True))
