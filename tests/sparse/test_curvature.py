"""Worths against the mean square gradients that they stand for."""

from __future__ import annotations

import pytest
import torch

from seft_ds.sparse.curvature import Curvature, Factors, worth


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_means_over_the_tokens_of_finished_steps(dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(0)
    curvature = Curvature(5, 3, torch.device("cpu"))
    batches = [(torch.randn(7, 5, generator=g), torch.randn(7, 3, generator=g)) for _ in range(4)]
    batches = [(dy.to(dtype), x.to(dtype)) for dy, x in batches]
    for step, finished in [(batches[:2], True), (batches[2:3], False), (batches[3:], True)]:
        for dy, x in step:
            curvature.add(dy, x)
        curvature.finish_step() if finished else curvature.discard_step()
    output = input = 0.0
    for step in (batches[:2], batches[3:]):
        dy, x = (torch.cat(parts).float() for parts in zip(*step, strict=True))
        output = output + (dy * len(dy)).square().mean(0)  # of a token's own loss, not of a mean
        input = input + x.square().mean(0)
    torch.testing.assert_close(curvature.output, output)
    torch.testing.assert_close(curvature.input, input)
    assert curvature.steps == 2 and not curvature.step_sums.any()


@pytest.mark.parametrize("copies", [False, True])
def test_a_step_weighs_the_same_on_any_number_of_ranks(copies: bool) -> None:
    """Three ranks share the tokens, each with the mean loss of its own; or all have the same ones."""
    g = torch.Generator().manual_seed(5)
    dy, x = torch.randn(6, 5, generator=g), torch.randn(6, 3, generator=g)
    one, three = (Curvature(5, 3, torch.device("cpu")) for _ in range(2))
    one.add(dy, x)
    one.finish_step()
    for rank in range(3):
        mine = slice(None) if copies else slice(2 * rank, 2 * rank + 2)
        three.add(dy[mine] * (1 if copies else 3), x[mine])
    three.finish_step(3)
    torch.testing.assert_close(three.output, one.output)
    torch.testing.assert_close(three.input, one.input)


@pytest.mark.parametrize("step", [1, 2, 7])
@pytest.mark.parametrize("first", [30, 31, 44])
def test_factors_know_where_their_matrix_begins(first: int, step: int) -> None:
    g = torch.Generator().manual_seed(4)
    weight, output, input = (torch.randn(n, generator=g) for n in (15, 5, 3))
    factors = Factors(30, output.square(), input.square())
    at = torch.arange(first, 45, step) - 30
    found = factors.worth(weight[at], first, step)
    wanted = weight[at].square() * output[at // 3].square() * input[at % 3].square()
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize(("lo", "hi"), [(0, 15), (0, 4), (1, 2), (2, 13), (6, 9), (14, 15), (7, 7)])
def test_worth_of_any_range(lo: int, hi: int) -> None:
    g = torch.Generator().manual_seed(1)
    weight, output, input = (torch.randn(n, generator=g) for n in (15, 5, 3))
    output, input, before = output.square(), input.square(), weight.clone()
    found = worth(weight[lo:hi], lo, output, input)
    for i, value in zip(range(lo, hi), found.tolist(), strict=True):
        wanted = float(weight[i]) ** 2 * float(output[i // 3]) * float(input[i % 3])
        assert value == pytest.approx(wanted, rel=1e-5)
    assert torch.equal(weight, before) and found.dtype == torch.float32


def test_it_is_the_mean_square_gradient_where_the_factors_are_independent() -> None:
    g = torch.Generator().manual_seed(2)
    dy = torch.randn(20_000, 3, generator=g) * torch.tensor([1.0, 3.0, 0.2])
    x = torch.randn(20_000, 2, generator=g) * torch.tensor([2.0, 0.5])
    curvature = Curvature(3, 2, torch.device("cpu"))
    curvature.add(dy, x)
    curvature.finish_step()
    ones = worth(torch.ones(6), 0, curvature.output, curvature.input) / 20_000**2
    exact = torch.stack([(dy[:, i] * x[:, j]).square().mean() for i in range(3) for j in range(2)])
    torch.testing.assert_close(ones, exact, rtol=0.05, atol=0)


def test_every_expert_has_inputs_of_its_own() -> None:
    g = torch.Generator().manual_seed(3)
    ends = [3, 3, 9]  # the second expert has no tokens
    dy, x = torch.randn(9, 4, generator=g), torch.randn(9, 2, generator=g)
    curvature = Curvature(12, 2, torch.device("cpu"), experts=3)
    curvature.add(dy, x, ends)
    curvature.add(dy, x, ends)
    curvature.finish_step()
    for e, rows in enumerate((slice(0, 3), slice(3, 3), slice(3, 9))):
        torch.testing.assert_close(
            curvature.output[4 * e : 4 * e + 4], 18 * 2 * dy[rows].square().sum(0)
        )
        torch.testing.assert_close(
            curvature.input[2 * e : 2 * e + 2], 2 * x[rows].square().sum(0) / 18
        )
