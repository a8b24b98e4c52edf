"""Exact top-k over shards against a plain sort."""

from __future__ import annotations

import os
import random

import pytest
import torch

from seft_ds.distributed.selection import gather_lists, select
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


def test_slurm_announces_the_ranks(monkeypatch) -> None:
    from seft_ds.distributed.collectives import _announce_ranks

    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="MASTER_ADDR is not set"):
        _announce_ranks()
    monkeypatch.setenv("MASTER_ADDR", "node1")
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"):
        monkeypatch.setenv(name, "")  # so that monkeypatch puts back what _announce_ranks sets
        monkeypatch.delenv(name)
    _announce_ranks()
    assert [os.environ[n] for n in ("RANK", "WORLD_SIZE", "LOCAL_RANK")] == ["5", "8", "1"]


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
