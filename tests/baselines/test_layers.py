"""Each adapter on one layer against its published equation, written out entry by entry."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from seft_ds.baselines.adapters import Adapters
from seft_ds.baselines.again import live_again
from seft_ds.baselines.lora import add_lora
from seft_ds.baselines.spp import add_spp, groups_for
from seft_ds.baselines.sqft import add_sqft

SCALE = 1.7


def sparse_layer(out_features: int, in_features: int, seed: int = 0) -> nn.Linear:
    torch.manual_seed(seed)
    layer = nn.Linear(in_features, out_features)
    layer.weight.data[torch.rand(out_features, in_features) < 0.6] = 0.0
    layer.weight.requires_grad_(False)
    return layer


def spp_by_hand(w: list, a: list, b: list) -> list[list[float]]:
    """The merged weight: row i is served by row floor(i · g / out) of A."""
    return [
        [v + SCALE * v * a[i * len(a) // len(w)][j] * b[i] for j, v in enumerate(row)]
        for i, row in enumerate(w)
    ]


def sqft_by_hand(w: list, a: list, b: list) -> list[list[float]]:
    return [
        [
            v + SCALE * sum(b[i][k] * a[k][j] for k in range(len(a))) if v != 0 else 0.0
            for j, v in enumerate(row)
        ]
        for i, row in enumerate(w)
    ]


@pytest.mark.parametrize(
    "add, by_hand, shape, rank",
    [
        (add_spp, spp_by_hand, (12, 8), 2),
        (add_spp, spp_by_hand, (7, 10), 2),  # rows that the groups don't divide
        (add_spp, spp_by_hand, (5, 3), 1),
        (add_sqft, sqft_by_hand, (12, 8), 2),
        (add_sqft, sqft_by_hand, (5, 3), 1),
    ],
)
def test_forward_gradient_and_merge(add, by_hand, shape: tuple[int, int], rank: int) -> None:
    layer = sparse_layer(*shape)
    start = layer.weight.clone()
    x = torch.randn(4, 6, shape[1])
    before = layer(x)
    weight = layer.weight
    a, b = add(layer, shape, rank, SCALE, 0.0, torch.Generator().manual_seed(1))
    assert layer.weight is weight and torch.equal(layer(x), before)  # training starts where it was
    assert a.abs().max() <= shape[1] ** -0.5 and a.abs().max() > 0 and not b.any()
    b.data.normal_()
    merged = torch.tensor(by_hand(start.tolist(), a.tolist(), b.tolist()))
    torch.testing.assert_close(layer(x), x @ merged.t() + layer.bias)
    ours = Adapters("", [], rank, SCALE).merged(add.__name__[4:], start, a, b)
    torch.testing.assert_close(ours.detach(), merged)
    assert torch.equal(ours == 0, start == 0)
    # Gradients: of the loss through the layer, and by differences of the equation.
    (layer(x) ** 2).sum().backward()
    for param, i in ((a, 0), (a, a.numel() - 1), (b, 0), (b, b.numel() - 1)):
        kept, losses = param.data.view(-1)[i].item(), []
        for step in (1e-3, -1e-3):
            param.data.view(-1)[i] = kept + step
            w = torch.tensor(by_hand(start.tolist(), a.tolist(), b.tolist()), dtype=torch.float64)
            losses.append(((x.double() @ w.t() + layer.bias.double()) ** 2).sum().item())
        param.data.view(-1)[i] = kept
        wanted = (losses[0] - losses[1]) / 2e-3
        assert param.grad.view(-1)[i].item() == pytest.approx(wanted, rel=2e-3, abs=2e-3)


def test_dropout_is_of_the_adapter_only() -> None:
    for add in (add_spp, add_sqft):
        layer = sparse_layer(6, 8)
        x = torch.randn(3, 8)
        plain = layer(x)
        _, b = add(layer, (6, 8), 2, SCALE, 0.999999, torch.Generator())
        b.data.fill_(1.0)
        assert torch.equal(layer(x), plain)  # nearly surely nothing of the adapter's input is left
        assert not torch.equal(layer.eval()(x), plain)


@pytest.mark.parametrize(
    "shape", [(576, 576), (192, 576), (1536, 576), (576, 1536), (3, 50), (50, 3)]
)
@pytest.mark.parametrize("rank", [1, 2, 4, 16])
def test_spp_spends_the_budget(shape: tuple[int, int], rank: int) -> None:
    out_features, in_features = shape
    budget = rank * sum(shape)

    def off(groups: int) -> int:
        return abs(groups * in_features + out_features - budget)

    assert off(groups_for(rank, shape)) == min(off(g) for g in range(1, out_features + 1))


def test_lora_is_pefts_and_merges_as_peft_does() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.up_first = sparse_layer(12, 8), sparse_layer(8, 12)

    model = Two()
    found = add_lora(model, ["first"], rank=2, alpha=2 * SCALE, dropout=0.0, seed=3)
    assert list(found) == ["first"] and type(model.up_first) is nn.Linear  # full names, no suffixes
    base, a, b = found["first"]
    assert base is model.first.base_layer and a.shape == (2, 8) and b.shape == (12, 2)
    b.data.normal_()
    ours = Adapters("", [], 2, SCALE).merged("lora", base.weight, a, b)
    x = torch.randn(5, 8)
    torch.testing.assert_close(model.first(x), x @ ours.t() + base.bias)
    model.first.merge()
    torch.testing.assert_close(base.weight.data, ours.detach())
    again = Two()
    assert torch.equal(add_lora(again, ["first"], 2, 2 * SCALE, 0.0, seed=3)["first"][1], a)


def again_by_hand(w: list, live: list, sums: list, pattern: tuple[int, int] | None) -> list:
    """Per row (or group): the best by |w| · ‖x‖, as many as were live; the higher position wins a tie."""
    out = []
    for row, flags in zip(w, live, strict=True):
        scores = [abs(v) * sums[j] ** 0.5 for j, v in enumerate(row)]
        size = pattern[1] if pattern else len(row)
        chosen: list[bool] = []
        for first in range(0, len(row), size):
            members = range(first, first + size)
            keep = pattern[0] if pattern else sum(flags)
            best = sorted(members, key=lambda j: (scores[j], j))[size - keep :]
            chosen += [j in best for j in members]
        out.append(chosen)
    return out


@pytest.mark.parametrize("pattern", [None, (2, 4)])
@pytest.mark.parametrize("ties", [False, True])
def test_pruned_again_to_the_same_counts(pattern: tuple[int, int] | None, ties: bool) -> None:
    torch.manual_seed(0)
    live = torch.rand(9, 16) < torch.rand(9, 1)  # a different count in every row
    live[0], live[1] = False, True
    if pattern:
        live = torch.rand(9, 4, 4).argsort(-1).lt(2).view(9, 16)
    merged = torch.randint(-2, 3, (9, 16)).float() if ties else torch.randn(9, 16)
    sums = torch.randint(1, 3, (16,)).double() ** 2 if ties else torch.rand(16).double()
    after = live_again(merged, live, sums, pattern, "w")
    assert after.tolist() == again_by_hand(merged.tolist(), live.tolist(), sums.tolist(), pattern)
    assert torch.equal(after.sum(1), live.sum(1))


def test_scores_that_are_not_finite_are_refused() -> None:
    live = torch.ones(2, 4, dtype=torch.bool)
    with pytest.raises(ValueError, match="w has scores that are not finite"):
        live_again(torch.full((2, 4), float("nan")), live, torch.ones(4).double(), None, "w")
