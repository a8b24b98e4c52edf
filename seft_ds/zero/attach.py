"""Before DeepSpeed sees the model: find the pruned weights, freeze everything, place the first slots.

Works on whole weights and on weights that `deepspeed.zero.Init` has already partitioned.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from seft_ds.config import SeftConfig
from seft_ds.distributed.collectives import Ranks
from seft_ds.distributed.selection import gather_lists, select
from seft_ds.sparse import mask, pattern
from seft_ds.sparse.linear import SeftLinear, add_slots
from seft_ds.sparse.scores import hash_keys
from seft_ds.sparse.shard import shard_range
from seft_ds.sparse.topology import masked_keys
from seft_ds.targets import Target, assign_slots, matches, parse_pattern, total_slots
from seft_ds.zero import shards

_KEYS_AT_ONCE = 1 << 24  # bounds the memory of choosing the first slots: 64 MiB of keys


@dataclass
class AttachedTarget:
    """A target weight with its layer and the live mask of the positions that this rank owns."""

    target: Target
    module: SeftLinear
    live_bits: torch.Tensor  # packed, uint8


def attach_slots(model: nn.Module, config: SeftConfig, ranks: Ranks) -> list[AttachedTarget]:
    """Turn the pruned linear layers of `model` into `SeftLinear`, and freeze all else. A collective.

    Raises:
        ValueError: nothing is pruned, a named target doesn't exist, or the slots don't fit.
    """
    found = find_targets(model, config, ranks)
    targets = [t for t, _ in found]
    total = total_slots(targets, config.density, config.trainable)
    assign_slots(targets, total)
    bits = [_live_bits(t, m.weight, ranks) for t, m in found]
    positions = _random_live(targets, bits, config.seed, ranks)
    for param in model.parameters():
        param.requires_grad_(False)
    attached = []
    for (target, module), live, position in zip(found, bits, positions, strict=True):
        add_slots(module, position.to(torch.int32 if target.numel < 2**31 else torch.int64))
        assert isinstance(module, SeftLinear)
        attached.append(AttachedTarget(target, module, live))
    return attached


def find_targets(
    model: nn.Module, config: SeftConfig, ranks: Ranks
) -> list[tuple[Target, nn.Linear]]:
    """The pruned linear layers that `config` means, with their live counts and patterns. A collective.

    Raises:
        ValueError: nothing is pruned, or a named target doesn't exist or lacks the named pattern.
    """
    layers = _linear_layers(model, config)
    live_counts = _count_live(layers, ranks)
    found = []
    for (name, module), live in zip(layers, live_counts, strict=True):
        shape = shards.shape_of(module.weight)
        target = Target(name, (shape[0], shape[1]), live)
        # A layer that was pruned away whole has nothing that a slot could sit on.
        if live and 1 - live / target.numel >= config.min_sparsity:
            found.append((target, module))
    if not found:
        raise ValueError(_nothing_pruned(layers, live_counts, config))
    for target, module in found:
        target.pattern = _find_pattern(target, module.weight, config, ranks)
    return found


def _linear_layers(model: nn.Module, config: SeftConfig) -> list[tuple[str, nn.Linear]]:
    """The layers that may be targets: never the output head unless it is named."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    layers = [(n, m) for n, m in model.named_modules() if type(m) is nn.Linear]
    owners: dict[int, int] = {}  # how many modules hold each weight object
    for module in model.modules():
        weight = module._parameters.get("weight")
        if weight is not None:
            owners[id(weight)] = owners.get(id(weight), 0) + 1
    if config.targets == "auto":
        return [(n, m) for n, m in layers if m is not head and owners[id(m.weight)] == 1]
    for wanted in config.targets:
        if not any(matches(n, [wanted]) for n, _ in layers):
            kinds = sorted({n.rsplit(".", 1)[-1] for n, _ in layers})
            raise ValueError(
                f"target {wanted!r} matches no linear layer of this model; layers end in: {', '.join(kinds)}"
            )
    chosen = [(n, m) for n, m in layers if matches(n, list(config.targets))]
    for name, module in chosen:
        if owners[id(module.weight)] > 1:
            raise ValueError(f"target {name} shares its weight with another layer; leave it out")
    return chosen


def _count_live(layers: list[tuple[str, nn.Linear]], ranks: Ranks) -> list[int]:
    """Nonzero entries of each weight over all ranks; -0.0 becomes +0.0 on the way. One sum."""
    counts = []
    for _, module in layers:
        lo, values = shards.owned(module.weight, 1, ranks)
        _, everything = shards.held(module.weight, ranks)
        everything[everything == 0] = 0.0
        counts.append(int(values.count_nonzero()))
    if not counts:
        return []
    device = layers[0][1].weight.device
    return ranks.sum_(torch.tensor(counts, dtype=torch.int64, device=device)).tolist()


def _nothing_pruned(layers: list, live_counts: list[int], config: SeftConfig) -> str:
    total = sum(shards.shape_of(m.weight)[0] * shards.shape_of(m.weight)[1] for _, m in layers)
    share = 1 - sum(live_counts) / total if total else 0.0
    return (
        f"nothing to repair: of {len(layers)} linear layers none has {config.min_sparsity:.0%} zeros or "
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
    """K random live positions of each weight, ascending, the same on every rank and rank count."""
    positions: list[torch.Tensor] = []
    for first, stop in _runs(targets, ranks.size):
        keys, begins = [], []
        for i in range(first, stop):
            target = targets[i]
            lo, hi = shard_range(target.numel, ranks.rank, ranks.size, target.multiple)
            position = torch.arange(lo, hi, device=bits[i].device)
            live = mask.unpack(bits[i], hi - lo)
            keys.append(masked_keys(hash_keys(position, seed * len(targets) + i), live))
            begins.append(lo)
        counts = [t.n_slots for t in targets[first:stop]]
        chosen = select(keys, list(range(stop - first)), counts, ranks)
        positions += gather_lists([b + c for b, c in zip(begins, chosen, strict=True)], ranks)
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
