"""Which layers count as linear, as routers, as experts, and what is said of the others."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional

from seft_ds.naming import PLAIN, Naming
from seft_ds.sparse.layers import choose_layers, computes_linear, layers_of, names_that_tell


class Falcon(nn.Linear):
    """As transformers' FalconLinear."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        hidden = input @ self.weight.T
        return hidden if self.bias is None else hidden + self.bias


class Renamed(nn.Linear):
    pass


class Scaled(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return functional.linear(input, self.weight, self.bias) * 1.01


class Rounded(nn.Linear):
    """Inputs of 8 bits, as AutoBitLinear's."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        scale = 127 / input.abs().max(dim=-1, keepdim=True).values
        return functional.linear((input * scale).round() / scale, self.weight, self.bias)


class StraightThrough(nn.Linear):
    """Forward as a linear layer, backward not."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return functional.linear(input.detach(), self.weight, self.bias) + 0 * input.sum()


class NoisyInTraining(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        noise = torch.rand_like(input) if self.training else 0.0
        return functional.linear(input + noise, self.weight, self.bias)


class Router(nn.Linear):
    def forward(self, input: torch.Tensor) -> tuple:  # type: ignore[override]
        return super().forward(input), None


class Grouped(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return (input.view(-1, 2, 8) @ self.weight.view(2, -1, 8).mT).flatten(1)


@pytest.mark.parametrize("bias", [True, False])
def test_a_subclass_is_linear_if_it_computes_that(bias: bool) -> None:
    for device in ("cpu", "meta"):  # the layer's own weight is not looked at
        for kind in (nn.Linear, Renamed, Falcon):
            assert computes_linear(kind(8, 8, bias, device=device)), kind
        for kind in (Scaled, Rounded, StraightThrough, NoisyInTraining, Router, Grouped):
            assert not computes_linear(kind(8, 8, bias, device=device)), kind
    layer, noisy = Falcon(8, 8, bias), NoisyInTraining(8, 8)
    kept, state = layer.weight.detach().clone(), torch.random.get_rng_state()
    assert computes_linear(layer) and not computes_linear(noisy)
    assert torch.equal(layer.weight, kept) and torch.equal(torch.random.get_rng_state(), state)
    layer = Falcon(8, 8, bias)
    layer.extra = nn.Linear(2, 2)
    assert not computes_linear(layer)


class Conv1D(nn.Module):
    """As transformers': the weight is (in, out)."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 6))


class Packed(nn.Module):
    in_features, out_features = 8, 8

    def __init__(self) -> None:
        super().__init__()
        packed = torch.zeros(8, 4, dtype=torch.uint8)
        self.weight = nn.Parameter(packed, requires_grad=False)


class TopKGating(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 2)


class MambaMixer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.in_proj, self.dt_proj, self.conv = nn.Linear(4, 4), nn.Linear(4, 4), nn.Conv1d(4, 4, 3)


class Stacked(nn.Module):
    """A matrix for each of 3 experts, and a vector."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(shape))
        self.mix = nn.Parameter(torch.randn(1, 1, 4))


def found(**parts: nn.Module) -> dict[str, str | None]:
    """{name: problem} of the layers of a model of 3 experts."""
    model = nn.ModuleDict(parts)
    model.config = SimpleNamespace(num_local_experts=3)  # type: ignore[assignment]
    return {layer.name: layer.problem for layer in layers_of(model, PLAIN)}


def test_what_is_a_layer_and_what_is_not() -> None:
    linear = nn.Linear(4, 4)
    assert found(up=linear, norm=nn.LayerNorm(4), embed=nn.Embedding(4, 4)) == {"up": None}
    routers = nn.ModuleDict({"classifier": nn.Linear(4, 3)})
    assert found(up=linear, gate=nn.Linear(4, 3), router=routers, choice=TopKGating()) == {
        "up": None
    }
    # A convolution is no stack of experts, and the mixer reads dt_proj's weight without calling it.
    assert found(mixer=MambaMixer()) == {"mixer.in_proj": None}
    assert found(mlp=Stacked(2, 5, 6)) == {}  # no experts: there are 3 of those
    assert list(found(mlp=Stacked(3, 5, 6))) == ["mlp.w"]
    assert list(found(experts=Stacked(15, 6))) == ["experts.w"]  # stacked along the rows


def test_what_is_said_of_the_others() -> None:
    for said, name, module in [
        ("Conv1D keeps its weight transposed", "attn", Conv1D()),
        ("quantised (Packed, torch.uint8)", "attn", Packed()),
        ("Scaled is a torch.nn.Linear that computes something else", "attn", Scaled(4, 4)),
        ("experts stacked in one tensor", "mlp", Stacked(3, 5, 6)),
        ("modules of their own", "moe", nn.ModuleDict({"experts": nn.ModuleList([nn.Linear(4, 4)])})),
    ]:  # fmt: skip
        (problem,) = found(**{name: module}).values()
        assert problem is not None and said in problem
    hooked = nn.Linear(4, 4)
    hooked.forward = lambda x: x  # type: ignore[assignment]
    assert "only those are supported" in str(found(up=hooked))


def test_names_that_tell_some_layers_from_others() -> None:
    model = nn.ModuleDict(
        {
            "mlp": nn.ModuleDict(
                {"down": nn.Linear(4, 4), "experts": nn.ModuleDict({"down": Conv1D()})}
            )
        }
    )
    layers = list(layers_of(model, PLAIN))
    able = [layer for layer in layers if layer.problem is None]
    names = names_that_tell(able, [layer for layer in layers if layer.problem is not None])
    assert names == ["mlp.down"]
    assert [c.name for c in choose_layers(model, Naming(), names)] == ["mlp.down"]
    with pytest.raises(ValueError, match=r"experts\.down: Conv1D keeps.*leave it out of"):
        choose_layers(model, Naming(), ["experts.down"])
