"""Bytes that a rank holds, by part: predicted before a run, from shapes alone.

The parts in `HELD` follow from ZeRO's cuts and the optimizer's state, and are exact to the byte but for
padding; `seft_ds/zero/memory_use.py` measures the same parts in a running engine. Those in `PASSING`
(activations, what ZeRO-3 gathers for a moment, reduction buffers) are estimates.

ZeRO's cuts (read in DeepSpeed 0.19.8): stage 3 cuts each parameter by itself, ceil(n / ranks) a rank, and
keeps small ones whole as well; stages 1 and 2 cut the deltas written one after the other; stage 0 cuts
nothing, and masks and windows are cut all the same (`seft_ds.sparse.shard`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from seft_ds.config import SeftConfig
from seft_ds.schedule import Schedule, resolve_interval
from seft_ds.targets import Target

HELD = (
    "weights", "deltas", "positions", "gradients", "masters", "moments", "masks", "slot tables", "windows",
    "curvature",
)  # fmt: skip
PASSING = (
    "reduction buffers", "gathered weights", "slot gradients", "exchange", "activations", "window gradients",
)  # fmt: skip
BLOCK = 256  # entries that share a scale in bitsandbytes' 8-bit state
SMALLEST_8BIT = 4096  # bitsandbytes keeps smaller tensors in 32 bits (its min_8bit_size)
# Per slot: the codes of positions (int64), slot numbers (int64), and whether it was born dead.
_TABLE_BYTES = 8 + 8 + 1
# Per position that an exchange weighs: its worth in fp32, and the lists of what it moves, int64 both ways.
# Of one weight at a time: live, held, keys, what may be chosen, and its indices.
_EXCHANGE_BYTES, _EXCHANGE_TRANSIENT = 4, 1 + 1 + 4 + 4 + 4 + 8
# Moments of 4 bytes an optimizer keeps for each entry, by a part of its lower-case name.
_MOMENTS = {"ademamix": 3, "lion": 1, "adagrad": 1, "adam": 2}


@dataclass(frozen=True)
class Setup:
    """What decides how a run is spread over ranks and devices."""

    stage: int
    ranks: int
    dtype_bytes: int = 2  # of the weights: bf16 2, fp32 4
    optimizer: str = "adamw"  # a name such as adamw_torch, AdamW8bit, lion_8bit
    smallest_8bit: int = SMALLEST_8BIT
    offload_optimizer: bool = False
    offload_param: bool = False
    persistent_below: int = 100_000  # stage3_param_persistence_threshold
    sub_group_size: int = 1_000_000_000
    reduce_bucket: int = 500_000_000
    live_parameters: int = 1_000_000_000  # stage3_max_live_parameters
    reuse_distance: int = 1_000_000_000  # stage3_max_reuse_distance
    prefetched: int = 50_000_000  # stage3_prefetch_bucket_size

    @property
    def moments(self) -> int:
        """Numbers that the optimizer keeps for each slot."""
        name = self.optimizer.lower()
        for part, count in _MOMENTS.items():
            if part in name:
                return count
        raise ValueError(
            f"optimizer {self.optimizer!r}: wanted one of the Adam, Lion, AdEMAMix or Adagrad families"
        )

    @property
    def stays(self) -> int:
        """Entries before the loss that ZeRO-3 keeps from forward to backward: as far as half the reuse
        distance (or what is prefetched) reaches."""
        return max(self.reuse_distance, self.prefetched) // 2

    @property
    def eight_bit(self) -> bool:
        name = self.optimizer.lower()
        return "8bit" in name or "8-bit" in name

    @classmethod
    def from_config(
        cls, config: dict[str, Any], ranks: int, dtype_bytes: int, optim: str, hidden: int
    ) -> Setup:
        """From a DeepSpeed config. `optim` is what the trainer chooses where the config names none;
        `hidden` is the model's width, by which transformers fills in "auto".
        """
        zero = config["zero_optimization"]

        def number(name: str, default: int, auto: float) -> int:
            value = zero.get(name, default)
            return int(auto if value == "auto" else value)

        def offloaded(name: str) -> bool:
            return ((zero.get(name) or {}).get("device", "none")) != "none"

        optimizer = config.get("optimizer", {})
        return cls(
            stage=int(zero.get("stage", 0)),
            ranks=ranks,
            dtype_bytes=dtype_bytes,
            optimizer=str(optimizer.get("type", optim)),
            smallest_8bit=int(optimizer.get("params", {}).get("min_8bit_size", SMALLEST_8BIT)),
            offload_optimizer=offloaded("offload_optimizer"),
            offload_param=offloaded("offload_param"),
            persistent_below=number("stage3_param_persistence_threshold", 100_000, 10 * hidden),
            sub_group_size=number("sub_group_size", 1_000_000_000, 1e9),
            reduce_bucket=number("reduce_bucket_size", 500_000_000, hidden**2),
            live_parameters=number("stage3_max_live_parameters", 1_000_000_000, 1e9),
            reuse_distance=number("stage3_max_reuse_distance", 1_000_000_000, 1e9),
            prefetched=number("stage3_prefetch_bucket_size", 50_000_000, 0.9 * hidden**2),
        )


@dataclass
class Plan:
    """Bytes on one rank, the one that holds most."""

    device: dict[str, int] = field(default_factory=dict)
    host: dict[str, int] = field(default_factory=dict)

    @property
    def device_total(self) -> int:
        return sum(self.device.values())

    @property
    def host_total(self) -> int:
        return sum(self.host.values())


def plan(
    targets: Sequence[Target],
    others: Sequence[int],
    setup: Setup,
    config: SeftConfig,
    total_steps: int = 1000,
    passing: dict[str, int] | None = None,
    in_backward: int = 0,
) -> Plan:
    """What one rank holds during training.

    Args:
        targets: sparse weights with their slots assigned.
        others: number of entries of each other parameter.
        passing: further parts that come and go, such as `activations`.
        in_backward: how many bytes of `passing` are there in backward only.
    """
    result = Plan()
    on_host = {
        "weights": setup.offload_param,
        "deltas": setup.offload_param,
        "positions": setup.offload_param,
        "gradients": setup.offload_optimizer,
        "masters": setup.offload_optimizer,
        "moments": setup.offload_optimizer,
    }
    held = {
        "weights": _weights(targets, others, setup),
        "positions": _positions(targets, setup),
        **_trained(targets, setup),
        "masks": sum(3 * -(-_owned(t, setup) // 8) for t in targets),
        "slot tables": sum(_table(t, setup) for t in targets),
        "windows": window_bytes(targets, setup, config, total_steps),
        "curvature": sum(curvature_bytes(t) for t in targets) * config.weighs_by_curvature,
    }
    assert set(held) == set(HELD)
    for part in HELD:
        where = result.host if on_host.get(part) else result.device
        where[part] = held[part]
    result.device |= buffers(targets, others, setup, in_backward)
    if config.dense_model is not None:
        free = [t for t in targets if t.pattern is None]
        weighed = sum(_owned(t, setup) for t in free)
        largest = max((_owned(t, setup) for t in free), default=0)
        moved = round(2 * 8 * config.exchange * weighed)
        sums = sum(2 * curvature_bytes(t) for t in free)  # of the window, and of a step
        result.device["exchange"] = (
            weighed * _EXCHANGE_BYTES + moved + largest * _EXCHANGE_TRANSIENT + sums
        )
    result.device |= passing or {}
    return result


def _cut(numel: int, setup: Setup) -> int:
    """Entries of one parameter on the rank that holds most."""
    return -(-numel // setup.ranks) if setup.stage == 3 else numel


def _kept(numel: int, setup: Setup) -> int:
    """`_cut`, and the whole of what ZeRO-3 finds too small to gather each time."""
    persists = setup.stage == 3 and setup.ranks > 1 and numel <= setup.persistent_below
    return _cut(numel, setup) + (numel if persists else 0)


def _owned(target: Target, setup: Setup) -> int:
    """Positions that a rank decides about, whatever the stage."""
    length = -(-target.numel // setup.ranks)
    return min(target.numel, -(-length // target.multiple) * target.multiple)


def _weights(targets: Sequence[Target], others: Sequence[int], setup: Setup) -> int:
    entries = sum(_cut(t.numel, setup) for t in targets) + sum(_kept(n, setup) for n in others)
    return entries * setup.dtype_bytes


def _positions(targets: Sequence[Target], setup: Setup) -> int:
    return sum(_cut(t.n_slots, setup) * (4 if t.numel < 2**31 else 8) for t in targets)


def _trained(targets: Sequence[Target], setup: Setup) -> dict[str, int]:
    """Deltas, their gradients, fp32 masters and moments."""
    slots = [t.n_slots for t in targets]
    flats = optimizer_flats(slots, setup)
    own_master = setup.stage > 0 or setup.dtype_bytes < 4  # else the delta is its own master
    return {
        "deltas": sum(_kept(k, setup) for k in slots) * setup.dtype_bytes,
        "gradients": sum(_cut(k, setup) for k in slots) * setup.dtype_bytes,
        "masters": sum(flats) * 4 * own_master,
        "moments": sum(moment_bytes(n, setup) for n in flats),
    }


def optimizer_flats(slots: Sequence[int], setup: Setup) -> list[int]:
    """Lengths of the tensors that the optimizer steps, on the rank that holds most."""
    if setup.stage == 0:
        return list(slots)
    if setup.stage < 3:
        cut = 2 * setup.ranks  # ZeRO's alignment
        return [-(-sum(slots) // cut) * 2]
    flats, filled = [], 0
    for k in slots:  # whole parameters until the group is full
        filled += -(-k // setup.ranks)
        if filled >= setup.sub_group_size:
            flats.append(filled)
            filled = 0
    return flats + ([filled] if filled else [])


def moment_bytes(entries: int, setup: Setup) -> int:
    """The optimizer's state of one flat tensor, without tables that all tensors share."""
    if setup.eight_bit and entries >= setup.smallest_8bit:
        return setup.moments * (entries + 4 * -(-entries // BLOCK))
    return setup.moments * 4 * entries


def _table(target: Target, setup: Setup) -> int:
    """The slots that a rank must know: of what it holds. Under ZeRO-3 about its share of them."""
    known = target.n_slots if setup.stage < 3 else -(-target.n_slots // setup.ranks)
    return known * (_TABLE_BYTES + setup.dtype_bytes)


def curvature_bytes(target: Target) -> int:
    """A number for every output and input, whole on every rank."""
    return 4 * (target.shape[0] + target.shape[1] * max(1, target.experts))


def window_bytes(
    targets: Sequence[Target], setup: Setup, config: SeftConfig, total_steps: int
) -> int:
    """The most that open windows hold at once: G and Q in fp32, where a window is open."""
    interval = resolve_interval(config.interval, config.window, total_steps)
    schedule = Schedule(
        total_steps=total_steps,
        interval=interval,
        window=config.window,
        drop_fraction=config.drop_fraction,
        stop=config.stop,
        n_targets=len(targets),
        waves=config.in_waves,
        replace_all_first=config.start == "gradient",
    )
    sizes = [8 * _owned(t, setup) for t in targets]
    # Windows come round once an interval: two rounds show every set that is ever open together.
    steps = range(1, min(total_steps, 2 * interval + config.window) + 1)
    return max(
        (sum(s for i, s in enumerate(sizes) if schedule.in_window(i, step)) for step in steps),
        default=0,
    )


def buffers(
    targets: Sequence[Target], others: Sequence[int], setup: Setup, in_backward: int
) -> dict[str, int]:
    """What comes and goes in a step beside activations. Estimates."""
    # Of fused experts one at a time.
    largest = max((t.numel // max(1, t.experts) for t in targets), default=0)
    slots = [t.n_slots for t in targets]
    everything = sum(t.numel for t in targets) + sum(others)
    # The gradient of one weight at a time in fp32, and deltas gathered for the write-through.
    gradients = 4 * largest + 4 * max(min(sum(slots), 1 << 24), *slots, 0)
    # What is gathered arrives in one buffer and is copied from there.
    arriving = min(setup.prefetched, everything) * setup.dtype_bytes
    if everything <= min(setup.live_parameters, setup.stays):
        # Nothing has to arrive any more when backward begins, and has what only backward has.
        arriving = max(0, arriving - in_backward - gradients)
    gathered = min(setup.live_parameters, everything) * setup.dtype_bytes + arriving
    # A single rank has its weights at hand.
    gathers = setup.stage == 3 and (setup.ranks > 1 or setup.offload_param)
    return {
        "reduction buffers": setup.reduce_bucket * setup.dtype_bytes if setup.stage else 0,
        "gathered weights": max(gathered, _module(targets, setup)) if gathers else 0,
        "slot gradients": gradients,
    }


def _module(targets: Sequence[Target], setup: Setup) -> int:
    """Bytes of the largest module of fused experts, gathered whole: weights, deltas, positions."""
    sizes: dict[str, int] = {}
    for t in targets:
        if t.experts:
            owner, index = t.name.rpartition(".")[0], 4 if t.numel < 2**31 else 8
            held = (t.numel + t.n_slots) * setup.dtype_bytes + t.n_slots * index
            sizes[owner] = sizes.get(owner, 0) + held
    return max(sizes.values(), default=0)
