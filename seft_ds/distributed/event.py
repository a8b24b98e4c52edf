"""One evolution event: drop, grow, release, place, adapt (docs: concepts; SEFT, arXiv 2505.24037).

`plan` decides, over all ranks and for several weights at once, what changes; it changes nothing.
Every rank ends up with the same `Change` for each weight, in terms of positions, whatever the number of
ranks; `seft_ds.zero` then applies it to the part of the weight that the rank holds.

Where we depart from the paper: sensitivity prunes only positions that no slot holds (a fresh weight is 0,
so a literal reading would prune every revival at once), and with `scope: global` a weight grows as many
slots as it dropped, because its delta vector has a fixed size; which slots drop and which live weights
are pruned is decided over all weights together, so live weights do move between weights.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from seft_ds.distributed.collectives import Ranks
from seft_ds.distributed.selection import gather_lists, select
from seft_ds.sparse import pattern, radix, topology
from seft_ds.sparse.scores import GROW, PRUNE, ScoreInputs
from seft_ds.sparse.topology import Shard


@dataclass(frozen=True)
class EventSettings:
    release: str = "fold"  # fold | revert
    grow: str = "magnitude"
    prune: str = "taylor"
    scope: str = "layer"  # layer | global
    nm: str = "swap"  # swap | fixed


@dataclass
class Change:
    """What one event does to one weight. Positions are flat, ascending, the same on every rank."""

    dropped: int
    grown: int
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

    @property
    def kept(self) -> int:
        """Slots that were dropped and grown in the same event."""
        return self.dropped - self.released.numel()


def plan(shards: list[Shard], rate: float, settings: EventSettings, ranks: Ranks) -> list[Change]:
    """Decide one event for `shards` (this rank's shard of each weight, in order), over all ranks.

    Collectives: four selections at most, two small sums and the gathered position lists.

    Args:
        rate: the share of slots to drop, in [0, 1].
    """
    each = list(range(len(shards)))
    scope = _scope_groups(shards, settings)

    # 1. Drop the slots with the smallest |δ|.
    slots = _per_group([s.n_slots for s in shards], scope)
    keys = [topology.drop_keys(s) for s in shards]
    dropped = select(keys, scope, [int(rate * k) for k in slots], ranks)
    d = _sum_each([x.numel() for x in dropped], ranks, like=shards[0])

    # 2. Grow: the largest scores among what no remaining slot holds. Dead positions compete.
    keys, victims = _growth(shards, dropped, settings)
    grown = [s.lo + i for s, i in zip(shards, select(keys, each, d, ranks), strict=True)]
    split = [topology.split_dropped(*x) for x in zip(shards, dropped, grown, strict=True)]
    released, fresh = [x[0] for x in split], [x[1] for x in split]
    revived = [~s.live[s.index(f)] for s, f in zip(shards, fresh, strict=True)]

    # 3. Release. No more positions may die than come alive, or the count could not be restored.
    may_die = _may_die(shards, released, settings)
    totals = [x for r, m in zip(revived, may_die, strict=True) for x in (int(r.sum()), m.numel())]
    totals = _sum_each(totals, ranks, like=shards[0])
    alive, mortal = _per_group(totals[0::2], scope), _per_group(totals[1::2], scope)
    deaths = [min(a, b) for a, b in zip(alive, mortal, strict=True)]
    died, folded = _release(shards, released, may_die, scope, deaths, settings, ranks)

    # 4. Place the fresh slots: nothing to decide, base = the current weight.

    # 5. Adapt: prune the least sensitive live positions that no slot holds, until the count is right.
    excess = [a - b for a, b in zip(alive, deaths, strict=True)]
    pruned = _adapt(
        shards, dropped, grown, released, folded, died, victims, scope, excess, settings, ranks
    )

    # 6. Every rank learns the lists: positions only, no scores but those of the fresh slots.
    return _gather_changes(shards, d, released, folded, died, fresh, revived, pruned, ranks)


def _scope_groups(shards: list[Shard], settings: EventSettings) -> list[int]:
    """The group of each weight. A weight with an N:M pattern pays for its revivals by itself."""
    groups: dict[object, int] = {}
    shared = settings.scope == "global"
    keys = ["all" if shared and s.pattern is None else w for w, s in enumerate(shards)]
    return [groups.setdefault(key, len(groups)) for key in keys]


def _growth(
    shards: list[Shard], dropped: list[torch.Tensor], settings: EventSettings
) -> tuple[list[torch.Tensor], list[torch.Tensor | None]]:
    """Growth keys (n,) of each shard, and for N:M swaps who pays in each group (k,), else None."""
    keys, victims = [], []
    for shard, drop in zip(shards, dropped, strict=True):
        stays = torch.ones(shard.position.numel(), dtype=torch.bool, device=drop.device)
        stays[drop] = False
        held = shard.flags(shard.position[stays])
        score = GROW[settings.grow](_inputs(shard, shard.weight))
        victim = None
        if shard.pattern is None:
            candidate = ~held
        elif settings.nm == "fixed":
            candidate = shard.live & ~held
        else:
            # Whoever pays is released for certain, so its value after release is what counts.
            fold = _always_fold(shard, drop, settings)
            after = topology.released_weight(shard, drop, fold)
            sensitivity = PRUNE[settings.prune](_inputs(shard, after))
            m = shard.pattern[1]
            candidate, victim = pattern.swap_candidates(score, sensitivity, shard.live, held, m)
        keys.append(topology.masked_keys(radix.largest_first(score), candidate))
        victims.append(victim)
    return keys, victims


def _always_fold(shard: Shard, slots: torch.Tensor, settings: EventSettings) -> torch.Tensor:
    """Bool (m,): slots that keep their value whatever else happens.

    With an N:M pattern a position that was born dead can't die on release: its group would be short.
    """
    if settings.release == "fold":
        return torch.ones(slots.numel(), dtype=torch.bool, device=slots.device)
    return shard.born_dead[slots] & (shard.pattern is not None)


def _may_die(
    shards: list[Shard], released: list[torch.Tensor], settings: EventSettings
) -> list[torch.Tensor]:
    """The released slots (indices into the shard's slots) that `revert` sends back to a dead 0."""
    result = []
    for shard, slots in zip(shards, released, strict=True):
        mortal = shard.born_dead[slots] & ~_always_fold(shard, slots, settings)
        result.append(slots[mortal])
    return result


def _release(
    shards: list[Shard],
    released: list[torch.Tensor],
    may_die: list[torch.Tensor],
    scope: list[int],
    deaths: list[int],
    settings: EventSettings,
    ranks: Ranks,
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """(died, folded): bool (m,) each, over the released slots. Those with the largest |δ| fold."""
    keys = [topology.drop_keys(s)[m] for s, m in zip(shards, may_die, strict=True)]
    dying = select(keys, scope, deaths, ranks) if settings.release == "revert" else None
    died, folded = [], []
    for w, (shard, slots) in enumerate(zip(shards, released, strict=True)):
        dies = torch.zeros(slots.numel(), dtype=torch.bool, device=slots.device)
        if dying is not None:
            dies = torch.isin(slots, may_die[w][dying[w]])
        mortal = torch.isin(slots, may_die[w])
        died.append(dies)
        folded.append(_always_fold(shard, slots, settings) | (mortal & ~dies))
    return died, folded


def _adapt(
    shards: list[Shard],
    dropped: list[torch.Tensor],
    grown: list[torch.Tensor],
    released: list[torch.Tensor],
    folded: list[torch.Tensor],
    died: list[torch.Tensor],
    victims: list[torch.Tensor | None],
    scope: list[int],
    excess: list[int],
    settings: EventSettings,
    ranks: Ranks,
) -> list[torch.Tensor]:
    """Positions of each shard to prune, so that the live count of each scope is what it was."""
    keys = []
    for w, shard in enumerate(shards):
        remaining = torch.ones(shard.position.numel(), dtype=torch.bool, device=shard.weight.device)
        remaining[dropped[w]] = False
        held = shard.flags(shard.position[remaining]) | shard.flags(grown[w])
        dead_now = shard.flags(shard.position[released[w][died[w]]])
        weight = topology.released_weight(shard, released[w], folded[w])
        score = PRUNE[settings.prune](_inputs(shard, weight))
        candidate = shard.live & ~held & ~dead_now
        victim = victims[w]
        if shard.pattern is not None:
            # The groups that took in a dead position give up their own member, and nobody else.
            candidate &= _paying(shard, grown[w], victim)
        keys.append(topology.masked_keys(radix.smallest_first(score), candidate))
    pruned = select(keys, scope, excess, ranks)
    return [shard.lo + i for shard, i in zip(shards, pruned, strict=True)]


def _paying(shard: Shard, grown: torch.Tensor, victim: torch.Tensor | None) -> torch.Tensor:
    """Bool (n,): the members that pay for a revival in their group."""
    flags = torch.zeros_like(shard.live)
    if victim is not None and shard.pattern is not None:
        m = shard.pattern[1]
        entered = shard.index(grown)
        group = entered[~shard.live[entered]] // m
        flags[group * m + victim[group]] = True
    return flags


def _gather_changes(
    shards: list[Shard],
    dropped: list[int],
    released: list[torch.Tensor],
    folded: list[torch.Tensor],
    died: list[torch.Tensor],
    fresh: list[torch.Tensor],
    revived: list[torch.Tensor],
    pruned: list[torch.Tensor],
    ranks: Ranks,
) -> list[Change]:
    at = [s.position[r] for s, r in zip(shards, released, strict=True)]
    slot = [s.slot[r] for s, r in zip(shards, released, strict=True)]
    index = [s.index(f) for s, f in zip(shards, fresh, strict=True)]
    positions = gather_lists(at + slot + fresh + pruned, ranks)
    flags = [x.to(torch.uint8) for x in folded + died + revived]
    marks = [x.bool() for x in gather_lists(flags, ranks)]
    moments = gather_lists(
        [s.G[i] for s, i in zip(shards, index, strict=True)]
        + [s.Q[i] for s, i in zip(shards, index, strict=True)]
        + [s.weight[i].float() for s, i in zip(shards, index, strict=True)],
        ranks,
    )
    n = len(shards)
    return [
        Change(
            dropped=dropped[w],
            grown=dropped[w],
            released=positions[w],
            released_slot=positions[n + w],
            folded=marks[w],
            died=marks[n + w],
            fresh=positions[2 * n + w],
            fresh_G=moments[w],
            fresh_Q=moments[n + w],
            fresh_base=moments[2 * n + w],
            revived=marks[2 * n + w],
            pruned=positions[3 * n + w],
        )
        for w in range(n)
    ]


def _inputs(shard: Shard, weight: torch.Tensor) -> ScoreInputs:
    return ScoreInputs(weight, shard.G, shard.Q, shard.positions(), shard.seed)


def _per_group(values: list[int], group: list[int]) -> list[int]:
    totals = [0] * (max(group) + 1)
    for value, g in zip(values, group, strict=True):
        totals[g] += value
    return totals


def _sum_each(values: list[int], ranks: Ranks, like: Shard) -> list[int]:
    """Sum each of a list of counts over the ranks."""
    return ranks.sum_(torch.tensor(values, dtype=torch.int64, device=like.weight.device)).tolist()
