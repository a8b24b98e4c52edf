"""What a checkpoint of SEFT holds, and which rank's file holds which part of it.

A tag directory (`global_step20`):

    manifest.json       sizes and sha256 of the files below (checkpoint/manifest.py)
    seft.json           CheckpointMeta: the run, its targets, what the files hold
    engine.pt           DeepSpeed's counters, scheduler, hyperparameters, the caller's client_state
    rank-00000-of-00002.safetensors ...   one a rank

Everything in the rank files is stored by global position or slot index, each rank its own range, so that
any number of ranks under any ZeRO stage can read what it needs. For target i (its number in `targets`):

    i.weight            effective weight at the rank's positions (base: copy)
    i.touched_bits, i.touched_values   the positions whose weight may differ from the base model's, and
                        their effective weights (base: reference)
    i.live_bits, i.start_bits          packed masks of the rank's positions
    i.slots.position, .slot, .base, .born_dead    the slots on the rank's positions, ascending
    i.window.G, .Q      open window's sums at the rank's positions
    i.delta, i.moment.NAME             fp32 master values and moments of the slots in slot_ranges
    i.fresh_slots       (rank 0) slots that the last event placed and no step has moved yet
    other.NAME          every other weight (base: copy) and buffer, flat, the rank's share

The position range of rank r is `shard_range(numel, r, ranks, multiple)`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from seft_ds.sparse.shard import shard_range
from seft_ds.targets import Target

FORMAT = "seft_ds-checkpoint-2"
META_NAME = "seft.json"
ENGINE_NAME = "engine.pt"
_META_BYTES = 1 << 28  # more than a model with ten thousand targets on thousands of ranks needs

Count = Field(ge=0, le=1 << 53)
DtypeName = Literal[
    "float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool"
]


class _Plain(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class TargetMeta(_Plain):
    """One target weight, as `targets.Target` has it."""

    name: str
    shape: list[int] = Field(min_length=2, max_length=2)
    target_live: int = Count
    pattern: list[int] | None = Field(min_length=2, max_length=2)
    n_slots: int = Field(ge=1, le=1 << 53)

    def target(self) -> Target:
        pattern = (self.pattern[0], self.pattern[1]) if self.pattern else None
        return Target(
            self.name, (self.shape[0], self.shape[1]), self.target_live, pattern, self.n_slots
        )


class OtherMeta(_Plain):
    """A weight that isn't a target, or a buffer."""

    name: str
    shape: list[int]
    dtype: DtypeName
    buffer: bool

    @property
    def numel(self) -> int:
        numel = 1
        for size in self.shape:
            numel *= size
        return numel


class CheckpointMeta(_Plain):
    """`seft.json`."""

    format: Literal["seft_ds-checkpoint-2"]
    base: Literal["copy", "reference"]
    step: int = Count
    total_steps: int | None
    ranks: int = Field(ge=1, le=1 << 20)
    zero_stage: int = Field(ge=0, le=3)
    dtype: DtypeName  # of the target weights
    targets: list[TargetMeta] = Field(min_length=1)
    others: list[OtherMeta]
    fingerprints: dict[str, str]  # of the base model's weights, by name (zero/fingerprint.py)
    slot_ranges: list[list[list[int]]]  # [rank][target] = the slots [lo, hi) in that rank's file
    moments: list[str]
    optimizer_steps: float | None
    window_steps: list[int | None]  # of each target's open window; None: not open
    target_events: list[int]  # that each target has had
    source_dir: str
    config: dict[str, Any]
    n_events: int = Count
    event_seconds: float
    event_bytes: int = Count
    skipped_steps: int = Count
    skipped_in_a_row: int = Count
    versions: dict[str, str]

    def positions(self, i: int) -> list[tuple[int, int]]:
        """The positions [lo, hi) of target i in each rank's file."""
        target = self.targets[i].target()
        return [
            shard_range(target.numel, r, self.ranks, target.multiple) for r in range(self.ranks)
        ]

    def problem(self) -> str | None:
        """What does not fit together, or None."""
        if len(self.slot_ranges) != self.ranks:
            return f"slot_ranges of {len(self.slot_ranges)} ranks, wanted {self.ranks}"
        if len(self.window_steps) != len(self.targets):
            return f"window_steps of {len(self.window_steps)} targets, wanted {len(self.targets)}"
        if len(self.target_events) != len(self.targets) or min(self.target_events) < 0:
            return f"target_events {self.target_events[:3]}, wanted a count for each target"
        for target in self.targets:
            if min(target.shape) < 1 or target.target_live > target.shape[0] * target.shape[1]:
                return f"{target.name}: shape {target.shape}, {target.target_live} live"
            n_m = target.pattern
            if n_m and not 0 < n_m[0] < n_m[1]:
                return f"{target.name}: pattern {n_m}"
            if target.n_slots > target.target_live:
                return f"{target.name}: {target.n_slots} slots, {target.target_live} live"
        for i, target in enumerate(self.targets):
            end = 0
            for ranges in self.slot_ranges:
                if len(ranges) != len(self.targets) or len(ranges[i]) != 2:
                    return "slot_ranges don't cover the targets"
                lo, hi = ranges[i]
                if lo == hi:
                    continue
                if lo != end or hi < lo:
                    return f"{target.name}: slot ranges don't follow each other"
                end = hi
            if end != target.n_slots:
                return f"{target.name}: slot ranges end at {end}, wanted {target.n_slots}"
        if any(min(o.shape, default=1) < 0 for o in self.others):
            return "a negative size"
        if any(not name.isidentifier() for name in self.moments):
            return f"moments {self.moments}"
        if (self.optimizer_steps is None) != (not self.moments):
            return "moments without a step count, or a step count without moments"
        return None


def rank_file(rank: int, size: int) -> str:
    return f"rank-{rank:05d}-of-{size:05d}.safetensors"


def read_meta(directory: Path) -> CheckpointMeta:
    """The description of the SEFT state in a checkpoint's tag directory.

    Raises:
        ValueError: none there, or one that is damaged or of another version.
    """
    path = directory / META_NAME
    if not path.is_file():
        raise ValueError(
            f"{directory} holds no SEFT state ({META_NAME} is missing): it was not saved by a SEFT run, or "
            "the save was interrupted; give another checkpoint"
        )
    if path.stat().st_size > _META_BYTES:
        raise ValueError(f"{path} has {path.stat().st_size} bytes: it is not what we wrote")
    try:
        plain = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error}); give another checkpoint") from None
    found = plain.get("format") if isinstance(plain, dict) else None
    if found != FORMAT:
        raise ValueError(f"{path}: format {found!r}, this version reads {FORMAT!r}")
    try:
        meta = CheckpointMeta.model_validate(plain)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ValueError(f"{path} is damaged: {where}: {first['msg']}") from None
    problem = meta.problem()
    if problem:
        raise ValueError(f"{path} is damaged: {problem}")
    return meta


def find_tag(checkpoint: Path) -> Path:
    """The tag directory of a checkpoint: itself, the one that `latest` names, or the only one there.

    Raises:
        ValueError: there is none.
    """
    if (checkpoint / META_NAME).is_file():
        return checkpoint
    latest = checkpoint / "latest"
    if latest.is_file():
        name = latest.read_text(errors="replace")[:256].strip()
        plain = name and Path(name).name == name and name not in (".", "..")
        if not plain or not (checkpoint / name).is_dir():
            raise ValueError(f"{latest} names {name!r}, which is no folder beside it")
        return checkpoint / name
    found = [p.parent for p in checkpoint.glob(f"*/{META_NAME}")] if checkpoint.is_dir() else []
    if len(found) != 1:
        raise ValueError(
            f"{checkpoint} is no checkpoint (no file 'latest' and no single folder with {META_NAME}); give "
            "RUN/checkpoint-N as it was written"
        )
    return found[0]
