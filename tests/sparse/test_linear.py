from __future__ import annotations

import pytest
import torch
from torch import nn

from seft_ds.sparse.linear import SeftLinear, add_slots


class Runtime:
    """Stands where the engine extension does; `sink` is what it hands out, twice."""

    kernel = None  # by rule

    def __init__(self, sink=None):
        self.sink = sink
        self.not_finite = torch.zeros((), dtype=torch.bool)

    def open_sinks(self):
        return [self.sink, self.sink] if self.sink else []


class Sink:
    def __init__(self, uses_product: bool = False):
        self.total = 0.0
        self.uses_product = uses_product
        self.products = []

    def add(self, dy: torch.Tensor, x: torch.Tensor, ends=None, product=None) -> None:
        assert ends is None
        self.total = self.total + dy.t() @ x
        if product is not None:
            self.products.append(product)


def layer(bias: bool = True, dtype: torch.dtype = torch.float32) -> tuple[nn.Linear, SeftLinear]:
    torch.manual_seed(0)
    plain, ours = nn.Linear(13, 9, bias, dtype=dtype), nn.Linear(13, 9, bias, dtype=dtype)
    ours.load_state_dict(plain.state_dict())
    add_slots(ours, torch.tensor([100, 3, 50, 116, 0], dtype=torch.int32))
    ours.weight.requires_grad_(False)
    ours.seft_runtime = Runtime()
    return plain, ours


def test_a_window_shares_the_product_of_the_slot_gradients() -> None:
    gradients = []
    for sink in (Sink(uses_product=True), Sink()):
        _, ours = layer(dtype=torch.bfloat16)  # so that the rule says dense
        ours.seft_runtime.sink = sink
        torch.manual_seed(1)
        x = torch.randn(6, 13, dtype=torch.bfloat16, requires_grad=True)
        ours(x).backward(torch.randn(6, 9, dtype=torch.bfloat16))
        gradients.append(ours.seft_delta.grad)
        assert len(sink.products) == 2 * sink.uses_product
        assert all(torch.equal(p, sink.total / 2) for p in sink.products)
    assert torch.equal(*gradients)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_output_and_gradients_as_the_dense_layer(bias: bool, dtype: torch.dtype) -> None:
    plain, ours = layer(bias, dtype)
    ours.seft_runtime.sink = sink = Sink()
    x1 = torch.randn(2, 3, 13, dtype=dtype, requires_grad=True)
    x2 = x1.detach().clone().requires_grad_()
    y1, y2 = plain(x1), ours(x2)
    assert torch.equal(y1, y2)
    dy = torch.randn_like(y1)
    y1.backward(dy)
    y2.backward(dy)
    tolerance = (
        dict(rtol=1e-5, atol=1e-5) if dtype == torch.float32 else dict(rtol=2**-6, atol=2**-6)
    )
    torch.testing.assert_close(x2.grad, x1.grad, **tolerance)
    dense = plain.weight.grad
    torch.testing.assert_close(
        ours.seft_delta.grad, dense.view(-1)[ours.seft_position.long()], **tolerance
    )
    torch.testing.assert_close(sink.total / 2, dense, **tolerance)  # handed to each of two sinks
    assert ours.weight.grad is None


def test_without_an_engine_training_is_refused_and_evaluation_is_not() -> None:
    _, ours = layer()
    ours.seft_runtime = None
    with pytest.raises(ValueError, match="no DeepSpeed engine"):
        ours(torch.randn(1, 13))
    with torch.no_grad():
        ours(torch.randn(1, 13))
    ours.eval()(torch.randn(1, 13))


def peak_bytes(module: nn.Module, x: torch.Tensor) -> int:
    """The most memory that a forward and backward held at once beyond what was there before."""
    with torch.profiler.profile(profile_memory=True) as profile:
        y = module(x)
        y.backward(torch.ones_like(y))
        del y
    events = profile.profiler.kineto_results.events()
    held = peak = 0
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_copy_of_the_weight_and_no_adapter_branch(dtype: torch.dtype, monkeypatch) -> None:
    from seft_ds.sparse import slot_grad

    monkeypatch.setattr(slot_grad, "_BLOCK_ENTRIES", 1 << 16)
    size, tokens, k = 2048, 32, 4096
    frozen = nn.Linear(size, size, bias=False, dtype=dtype)
    frozen.weight.requires_grad_(False)
    ours = nn.Linear(size, size, bias=False, dtype=dtype)
    ours.weight.requires_grad_(False)
    add_slots(ours, torch.randperm(size * size)[:k].to(torch.int32))
    assert isinstance(ours, SeftLinear)
    ours.seft_runtime = Runtime()
    x = torch.randn(tokens, size, dtype=dtype, requires_grad=True)
    weight_bytes = frozen.weight.nbytes
    plain, with_slots = peak_bytes(frozen, x), peak_bytes(ours, x)
    assert plain < weight_bytes / 4  # the measure works: activations only
    assert with_slots - plain < weight_bytes / 4, (with_slots, plain, weight_bytes)
