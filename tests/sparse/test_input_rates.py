"""Factors on the learning rate by the size of inputs."""

from __future__ import annotations

import torch

from seft_ds.sparse.input_rates import input_rates


def test_larger_inputs_take_shorter_steps() -> None:
    a, b = torch.tensor([1.0, 4.0, 16.0]), torch.tensor([0.25, 0.0])
    one, two = input_rates([a, b], [30, 10], power=0.5)
    # Geometric mean of the root mean squares over slots: 2 for three quarters, 1/2 for one (the 0 apart).
    middle = 2.0 ** (0.75 * 1 + 0.25 * -1)
    torch.testing.assert_close(one, (torch.tensor([1.0, 2.0, 4.0]) / middle) ** -0.5)
    torch.testing.assert_close(two, torch.tensor([(0.5 / middle) ** -0.5, 1.0]))


def test_slots_take_the_learning_rate_in_the_mean() -> None:
    squares = [torch.rand(50) + 0.5, torch.rand(20) + 0.1]
    rates = input_rates(squares, [500, 200])
    assert abs(torch.cat(rates).log().mean()) < 1e-6  # as many slots on each input


def test_power_0_and_extremes() -> None:
    squares = [torch.tensor([1e-30, 1.0, 1e30]), torch.zeros(3)]
    assert all(torch.equal(r, torch.ones(3)) for r in input_rates(squares, [1, 1], power=0.0))
    far, dead = input_rates(squares, [1, 1], power=1.0)
    torch.testing.assert_close(far, torch.tensor([10.0, 1.0, 0.1]))
    assert torch.equal(dead, torch.ones(3))
