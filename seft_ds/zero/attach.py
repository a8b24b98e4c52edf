"""Before DeepSpeed sees the model: find the pruned weights, freeze everything, place the first slots.

Works on whole weights and on weights that `deepspeed.zero.Init` has already partitioned.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from seft_ds.config import SeftConfig
from seft_ds.distributed.collectives import Ranks
from seft_ds.distributed.selection import gather_lists, select
from seft_ds.naming import naming_of_model
from seft_ds.sparse import mask, pattern
from seft_ds.sparse.experts import SeftExperts, add_expert_slots
from seft_ds.sparse.layers import as_target, choose_layers
from seft_ds.sparse.linear import DELTA, POSITION, SeftLinear, add_slots
from seft_ds.sparse.scores import hash_keys
from seft_ds.sparse.shard import shard_range
from seft_ds.sparse.topology import masked_keys
from seft_ds.targets import Target, assign_slots, parse_pattern, total_slots
from seft_ds.zero import shards

_KEYS_AT_ONCE = 1 << 24  # bounds the memory of choosing the first slots: 64 MiB of keys


@dataclass
class Found:
    """A pruned weight: which parameter of which module."""

    target: Target
    module: nn.Module
    parameter: str = "weight"
    problem: str | None = None  # why it can't be repaired

    @property
    def weight(self) -> nn.Parameter:
        weight = self.module._parameters[self.parameter]
        assert weight is not None
        return weight


@dataclass
class AttachedTarget(Found):
    """A target weight with its slots, and the live mask of the positions that this rank owns."""

    live_bits: torch.Tensor = field(default_factory=lambda: torch.empty(0))  # packed, uint8

    @property
    def delta(self) -> nn.Parameter:
        return self._slot_parameter(DELTA)

    @property
    def position(self) -> nn.Parameter:
        return self._slot_parameter(POSITION)

    def connect(self, runtime: Any) -> None:
        """Have the module's forward pass use `runtime` for this weight."""
        if isinstance(self.module, SeftExperts):
            self.module.seft_runtimes[self.parameter] = runtime
        else:
            assert isinstance(self.module, SeftLinear)
            self.module.seft_runtime = runtime

    def _slot_parameter(self, kind: str) -> nn.Parameter:
        name = kind if self.parameter == "weight" else f"{self.parameter}_{kind}"
        found = self.module._parameters[name]
        assert found is not None
        return found


def attach_slots(model: nn.Module, config: SeftConfig, ranks: Ranks) -> list[AttachedTarget]:
    """Give the pruned linear layers and fused experts slots, and freeze the rest. A collective.

    Raises:
        ValueError: nothing is pruned, a named target doesn't exist, or the slots don't fit.
    """
    found = find_targets(model, config, ranks)
    targets = [f.target for f in found]
    total = total_slots(targets, config.density, config.trainable)
    assign_slots(targets, total)
    bits = [_live_bits(f.target, f.weight, ranks) for f in found]
    positions = _random_live(targets, bits, config.seed, ranks)
    for param in model.parameters():
        param.requires_grad_(False)
    attached = []
    for f, live, position in zip(found, bits, positions, strict=True):
        position = position.to(torch.int32 if f.target.numel < 2**31 else torch.int64)
        if f.target.experts:
            add_expert_slots(f.module, f.parameter, position, _slot_ends(f.target))
        else:
            assert isinstance(f.module, nn.Linear)
            add_slots(f.module, position)
        attached.append(AttachedTarget(f.target, f.module, f.parameter, live_bits=live))
    return attached


def _slot_ends(target: Target) -> list[int]:
    """Where each expert's slots end in the delta vector."""
    ends = list(itertools.accumulate(target.part_slots))
    matrices = target.n_parts // target.experts
    return ends[matrices - 1 :: matrices]


def find_targets(model: nn.Module, config: SeftConfig, ranks: Ranks) -> list[Found]:
    """The pruned weights that `config` means, with their live counts and patterns. A collective.

    Raises:
        ValueError: nothing is pruned, a named target doesn't exist or lacks the named pattern, or something
            is pruned that can't be repaired (`seft_ds.sparse.layers`).
    """
    candidates = _candidates(model, config)
    live_counts = _count_live(candidates, ranks)
    found = []
    for f, by_part in zip(candidates, live_counts, strict=True):
        target = f.target
        target.target_live = sum(by_part)
        target.part_live = by_part if target.experts else []
        # A layer that was pruned away whole has nothing that a slot could sit on.
        if target.target_live and 1 - target.target_live / target.numel >= config.min_sparsity:
            found.append(f)
    broken = [f for f in found if f.problem is not None]
    if broken:
        raise ValueError(_cannot_repair(broken, [f for f in found if f.problem is None]))
    if not found:
        raise ValueError(_nothing_pruned(candidates, config))
    for f in found:
        f.target.pattern = _find_pattern(f.target, f.weight, config, ranks)
    return found


def _candidates(model: nn.Module, config: SeftConfig) -> list[Found]:
    """The weights that may be targets, in the model's order; with "auto" also those that can't be repaired.

    Of fused experts the number of parts is set, and their live counts are not yet.
    """
    chosen = choose_layers(model, naming_of_model(model), config.targets, shards.shape_of)
    return [Found(as_target(one), one.module, one.parameter, one.problem) for one in chosen]


def _cannot_repair(broken: list[Found], others: list[Found]) -> str:
    """What to say of pruned weights that can't be repaired."""
    first = broken[0]
    share = 1 - first.target.target_live / first.target.numel
    more = f", as {len(broken) - 1} others have," if len(broken) > 1 else ""
    said = (
        f"{first.target.name} has {share:.0%} zeros{more} and can't be repaired: {first.problem}. "
    )
    if not others:
        return said + "No other layer of this model is pruned"
    kinds = list(dict.fromkeys(f.target.name.rpartition(".")[2] for f in others))
    return (
        f'{said}To repair the other pruned layers only, name them: "targets": {json.dumps(kinds)}'
    )


def _count_live(candidates: list[Found], ranks: Ranks) -> list[list[int]]:
    """Nonzero entries of each weight, by part, over all ranks; -0.0 becomes +0.0 on the way. One sum."""
    if not candidates:
        return []
    counts = []
    for f in candidates:
        lo, values = shards.owned(f.weight, 1, ranks)
        _, everything = shards.held(f.weight, ranks)
        everything[everything == 0] = 0.0
        counts += [
            values[begin - lo : end - lo].count_nonzero()
            for begin, end in f.target.part_ranges(lo, lo + values.numel())
        ]
    totals = ranks.sum_(torch.stack(counts)).tolist()
    sizes = [f.target.n_parts for f in candidates]
    ends = list(itertools.accumulate(sizes))
    return [totals[end - n : end] for n, end in zip(sizes, ends, strict=True)]


def _nothing_pruned(candidates: list[Found], config: SeftConfig) -> str:
    if candidates and all(f.problem is not None for f in candidates):
        first = candidates[0]
        return f"no layer of this model can be repaired; {first.target.name}: {first.problem}"
    total = sum(f.target.numel for f in candidates)
    live = sum(f.target.target_live for f in candidates)
    share = 1 - live / total if total else 0.0
    return (
        f"nothing to repair: of {len(candidates)} linear layers none has {config.min_sparsity:.0%} zeros or "
        f"more ({share:.2%} zeros over all). Prune the model first, for example:\n"
        "  deepspeed launch/prune.py --model_name_or_path DIR --output_dir PRUNED --method wanda "
        "--sparsity 0.6 --calibration_file TEXT"
    )


def _find_pattern(
    target: Target, weight: nn.Parameter, config: SeftConfig, ranks: Ranks
) -> tuple[int, int] | None:
    """The N:M pattern that every group of this weight follows, or None; sets the exact live count."""
    if config.pattern == "none":
        return None
    columns = target.shape[1]
    if config.pattern == "auto":
        tries = pattern.plausible(target.target_live, target.numel, columns)
    else:
        tries = [parse_pattern(config.pattern)]
    for n, m in tries:
        fits = columns % m == 0
        if fits:
            _, values = shards.owned(weight, m, ranks)
            broken = torch.tensor([not pattern.at_most(values != 0, n, m)], dtype=torch.int64)
            fits = int(ranks.sum_(broken.to(values.device))) == 0
        if fits:
            target.target_live = target.numel // m * n
            if target.experts:
                target.part_live = [target.part_numel // m * n] * target.n_parts
            return n, m
        if config.pattern != "auto":
            raise ValueError(
                f"{target.name}: the pattern {config.pattern} was given, but some group of {m} inputs "
                f"has more than {n} nonzero weights; prune with --pattern {config.pattern}, or set pattern "
                'to "auto"'
            )
    return None


def _live_bits(target: Target, weight: nn.Parameter, ranks: Ranks) -> torch.Tensor:
    _, values = shards.owned(weight, target.multiple, ranks)
    live = values != 0
    return mask.pack(pattern.fill(live, *target.pattern) if target.pattern else live)


def _random_live(
    targets: list[Target], bits: list[torch.Tensor], seed: int, ranks: Ranks
) -> list[torch.Tensor]:
    """K random live positions of each weight, part by part and ascending, the same on every rank and rank
    count."""
    positions: list[torch.Tensor] = []
    for first, stop in _runs(targets, ranks.size):
        keys, begins, counts = [], [], []
        for i in range(first, stop):
            target = targets[i]
            lo, hi = shard_range(target.numel, ranks.rank, ranks.size, target.multiple)
            position = torch.arange(lo, hi, device=bits[i].device)
            live = mask.unpack(bits[i], hi - lo)
            key = masked_keys(hash_keys(position, seed * len(targets) + i), live)
            for begin, end in target.part_ranges(lo, hi):
                keys.append(key[begin - lo : end - lo])
                begins.append(begin)
            counts += target.slots_by_part
        chosen = select(keys, list(range(len(keys))), counts, ranks, few=True)
        lists = gather_lists([b + c for b, c in zip(begins, chosen, strict=True)], ranks)
        ends = itertools.accumulate(t.n_parts for t in targets[first:stop])
        positions += [
            torch.cat(lists[end - t.n_parts : end])
            for t, end in zip(targets[first:stop], ends, strict=True)
        ]
    return positions


def _runs(targets: list[Target], n_ranks: int) -> Iterator[tuple[int, int]]:
    """Targets [first, stop) that are decided together: their keys on one rank are bounded in number."""
    first, entries = 0, 0
    for i, target in enumerate(targets):
        if i > first and entries + target.numel // n_ranks > _KEYS_AT_ONCE:
            yield first, i
            first, entries = i, 0
        entries += target.numel // n_ranks
    yield first, len(targets)
