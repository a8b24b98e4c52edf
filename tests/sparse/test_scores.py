from __future__ import annotations

import torch

from seft_ds.sparse import scores


def test_hash_depends_on_position_and_seed_only_and_is_uniform() -> None:
    whole = scores.hash_keys(torch.arange(100_000), 3)
    part = scores.hash_keys(torch.arange(40_000, 60_000), 3)
    assert torch.equal(whole[40_000:60_000], part)
    assert int(whole.min()) >= 0 and whole.unique().numel() > 99_990
    assert abs(float(whole.double().mean()) / 2**30 - 1) < 0.01
    assert (scores.hash_keys(torch.arange(1000), 4) != whole[:1000]).sum() > 990


def test_formulas() -> None:
    w, G, Q = torch.tensor([2.0, -3.0]), torch.tensor([-1.0, 0.5]), torch.tensor([4.0, 9.0])
    inputs = scores.ScoreInputs(w, G, Q, 0, 0)
    assert scores.gradient_magnitude(inputs).tolist() == [1.0, 0.5]
    assert scores.consistency(inputs).tolist() == [0.5, float(torch.tensor(0.5) / 3)]
    assert scores.gain(inputs).tolist() == [0.0, 0.0]  # smaller than their own noise
    steps = torch.tensor([[3.0, 1.0], [1.0, -1.0], [2.0, 0.0]])  # gradients of three steps
    pairs = sum(steps[s] * steps[t] for s in range(3) for t in range(3) if s != t)
    seen = scores.ScoreInputs(w, steps.sum(0), steps.square().sum(0), 0, 0)
    assert torch.allclose(scores.gain(seen), pairs.clamp(min=0) / seen.Q.sqrt())
    nothing = scores.ScoreInputs(w, torch.zeros(2), torch.zeros(2), 0, 0)
    assert not scores.gain(nothing).any() and not scores.consistency(nothing).any()
    assert scores.taylor(inputs).tolist() == [2.0, 1.5]
    assert scores.fisher(inputs).tolist() == [16.0, 81.0]
    assert scores.weight_magnitude(inputs).tolist() == [2.0, 3.0]
    assert w.tolist() == [2.0, -3.0]  # scores don't write to what they are given
