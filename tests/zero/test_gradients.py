"""Slot gradients and window sums of the engine against the dense gradient of a plain copy."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from tests.ranks import run_processes
from tests.tiny import tiny_model
from tests.zero.test_engine import KINDS, STAGES, config, tokens

CLIP = 0.01


def dense_gradients(kind: str, batches: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """dL/dW of every pruned layer, the mean over the batches, by plain autograd."""
    torch.manual_seed(0)
    model = tiny_model(kind)
    for ids in batches:
        (model(input_ids=ids, labels=ids).loss / len(batches)).backward()
    return {n: m.weight.grad for n, m in model.named_modules() if isinstance(m, nn.Linear)}


def compare(kind: str, stage: int) -> None:
    from deepspeed.utils import safe_get_full_grad

    import seft_ds
    from seft_ds.zero import shards

    torch.manual_seed(0)
    # Every weight is in its window from the first step on.
    settings = config(stage, interval=3, window=3, waves=False, density=0.1)
    settings |= {"gradient_accumulation_steps": 2, "gradient_clipping": CLIP}
    engine, *_ = seft_ds.initialize(model=tiny_model(kind), config=settings)
    ranks = engine.seft.ranks
    everyone = [tokens(0, row=r) for r in range(2 * ranks.size)]
    wanted = dense_gradients(kind, everyone)
    for ids in everyone[2 * ranks.rank : 2 * ranks.rank + 2]:
        engine.backward(engine(input_ids=ids, labels=ids).loss)
        if engine.is_gradient_accumulation_boundary():
            norm = 0.0
            for state in engine.seft.states:
                position = shards.gather_whole(state.position, ranks).long()
                at_slots = wanted[state.target.name].view(-1)[position]
                grad = state.delta.grad if stage == 0 else safe_get_full_grad(state.delta)
                torch.testing.assert_close(grad.float(), at_slots, rtol=1e-4, atol=1e-7)
                norm += float(at_slots.double().square().sum())
            clip = CLIP / norm**0.5
            assert clip < 0.9  # it bites
        engine.step()
    for state in engine.seft.states:
        dense = clip * wanted[state.target.name].view(-1)[state.lo : state.hi]
        assert state.window is not None and state.window.steps == 1
        torch.testing.assert_close(state.window.G, dense, rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(state.window.Q, dense.square(), rtol=1e-3, atol=1e-12)
        # What the optimizer saw at the slots is what the window summed there.
        part = state.slot_shard
        if part.hi > part.lo:
            saw = part.moment("mean") / (1 - 0.9)
            position = shards.gather_whole(state.position, ranks).long()
            G = torch.cat(ranks.gather(state.window.G))[position]
            torch.testing.assert_close(saw, G[part.lo : part.hi], rtol=1e-4, atol=1e-8)
        else:
            ranks.gather(state.window.G)


def compare_all() -> None:
    for kind, stage in itertools.product(KINDS, STAGES):
        compare(kind, stage)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("size", [1, 3])
def test_slot_and_window_gradients_are_the_dense_ones(size: int) -> None:
    run_processes(size, compare_all)
