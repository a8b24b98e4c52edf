"""SparseGPT on one linear layer, against the OBS formula in float64."""

from __future__ import annotations

import pytest
import torch

from seft_ds.prune.choose import Budget, Quota, quota_of
from seft_ds.prune.sparsegpt import inverse_factor, sparsegpt
from seft_ds.prune.wanda import square_sums, wanda_dead
from tests.prune.slow import slow_obs, slow_wanda_dead

BUDGETS = [Budget(sparsity=0.5), Budget(sparsity=0.7), Budget(pattern="2:4"), Budget(pattern="1:4"),
           Budget(pattern="4:8"), Budget(pattern="2:5")]  # fmt: skip


def layer(out: int, inputs: int, samples: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight (out, in) and inputs (samples, in) that go together, as activations do: correlated, uneven."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out, inputs, generator=generator)
    mixing = torch.randn(inputs, inputs, generator=generator) / inputs**0.5
    scale = torch.rand(inputs, generator=generator) * 3 + 0.05
    x = torch.randn(samples, inputs, generator=generator) @ (torch.eye(inputs) + mixing) * scale
    return weight, x


def gram_of(x: torch.Tensor) -> torch.Tensor:
    return (2 / len(x) * x.double().T @ x.double()).float()


def solve(weight, gram, budget):
    quota = quota_of(budget, tuple(weight.shape), by_row=False)
    return sparsegpt(weight, gram, inverse_factor(gram, "layer"), quota, "layer.weight")


@pytest.mark.parametrize("budget", BUDGETS, ids=str)
def test_it_is_the_column_by_column_obs_update(budget):
    # Two whole blocks of 128 columns and a part of one, or one and a part.
    weight, x = layer(7, 280 if budget.pattern is None else 200, 400)
    gram = gram_of(x)
    got, dead = solve(weight, gram, budget)
    width = 125 if budget.pattern == "2:5" else 128
    expected, expected_dead = slow_obs(weight.double(), gram.double(), budget, width)
    assert torch.equal(dead, expected_dead)
    assert (got - expected).abs().max() < 1e-4
    assert (got[dead] == 0).all() and (got[~dead] != 0).all()


@pytest.mark.parametrize("budget", BUDGETS, ids=str)
def test_wanda_is_its_formula(budget):
    weight, x = layer(9, 40, 60)
    dead = wanda_dead(weight, square_sums(x), quota_of(budget, (9, 40), by_row=True), "w")
    assert torch.equal(dead, slow_wanda_dead(weight.double(), x.double(), budget))


@pytest.mark.parametrize("dead_share", [0.3, 0.55, 0.999])
def test_the_count_is_the_quota_whatever_the_blocks(dead_share):
    weight, x = layer(7, 300, 320)
    dead = int(dead_share * weight.numel()) + 1
    gram = gram_of(x)
    _, mask = sparsegpt(weight, gram, inverse_factor(gram, "w"), Quota(dead), "w")
    assert int(mask.sum()) == dead
    assert int(mask[:, :128].sum()) == dead * 128 // 300


def test_inputs_that_are_always_zero_die_first_and_disturb_nothing():
    weight, x = layer(6, 64, 100)
    x[:, 5::8] = 0.0
    gram = gram_of(x)
    got, dead = solve(weight, gram, Budget(sparsity=0.5))
    expected, expected_dead = slow_obs(weight.double(), gram.double(), Budget(sparsity=0.5))
    assert torch.equal(dead, expected_dead) and dead[:, 5::8].all()
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-4)
    # More of them than may die: the live ones are zeros, and the mask says which.
    got, dead = solve(weight, gram, Budget(sparsity=0.05))
    assert int(dead.sum()) == int(0.05 * weight.numel()) < int((got == 0).sum())


def test_the_update_makes_up_for_most_of_what_pruning_costs():
    weight, x = layer(20, 96, 400)
    x += torch.randn(400, 8) @ torch.randn(8, 96) * 3  # features that say much the same
    gram = gram_of(x)
    got, dead = solve(weight, gram, Budget(sparsity=0.6))
    quota = quota_of(Budget(sparsity=0.6), (20, 96), by_row=True)
    by_wanda = weight * ~wanda_dead(weight, square_sums(x), quota, "w")

    def loss(pruned: torch.Tensor) -> float:
        return float((x @ (pruned - weight).T).square().sum())

    assert loss(got) < 0.5 * min(loss(weight * ~dead), loss(by_wanda))


def test_the_factor_is_that_of_the_damped_inverse():
    _, x = layer(1, 50, 80)
    gram = gram_of(x)
    u = inverse_factor(gram, "w").double()
    damped = gram.double() + 0.01 * gram.diagonal().double().mean() * torch.eye(50)
    assert torch.equal(u, u.triu())
    torch.testing.assert_close(u.T @ u @ damped, torch.eye(50).double(), rtol=0, atol=1e-4)


def test_damping_is_raised_with_a_warning_and_then_given_up():
    torch.manual_seed(0)
    singular = torch.diag(torch.tensor([1.0, 1.0, 1.0, -0.05]))  # as rounding may leave it
    with pytest.warns(UserWarning, match="q_proj can't be factorised with a damping of 0.01"):
        u = inverse_factor(singular, "q_proj")
    assert torch.isfinite(u).all()
    hopeless = torch.diag(torch.tensor([1.0, 1.0, 1.0, -50.0]))
    with (
        pytest.warns(UserWarning),
        pytest.raises(ValueError, match="q_proj can't be factorised, not even.*--method wanda"),
    ):
        inverse_factor(hopeless, "q_proj")


def test_what_is_not_finite_is_refused_by_name():
    gram = torch.eye(4)
    gram[1, 1] = float("inf")
    with pytest.raises(ValueError, match="inputs of q_proj are not finite"):
        inverse_factor(gram, "q_proj")
    weight = torch.full((2, 4), float("nan"))
    with pytest.raises(ValueError, match="q_proj.weight is not finite"):
        sparsegpt(weight, torch.eye(4), torch.eye(4), Quota(2), "q_proj.weight")
    with pytest.raises(ValueError, match="w has 4 inputs.*2:5"):
        sparsegpt(torch.ones(2, 4), torch.eye(4), torch.eye(4), Quota(2, pattern="2:5"), "w")
