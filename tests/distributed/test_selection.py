"""Exact top-k over shards against a plain sort."""

from __future__ import annotations

import random

import pytest
import torch

from seft_ds.distributed import selection
from seft_ds.distributed.selection import KeysOnDemand, gather_lists, select
from seft_ds.sparse import radix
from seft_ds.sparse.shard import shard_range
from tests.ranks import run_threads


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("shared", [False, True])
def test_select_equals_sorting(size: int, shared: bool) -> None:
    rng = random.Random(size)
    g = torch.Generator().manual_seed(size)
    for trial in range(12):
        lengths = [rng.choice([1, 5, 23, 60]) for _ in range(3)]
        scale = [1.0, 1e-30, 0.0][trial % 3]  # the last: all scores are zero
        scores = [torch.randint(0, 4, (n,), generator=g).float() * scale for n in lengths]
        excluded = [torch.rand(n, generator=g) < 0.2 for n in lengths]
        group = [0, 0, 0] if shared else [0, 1, 2]
        free = [int((~e).sum()) for e in excluded]
        k = [rng.randint(0, sum(free))] if shared else [rng.randint(0, f) for f in free]

        def work(ranks, lengths=lengths, scores=scores, excluded=excluded, group=group, k=k):
            bounds = [shard_range(n, ranks.rank, ranks.size) for n in lengths]
            keys = [
                torch.where(e[lo:hi], radix.EXCLUDED, radix.largest_first(s)[lo:hi])
                for s, e, (lo, hi) in zip(scores, excluded, bounds, strict=True)
            ]
            chosen = select(keys, group, k, ranks)
            return [(c + lo).tolist() for c, (lo, _) in zip(chosen, bounds, strict=True)]

        by_rank = run_threads(size, work)
        got = {(w, p) for lists in by_rank for w in range(3) for p in lists[w]}
        wanted = set()
        for each, count in enumerate(k):
            order = sorted(
                (-float(scores[w][p]), w, p)
                for w in range(3)
                if group[w] == each
                for p in range(lengths[w])
                if not excluded[w][p]
            )
            wanted |= {(w, p) for _, w, p in order[:count]}
        assert got == wanted


def test_too_few_candidates_is_an_error() -> None:
    keys = [torch.tensor([1, radix.EXCLUDED, 5], dtype=torch.int32)]
    with pytest.raises(AssertionError, match="more entries than"):
        run_threads(1, lambda ranks: select(keys, [0], [3], ranks))


def sorted_choice(keys: list[torch.Tensor], k: int) -> set[tuple[int, int]]:
    """(weight, index) of the k largest of all weights together, by sorting."""
    every = [
        (-key, w, i) for w, of in enumerate(keys) for i, key in enumerate(of.tolist()) if key >= 0
    ]
    return {(w, i) for _, w, i in sorted(every)[:k]}


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize(
    "kind", ["spread", "ties", "equal", "lying sample", "hidden from the sample"]
)
def test_few_of_many_equal_sorting(size: int, kind: str, monkeypatch) -> None:
    monkeypatch.setattr(selection, "_BLOCK_ON_CPU", 1000)
    lengths, k = [7001, 4, 5003], [60]
    g = torch.Generator().manual_seed(size)
    scores = [torch.randn(n, generator=g).abs() for n in lengths]
    if kind == "ties":
        scores = [s.mul(4).floor() for s in scores]
    if kind == "equal":
        scores = [torch.ones(n) for n in lengths]
    bounds = [[shard_range(n, r, size) for n in lengths] for r in range(size)]
    for ranges in bounds if kind in ("lying sample", "hidden from the sample") else []:
        for s, (lo, hi) in zip(scores, ranges, strict=True):
            # The sample sees the only large scores, so that its floor is too high; or the only small ones.
            s[lo : hi : selection._SAMPLE_EVERY] *= 1e6 if kind == "lying sample" else 1e-6
    keys = [radix.largest_first(s).clone() for s in scores]
    for key in keys:
        key[torch.rand(key.numel(), generator=g) < 0.3] = radix.EXCLUDED
    looked_at = [0] * size

    def work(ranks):
        ranges = bounds[ranks.rank]

        def on_demand(key: torch.Tensor, lo: int, hi: int) -> KeysOnDemand:
            def make(where: slice) -> torch.Tensor:
                found = key[lo:hi][where].clone()
                looked_at[ranks.rank] += found.numel()
                return found

            return KeysOnDemand(hi - lo, key.device, make)

        mine = [on_demand(key, lo, hi) for key, (lo, hi) in zip(keys, ranges, strict=True)]
        chosen = select(mine, [0, 0, 0], k, ranks, few=True)
        return [(c + lo).tolist() for c, (lo, _) in zip(chosen, ranges, strict=True)]

    by_rank = run_threads(size, work)
    assert {(w, p) for lists in by_rank for w in range(3) for p in lists[w]} == sorted_choice(
        keys, k[0]
    )
    assert all(of == sorted(of) for lists in by_rank for of in lists)
    # Once by the sample, once to compare; again only where the sample misled.
    once_and_a_sample = sum(lengths) * (1 + 1 / selection._SAMPLE_EVERY) + 3 * size
    assert (sum(looked_at) <= once_and_a_sample) == (kind != "lying sample")


def test_keys_order_like_scores() -> None:
    values = torch.tensor([0.0, 1e-45, 1e-38, 0.1, 1.0, 1.5, 3e38, torch.inf])
    keys = radix.largest_first(values)
    assert (keys[1:] > keys[:-1]).all()
    down = radix.smallest_first(values)
    assert (down[1:] < down[:-1]).all() and (down >= 0).all()


@pytest.mark.parametrize("size", [1, 3])
def test_gather_lists_keeps_rank_order(size: int) -> None:
    def work(ranks):
        lists = [torch.full((ranks.rank,), ranks.rank), torch.tensor([10 * ranks.rank])]
        return [x.tolist() for x in gather_lists(lists, ranks)]

    wanted = [[r for r in range(size) for _ in range(r)], [10 * r for r in range(size)]]
    assert run_threads(size, work) == [wanted] * size


def test_real_process_groups_give_the_same_interface() -> None:
    from tests.ranks import run_processes

    assert run_processes(3, _talk) == [
        ([6, 6], [0, 1, 1, 2, 2, 2], ["a0", "a1", "a2"], [30 + 3 * r, 3]) for r in range(3)
    ]


def _talk():
    from seft_ds.distributed.collectives import init_ranks

    ranks = init_ranks()
    total = ranks.sum_(torch.tensor([ranks.rank + 1, 2]))
    ragged = torch.cat(ranks.gather(torch.full((ranks.rank + 1,), ranks.rank)))
    names = ranks.gather_object(f"a{ranks.rank}")
    own_row = ranks.sum_scatter(torch.tensor([[10, 1], [11, 1], [12, 1]]))
    assert ranks.bytes > 0
    return total.tolist(), ragged.tolist(), names, own_row.tolist()
