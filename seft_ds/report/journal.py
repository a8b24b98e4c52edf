"""The journal of a run: `journal.jsonl`, one JSON object a line, each with its `kind`.

    run     once a start: command, config, model, ranks, zero_stage, dtype, targets, versions
    step    step, loss, learning_rate, grad_norm; seconds, tokens (since the line before it)
    event   step, target, dropped, grown, kept, revived, died, folded, pruned, live, target_live,
            changed (positions whose live bit differs from the start), slots, cut (moments that 8-bit
            state could not hold), seconds, bytes; parts that took no part, where there are some: idle (no
            token reached them; of fused experts always), not_finite (their sums overflowed)
    exchange step, exchanged, most, paying, targets (name: revived, pruned, live, changed, idle, not_finite),
            seconds, bytes
    skipped step, in_a_row, batches: a loss or gradient was not finite; weights: where the losses were finite
    fresh   step, largest_update, by_target, learning_rate: the step after an event, fresh slots only; updates
            over the factors of lr_scale
    eval    step, name, value
    memory  step, planned, measured (bytes by part, of rank 0), peak_bytes, peak_of: when training ended
    deltas  step, targets (name: rms, largest) of the slots held when training ended
    stop    step, why, checkpoint: a signal ended the run
    end     step, seconds, live, target_live, changed_positions; unreached: a line on the weights that no
            gradient reached, if there are some

Each line is flushed as it is written, so that a run that dies loses at most the line it was writing.
Such a torn last line is ignored by readers and cut off when the file is opened to append. A resumed
run appends a second `run` line and may repeat steps; readers let the later line stand.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any, BinaryIO

JOURNAL_NAME = "journal.jsonl"
_LINE_BYTES = 64 << 20  # more than the `run` line of a model with a million targets
_BLOCK_BYTES = 1 << 20
_LEVELS = 50  # of nesting in one record
# What readers rely on: the fields of each kind that are names, and those that are numbers or null.
_NAMES = {"event": ("target",), "eval": ("name",)}
_NUMBERS = set(
    "loss learning_rate grad_norm seconds tokens live target_live slots bytes dropped grown".split()
)
_NUMBERS |= set("kept revived died folded pruned largest_update value changed_positions".split())
_NUMBERS |= {"changed", "peak_bytes", "exchanged", "most", "paying"}


class Journal:
    """Appends records to a journal file, which is made if it is missing."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        cut_torn_line(self.path)
        self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 (closed by close)

    def write(self, kind: str, **fields: Any) -> None:
        """Append one record and flush it. Numbers that are not finite become null."""
        record = _plain({"kind": kind, **fields})
        self._file.write(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_journal(path: str | Path) -> list[dict[str, Any]]:
    """All whole records of a journal, in order; a torn last line is left out.

    Raises ValueError, naming the line, for damage anywhere else, and for a missing file.
    """
    path = Path(path)
    if not os.path.isfile(path):
        raise ValueError(f"{path} does not exist; give the directory of a run that wrote a journal")
    records = []
    with open(path, "rb") as file:
        lines = iter(lambda: file.readline(_LINE_BYTES), b"")
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            record = _record(line)
            if record is not None:
                records.append(record)
            elif line.endswith(b"\n") or len(line) == _LINE_BYTES:
                # A line that was written whole ends in a newline: what follows the last newline is torn.
                raise ValueError(
                    f"{path}, line {number}: not a journal record; the file is damaged"
                )
    return records


def _record(line: bytes) -> dict[str, Any] | None:
    """One line as a record, or None if it is none that `Journal` writes."""
    try:
        record = json.loads(line.decode("utf-8"), parse_constant=_refuse, parse_float=_finite)
    except (ValueError, RecursionError):  # bad JSON, bad UTF-8, NaN
        return None
    if not isinstance(record, dict) or not isinstance(record.get("kind"), str) or _too_deep(record):
        return None
    names = all(isinstance(record.get(name), str) for name in _NAMES.get(record["kind"], ()))
    counted = record["kind"] in ("run", "end") or type(record.get("step", 0)) is int
    return record if names and counted and _has_numbers(record) and _has_targets(record) else None


def _has_numbers(record: dict[str, Any]) -> bool:
    return all(_is_number(v) for k, v in record.items() if k in _NUMBERS and v is not None)


def _has_targets(record: dict[str, Any]) -> bool:
    """Of a `run`: a list of named weights, whose shape is a list of numbers."""
    targets = record.get("targets") if record["kind"] == "run" else None
    return targets is None or (
        isinstance(targets, list)
        and all(
            isinstance(t, dict)
            and isinstance(t.get("name"), str)
            and isinstance(t.get("shape") or [], list)
            and all(map(_is_number, t.get("shape") or []))
            and _has_numbers(t)
            for t in targets
        )
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, float) or (type(value) is int and abs(value) < 1 << 63)


def _refuse(text: str) -> None:
    raise ValueError(text)


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(text)
    return value


def _too_deep(record: dict[str, Any]) -> bool:
    level: list[Any] = [record]
    for _ in range(_LEVELS):
        items = [i for x in level for i in (x.values() if isinstance(x, dict) else x)]
        level = [item for item in items if isinstance(item, (dict, list))]
    return bool(level)


def cut_torn_line(path: Path) -> None:
    """Cut what follows the last newline, the rest of a write that never ended."""
    if not path.is_file():
        return
    with open(path, "r+b") as file:
        file.truncate(_end_of_last_line(file))


def _end_of_last_line(file: BinaryIO) -> int:
    """Where the last newline ends, read from the back; 0 if there is none."""
    end = file.seek(0, os.SEEK_END)
    while end > 0:
        begin = max(0, end - _BLOCK_BYTES)
        file.seek(begin)
        found = file.read(end - begin).rfind(b"\n")
        if found >= 0:
            return begin + found + 1
        end = begin
    return 0


def _plain(value: Any) -> Any:
    """`value` with only what JSON has: tensor and numpy scalars as numbers, other objects as text."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (str, int)):  # bool is an int
        return value
    try:
        return _plain(value.item())  # a tensor or numpy scalar; a sync if it is on a GPU
    except (AttributeError, ValueError, RuntimeError):
        return str(value)
