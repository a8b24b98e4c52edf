"""Learning rates of slots by their inputs, in real engines under every ZeRO stage."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from seft_ds.sparse.input_rates import input_rates
from tests.ranks import run_processes
from tests.tiny import tiny_model
from tests.zero.test_engine import STAGES, config, tokens


def rates_by_hand(batches: list[torch.Tensor], names: list[str], slots: list[int]):
    """From the inputs of a plain copy, all ranks' batches in one list."""
    torch.manual_seed(0)
    model = tiny_model("llama")
    seen: dict[str, list[torch.Tensor]] = {name: [] for name in names}
    for name in names:
        layer = model.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        layer.register_forward_hook(
            lambda m, args, out, name=name: seen[name].append(args[0].flatten(0, -2))
        )
    with torch.no_grad():
        for ids in batches:
            model(input_ids=ids)
    return input_rates([torch.cat(seen[name]).square().mean(0) for name in names], slots)


def deltas_of(stage: int, scale: str, n_steps: int, batches: list[torch.Tensor]):
    import seft_ds

    torch.manual_seed(0)
    settings = config(stage, interval=30, window=3, density=0.1, lr_scale=scale)
    engine, *_ = seft_ds.initialize(model=tiny_model("llama"), config=settings)
    seft = engine.seft
    for _ in range(n_steps):
        ids = batches[seft.ranks.rank]
        engine.backward(engine(input_ids=ids, labels=ids).loss)
        engine.step()
    every = list(range(len(seft.states)))
    positions = [p.long() for p in whole_positions(seft)]
    assert all(s.curvature is None for s in seft.states)  # measured once
    return seft, positions, seft.gather_deltas(every)


def whole_positions(seft):
    from seft_ds.zero import shards

    return [shards.gather_whole(s.position, seft.ranks) for s in seft.states]


def compare() -> None:
    from seft_ds.distributed.collectives import init_ranks

    ranks = init_ranks()
    batches = [tokens(0, row=r) for r in range(ranks.size)]
    for stage in STAGES:
        seft, positions, plain = deltas_of(stage, "none", 1, batches)
        assert all(s.rates is None for s in seft.states)
        seft, again, scaled = deltas_of(stage, "input", 1, batches)
        names = [s.target.name for s in seft.states]
        wanted = rates_by_hand(batches, names, [s.target.n_slots for s in seft.states])
        for state, rates in zip(seft.states, wanted, strict=True):
            torch.testing.assert_close(state.rates, rates, rtol=1e-3, atol=0)
        columns = [p % s.target.shape[1] for p, s in zip(positions, seft.states, strict=True)]
        for p, q, ours, theirs, state, column in zip(
            positions, again, scaled, plain, seft.states, columns, strict=True
        ):
            assert torch.equal(p, q) and bool((theirs != 0).all())
            torch.testing.assert_close(ours, theirs * state.rates[column], rtol=1e-6, atol=0)
        spread = torch.cat(wanted)
        assert spread.max() > 1.2 and spread.min() < 0.8  # or nothing would be seen
        # A second step adds to the first, scaled as well.
        seft, _, later = deltas_of(stage, "input", 2, batches)
        rate = 2 * 2 * seft.lr  # no step of Adam's is longer than twice its rate so early
        for one, two, state, column in zip(scaled, later, seft.states, columns, strict=True):
            assert bool(((two - one).abs() <= rate * state.rates[column]).all())
            assert not torch.equal(one, two)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("size", [1, 3])
def test_updates_are_scaled_by_the_inputs_of_the_first_step(size: int) -> None:
    run_processes(size, compare)


def test_slots_drop_by_deltas_in_units_of_their_own_steps() -> None:
    from benchmarks.scale import SilentRanks, share_of

    state = share_of((16, 12), 0.2, SilentRanks(0, 1))
    delta = torch.randn(state.target.n_slots)
    kept = delta.clone()
    [plain] = state.views(delta, 0)
    assert torch.equal(plain.delta, delta[plain.slot])
    state.rates = torch.rand(12) + 0.5
    [view] = state.views(delta, 0)
    torch.testing.assert_close(view.delta, plain.delta / state.rates[view.position % 12])
    assert torch.equal(delta, kept)
