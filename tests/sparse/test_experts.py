"""Fused experts: their forward pass and slot gradients against autograd through transformers' own."""

from __future__ import annotations

import copy

import pytest
import torch

from seft_ds.sparse import mask, slot_grad
from seft_ds.sparse.experts import (
    SlotExperts,
    add_expert_slots,
    experts_slot_gradient,
    grouped,
    unsupported,
)
from tests.tiny import dense_moe

E, OUT, IN = 5, 8, 12


def sorted_tokens(counts: list[int], seed: int = 0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(sum(counts), IN, generator=g)
    dy = torch.randn(sum(counts), OUT, generator=g)
    return dy, x, torch.tensor(counts).cumsum(0).tolist()


def dense_gradient(dy: torch.Tensor, x: torch.Tensor, ends: list[int]) -> torch.Tensor:
    """(E, OUT, IN), token by token."""
    out = torch.zeros(E, OUT, IN, dtype=torch.float64)
    expert = 0
    for t in range(len(x)):
        while t >= ends[expert]:
            expert += 1
        out[expert] += torch.outer(dy[t].double(), x[t].double())
    return out


def slots(per_expert: list[int], seed: int = 0):
    """Positions by expert in no order within one, and where each expert's end."""
    g = torch.Generator().manual_seed(seed)
    n = OUT * IN
    parts = [torch.randperm(n, generator=g)[:k] + e * n for e, k in enumerate(per_expert)]
    return torch.cat(parts), torch.tensor(per_expert).cumsum(0).tolist()


@pytest.mark.parametrize("counts", [[3, 0, 7, 1, 0], [0, 0, 0, 0, 9], [4, 4, 4, 4, 4]])
@pytest.mark.parametrize("per_expert", [[3, 4, 0, 5, 2], [60] * 5], ids=["few", "many"])
@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_slot_gradients_are_the_dense_ones_at_their_positions(counts, per_expert, index) -> None:
    dy, x, ends = sorted_tokens(counts)
    position, slot_ends = slots(per_expert)
    got = experts_slot_gradient(dy, x, position.to(index), slot_ends, ends)
    dense = dense_gradient(dy, x, ends)
    torch.testing.assert_close(got.double(), dense.view(-1)[position], rtol=1e-5, atol=1e-5)
    for e, n in enumerate(counts):
        mine = got[slot_ends[e - 1] if e else 0 : slot_ends[e]]
        assert n or not mine.any(), "an expert without tokens gets zeros"


@pytest.mark.parametrize(
    "parts", [[(0, 480)], [(0, 160), (160, 320), (320, 480)], [(7, 200), (95, 97), (480, 480)]]
)
@pytest.mark.parametrize("counts", [[3, 0, 7, 1, 0], [0, 0, 0, 2, 0]])
def test_dense_parts_cover_every_expert(parts: list[tuple[int, int]], counts: list[int]) -> None:
    """Cut anywhere, within rows and across experts."""
    dy, x, ends = sorted_tokens(counts)
    dense = dense_gradient(dy, x, ends).view(-1)
    got = slot_grad.dense_parts(dy, x, parts, ends)
    assert got.shape == (len(parts), max(hi - lo for lo, hi in parts))
    for (lo, hi), row in zip(parts, got.double(), strict=True):
        torch.testing.assert_close(row[: hi - lo], dense[lo:hi], rtol=1e-5, atol=1e-5)
        assert not row[hi - lo :].any()


def test_input_gradient_and_sinks() -> None:
    dy, x, ends = sorted_tokens([3, 0, 7, 1, 0])
    weight = torch.randn(E, OUT, IN)
    position, slot_ends = slots([3, 4, 0, 5, 2])
    delta = torch.zeros(position.numel(), requires_grad=True)
    x.requires_grad_()
    seen = []

    class Sink:
        def add(self, *args):
            seen.append(args)

    y = SlotExperts.apply(x, weight, delta, position, slot_ends, ends, [Sink()], None)
    y.backward(dy)
    begin, expected = 0, torch.zeros_like(x)
    for e, end in enumerate(ends):
        torch.testing.assert_close(y[begin:end], x[begin:end] @ weight[e].t())
        expected[begin:end] = dy[begin:end] @ weight[e]
        begin = end
    torch.testing.assert_close(x.grad, expected)
    torch.testing.assert_close(
        delta.grad.double(), dense_gradient(dy, x.detach(), ends).view(-1)[position]
    )
    assert torch.equal(seen[0][0], dy) and torch.equal(seen[0][1], x) and seen[0][2] == ends
    assert torch.equal(grouped(x.detach(), weight, ends), y)


@pytest.mark.parametrize("kind", ["deepseek_v3", "mixtral"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_module_computes_what_transformers_does(kind: str, dtype: torch.dtype) -> None:
    """Output, gradients of the tokens and of the routing weights, and slot gradients, with an idle expert."""
    model = dense_moe(kind, dtype)
    model.set_experts_implementation("eager")
    theirs = model.model.layers[1].mlp.experts
    ours = copy.deepcopy(theirs)
    tight = dict(rtol=1e-5, atol=1e-6) if dtype == torch.float32 else dict(rtol=0.03, atol=0.03)
    ends, positions = {}, {}
    for name, n in (("gate_up_proj", 5), ("down_proj", 3)):
        weight = ours._parameters[name]
        size = weight[0].numel()
        positions[name] = torch.cat([torch.randperm(size)[:n] + e * size for e in range(6)])
        ends[name] = [n * (e + 1) for e in range(6)]
        add_expert_slots(ours, name, positions[name].int(), ends[name])

    class Runtime:
        kernel = None  # by rule
        not_finite = torch.zeros((), dtype=torch.bool)

        def open_sinks(self):
            return []

    g = torch.Generator().manual_seed(1)
    index = torch.stack([torch.randperm(5, generator=g)[:2] for _ in range(30)])  # expert 5: none
    results = []
    for module in (theirs, ours):
        hidden = torch.randn(30, 24, generator=torch.Generator().manual_seed(2)).to(dtype)
        weights = torch.rand(30, 2, generator=torch.Generator().manual_seed(3)).to(dtype)
        hidden.requires_grad_()
        weights.requires_grad_()
        if module is ours:
            with pytest.raises(ValueError, match="no DeepSpeed engine"):
                module.train()(hidden, index, weights)
            with torch.no_grad():
                assert torch.equal(module(hidden, index, weights), results[0][0])
            module.seft_runtimes = {name: Runtime() for name in ends}
            for name in ends:
                module._parameters[name].requires_grad_(False)
        out = module(hidden, index, weights)
        out.float().square().sum().backward()
        results.append((out.detach(), hidden.grad, weights.grad))
    for theirs_, ours_ in zip(*results, strict=True):
        torch.testing.assert_close(ours_, theirs_, **tight)
    for name, at in positions.items():
        got = ours._parameters[f"{name}_seft_delta"].grad
        torch.testing.assert_close(got, theirs._parameters[name].grad.view(-1)[at], **tight)
        assert not got[-ends[name][0] :].any()


def test_forms_that_were_not_tried_are_named() -> None:
    experts = dense_moe("mixtral").model.layers[0].mlp.experts
    assert unsupported(experts) is None
    experts.has_bias = True
    assert unsupported(experts) == "experts with biases are not supported"


def test_a_cut_of_a_packed_mask() -> None:
    live = torch.rand(45) < 0.5
    for lo, hi in [(0, 45), (8, 45), (3, 30), (16, 32), (44, 45), (7, 7), (8, 40)]:
        assert torch.equal(mask.cut(mask.pack(live), lo, hi), mask.pack(live[lo:hi])), (lo, hi)
