"""Is a sparse model directory what its `sparsity.json` says? Recounted from the files alone.

A directory holds if its files have exactly the recorded tensors, each in its shape and dtype and without
NaN or infinity; if those that are not sparse are byte for byte as they were written; if, for every target,
- as many entries differ from zero as `live` says, at the positions that the mask digest stands for;
- that count is `target_live` (with `scope: global` the sum over all targets is);
- in a weight with the pattern N:M, every M consecutive inputs of a row have exactly N live;
- no dead position holds -0.0 (it compares equal to zero, but is not what was written);
if the totals and the pattern of the record follow from these; and if config.json has the recorded structure
and nothing in the folder would make a reader load something else (an adapter, a quantization_config, other
weights files). One tensor is in memory at a time; no model code and no DeepSpeed is involved.

The mask digest of a weight is the sha256 of its packed mask (seft_ds.sparse.mask, whole weight in
row-major order); the digest of the model is the sha256 of the lines "name digest\\n" in name order.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from seft_ds.console import ADAPTER_NAME
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

FORMAT = "seft_ds-sparsity-2"
# Before November 2026: without `others` and `config`, so that less can be compared.
OLD_FORMAT = "seft_ds-sparsity-1"
RECORD_NAME = "sparsity.json"
CONFIG_NAME = "config.json"
# What every entry of `targets` in the record has, and of which types.
_ENTRY_TYPES: dict[str, tuple[type, ...]] = {
    "shape": (list,),
    "dtype": (str,),
    "pattern": (str, type(None)),
    "target_live": (int, type(None)),
    "live": (int,),
    "mask_digest": (str,),
}
_OTHER_TYPES: dict[str, tuple[type, ...]] = {"shape": (list,), "dtype": (str,), "digest": (str,)}
# Entries of a config that decide which tensors a model has, and in which shapes.
_STRUCTURE = re.compile(
    r"(num|n|d)_\w+|\w+_(size|dim|rank|heads|layers|experts|width)|model_type|architectures"
    r"|tie_word_embeddings|layer_types"
)
_NOT_STRUCTURE = re.compile(
    r"num_(beam|return|labels)\w*|n_(positions|ctx)|chunk_size\w*|\w*window_size"
)


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
    problems += _check_config(directory, record)
    found: set[str] = set()
    tensors: dict[str, TargetCheck] = {}
    for file_name in sorted(set(files.values())):
        checks, names, file_problems = _check_file(directory, file_name, files, record)
        tensors.update(checks)
        found |= names
        problems += file_problems
    for name, entry in record["targets"].items():
        if name not in tensors:
            missing = _blank_check(name, entry)
            missing.problems.append("missing from the model's files")
            tensors[name] = missing
    targets = [tensors[name] for name in sorted(tensors)]
    problems += [f"{c.name}: {p}" for c in targets for p in c.problems]
    problems += _check_names(record, found)
    if not problems:  # sums over wrong parts would only repeat what is already said
        problems += _check_totals(record, targets, len(found))
    return VerifyResult(directory, record, targets, problems)


def packed_digest(bits: torch.Tensor) -> str:
    """ "sha256:..." of packed mask bits, uint8 (ceil(n / 8),)."""
    return "sha256:" + hashlib.sha256(bits.cpu().contiguous().numpy().data).hexdigest()


def model_digest(digests: dict[str, str]) -> str:
    """ "sha256:..." over {target name: its digest}, in name order."""
    lines = "".join(f"{name} {digests[name]}\n" for name in sorted(digests))
    return "sha256:" + hashlib.sha256(lines.encode()).hexdigest()


def tensor_digest(tensor: torch.Tensor) -> str:
    """ "sha256:..." of a tensor's bytes in row-major order."""
    flat = tensor.cpu().contiguous().reshape(-1).view(torch.uint8)
    return "sha256:" + hashlib.sha256(flat.numpy().data).hexdigest()


def pattern_of(entries: dict[str, dict[str, Any]]) -> str:
    """The pattern of a whole model: that of all its targets, "unstructured", or "mixed"."""
    patterns = {entry["pattern"] or "unstructured" for entry in entries.values()}
    return patterns.pop() if len(patterns) == 1 else "mixed"


def structure_of(config: dict[str, Any]) -> dict[str, Any]:
    """What a model's config says of its tensors: sizes, numbers of layers and heads, ties."""
    found: dict[str, Any] = {}
    for key, value in sorted(config.items()):
        if key.endswith("_config") and isinstance(value, dict):
            if "quantization" in key or "compression" in key:
                continue
            found[key] = structure_of(value)
        elif _STRUCTURE.fullmatch(key) and not _NOT_STRUCTURE.fullmatch(key):
            plain = value if isinstance(value, list) else [value]
            if all(isinstance(v, (int, str)) for v in plain):
                found[key] = value
    return found


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
    if record.get("format") not in (FORMAT, OLD_FORMAT):
        raise ValueError(
            f"{path} has format {shown(record.get('format'))}; this version reads {FORMAT!r}"
        )
    targets = record.get("targets")
    if not isinstance(targets, dict) or not targets:
        raise ValueError(f"{path} names no targets; write the model again with launch/export.py")
    _check_entries(path, targets, _ENTRY_TYPES)
    for name, entry in targets.items():
        if entry["pattern"] is not None:
            try:
                parse_pattern(entry["pattern"])
            except ValueError as error:
                raise ValueError(f"{path}: {name}: {error}") from None
    if record["format"] == FORMAT:
        for key in ("others", "config"):
            if not isinstance(record.get(key), dict):
                raise ValueError(f"{path}: {key} is {shown(record.get(key))}; the file is damaged")
        _check_entries(path, record["others"], _OTHER_TYPES)
        twice = sorted(set(targets) & set(record["others"]))
        if twice:
            raise ValueError(f"{path}: {twice[0]} is there as a target and as another tensor")
    return record


def _check_entries(path: Path, entries: dict[str, Any], wanted: dict[str, Any]) -> None:
    """ValueError unless every entry of a part of the record has the `wanted` fields."""
    for name, entry in entries.items():
        if not is_name(name):
            raise ValueError(f"{path}: {shown(name)} is no name of a tensor; the file is damaged")
        for key, types in wanted.items():
            if not isinstance(entry, dict) or key not in entry:
                raise ValueError(f"{path}: {name} has no {key}; the file is damaged")
            value = entry[key]
            if not isinstance(value, types) or isinstance(value, bool) or _absurd(value):
                raise ValueError(f"{path}: {key} of {name} is {shown(value)}; the file is damaged")
        shape = entry["shape"]
        if not all(type(size) is int and size >= 0 for size in shape) or _absurd(math.prod(shape)):
            raise ValueError(f"{path}: shape of {name} is {shown(shape)}; the file is damaged")


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
    directory: Path, file_name: str, files: dict[str, str], record: dict[str, Any]
) -> tuple[dict[str, TargetCheck], set[str], list[str]]:
    """Checks of the targets in one weights file, the names in it, and problems with its other tensors."""
    targets, others = record["targets"], record.get("others", {})
    indexed = {name for name, file in files.items() if file == file_name} - {""}
    checks: dict[str, TargetCheck] = {}
    try:
        opened = open_tensors(directory / file_name)
    except ValueError as error:
        return {}, indexed, [str(error).removeprefix(f"{directory}/")]
    with opened as file:
        names = set(file.keys())
        problems = [f"{name}: indexed, but not in {file_name}" for name in indexed - names]
        if "" not in files:
            new = (printable(n, 200) for n in names - indexed)
            problems += [f"{n}: in {file_name}, but not indexed" for n in new]
        for name in sorted(names & set(targets)):
            checks[name] = _check_target(name, targets[name], file)
        for name in sorted(names & set(others)):
            problems += [f"{name}: {problem}" for problem in _check_other(name, others[name], file)]
    return checks, names, sorted(problems)


def _check_other(name: str, entry: dict[str, Any], file: Any) -> list[str]:
    """What does not hold of a tensor that is not sparse."""
    view = file.get_slice(name)
    problems = _header_problems(view, entry)
    if problems:
        return problems
    value = file.get_tensor(name)
    wrong = count_not_finite(value)
    if wrong != entry.get("not_finite", 0):
        problems.append(f"{wrong} entries are NaN or infinite")
    if tensor_digest(value) != entry["digest"]:
        problems.append(f"other values than when {RECORD_NAME} was written (digest)")
    return problems


def _header_problems(view: Any, entry: dict[str, Any]) -> list[str]:
    """What a tensor's shape and dtype in the file have against its entry in the record."""
    shape, dtype = view.get_shape(), DTYPE_OF_CODE.get(view.get_dtype())
    if shape != entry["shape"]:
        return [f"shape {shape}, {RECORD_NAME} says {entry['shape']}"]
    if str(dtype) != f"torch.{entry['dtype']}":
        recorded = printable(entry["dtype"], 20)
        return [f"dtype {view.get_dtype()}, {RECORD_NAME} says {recorded}"]
    return []


def count_not_finite(value: torch.Tensor) -> int:
    """How many entries are NaN or infinite."""
    return int((~value.isfinite()).sum()) if value.is_floating_point() else 0


def _check_config(directory: Path, record: dict[str, Any]) -> list[str]:
    """What in the folder would make a reader load something else than what was written."""
    problems = []
    if (directory / ADAPTER_NAME).is_file():
        problems.append(f"{ADAPTER_NAME}: an adapter, which readers put on top of the model")
    if "config" not in record:
        return problems
    try:
        config = read_object(directory / CONFIG_NAME)
    except ValueError as error:
        return [*problems, str(error).replace(f"{directory}/", "")]
    if config.get("quantization_config") is not None:
        problems.append(f"{CONFIG_NAME}: has a quantization_config, but the tensors are plain")
    return problems + _differences(record["config"], structure_of(config))


def _differences(recorded: dict[str, Any], found: dict[str, Any], prefix: str = "") -> list[str]:
    problems = []
    for key in sorted(recorded.keys() | found.keys()):
        before, now = recorded.get(key), found.get(key)
        if isinstance(before, dict) and isinstance(now, dict):
            problems += _differences(before, now, f"{prefix}{key}.")
        elif before != now:
            name = printable(f"{prefix}{key}", 80)
            said = f"{shown(now)}, {RECORD_NAME} says {shown(before)}"
            problems.append(f"{CONFIG_NAME}: {name} is {said}")
    return problems


def _check_names(record: dict[str, Any], found: set[str]) -> list[str]:
    """Tensors that the record doesn't know, or that the files lack; missing targets are named already."""
    if "others" not in record:
        return []
    new = found - set(record["targets"]) - set(record["others"])
    gone = set(record["others"]) - found
    return [f"{printable(n, 200)}: in the files, but not in {RECORD_NAME}" for n in sorted(new)] + [
        f"{n}: missing from the model's files" for n in sorted(gone)
    ]


def _blank_check(name: str, entry: dict[str, Any]) -> TargetCheck:
    total = math.prod(entry["shape"])
    return TargetCheck(name, total, entry["pattern"], entry["live"], entry["target_live"])


def _check_target(name: str, entry: dict[str, Any], file: Any) -> TargetCheck:
    """Recount one target; `file` is an open safetensors file that holds it."""
    check = _blank_check(name, entry)
    view = file.get_slice(name)
    shape = view.get_shape()
    check.problems += _header_problems(view, entry)
    if shape != entry["shape"] or view.get_dtype() not in DTYPE_OF_CODE:
        return check  # nothing that we write, or that torch can count
    weight = file.get_tensor(name)  # the only tensor in memory
    if wrong := count_not_finite(weight):
        check.problems.append(f"{wrong} entries are NaN or infinite")
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
        "pattern": pattern_of(record["targets"]),
    }
    if record["format"] == FORMAT:
        seft = record.get("seft")
        scope = seft.get("scope", "layer") if isinstance(seft, dict) else "layer"
        expected["scope"] = scope if "scope" in record or scope != "layer" else None
    for key, value in expected.items():
        if record.get(key) != value:
            came = shown(record.get(key))
            problems.append(f"{RECORD_NAME}: {key} is {came}, recounted {value!r}")
    aimed = [c for c in checks if c.target_live is not None]
    if record["format"] == FORMAT and len(aimed) < len(checks) and not _may_miss_targets(record):
        name = next(c.name for c in checks if c.target_live is None)
        problems.append(f"{name}: target_live is null, and nothing in the record says why")
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


def _may_miss_targets(record: dict[str, Any]) -> bool:
    """Whether live counts are a result rather than an aim: events without `adapt`, and merged LoRA."""
    seft = record.get("seft")
    return record.get("method") == "lora" or (isinstance(seft, dict) and seft.get("adapt") is False)
