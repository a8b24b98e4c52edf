"""Bytes that a rank sends in an optimizer step, by purpose: predicted from shapes, like the bytes it holds.

Ring algorithms are assumed: of a whole of B bytes, all-gather and reduce-scatter send (n - 1)/n · B from each
of n ranks, an all-reduce twice that. `benchmarks/wire.py` counts the same in real runs.
"""

from __future__ import annotations

from collections.abc import Sequence

from seft_ds.config import SeftConfig
from seft_ds.distributed import selection
from seft_ds.memory import Setup, curvature_bytes
from seft_ds.schedule import resolve_interval
from seft_ds.sparse import radix
from seft_ds.targets import Target


def wire_bytes(
    targets: Sequence[Target],
    others: Sequence[int],
    setup: Setup,
    config: SeftConfig,
    trained: int | None = None,
    micro_batches: int = 1,
    total_steps: int = 1000,
) -> dict[str, float]:
    """What one rank sends a step, on average over an interval.

    Args:
        others: number of entries of each parameter that is no target.
        trained: entries that train in a run without slots (LoRA: its adapters; full fine-tuning: all);
            None: the slots of the targets.
        micro_batches: gradient accumulation.
    """
    share = (setup.ranks - 1) / setup.ranks
    own = trained is None
    moved = sum(t.n_slots for t in targets) if trained is None else trained
    result: dict[str, float] = {}
    if setup.stage == 3:
        gathered = _gathered(targets, others, setup, moved, own)
        result["weights"] = share * gathered * micro_batches
    # DeepSpeed's ZeRO-1 and 2 sum whole buckets on all ranks; its ZeRO-3 sums each part on its owner. From
    # ZeRO-2 on they do so after every micro-batch.
    whole_gradients = 1 if setup.stage == 3 else 2
    sums = micro_batches if setup.stage >= 2 else 1
    result["gradients"] = sums * whole_gradients * share * moved * setup.dtype_bytes
    if setup.stage in (1, 2):
        result["updated values"] = share * moved * setup.dtype_bytes
    if own:
        # Values of all slots go to every rank, which writes those into the weights that it holds.
        result["write-through"] = 4 * share * moved * (setup.stage > 0)
    if own and config.drop_fraction:
        interval = resolve_interval(config.interval, config.window, total_steps)
        entries, open_share = sum(t.numel for t in targets), min(1.0, config.window / interval)
        result["windows"] = 4 * share * entries * open_share * micro_batches
        if config.weighs_by_curvature:
            result["curvature"] = 2 * share * sum(map(curvature_bytes, targets)) * open_share
        result["events"] = share * sum(_event(t, config) for t in targets) / interval
    return result


def _gathered(
    targets: Sequence[Target], others: Sequence[int], setup: Setup, moved: int, own: bool
) -> int:
    """Bytes of the weights that ZeRO-3 gathers for one forward and backward pass.

    A weight that backward needs soon after forward stays where it is; those in front are gathered twice.
    """
    large = [n for n in others if n > setup.persistent_below]
    entries = sum(t.numel for t in targets) + sum(large)
    # Slots are gathered with their weight: deltas, and positions of 4 or 8 bytes.
    beside = sum(t.n_slots * (setup.dtype_bytes + (4 if t.numel < 2**31 else 8)) for t in targets)
    if not own:
        beside = 0 if moved >= entries else moved * setup.dtype_bytes
    whole = entries * setup.dtype_bytes + beside
    stays = min(1.0, setup.stays / entries) if entries else 1.0
    return round(whole * (2 - stays))


def _event(target: Target, config: SeftConfig) -> float:
    """Bytes of the whole that the collectives of one weight's event hand about, before the ring's share."""
    # Drop, grow and adapt; with `revert` also who dies. An all-reduce sends its payload twice.
    selections = 3 + (config.release == "revert")
    counts = selections * target.n_parts * sum(8 << bits for _, bits in radix.DIGITS)
    # Of the keys of growing and pruning a sample goes first.
    counts += 2 * target.n_parts * (8 << selection.SAMPLE_DIGIT[1])
    # On average over a cosine from drop_fraction to 0, half of it; 4 int64, 3 fp32 and 3 flags a slot.
    lists = config.drop_fraction / 2 * target.n_slots * (4 * 8 + 3 * 4 + 3)
    return 2 * counts + lists
