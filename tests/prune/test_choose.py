"""Exact choices of dead positions, against sorts that anyone can read."""

from __future__ import annotations

import pytest
import torch

from seft_ds.prune import choose
from seft_ds.prune.choose import (
    Budget,
    Quota,
    apportion,
    dead_count,
    dead_positions,
    lowest,
    lowest_of_groups,
    quota_of,
    zero_,
)
from seft_ds.prune.magnitude import global_quotas
from seft_ds.prune.magnitude import magnitude_dead as by_magnitude
from seft_ds.prune.wanda import square_sums, wanda_scores
from seft_ds.prune.wanda import wanda_dead as by_wanda
from tests.ranks import run_threads


def magnitude_dead(weight: torch.Tensor, budget: Budget, name: str) -> torch.Tensor:
    return by_magnitude(weight, quota_of(budget, tuple(weight.shape), by_row=False), name)


def wanda_dead(weight: torch.Tensor, sums: torch.Tensor, budget: Budget, name: str) -> torch.Tensor:
    return by_wanda(weight, sums, quota_of(budget, tuple(weight.shape), by_row=True), name)


def sorted_lowest(scores: list[float], k: int) -> set[int]:
    """The k lowest by (score, position), the slow way."""
    return set(sorted(range(len(scores)), key=lambda i: (scores[i], i))[:k])


def tied_scores(rows: int, columns: int, seed: int) -> torch.Tensor:
    """Scores of few distinct values, zeros among them, so that every cut goes through ties."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 4, (rows, columns), generator=generator).float()


@pytest.mark.parametrize("k", [0, 1, 7, 19, 20])
@pytest.mark.parametrize("chunk", [1, 60, 1 << 24])
def test_lowest_is_a_stable_sort_of_each_row(monkeypatch, k, chunk):
    monkeypatch.setattr(choose, "SCORES_AT_ONCE", chunk)
    scores = tied_scores(11, 20, seed=k)
    chosen = lowest(scores, k)
    for row, marks in zip(scores.tolist(), chosen.tolist()):
        assert {i for i, mark in enumerate(marks) if mark} == sorted_lowest(row, k)


@pytest.mark.parametrize("keep, group", [(2, 4), (1, 4), (4, 8), (3, 5)])
@pytest.mark.parametrize("chunk", [45, 1 << 24])
def test_lowest_of_groups_is_a_stable_sort_of_each_group(monkeypatch, keep, group, chunk):
    monkeypatch.setattr(choose, "SCORES_AT_ONCE", chunk)
    scores = tied_scores(6, 40, seed=group)
    dead = lowest_of_groups(scores, keep, group, "w")
    for row, marks in zip(scores.tolist(), dead.tolist()):
        for lo in range(0, 40, group):
            got = {i for i in range(group) if marks[lo + i]}
            assert got == sorted_lowest(row[lo : lo + group], group - keep)


def test_a_group_that_does_not_fit_names_the_weight():
    with pytest.raises(ValueError, match=r"layers\.3\.q_proj has 6 inputs.*2:4"):
        lowest_of_groups(torch.rand(2, 6), 2, 4, "layers.3.q_proj")


@pytest.mark.parametrize(
    "sparsity, numel, expected",
    [
        (0.29, 100, 29),
        (0.57, 100, 57),
        (0.6, 576, 345),
        (0.5, 7, 3),
        (0.1, 9, 0),
        (0.999, 1000, 999),
    ],
)
def test_the_count_reads_sparsity_as_a_decimal(sparsity, numel, expected):
    assert dead_count(sparsity, numel) == expected


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"sparsity": 0.5, "pattern": "2:4"},
        {"sparsity": 0.0},
        {"sparsity": 1.0},
        {"sparsity": -0.1},
        {"sparsity": 60.0},
        {"sparsity": float("nan")},
        {"pattern": "4:2"},
        {"pattern": "2/4"},
    ],
)
def test_budgets_without_sense_are_refused(settings):
    with pytest.raises(ValueError, match=r"got|wanted"):
        Budget(**settings)


def test_magnitude_counts_over_the_whole_weight():
    weight = torch.tensor([[9.0, -8.0, 7.0], [0.1, -0.2, 0.1]])
    dead = magnitude_dead(weight, Budget(sparsity=0.5), "w")
    assert dead.tolist() == [[False] * 3, [True] * 3]
    # Two equal entries and room for one: the lower position dies.
    one = magnitude_dead(weight, Budget(sparsity=0.2), "w")
    assert one.nonzero().tolist() == [[1, 0]]


def test_magnitude_sees_a_transposed_weight_in_its_own_order():
    weight = torch.randn(8, 5).t()
    dead = magnitude_dead(weight, Budget(sparsity=0.4), "w")
    flat = weight.abs().flatten().tolist()
    assert set(dead.flatten().nonzero().flatten().tolist()) == sorted_lowest(flat, 16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_wanda_against_a_sort_of_every_row(dtype):
    torch.manual_seed(0)
    weight, x = torch.randn(7, 30).to(dtype), (torch.randn(50, 30) * torch.rand(30) * 9).to(dtype)
    weight[2] = 1.0  # a row that only the inputs rank
    weight[3, :20] = 0.0  # ties at the bottom
    sums = square_sums(x)
    dead = wanda_dead(weight, sums, Budget(sparsity=0.55), "w")
    assert dead.sum(dim=1).tolist() == [16] * 7
    for row, score in zip(dead, wanda_scores(weight, sums).tolist()):
        assert set(row.nonzero().flatten().tolist()) == sorted_lowest(score, 16)


def test_wanda_scores_are_weight_times_input_norm():
    torch.manual_seed(1)
    weight, x = torch.randn(4, 6), torch.randn(2, 5, 6)
    for i in range(4):
        for j in range(6):
            norm = sum(float(v) ** 2 for v in x[:, :, j].flatten()) ** 0.5
            expected = abs(float(weight[i, j])) * norm
            assert float(wanda_scores(weight, square_sums(x))[i, j]) == pytest.approx(expected)


def test_wanda_prefers_a_small_weight_on_a_large_input():
    weight, sums = torch.tensor([[1.0, 0.5]]), torch.tensor([1.0, 100.0], dtype=torch.float64)
    assert wanda_dead(weight, sums, Budget(sparsity=0.5), "w").tolist() == [[True, False]]
    assert magnitude_dead(weight, Budget(sparsity=0.5), "w").tolist() == [[False, True]]


def test_wanda_with_a_pattern():
    weight = torch.tensor([[1.0, 1.0, 1.0, 9.0]])
    sums = torch.tensor([4.0, 1.0, 9.0, 0.0], dtype=torch.float64)
    dead = wanda_dead(weight, sums, Budget(pattern="2:4"), "w")
    assert dead.tolist() == [[False, True, False, True]]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_scores_that_cannot_be_ranked_are_refused_by_name(bad):
    weight = torch.ones(2, 4)
    weight[1, 2] = bad
    with pytest.raises(ValueError, match="layer.weight has scores that are not finite"):
        magnitude_dead(weight, Budget(sparsity=0.5), "layer.weight")
    with pytest.raises(ValueError, match="layer.weight"):
        wanda_dead(weight, torch.ones(4, dtype=torch.float64), Budget(sparsity=0.5), "layer.weight")


def test_no_negative_zero_is_left():
    weight = torch.tensor([[-1.0, -0.0, 2.0, -3.0]])
    zero_(weight, torch.tensor([[True, False, False, False]]))
    assert weight.tolist() == [[0.0, 0.0, 2.0, -3.0]]
    assert torch.signbit(weight).tolist() == [[False, False, False, True]]


@pytest.mark.parametrize("by_row", [True, False])
def test_a_quota_is_the_budget_in_entries(by_row):
    # 0.55 of 9 inputs is 4.95: by row the share is rounded down in every row.
    assert quota_of(Budget(sparsity=0.55), (7, 9), by_row).dead == (7 * 4 if by_row else 34)
    assert quota_of(Budget(pattern="1:4"), (3, 8), by_row) == Quota(18, pattern="1:4")


def test_rows_that_do_not_share_evenly_give_one_more_from_the_first_on():
    scores = tied_scores(5, 8, seed=1)
    dead = dead_positions(scores, Quota(17, by_row=True), "w")
    assert dead.sum(dim=1).tolist() == [4, 4, 3, 3, 3]
    for row, marks in zip(scores.tolist(), dead):
        assert set(marks.nonzero().flatten().tolist()) == sorted_lowest(row, int(marks.sum()))
    assert int(dead_positions(scores, Quota(0), "w").sum()) == 0


@pytest.mark.parametrize("total, shares", [(10, [1.0, 1.0, 1.0]), (7, [0.1, 0.7, 0.2]), (0, [2.0])])
def test_apportioned_parts_add_up_and_are_no_further_than_one_off(total, shares):
    parts = apportion(total, shares)
    assert sum(parts) == total
    assert all(abs(p - total * s / sum(shares)) < 1 for p, s in zip(parts, shares))
    assert apportion(10, [1.0, 1.0, 1.0]) == [4, 3, 3]


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["normal", "tied"])
def test_global_quotas_are_one_sort_of_all_weights(size, dtype, kind):
    torch.manual_seed(3)
    shapes = {"a": (4, 6), "b": (3, 10), "c": (8, 5), "d": (1, 2)}
    weights = {n: torch.randn(s).to(dtype) for n, s in shapes.items()}
    if kind == "tied":
        weights = {n: w.round() for n, w in weights.items()}
    values = [(abs(float(v)), i, j, n) for i, (n, w) in enumerate(weights.items())
              for j, v in enumerate(w.flatten())]  # fmt: skip
    for dead in (0, 1, 17, 50, len(values) - 1, len(values)):
        chosen = sorted(values)[:dead]
        for quotas in run_threads(
            size, lambda r, dead=dead: global_quotas(list(weights), weights.__getitem__, dead, r)
        ):
            assert {n: q.dead for n, q in quotas.items()} == {
                n: sum(v[3] == n for v in chosen) for n in weights
            }
        for name, weight in weights.items():
            mask = by_magnitude(weight, quotas[name], name)
            assert {j for _, _, j, n in chosen if n == name} == set(
                mask.flatten().nonzero().flatten().tolist()
            )


def test_a_global_budget_names_a_weight_that_is_not_finite():
    weights = {"a": torch.ones(2, 2), "b": torch.full((2, 2), float("inf"))}
    with pytest.raises(ValueError, match="b has scores that are not finite"):
        run_threads(1, lambda r: global_quotas(["a", "b"], weights.__getitem__, 2, r))
