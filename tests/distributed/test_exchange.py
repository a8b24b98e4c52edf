"""One exchange on threads as ranks against a slow reference: the same positions, whatever the ranks."""

from __future__ import annotations

import pytest
import torch

from seft_ds.distributed.exchange import Stakes, plan_exchange
from seft_ds.sparse import mask
from seft_ds.sparse.shard import shard_range
from tests.ranks import run_threads

RANKS = [1, 2, 3, 4, 7]
SIZES = [60, 7, 33]


def stakes_of(worth: torch.Tensor, live: torch.Tensor, held: torch.Tensor) -> Stakes:
    return Stakes(worth, mask.pack(live), held.nonzero().squeeze(1))


def held(s: Stakes) -> torch.Tensor:
    flags = torch.zeros_like(s.live)
    flags[s.held_at] = True
    return flags


def random_stakes(seed: int, kind: str) -> list[Stakes]:
    """Whole weights. kind: how the worths look (ties are the hard part)."""
    g = torch.Generator().manual_seed(seed)
    found = []
    for n in SIZES:
        worth = torch.rand(n, generator=g)
        if kind == "ties":
            worth = worth.mul(1 << seed % 3).round()  # of two, three and five values
        elif kind == "equal":
            worth = torch.full((n,), float(seed % 2))
        live = torch.rand(n, generator=g) < 0.5
        held = live & (torch.rand(n, generator=g) < 0.2)
        if kind == "one side":  # slots hold all that live; nothing is dead; nothing lives
            live, held = [(live, live), (~live | live, held), (live & ~live, held & ~held)][seed]
        found.append(stakes_of(worth, live, held))
    return found


def reference(
    stakes: list[Stakes], group: list[int], most: list[int]
) -> tuple[list[tuple[set[int], set[int]]], list[int]]:
    """Pair the best dead position with the worst free live one, as long as it is worth strictly more."""
    out: list[tuple[set[int], set[int]]] = [(set(), set()) for _ in stakes]
    paying = []
    for g, limit in enumerate(most):
        mine = [w for w in range(len(stakes)) if group[w] == g]
        every = [(float(stakes[w].worth[p]), w, p) for w in mine for p in range(SIZES[w])]
        dead = [(v, w, p) for v, w, p in every if not stakes[w].live[p] and v > 0]
        free = [(v, w, p) for v, w, p in every if stakes[w].live[p] and p not in stakes[w].held_at]
        dead.sort(key=lambda e: (-e[0], e[1], e[2]))
        free.sort(key=lambda e: (e[0], e[1], e[2]))
        pairs = zip(dead, free, strict=False)
        paying.append(sum(d[0] > f[0] for d, f in pairs))  # worth falls here and rises there
        for i in range(min(limit, paying[-1])):
            out[dead[i][1]][0].add(dead[i][2])
            out[free[i][1]][1].add(free[i][2])
    return out, paying


@pytest.mark.parametrize("kind", ["plain", "ties", "equal", "one side"])
@pytest.mark.parametrize("group", [[0, 0, 0], [0, 1, 2], [0, 1, 0]])
@pytest.mark.parametrize("share", [0.0, 0.1, 1.0])
def test_the_same_as_the_reference_on_any_ranks(kind: str, group: list[int], share: float) -> None:
    for seed in range(3):
        stakes = random_stakes(seed, kind)
        sizes = [
            sum(n for n, g in zip(SIZES, group, strict=True) if g == k)
            for k in range(max(group) + 1)
        ]
        most = [int(share * n) for n in sizes]
        wanted, wanted_paying = reference(stakes, group, most)
        for size in RANKS:

            def work(ranks, stakes=stakes, most=most):
                ranges = [shard_range(n, ranks.rank, ranks.size) for n in SIZES]
                mine = [
                    stakes_of(*(t[lo:hi].clone() for t in (s.worth, s.live, held(s))))
                    for s, (lo, hi) in zip(stakes, ranges, strict=True)
                ]
                changes, paying = plan_exchange(mine, group, most, ranks)
                return [
                    ((c.revived + lo).tolist(), (c.pruned + lo).tolist())
                    for c, (lo, _) in zip(changes, ranges, strict=True)
                ], paying

            results = run_threads(size, work)
            assert all(paying == wanted_paying for _, paying in results)
            for w, (revived, pruned) in enumerate(wanted):
                assert {p for r, _ in results for p in r[w][0]} == revived, (seed, size, w)
                assert {p for r, _ in results for p in r[w][1]} == pruned, (seed, size, w)


def test_nothing_that_a_slot_holds_is_pruned_and_counts_stay() -> None:
    stakes = random_stakes(5, "plain")
    for s in stakes:
        s.worth[s.live] = 0.0  # everything dead is worth more
    [(changes, paying)] = run_threads(1, lambda r: plan_exchange(stakes, [0, 0, 0], [1000], r))
    moved = sum(c.revived.numel() for c in changes)
    assert moved == sum(c.pruned.numel() for c in changes) == paying[0] > 0
    for s, c in zip(stakes, changes, strict=True):
        assert (
            not held(s)[c.pruned].any() and s.live[c.pruned].all() and not s.live[c.revived].any()
        )
