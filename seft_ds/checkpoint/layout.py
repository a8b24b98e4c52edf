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
    i.curvature.output, .input         (rank 0) sums of an exchange's open window, over all ranks
    i.rates             (rank 0) factors on the learning rate, by input
    i.delta, i.moment.NAME             fp32 master values and moments of the slots in slot_ranges
    flat.k.absmax.NAME  scales of 8-bit moments, by block of the rank's k-th flat tensor
    i.fresh_slots       (rank 0) slots that the last event placed and no step has moved yet
    other.NAME          every other weight (base: copy) and buffer, flat, the rank's share

The position range of rank r is `shard_range(numel, r, ranks, multiple)`.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from seft_ds.checkpoint.manifest import hash_file, read_manifest
from seft_ds.config import WITH_DENSE_MODEL, SeftConfig, parse_seft
from seft_ds.json_file import printable, read_text, shown
from seft_ds.optim.families import FAMILIES
from seft_ds.sparse.shard import shard_range
from seft_ds.targets import Target

FORMAT = "seft_ds-checkpoint-4"
META_NAME = "seft.json"
ENGINE_NAME = "engine.pt"
_LATEST_BYTES = 1024
_META_BYTES = 1 << 28  # more than a model with ten thousand targets on thousands of ranks needs

_MOST = 1 << 53  # of anything that is counted: exact in a float as well
Count = Field(ge=0, le=_MOST)
Name = Annotated[str, Field(min_length=1, max_length=1000, pattern=r"^[^\x00-\x1f\x7f]+$")]
Size = Annotated[int, Field(ge=0, le=_MOST)]
FloatName = Literal["float64", "float32", "float16", "bfloat16"]
DtypeName = FloatName | Literal["int64", "int32", "int16", "int8", "uint8", "bool"]


class _Plain(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class TargetMeta(_Plain):
    """One target weight, as `targets.Target` has it."""

    name: Name
    shape: list[Size] = Field(min_length=2, max_length=2)
    target_live: int = Count
    pattern: list[Size] | None = Field(min_length=2, max_length=2)
    n_slots: int = Field(ge=1, le=_MOST)
    experts: int = Field(default=0, ge=0, le=1 << 20)
    part_live: list[Size] = Field(default=[], max_length=1 << 21)
    part_slots: list[Size] = Field(default=[], max_length=1 << 21)

    def target(self) -> Target:
        pattern = (self.pattern[0], self.pattern[1]) if self.pattern else None
        shape = (self.shape[0], self.shape[1])
        return Target(
            self.name, shape, self.target_live, pattern, self.n_slots, self.experts, self.part_live,
            self.part_slots,
        )  # fmt: skip

    def problem_of_parts(self) -> str | None:
        """What of the parts does not fit together, or None."""
        n = len(self.part_live)
        if not self.experts:
            return f"{n} parts of a weight without experts" if n or self.part_slots else None
        if not n or n % self.experts or self.shape[0] % n or len(self.part_slots) != n:
            return f"{n} parts of {self.experts} experts, {len(self.part_slots)} with slots"
        if sum(self.part_live) != self.target_live or sum(self.part_slots) != self.n_slots:
            return "its parts don't add up to it"
        size = self.shape[0] // n * self.shape[1]
        pairs = zip(self.part_slots, self.part_live, strict=True)
        return None if all(k <= live <= size for k, live in pairs) else "a part has too many slots"


class OtherMeta(_Plain):
    """A weight that isn't a target, or a buffer."""

    name: Name
    shape: list[Size] = Field(max_length=16)
    dtype: DtypeName
    buffer: bool

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


class CheckpointMeta(_Plain):
    """`seft.json`."""

    format: Literal["seft_ds-checkpoint-4"]
    base: Literal["copy", "reference"]
    step: int = Count
    total_steps: Annotated[int, Field(ge=1, le=_MOST)] | None
    ranks: int = Field(ge=1, le=1 << 20)
    zero_stage: int = Field(ge=0, le=3)
    train_batch_size: int = Count  # rows of a step, over all ranks
    dtype: FloatName  # of the target weights
    targets: list[TargetMeta] = Field(min_length=1)
    others: list[OtherMeta]
    fingerprints: dict[Name, str]  # of the base model's weights, by name (zero/fingerprint.py)
    slot_ranges: list[list[list[int]]]  # [rank][target] = the slots [lo, hi) in that rank's file
    flat_layouts: list[str]  # of each rank: a digest of which slots share 8-bit blocks
    moments: list[str]
    optimizer_steps: Annotated[float, Field(ge=0, le=_MOST)] | None
    window_steps: list[Size | None]  # of each target's open window; None: not open
    curvature_steps: list[Size | None]  # likewise of what is measured for an exchange
    rates: bool  # whether the files hold factors on the learning rate
    target_events: list[int]  # that each target has had
    source_dir: str = Field(max_length=4096)
    config: dict[str, Any]
    n_events: int = Count
    n_exchanges: int = Count
    event_seconds: float = Field(ge=0)
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
        if len(self.flat_layouts) != self.ranks:
            return f"flat_layouts of {len(self.flat_layouts)} ranks, wanted {self.ranks}"
        if len(self.window_steps) != len(self.targets):
            return f"window_steps of {len(self.window_steps)} targets, wanted {len(self.targets)}"
        if len(self.curvature_steps) != len(self.targets):
            return f"curvature_steps of {len(self.curvature_steps)} targets, wanted {len(self.targets)}"
        if len(self.target_events) != len(self.targets) or min(self.target_events) < 0:
            return f"target_events {self.target_events[:3]}, wanted a count for each target"
        for target in self.targets:
            numel = target.shape[0] * target.shape[1]
            if not 0 < numel <= _MOST or target.target_live > numel:
                return f"{target.name}: shape {target.shape}, {target.target_live} live"
            n_m = target.pattern
            if n_m and not 0 < n_m[0] < n_m[1]:
                return f"{target.name}: pattern {n_m}"
            if target.n_slots > target.target_live:
                return f"{target.name}: {target.n_slots} slots, {target.target_live} live"
            if problem := target.problem_of_parts():
                return f"{target.name}: {problem}"
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
        if self.moments and self.moments not in [sorted(names) for names in FAMILIES.values()]:
            return f"moments {self.moments}"
        if (self.optimizer_steps is None) != (not self.moments):
            return "moments without a step count, or a step count without moments"
        return self._problem_of_names() or self._problem_of_settings()

    def _problem_of_names(self) -> str | None:
        """Is every weight of the base model there, and nothing twice?"""
        targets = [t.target().weight_name for t in self.targets]
        names = [*targets, *(o.name for o in self.others)]
        if len(set(names)) != len(names) or "__metadata__" in names:
            return "a weight or buffer is listed twice, or under a name that the format reserves"
        weights = {*targets, *(o.name for o in self.others if not o.buffer)}
        if self.base == "copy" and weights != set(self.fingerprints):
            some = min(weights ^ set(self.fingerprints))
            return f"{some} is not both among the weights and among the fingerprints"
        for other in self.others:
            if other.numel > _MOST:
                return f"{other.name}: shape {other.shape}"
        return None

    def _problem_of_settings(self) -> str | None:
        """`config` holds all settings; those that were not given are as they are by default."""
        known = {name: field.default for name, field in SeftConfig.model_fields.items()}
        if self.config.get("dense_model") is not None:
            known |= WITH_DENSE_MODEL
        given = {k: v for k, v in self.config.items() if k not in known or v != known[k]}
        try:
            parse_seft(given)
        except ValueError as error:
            return str(error)
        return None


def rank_file(rank: int, size: int) -> str:
    return f"rank-{rank:05d}-of-{size:05d}.safetensors"


def read_meta(directory: Path) -> CheckpointMeta:
    """The description of the SEFT state in a checkpoint's tag directory.

    Raises:
        ValueError: none there, or one that is damaged or of another version.
    """
    path = directory / META_NAME
    if not os.path.isfile(path):
        raise ValueError(
            f"{directory} holds no SEFT state ({META_NAME} is missing): it was not saved by a SEFT run, or "
            "the save was interrupted; give another checkpoint"
        )
    text = read_text(path, _META_BYTES)
    try:
        plain = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error}); give another checkpoint") from None
    found = plain.get("format") if isinstance(plain, dict) else None
    if found != FORMAT:
        raise ValueError(f"{path}: format {shown(found)}, this version reads {FORMAT!r}")
    try:
        meta = CheckpointMeta.model_validate(plain)
    except ValidationError as error:
        first = error.errors()[0]
        where = printable(".".join(str(part) for part in first["loc"]), 100)
        raise ValueError(f"{path} is damaged: {where}: {first['msg']}") from None
    problem = meta.problem()
    if problem:
        raise ValueError(f"{path} is damaged: {printable(problem, 500)}")
    return meta


def check_listed(directory: Path, meta: CheckpointMeta) -> None:
    """ValueError unless the manifest covers every file that is read, and this description is the one it
    covers. It vouches for no other file.
    """
    listed = read_manifest(directory)[0]
    wanted = [META_NAME, ENGINE_NAME, *(rank_file(r, meta.ranks) for r in range(meta.ranks))]
    for name in wanted:
        if name not in listed:
            raise ValueError(f"{directory}: its manifest does not list {name}; it is damaged")
    path = directory / META_NAME
    try:
        found: object = hash_file(path)
    except OSError as error:  # a link, say
        found = error
    if found != listed[META_NAME]:
        raise ValueError(f"{path} is not what was written ({found}); the checkpoint is damaged")


def find_tag(checkpoint: Path) -> Path:
    """The tag directory of a checkpoint: itself, the one that `latest` names, or the only one there.

    Raises:
        ValueError: there is none.
    """
    if os.path.isfile(checkpoint / META_NAME):
        return checkpoint
    latest = checkpoint / "latest"
    if os.path.isfile(latest):
        name = read_text(latest, _LATEST_BYTES).strip()
        plain = name and Path(name).name == name and name not in (".", "..")
        if not plain or not os.path.isdir(checkpoint / name):
            raise ValueError(f"{latest} names {shown(name)}, which is no folder beside it")
        return checkpoint / name
    found = [p.parent for p in checkpoint.glob(f"*/{META_NAME}")] if checkpoint.is_dir() else []
    if len(found) != 1:
        raise ValueError(
            f"{checkpoint} is no checkpoint (no file 'latest' and no single folder with {META_NAME}); give "
            "RUN/checkpoint-N as it was written"
        )
    return found[0]
