"""The slow and obvious versions: one process, whole weights, Python sorts, one position at a time."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch


@dataclass
class State:
    """A whole weight in plain Python: every list has one entry a position, dicts have one a slot."""

    weight: list[float]
    live: set[int]
    delta: dict[int, float]  # position -> δ
    base: dict[int, float]
    born_dead: set[int]
    G: list[float]
    Q: list[float]
    pattern: tuple[int, int] | None = None
    product: list[float] | None = None  # of the two factors of the curvature


@dataclass
class Outcome:
    dropped: set[int]
    grown: set[int]
    released: set[int]
    fresh: set[int]
    folded: set[int]
    died: set[int]
    pruned: set[int]
    revived: set[int]


def f32(x: float) -> float:
    return torch.tensor(x, dtype=torch.float32).item()


def grow_score(s: State, p: int) -> float:
    return abs(s.G[p])


def prune_score(s: State, p: int, w: float, kind: str) -> float:
    if kind == "taylor":
        return abs(f32(f32(w) * s.G[p]))
    if kind == "fisher":
        return f32(f32(f32(w) * f32(w)) * s.Q[p])
    if kind == "curvature":
        assert s.product is not None
        return f32(f32(s.product[p] * f32(w)) * f32(w))
    return abs(f32(w))


def event(
    states: list[State],
    rate: float,
    release: str,
    prune: str,
    scope: str,
    nm: str,
    adapt: bool = True,
    among: str = "all",
) -> list[Outcome]:
    """One event over whole weights (algorithm: drop, grow, release, place, adapt; idle weights have none)."""
    out = [Outcome(*[set() for _ in range(8)]) for _ in states]
    ids = [w for w, s in enumerate(states) if any(s.G) or any(s.Q)]
    groups = [[w] for w in ids]
    if scope == "global":
        plain = [w for w in ids if states[w].pattern is None]
        groups = ([plain] if plain else []) + [[w] for w in ids if states[w].pattern is not None]
    for group in groups:
        every = [(abs(states[w].delta[p]), w, p) for w in group for p in states[w].delta]
        for _, w, p in sorted(every)[: math.floor(rate * len(every))]:
            out[w].dropped.add(p)
    payer: list[dict[int, int]] = [{} for _ in states]
    for w in ids:
        s, o = states[w], out[w]
        held = set(s.delta) - o.dropped
        if s.pattern is None:
            everywhere = range(len(s.weight)) if among == "all" else sorted(s.live)
            candidates = [p for p in everywhere if p not in held]
        else:
            candidates, payer[w] = _nm_candidates(
                s, o.dropped, held, release, prune, nm if among == "all" else "fixed"
            )
        best = sorted((-grow_score(s, p), p) for p in candidates)
        o.grown = {p for _, p in best[: len(o.dropped)]}
        o.released, o.fresh = o.dropped - o.grown, o.grown - o.dropped
        o.revived = {p for p in o.fresh if p not in s.live}
    for group in groups:
        alive = sum(len(out[w].revived) for w in group)
        mortal = []
        for w in group:
            s, o = states[w], out[w]
            for p in o.released:
                dies = release == "revert" and p in s.born_dead and s.pattern is None
                if dies:
                    mortal.append((abs(s.delta[p]), w, p))
                elif release == "fold" or (s.pattern is not None and p in s.born_dead):
                    o.folded.add(p)
        mortal.sort()
        for i, (_, w, p) in enumerate(mortal):
            (out[w].died if i < alive or not adapt else out[w].folded).add(p)
        if not adapt:  # nothing is pruned in return: the live count is what it becomes
            continue
        deaths = min(alive, len(mortal))
        scores = []
        for w in group:
            s, o = states[w], out[w]
            held = (set(s.delta) - o.dropped) | o.grown
            for p in sorted(s.live - held - o.died):
                if s.pattern is not None and p not in {payer[w][q] for q in o.revived}:
                    continue
                value = s.weight[p]
                if p in o.released and p not in o.folded:
                    value = s.base[p]
                scores.append((prune_score(s, p, value, prune), w, p))
        for _, w, p in sorted(scores)[: alive - deaths]:
            out[w].pruned.add(p)
    return out


def _nm_candidates(s: State, dropped: set, held: set, release: str, prune: str, nm: str):
    m = s.pattern[1]
    payer: dict[int, int] = {}
    candidates = []
    for first in range(0, len(s.weight), m):
        members = range(first, first + m)
        free = [p for p in members if p in s.live and p not in held]
        dead = [p for p in members if p not in s.live]
        if nm == "fixed" or not free or not dead:
            candidates += free
            continue

        def value(p: int) -> float:
            back = p in dropped and release == "revert" and p not in s.born_dead
            return s.base[p] if back else s.weight[p]

        victim = min(free, key=lambda p: (prune_score(s, p, value(p), prune), p))
        entrant = min(dead, key=lambda p: (-grow_score(s, p), p))
        payer[entrant] = victim
        candidates += [p for p in free if p != victim] + [entrant]
    return candidates, payer
