"""The journal of a run: `journal.jsonl`, one JSON object a line, each with its `kind`.

    run     once a start: command, config, model, ranks, zero_stage, dtype, targets, versions
    step    step, loss, learning_rate, grad_norm; seconds, tokens (since the line before it)
    event   step, target, dropped, grown, kept, revived, died, folded, pruned, live, target_live,
            slots, seconds, bytes
    fresh   step, largest_update, by_target, learning_rate: the step after an event, fresh slots only
    eval    step, name, value
    end     step, seconds, live, target_live, changed_positions

Each line is flushed as it is written, so that a run that dies loses at most the line it was writing.
Such a torn last line is ignored by readers and cut off when the file is opened to append. A resumed
run appends a second `run` line and may repeat steps; readers let the later line stand.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

JOURNAL_NAME = "journal.jsonl"


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
    if not path.is_file():
        raise ValueError(f"{path} does not exist; give the directory of a run that wrote a journal")
    lines = path.read_bytes().split(b"\n")
    records = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line.decode("utf-8"))
        except ValueError:  # bad JSON and bad UTF-8
            record = None
        if isinstance(record, dict) and isinstance(record.get("kind"), str):
            records.append(record)
        elif number != len(lines):
            # A line that was written whole ends in a newline, so what follows the last newline is torn.
            raise ValueError(f"{path}, line {number}: not a journal record; the file is damaged")
    return records


def cut_torn_line(path: Path) -> None:
    """Cut what follows the last newline, the rest of a write that never ended."""
    if not path.is_file():
        return
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole == len(content):
        return
    with open(path, "r+b") as file:
        file.truncate(whole)


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
