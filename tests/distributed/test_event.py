"""One event on threads as ranks against the slow reference: the same chosen sets, bit for bit."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch

from seft_ds.config import SeftConfig
from seft_ds.distributed.event import join, plan
from seft_ds.sparse.curvature import Factors
from seft_ds.sparse.shard import shard_range
from seft_ds.sparse.topology import Shard
from tests import reference
from tests.ranks import run_threads

RANKS = [1, 2, 3, 4, 7]
SCORES = ["curvature", "taylor", "fisher"]
COLUMNS = 4  # of the weights, for the curvature's factors


def random_state(n: int, k: int, seed: int, kind: str, pattern: tuple[int, int] | None):
    """A whole weight with `k` slots. kind: how the scores look (ties are the hard part)."""
    g = torch.Generator().manual_seed(seed)

    def draw() -> torch.Tensor:
        if kind == "equal":
            return torch.ones(n)
        if kind == "zero":
            return torch.zeros(n)
        values = torch.randn(n, generator=g)
        return values.mul(2).round().div(2) if kind == "ties" else values

    live = torch.rand(n, generator=g) < 0.4
    if pattern is not None:
        order = torch.rand(n // pattern[1], pattern[1], generator=g).argsort(1)
        live = (order < pattern[0]).view(-1)
    elif live.sum() < k:
        live[:k] = True
    base = torch.where(live, draw(), 0.0)
    slots = live.nonzero().squeeze(1)[torch.randperm(int(live.sum()), generator=g)[:k]]
    born_dead = torch.rand(k, generator=g) < 0.4
    base[slots[born_dead]] = 0.0
    delta = draw()[:k]
    weight = base.clone()
    weight[slots] += delta
    G = draw()
    Q = G.square() * 1.5
    if kind == "zero":
        Q[0] = 1.0  # all scores tie at 0, and yet it isn't idle
    output, input = draw()[: -(-n // COLUMNS)].square(), draw()[:COLUMNS].square()
    return {
        "weight": weight, "live": live, "slots": slots, "delta": delta, "base": base[slots],
        "born_dead": born_dead, "G": G, "Q": Q, "pattern": pattern,
        "factors": Factors(0, output, input),
    }  # fmt: skip


def make_idle(s: dict) -> None:
    """As if no token had reached the weight, in its window and before."""
    for x in (s["G"], s["Q"], s["factors"].output, s["factors"].input):
        x.zero_()


def as_reference(s: dict) -> reference.State:
    slots = s["slots"].tolist()
    return reference.State(
        weight=s["weight"].tolist(),
        live=set(s["live"].nonzero().squeeze(1).tolist()),
        delta=dict(zip(slots, s["delta"].tolist(), strict=True)),
        base=dict(zip(slots, s["base"].tolist(), strict=True)),
        born_dead={p for p, b in zip(slots, s["born_dead"].tolist(), strict=True) if b},
        G=s["G"].tolist(),
        Q=s["Q"].tolist(),
        pattern=s["pattern"],
        product=product_of(s["factors"], s["weight"].numel()) if "factors" in s else None,
    )


def product_of(factors: Factors, n: int) -> list[float]:
    output, input = factors.output.tolist(), factors.input.tolist()
    return [reference.f32(output[p // COLUMNS] * input[p % COLUMNS]) for p in range(n)]


def as_shard(s: dict, name: str, rank: int, size: int) -> Shard:
    multiple = s["pattern"][1] if s["pattern"] else 1
    lo, hi = shard_range(s["weight"].numel(), rank, size, multiple)
    order = s["slots"].argsort()
    mine = order[(s["slots"][order] >= lo) & (s["slots"][order] < hi)]
    return Shard(
        name=name, lo=lo, weight=s["weight"][lo:hi], live=s["live"][lo:hi],
        G=s["G"][lo:hi].clone(), Q=s["Q"][lo:hi].clone(), position=s["slots"][mine], slot=mine,
        delta=s["delta"][mine], base=s["base"][mine], born_dead=s["born_dead"][mine],
        n_slots=s["slots"].numel(), seed=0, pattern=s["pattern"], factors=s.get("factors"),
    )  # fmt: skip


def check(states: list[dict], size: int, rate: float, **kw) -> int:
    """Compare with the reference; returns how many positions were revived."""
    config = SeftConfig(grow="magnitude", **kw)
    results = run_threads(
        size,
        lambda ranks: plan(
            [as_shard(s, str(i), ranks.rank, size) for i, s in enumerate(states)],
            rate,
            config,
            ranks,
        ),  # fmt: skip
    )
    wanted = reference.event(
        [as_reference(s) for s in states], rate, kw["release"], kw["prune"], kw["scope"], kw["nm"],
        kw.get("adapt", True), kw.get("grow_among", "all"),
    )  # fmt: skip
    for changes in results:  # every rank knows the same
        for state, change, want in zip(states, changes, wanted, strict=True):
            assert change.idle == (not state["G"].any() and not state["Q"].any())
            released = change.released.tolist()
            assert change.dropped == len(want.dropped)
            assert released == sorted(want.released)
            assert change.fresh.tolist() == sorted(want.fresh)
            assert change.pruned.tolist() == sorted(want.pruned)
            assert change.fresh[change.revived].tolist() == sorted(want.revived)
            assert change.released[change.died].tolist() == sorted(want.died)
            assert change.released[change.folded].tolist() == sorted(want.folded)
            assert state["slots"][change.released_slot].tolist() == released
            assert torch.equal(change.fresh_G, state["G"][change.fresh])
            assert torch.equal(change.fresh_Q, state["Q"][change.fresh])
            live = state["live"].clone()
            live[change.fresh] = True
            live[change.released[change.died]] = False
            live[change.pruned] = False
            if state["pattern"] is not None:
                n, m = state["pattern"]
                assert (live.view(-1, m).sum(1) == n).all()
    if not kw.get("adapt", True):
        assert not any(w.pruned for w in wanted)
    elif kw["scope"] == "global":
        total = sum(len(w.revived) - len(w.died) - len(w.pruned) for w in wanted)
        assert total == 0
    else:
        assert all(len(w.revived) == len(w.died) + len(w.pruned) for w in wanted)
    return sum(len(w.revived) for w in wanted)


@pytest.mark.parametrize("size", RANKS)
@pytest.mark.parametrize("kind", ["random", "ties", "equal", "zero"])
def test_unstructured(size: int, kind: str) -> None:
    revived = 0
    for i, (release, prune, scope, rate) in enumerate(
        itertools.product(
            ["fold", "revert"], ["curvature", "taylor", "fisher"], ["layer", "global"], [0.3, 1.0]
        )
    ):
        # Sizes that no rank count divides, one weight smaller than the rank count, K = 1.
        shape = [(97, 11), (61, 20), (5, 1)]
        states = [random_state(n, k, 10 * i + j, kind, None) for j, (n, k) in enumerate(shape)]
        if i % 3 == 1:
            make_idle(states[i % 2])
        revived += check(states, size, rate, release=release, prune=prune, scope=scope, nm="swap")
    assert revived > 0  # the comparison covered revivals, not only moves between live weights


@pytest.mark.parametrize("kind", ["random", "ties", "zero"])
def test_without_adapt_nothing_pays_for_a_revival(kind: str) -> None:
    revived = 0
    for i, (size, release, scope, rate) in enumerate(
        itertools.product([1, 3], ["fold", "revert"], ["layer", "global"], [0.3, 1.0])
    ):
        shape = [(97, 11), (61, 20), (5, 1)]
        states = [random_state(n, k, 10 * i + j, kind, None) for j, (n, k) in enumerate(shape)]
        if i % 3 == 1:
            make_idle(states[i % 2])
        revived += check(
            states, size, rate, release=release, prune="taylor", scope=scope, nm="swap",
            adapt=False, pattern="none",
        )  # fmt: skip
    assert revived > 0


@pytest.mark.parametrize("kind", ["random", "ties", "zero"])
def test_among_live_positions_only_slots_move(kind: str) -> None:
    for i, (size, release, scope) in enumerate(
        itertools.product([1, 3], ["fold", "revert"], ["layer", "global"])
    ):
        states = [random_state(97, 11, i, kind, None), random_state(24, 5, i, kind, (2, 4))]
        kw = {"release": release, "prune": "taylor", "scope": scope, "nm": "swap"}
        assert check(states, size, 0.7, grow_among="live", **kw) == 0


@pytest.mark.parametrize("size", RANKS)
@pytest.mark.parametrize("nm", ["swap", "fixed"])
@pytest.mark.parametrize("kind", ["random", "ties", "zero"])
def test_pattern(size: int, nm: str, kind: str) -> None:
    revived = 0
    for i, (release, prune, scope) in enumerate(
        itertools.product(
            ["fold", "revert"], ["curvature", "taylor", "fisher"], ["layer", "global"]
        )
    ):
        states = [
            random_state(24, 5, i, kind, (2, 4)),
            random_state(50, 6, i + 50, kind, None),
            random_state(40, 7, i + 90, kind, (4, 8)),
        ]
        if i % 3 == 1:
            make_idle(states[i % 2])
        revived += check(states, size, 0.7, release=release, prune=prune, scope=scope, nm=nm)
    assert (revived > 0) or nm == "fixed" or kind == "zero"


def part_of(s: dict, lo: int, hi: int, idle: bool) -> dict:
    """One part of a stacked weight as a weight of its own."""
    mine = (s["slots"] >= lo) & (s["slots"] < hi)
    part = {k: s[k][lo:hi].clone() for k in ("weight", "live", "G", "Q")}
    part |= {k: s[k][mine] for k in ("slots", "delta", "base", "born_dead")}
    part["slots"] = part["slots"] - lo
    if idle:
        part["G"].zero_()
        part["Q"].zero_()
    return part | {"pattern": s["pattern"]}


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("size", RANKS)
def test_parts_of_a_fused_weight_choose_for_themselves(size: int, scope: str) -> None:
    """Each part is an event of its own (layer) or all compete (global), but for those without a gradient,
    which neither give nor take; whatever the borders between ranks cut."""
    n_parts, n = 5, 24
    whole = random_state(n_parts * n, 40, seed=size, kind="ties", pattern=None)
    idle = [False, True, False, False, True]
    parts = [part_of(whole, p * n, (p + 1) * n, off) for p, off in enumerate(idle)]
    for p, part in enumerate(parts):
        whole["G"][p * n : (p + 1) * n], whole["Q"][p * n : (p + 1) * n] = part["G"], part["Q"]
    config = SeftConfig(release="fold", prune="taylor", scope=scope)

    def work(ranks):
        shard = as_shard(whole, "experts", ranks.rank, size)
        views, hi = [], shard.lo + shard.weight.numel()
        for p in range(n_parts):
            a, b = (min(max(x, shard.lo), hi) for x in (p * n, (p + 1) * n))
            mine = (shard.position >= a) & (shard.position < b)
            cut = {
                k: getattr(shard, k)[a - shard.lo : b - shard.lo]
                for k in ("weight", "live", "G", "Q")
            }
            rows = ("position", "slot", "delta", "base", "born_dead")
            cut |= {k: getattr(shard, k)[mine] for k in rows}
            n_slots = parts[p]["slots"].numel()
            views.append(replace(shard, lo=a, n_slots=n_slots, **cut))
        return join(plan(views, 0.4, config, ranks))

    busy = [p for p, off in enumerate(idle) if not off]
    states = [as_reference(parts[p]) for p in busy]
    wanted = reference.event(states, 0.4, "fold", "taylor", scope, "swap")
    moved = dict(zip(busy, wanted, strict=True))
    for change in run_threads(size, work):
        assert change.idle == 2
        for name in ("released", "fresh", "pruned"):
            found = sorted(p * n + x for p, want in moved.items() for x in getattr(want, name))
            assert getattr(change, name).tolist() == found, name
        assert change.dropped == sum(len(want.dropped) for want in wanted)
        assert whole["slots"][change.released_slot].tolist() == change.released.tolist()
        # A slot stays in its part: the module takes each expert's as a slice.
        assert torch.equal(change.released // n, change.fresh // n)


def test_an_event_of_idle_weights_alone_changes_nothing() -> None:
    state = random_state(24, 8, seed=0, kind="zero", pattern=None)
    make_idle(state)
    shard = as_shard(state, "unused", 0, 1)
    (change,) = run_threads(1, lambda ranks: plan([shard], 1.0, SeftConfig(), ranks))[0]
    assert change.idle == 1 and change.dropped == 0 and change.left_out(1)
    assert not any(x.numel() for x in (change.released, change.fresh, change.pruned))


def spoil(s: dict, what: str) -> None:
    """Put one value that isn't finite where no slot sits. The NaN of x86 has its sign bit set."""
    at = int((s["live"] & ~torch.isin(torch.arange(len(s["live"])), s["slots"])).nonzero()[0])
    negative = torch.tensor(-4194304, dtype=torch.int32).view(torch.float32).item()
    assert math.isnan(negative) and math.copysign(1, negative) < 0
    if what == "curvature":
        s["factors"].output[0], s["factors"].input[0] = 1e30, 1e30
    elif what == "weight":
        s["weight"][at] = torch.inf
    else:
        s[what[0]][at] = negative if what.endswith("NaN") else torch.inf


@pytest.mark.parametrize("what", ["G NaN", "G inf", "Q NaN", "Q inf", "curvature", "weight"])
def test_a_weight_whose_sums_are_not_finite_is_left_out(what: str) -> None:
    """On every rank, whichever holds the value; the others have their event as if it were not there."""
    for size, scope, prune in [(1, "layer", "curvature"), (3, "global", "fisher")]:
        states = [random_state(n, 9, n, "random", None) for n in (97, 61, 50)]
        spoil(states[1], what)
        kw = {"release": "fold", "prune": "curvature" if what == "curvature" else prune}
        config = SeftConfig(scope=scope, waves=False, **kw)

        def work(ranks, config=config, states=states):
            views = [as_shard(s, str(i), ranks.rank, ranks.size) for i, s in enumerate(states)]
            return plan(views, 0.5, config, ranks)

        others = [as_reference(states[w]) for w in (0, 2)]
        wanted = reference.event(others, 0.5, scope=scope, nm="fixed", **kw)
        for changes in run_threads(size, work):
            assert [c.not_finite for c in changes] == [0, 1, 0]
            assert changes[1].left_out(1) and not changes[1].pruned.numel()
            for change, want in zip((changes[0], changes[2]), wanted, strict=True):
                assert change.fresh.tolist() == sorted(want.fresh)
                assert change.pruned.tolist() == sorted(want.pruned)


@pytest.mark.parametrize("nm", ["fixed", "swap"])
def test_weights_with_nothing_to_choose_from(nm: str) -> None:
    """All live, all held, one row of one entry, and a rate too small to drop a slot."""
    for size, scope, release, rate in itertools.product(
        [1, 3], ["layer", "global"], ["fold", "revert"], [0.05, 0.5, 1.0]
    ):
        full = random_state(30, 30, 1, "ties", None)
        undead = random_state(30, 6, 2, "ties", None)
        undead["live"] |= True
        held = random_state(24, 12, 3, "ties", (2, 4))
        states = [full, undead, held, random_state(1, 1, 4, "random", None)]
        assert full["live"].all() and held["slots"].numel() == held["live"].sum() == 12
        check(states, size, rate, release=release, prune="taylor", scope=scope, nm=nm)
