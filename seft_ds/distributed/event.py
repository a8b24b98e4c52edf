"""One evolution event: drop, grow, release, place, adapt (docs: concepts; SEFT, arXiv 2505.24037).

`plan` decides, over all ranks and for several weights at once, what changes; it changes nothing.
Every rank ends up with the same `Change` for each weight, in terms of positions, whatever the number of
ranks; `seft_ds.zero` then applies it to the part of the weight that the rank holds.

Where we depart from the paper: sensitivity prunes only positions that no slot holds (a fresh weight is 0,
so a literal reading would prune every revival at once), and with `scope: global` a weight grows as many
slots as it dropped, because its delta vector has a fixed size; which slots drop and which live weights
are pruned is decided over all weights together, so live weights do move between weights.

A weight, or a matrix of an expert, that no token reached has a gradient of exactly 0 everywhere: nothing is
known of its slots or its live weights. It is idle: it takes no part in the event, neither giving nor taking,
whatever the scope. Nor does one whose sums overflowed, so that they order nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch

from seft_ds.config import SeftConfig
from seft_ds.distributed.collectives import Ranks
from seft_ds.distributed.selection import Keys, KeysOnDemand, gather_lists, select
from seft_ds.sparse import pattern, radix, topology
from seft_ds.sparse.scores import GROW, PRUNE, ScoreInputs
from seft_ds.sparse.topology import Shard

_NONE = torch.empty(0, dtype=torch.int64)  # a list that is not decided yet
_COUNTS = ("dropped", "idle", "not_finite")  # fields of a change that are no lists


@dataclass
class Change:
    """What one event does to one weight. Positions are flat, ascending, the same on every rank."""

    dropped: int  # and grown: as many
    released: torch.Tensor  # (m,) int64 positions whose slot is taken away
    released_slot: torch.Tensor  # (m,) int64: their slot indices; slot i moves to fresh[i]
    folded: torch.Tensor  # (m,) bool: keeps its trained value
    died: torch.Tensor  # (m,) bool: went back to a dead position's 0
    fresh: torch.Tensor  # (m,) int64 positions that get a slot
    fresh_G: torch.Tensor  # (m,) fp32
    fresh_Q: torch.Tensor  # (m,) fp32
    fresh_base: torch.Tensor  # (m,) fp32: the weight at the fresh position (exact for bf16)
    revived: torch.Tensor  # (m,) bool: the fresh position was dead
    pruned: torch.Tensor  # (p,) int64 positions that die by sensitivity
    idle: int = 0  # parts that no token reached, and that stayed as they were
    not_finite: int = 0  # parts whose sums overflowed, and that stayed as they were

    @property
    def kept(self) -> int:
        """Slots that were dropped and grown in the same event."""
        return self.dropped - self.released.numel()

    def left_out(self, parts: int) -> bool:
        """Whether a weight of so many parts had no event, since none of them took part."""
        return self.idle + self.not_finite == parts


@dataclass
class _Draft:
    """One weight while its event is decided: this rank's part of every list. "Slots" are indices into the
    shard's slots, "positions" are absolute."""

    shard: Shard
    n_dropped: int = 0  # over all ranks
    dropped: torch.Tensor = _NONE  # slots
    grown: torch.Tensor = _NONE  # positions
    released: torch.Tensor = _NONE  # slots that are dropped and not grown
    fresh: torch.Tensor = _NONE  # positions that are grown and not dropped
    revived: torch.Tensor = _NONE  # bool, over fresh
    mortal: torch.Tensor = _NONE  # slots of `released` that would go back to a dead 0
    died: torch.Tensor = _NONE  # bool, over released
    folded: torch.Tensor = _NONE  # bool, over released
    victim: torch.Tensor | None = None  # who pays in each group of an N:M swap
    pruned: torch.Tensor = _NONE  # positions


def plan(shards: list[Shard], rate: float, config: SeftConfig, ranks: Ranks) -> list[Change]:
    """Decide one event for `shards` (this rank's shard of each weight, in order), over all ranks.

    Collectives: four selections at most, three or four small sums and the gathered position lists.

    Args:
        rate: the share of slots to drop, in [0, 1].
        config: its scores, scope and what becomes of released slots.
    """
    idle, not_finite = _look(shards, ranks)
    off = [a or b for a, b in zip(idle, not_finite, strict=True)]
    busy = [shard for shard, out in zip(shards, off, strict=True) if not out]
    changes = iter(_plan_busy(busy, rate, config, ranks) if busy else [])
    device = shards[0].weight.device
    return [
        _unchanged(device, idle[w], not_finite[w]) if out else next(changes)
        for w, out in enumerate(off)
    ]


def join(changes: list[Change]) -> Change:
    """The changes of the parts of one weight, in the order of their positions, as one."""
    lists = {
        f.name: torch.cat([getattr(c, f.name) for c in changes])
        for f in fields(Change)
        if f.name not in _COUNTS
    }
    return Change(**{name: sum(getattr(c, name) for c in changes) for name in _COUNTS}, **lists)


def _plan_busy(shards: list[Shard], rate: float, config: SeftConfig, ranks: Ranks) -> list[Change]:
    drafts = [_Draft(shard) for shard in shards]
    scope = _scope_groups(shards, config)
    _drop(drafts, scope, rate, ranks)
    _grow(drafts, config, ranks)
    excess = _release(drafts, scope, config, ranks)
    # Placing the fresh slots leaves nothing to decide: δ = 0, base = the current weight.
    _adapt(drafts, scope, excess, config, ranks)
    return _gather(drafts, ranks)


def _look(shards: list[Shard], ranks: Ranks) -> tuple[list[bool], list[bool]]:
    """Which shards' weights had no gradient at all on any rank, and which have sums or weights that are not
    finite on some rank. One small sum and one host sync, whatever the number of weights."""
    flags = torch.stack([_reached_and_overflowed(s) for s in shards]).to(torch.int64)
    reached, overflowed = ranks.sum_(flags).t().tolist()
    not_finite = [r > 0 and n > 0 for r, n in zip(reached, overflowed, strict=True)]
    return [r == 0 for r in reached], not_finite


def _reached_and_overflowed(shard: Shard) -> torch.Tensor:
    """Bool (2,)."""
    sums = torch.stack([_farthest(x) for x in (shard.G, shard.Q)])
    seen = [*sums, _farthest(shard.weight)]
    if shard.factors is not None:
        seen.append(shard.factors.largest())
    return torch.stack([(sums != 0).any(), ~torch.stack(seen).isfinite().all()])


def _farthest(x: torch.Tensor) -> torch.Tensor:
    """The largest magnitude of x (n,), fp32 (); NaN if there is one; 0 if there is nothing."""
    if not x.numel():
        return x.new_zeros((), dtype=torch.float32)
    # In one pass and without a temporary, three times as fast as a norm.
    least, most = x.aminmax()
    return torch.maximum(-least, most).float()


def _unchanged(device: torch.device, idle: bool, not_finite: bool) -> Change:
    index, flag = (torch.empty(0, dtype=d, device=device) for d in (torch.int64, torch.bool))
    value = torch.empty(0, dtype=torch.float32, device=device)
    return Change(
        dropped=0, released=index, released_slot=index, folded=flag, died=flag, fresh=index,
        fresh_G=value, fresh_Q=value, fresh_base=value, revived=flag, pruned=index, idle=int(idle),
        not_finite=int(not_finite),
    )  # fmt: skip


def _scope_groups(shards: list[Shard], config: SeftConfig) -> list[int]:
    """The group of each weight. A weight with an N:M pattern pays for its revivals by itself."""
    groups: dict[object, int] = {}
    shared = config.scope == "global"
    keys = ["all" if shared and s.pattern is None else w for w, s in enumerate(shards)]
    return [groups.setdefault(key, len(groups)) for key in keys]


def _drop(drafts: list[_Draft], scope: list[int], rate: float, ranks: Ranks) -> None:
    """1. Drop the slots with the smallest |δ|."""
    slots = _per_group([d.shard.n_slots for d in drafts], scope)
    keys = [topology.drop_keys(d.shard) for d in drafts]
    for d, chosen in zip(drafts, select(keys, scope, [int(rate * k) for k in slots], ranks)):
        d.dropped = chosen
    for d, n in zip(drafts, _sum_each([d.dropped.numel() for d in drafts], drafts, ranks)):
        d.n_dropped = n


def _grow(drafts: list[_Draft], config: SeftConfig, ranks: Ranks) -> None:
    """2. Grow at the largest scores among what no remaining slot holds. Dead positions compete."""
    keys = [_growth_keys(d, config) for d in drafts]
    each = list(range(len(drafts)))  # every weight grows as many as it dropped
    for d, chosen in zip(
        drafts, select(keys, each, [d.n_dropped for d in drafts], ranks, few=True)
    ):
        shard = d.shard
        d.grown = shard.lo + chosen
        d.released, d.fresh = topology.split_dropped(shard, d.dropped, d.grown)
        d.revived = ~shard.live[shard.index(d.fresh)]


def _growth_keys(d: _Draft, config: SeftConfig) -> Keys:
    """Growth keys (n,) of the shard; for an N:M swap also finds out who would pay in each group."""
    shard = d.shard
    staying = shard.index(shard.position[_staying(d)])
    swaps = shard.pattern is not None and config.nm != "fixed" and config.grow_among != "live"
    if swaps:
        assert shard.pattern is not None
        # Whoever pays is released for certain, so its value after release is what counts.
        after = topology.released_weight(shard, d.dropped, _always_fold(shard, d.dropped, config))
        whole = slice(0, after.numel(), 1)
        score = GROW[config.grow](_inputs(shard, shard.weight, whole))
        sensitivity = PRUNE[config.prune](_inputs(shard, after, whole))
        held = shard.flags(shard.position[_staying(d)])
        m = shard.pattern[1]
        candidate, d.victim = pattern.swap_candidates(score, sensitivity, shard.live, held, m)
    else:
        among_all = shard.pattern is None and config.grow_among == "all"
        candidate = torch.ones_like(shard.live) if among_all else shard.live.clone()
        candidate[staying] = False

    def make(where: slice) -> torch.Tensor:
        score = GROW[config.grow](_inputs(shard, shard.weight, where))
        return topology.masked_keys(radix.largest_first(score), candidate[where])

    return KeysOnDemand(candidate.numel(), candidate.device, make)


def _release(drafts: list[_Draft], scope: list[int], config: SeftConfig, ranks: Ranks) -> list[int]:
    """3. Release. Returns how many live positions each scope has too many afterwards.

    No more positions may die than come alive, or the count could not be restored: of those that would,
    the ones with the largest |δ| fold. Without `adapt` there is no count to restore: all of them die.
    """
    for d in drafts:
        d.folded = _always_fold(d.shard, d.released, config)
        d.mortal = d.released[d.shard.born_dead[d.released] & ~d.folded]
    local = [n for d in drafts for n in (int(d.revived.sum()), d.mortal.numel())]
    totals = _sum_each(local, drafts, ranks)
    alive, mortal = _per_group(totals[0::2], scope), _per_group(totals[1::2], scope)
    deaths = [min(a, m) for a, m in zip(alive, mortal)] if config.adapt else mortal
    keys = [topology.drop_keys(d.shard)[d.mortal] for d in drafts]
    dying = select(keys, scope, deaths, ranks) if config.release == "revert" else None
    for w, d in enumerate(drafts):
        chosen = d.mortal[dying[w]] if dying is not None else d.mortal[:0]
        d.died = torch.isin(d.released, chosen)
        d.folded |= torch.isin(d.released, d.mortal) & ~d.died
    return [a - n if config.adapt else 0 for a, n in zip(alive, deaths)]


def _always_fold(shard: Shard, slots: torch.Tensor, config: SeftConfig) -> torch.Tensor:
    """Bool (m,): slots that keep their value whatever else happens.

    With an N:M pattern a position that was born dead can't die on release: its group would be short.
    """
    if config.release == "fold":
        return torch.ones_like(slots, dtype=torch.bool)
    return shard.born_dead[slots] & (shard.pattern is not None)


def _adapt(
    drafts: list[_Draft],
    scope: list[int],
    excess: list[int],
    config: SeftConfig,
    ranks: Ranks,
) -> None:
    """5. Prune the least sensitive live positions that no slot holds, until the count is right."""
    if not any(excess):  # as every rank knows
        for d in drafts:
            d.pruned = d.shard.position[:0]
        return
    keys = [_prune_keys(d, config) for d in drafts]
    for d, chosen in zip(drafts, select(keys, scope, excess, ranks, few=True)):
        d.pruned = d.shard.lo + chosen


def _prune_keys(d: _Draft, config: SeftConfig) -> Keys:
    """Pruning keys (n,) of the shard: of live positions that no slot holds, after the release."""
    shard = d.shard
    weight = topology.released_weight(shard, d.released, d.folded)
    candidate = shard.live.clone()
    for position in (shard.position[_staying(d)], d.grown, shard.position[d.released[d.died]]):
        candidate[shard.index(position)] = False
    if shard.pattern is not None:
        # The groups that took in a dead position give up their own member, and nobody else.
        candidate &= _paying(d)

    def make(where: slice) -> torch.Tensor:
        score = PRUNE[config.prune](_inputs(shard, weight, where))
        return topology.masked_keys(radix.smallest_first(score), candidate[where])

    return KeysOnDemand(candidate.numel(), candidate.device, make)


def _paying(d: _Draft) -> torch.Tensor:
    """Bool (n,): the members that pay for a revival in their group."""
    shard = d.shard
    flags = torch.zeros_like(shard.live)
    if d.victim is not None and shard.pattern is not None:
        m = shard.pattern[1]
        group = shard.index(d.fresh[d.revived]) // m
        flags[group * m + d.victim[group]] = True
    return flags


def _gather(drafts: list[_Draft], ranks: Ranks) -> list[Change]:
    """6. Every rank learns the lists: positions, and of the fresh slots their window sums."""
    parts: dict[str, list[torch.Tensor]] = {
        "released": [d.shard.position[d.released] for d in drafts],
        "released_slot": [d.shard.slot[d.released] for d in drafts],
        "fresh": [d.fresh for d in drafts],
        "pruned": [d.pruned for d in drafts],
        "folded": [d.folded for d in drafts],
        "died": [d.died for d in drafts],
        "revived": [d.revived for d in drafts],
        "fresh_G": [d.shard.G[d.shard.index(d.fresh)] for d in drafts],
        "fresh_Q": [d.shard.Q[d.shard.index(d.fresh)] for d in drafts],
        "fresh_base": [d.shard.weight[d.shard.index(d.fresh)].float() for d in drafts],
    }
    whole: dict[str, list[torch.Tensor]] = {}
    for dtype in (torch.int64, torch.bool, torch.float32):
        names = [name for name, lists in parts.items() if lists[0].dtype == dtype]
        sent = torch.uint8 if dtype == torch.bool else dtype
        joined = gather_lists([t.to(sent) for name in names for t in parts[name]], ranks)
        for i, name in enumerate(names):
            of_name = joined[i * len(drafts) : (i + 1) * len(drafts)]
            whole[name] = [t.to(dtype) for t in of_name]
    return [
        Change(dropped=d.n_dropped, **{name: lists[w] for name, lists in whole.items()})
        for w, d in enumerate(drafts)
    ]


def _staying(d: _Draft) -> torch.Tensor:
    """Bool (s,): the shard's slots that are not dropped."""
    stays = torch.ones_like(d.shard.position, dtype=torch.bool)
    stays[d.dropped] = False
    return stays


def _inputs(shard: Shard, weight: torch.Tensor, where: slice) -> ScoreInputs:
    """Of the positions `where` (with start and step) of a shard whose weights are `weight`."""
    first = shard.lo + where.start
    sums = shard.G[where], shard.Q[where]
    return ScoreInputs(weight[where], *sums, first, shard.seed, where.step, shard.factors)


def _per_group(values: list[int], group: list[int]) -> list[int]:
    totals = [0] * (max(group) + 1)
    for value, g in zip(values, group):
        totals[g] += value
    return totals


def _sum_each(values: list[int], drafts: list[_Draft], ranks: Ranks) -> list[int]:
    """Sum each of a list of counts over the ranks."""
    device = drafts[0].shard.weight.device
    return ranks.sum_(torch.tensor(values, dtype=torch.int64, device=device)).tolist()
