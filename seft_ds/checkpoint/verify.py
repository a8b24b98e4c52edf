"""Is a sparse model directory what its `sparsity.json` says? Recounted from the files alone.

A directory holds if, for every target weight,
- the file has the tensor, in the recorded shape and dtype;
- as many entries differ from zero as `live` says, at the positions that the mask digest stands for;
- that count is `target_live` (with `scope: global` the sum over all targets is);
- in a weight with the pattern N:M, every M consecutive inputs of a row have exactly N live;
- no dead position holds -0.0 (it compares equal to zero, but is not what was written);
and if the totals are the sums of these, the model's files hold the tensors that their index names, and
no others. One tensor is in memory at a time; no model code and no DeepSpeed is involved.

The mask digest of a weight is the sha256 of its packed mask (seft_ds.sparse.mask, whole weight in
row-major order); the digest of the model is the sha256 of the lines "name digest\\n" in name order.
"""

from __future__ import annotations

import hashlib
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from seft_ds.json_file import printable, read_object, shown
from seft_ds.sparse import mask
from seft_ds.targets import parse_pattern
from seft_ds.tensor_files import (
    DTYPE_OF_CODE,
    INDEX_NAME,
    WEIGHTS_NAME,
    is_name,
    open_tensors,
    read_index,
)

FORMAT = "seft_ds-sparsity-1"
RECORD_NAME = "sparsity.json"
# What every entry of `targets` in the record has, and of which types.
_ENTRY_TYPES: dict[str, tuple[type, ...]] = {
    "shape": (list,),
    "dtype": (str,),
    "pattern": (str, type(None)),
    "target_live": (int, type(None)),
    "live": (int,),
    "mask_digest": (str,),
}


@dataclass
class TargetCheck:
    """One target weight as found; `live` is -1 where the weight could not be read."""

    name: str
    total: int
    pattern: str | None
    recorded_live: int
    target_live: int | None
    live: int = -1
    mask_digest: str = ""
    problems: list[str] = field(default_factory=list)


@dataclass
class VerifyResult:
    """What `verify` found. `problems` is everything that does not hold, each naming its tensor or file."""

    directory: Path
    record: dict[str, Any]
    targets: list[TargetCheck]
    problems: list[str]

    @property
    def ok(self) -> bool:
        return not self.problems

    @property
    def live(self) -> int:
        return sum(t.live for t in self.targets if t.live >= 0)

    @property
    def total(self) -> int:
        return sum(t.total for t in self.targets)


def verify(directory: str | Path) -> VerifyResult:
    """Recount every target weight of a sparse model directory.

    Raises ValueError where there is nothing to check: no directory, no `sparsity.json` or weights, or
    JSON that is damaged. Everything else that does not hold is in the result's `problems`.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise ValueError(
            f"{directory} is not a directory; give a model directory written by seft_ds"
        )
    record = read_record(directory)
    files, problems = _tensor_files(directory)
    found = 0
    tensors: dict[str, TargetCheck] = {}
    for file_name in sorted(set(files.values())):
        checks, names, file_problems = _check_file(directory, file_name, files, record["targets"])
        tensors.update(checks)
        found += names
        problems += file_problems
    for name, entry in record["targets"].items():
        if name not in tensors:
            missing = _blank_check(name, entry)
            missing.problems.append("missing from the model's files")
            tensors[name] = missing
    targets = [tensors[name] for name in sorted(tensors)]
    problems += [f"{c.name}: {p}" for c in targets for p in c.problems]
    if not problems:  # sums over wrong parts would only repeat what is already said
        problems += _check_totals(record, targets, found)
    return VerifyResult(directory, record, targets, problems)


def packed_digest(bits: torch.Tensor) -> str:
    """ "sha256:..." of packed mask bits, uint8 (ceil(n / 8),)."""
    return "sha256:" + hashlib.sha256(bits.cpu().contiguous().numpy().data).hexdigest()


def model_digest(digests: dict[str, str]) -> str:
    """ "sha256:..." over {target name: its digest}, in name order."""
    lines = "".join(f"{name} {digests[name]}\n" for name in sorted(digests))
    return "sha256:" + hashlib.sha256(lines.encode()).hexdigest()


def groups_off_pattern(live: torch.Tensor, pattern: str) -> int:
    """How many groups of `live`, bool (out, in), have not exactly N of M consecutive inputs live.

    Inputs past the last whole group count as one group that is off. One host-device sync.
    """
    n, m = parse_pattern(pattern)
    rows, width = live.shape
    if width % m:
        return rows * -(-width // m)
    return int((live.view(-1, m).sum(dim=1) != n).sum())


def read_record(directory: Path) -> dict[str, Any]:
    """`sparsity.json` of a directory, its structure checked. Raises ValueError."""
    path = directory / RECORD_NAME
    if not os.path.isfile(path):
        raise ValueError(f"{directory} has no {RECORD_NAME}; it is not a sparse model of seft_ds")
    record = read_object(path)
    if record.get("format") != FORMAT:
        raise ValueError(
            f"{path} has format {shown(record.get('format'))}; this version reads {FORMAT!r}"
        )
    targets = record.get("targets")
    if not isinstance(targets, dict) or not targets:
        raise ValueError(f"{path} names no targets; write the model again with launch/export.py")
    for name, entry in targets.items():
        if not is_name(name):
            raise ValueError(f"{path}: {shown(name)} is no name of a tensor; the file is damaged")
        for key, types in _ENTRY_TYPES.items():
            value = entry.get(key) if isinstance(entry, dict) else None
            if not isinstance(value, types) or isinstance(value, bool) or _absurd(value):
                raise ValueError(f"{path}: {key} of {name} is {shown(value)}; the file is damaged")
        shape = entry["shape"]
        if not all(type(size) is int and size >= 0 for size in shape) or _absurd(math.prod(shape)):
            raise ValueError(f"{path}: shape of {name} is {shown(shape)}; the file is damaged")
        if entry["pattern"] is not None:
            try:
                parse_pattern(entry["pattern"])
            except ValueError as error:
                raise ValueError(f"{path}: {name}: {error}") from None
    return record


def _absurd(value: object) -> bool:
    """No count of ours, or a text or list far longer than what it should be."""
    if isinstance(value, int):
        return not 0 <= value < 1 << 62
    return isinstance(value, (str, list)) and len(value) > 200


def _tensor_files(directory: Path) -> tuple[dict[str, str], list[str]]:
    """{tensor name: file name} as the index (or the only file) says, and what is wrong with the set.

    For a single file without an index the only key is "" (the file's own header names its tensors).
    """
    listed: dict[str, str] = {}
    if os.path.isfile(directory / WEIGHTS_NAME):  # what transformers loads first
        listed = {"": WEIGHTS_NAME}
    elif os.path.isfile(directory / INDEX_NAME):
        listed = read_index(directory)
    else:
        raise ValueError(f"{directory} has neither {WEIGHTS_NAME} nor {INDEX_NAME}")
    present = {path.name for path in directory.glob("model*.safetensors")}
    problems = [
        f"{name}: a weights file that the model does not use; remove it"
        for name in sorted(present - set(listed.values()))
    ]
    return listed, problems


def _check_file(
    directory: Path, file_name: str, files: dict[str, str], targets: dict[str, Any]
) -> tuple[dict[str, TargetCheck], int, list[str]]:
    """Checks of the targets in one weights file, its number of tensors, and problems with the file."""
    indexed = {name for name, file in files.items() if file == file_name} - {""}
    checks: dict[str, TargetCheck] = {}
    try:
        opened = open_tensors(directory / file_name)
    except ValueError as error:
        return {}, 0, [str(error).removeprefix(f"{directory}/")]
    with opened as file:
        names = set(file.keys())
        problems = [f"{name}: indexed, but not in {file_name}" for name in indexed - names]
        if "" not in files:
            new = (printable(n, 200) for n in names - indexed)
            problems += [f"{n}: in {file_name}, but not indexed" for n in new]
        for name in sorted(names & set(targets)):
            checks[name] = _check_target(name, targets[name], file)
    return checks, len(names), sorted(problems)


def _blank_check(name: str, entry: dict[str, Any]) -> TargetCheck:
    total = math.prod(entry["shape"])
    return TargetCheck(name, total, entry["pattern"], entry["live"], entry["target_live"])


def _check_target(name: str, entry: dict[str, Any], file: Any) -> TargetCheck:
    """Recount one target; `file` is an open safetensors file that holds it."""
    check = _blank_check(name, entry)
    view = file.get_slice(name)
    shape, dtype = view.get_shape(), DTYPE_OF_CODE.get(view.get_dtype())
    if shape != entry["shape"]:
        check.problems.append(f"shape {shape}, {RECORD_NAME} says {entry['shape']}")
        return check
    if str(dtype) != f"torch.{entry['dtype']}":
        check.problems.append(
            f"dtype {view.get_dtype()}, {RECORD_NAME} says {printable(entry['dtype'], 20)}"
        )
    if dtype is None:  # packed or 8-bit floats: nothing that we write, or that torch can count
        return check
    weight = file.get_tensor(name)  # the only tensor in memory
    live = weight != 0
    check.live = int(torch.count_nonzero(live))
    check.mask_digest = packed_digest(mask.pack(live.view(-1)))
    check.problems += _mask_problems(check, entry["mask_digest"])
    if check.pattern is not None:
        off = groups_off_pattern(live, check.pattern) if live.dim() == 2 else -1
        if off:
            where = f"{off} groups of inputs" if off > 0 else f"shape {shape}"
            check.problems.append(f"{where} without the pattern {check.pattern}")
    negative_zeros = int(torch.count_nonzero(torch.signbit(weight) & ~live))
    if negative_zeros:
        check.problems.append(f"{negative_zeros} dead positions hold -0.0 instead of +0.0")
    return check


def _mask_problems(check: TargetCheck, recorded_digest: str) -> list[str]:
    if check.live != check.recorded_live:
        return [f"{check.live} live weights, {RECORD_NAME} says {check.recorded_live}"]
    if check.mask_digest != recorded_digest:
        return [f"{check.live} live weights as recorded, but at other positions (mask digest)"]
    return []


def _check_totals(record: dict[str, Any], checks: list[TargetCheck], found: int) -> list[str]:
    """What does not hold of the whole, given that every weight is as recorded."""
    problems = []
    live, total = sum(c.live for c in checks), sum(c.total for c in checks)
    expected: dict[str, Any] = {
        "live": live,
        "total": total,
        "sparsity": 1 - live / max(total, 1),
        "mask_digest": model_digest({c.name: c.mask_digest for c in checks}),
        "tensors": found,
    }
    for key, value in expected.items():
        if record.get(key) != value:
            came = shown(record.get(key))
            problems.append(f"{RECORD_NAME}: {key} is {came}, recounted {value!r}")
    aimed = [c for c in checks if c.target_live is not None]
    if record.get("scope") == "global":
        have, want = sum(c.live for c in aimed), sum(c.target_live or 0 for c in aimed)
        if have != want:
            problems.append(f"{have} live weights over all targets, target {want}")
    else:
        problems += [
            f"{c.name}: {c.live} live weights, target {c.target_live}"
            for c in aimed
            if c.live != c.target_live
        ]
    return problems
