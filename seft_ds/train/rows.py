"""Training rows cut from the middle of a text, beginning as their text did.

TRL writes every text with what its tokenizer puts before one, and cuts texts that are too long. Packed as
`bfd_split` or `wrapped` they go on in another row; with `--truncation_mode keep_end` their ends stay.
Such a row would begin in the middle of a text with nothing before it. It gets its text's beginning again,
if the text had one (a chat template may write none), within `--max_length` and outside the loss. Packing
loses no token by it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

from datasets import Dataset
from trl import pack_dataset

from seft_ds.beginning import beginning_of, described
from seft_ds.train.sources import Rows

Batch: TypeAlias = dict[str, list[list[int]]]
IGNORED = -100  # the label of a token that is not in the loss


def cuts(run: Any) -> bool:
    """Whether rows may begin in the middle of a text."""
    if run.max_length is None:
        return False
    if run.packing:
        return run.packing_strategy in ("bfd_split", "wrapped")
    return run.truncation_mode == "keep_end"


def check_length(run: Any, tokenizer: Any) -> None:
    """ValueError if rows are too short for what they begin with and a token that follows."""
    size = len(beginning_of(tokenizer)) if run.add_bos_token else 0
    if cuts(run) and run.max_length <= size:
        raise ValueError(
            f"--max_length {run.max_length}: each row begins with {size} tokens that the tokenizer puts "
            f"before a text; give {size + 1} or more, or --add_bos_token false"
        )


def describe_beginning(run: Any, tokenizer: Any) -> str:
    """How rows from the middle of a text begin, with a comma before it; empty if there are none."""
    what = "row from the middle of a text"
    return described(tokenizer, run.add_bos_token, what) if cuts(run) else ""


def cut_rows(rows: Rows, run: Any, beginning: list[int], settings: dict[str, Any]) -> Rows:
    """Cut and pack tokenized rows as TRL does, each row from the middle of a text with `beginning`.

    Args:
        rows: with input_ids and labels, whole.
        settings: of `map`.
    """
    fixed = {"beginning": beginning, "length": run.max_length}

    def mapped(rows: Rows, how: Any, what: str) -> Rows:
        named = {"desc": what} if isinstance(rows, Dataset) else {}
        return rows.map(how, batched=True, fn_kwargs=fixed, **settings, **named)

    rows = rows.select_columns(["input_ids", "labels"])
    if not run.packing:
        rows = mapped(rows, ends, "Cutting texts to their ends")
        rows = rows.filter(_counts)
    else:
        if run.shuffle_dataset:  # before and after packing, as TRL does
            rows = rows.shuffle(seed=run.seed)
        if run.packing_strategy == "wrapped":
            rows = mapped(rows, wrapped, "Cutting texts into rows")
        else:
            rows = mapped(rows, split, "Splitting long texts")
            rows = pack_dataset(rows, run.max_length, run.packing_strategy, settings)
    return rows.shuffle(seed=run.seed) if run.shuffle_dataset else rows


def split(batch: Batch, beginning: list[int], length: int) -> Batch:
    """Split texts longer than `length` into pieces, each of which begins as its text did."""
    out: Batch = {"input_ids": [], "labels": []}
    for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
        head = _head(ids, beginning)
        _add(out, ids[:length], labels[:length])
        own = length - len(head)
        for lo in range(length, len(ids), own):
            _add(out, head + ids[lo : lo + own], _ignored(head) + labels[lo : lo + own])
    return out


def wrapped(batch: Batch, beginning: list[int], length: int) -> Batch:
    """Write texts one after the other into rows of `length`; a row within a text begins as the text did."""
    out: Batch = {"input_ids": [], "labels": []}
    row: list[int] = []
    marks: list[int] = []
    for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
        head, lo = _head(ids, beginning), 0
        while lo < len(ids):
            if not row:
                again = head[:lo]  # nothing at the start of the text, which has its own
                row, marks = list(again), _ignored(again)
            hi = lo + length - len(row)
            row, marks = row + ids[lo:hi], marks + labels[lo:hi]
            lo = hi
            if len(row) == length:
                _add(out, row, marks)
                row, marks = [], []
    if row:
        _add(out, row, marks)
    return out


def ends(batch: Batch, beginning: list[int], length: int) -> Batch:
    """Keep the last tokens of texts longer than `length`, after what they began with."""
    out: Batch = {"input_ids": [], "labels": []}
    for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
        if len(ids) > length:
            head = _head(ids, beginning)
            own = length - len(head)
            ids, labels = head + ids[-own:], _ignored(head) + labels[-own:]
        _add(out, ids, labels)
    return out


def _head(ids: list[int], beginning: list[int]) -> list[int]:
    return beginning if ids[: len(beginning)] == beginning else []


def _ignored(tokens: Sequence[int]) -> list[int]:
    return [IGNORED] * len(tokens)


def _add(out: Batch, ids: list[int], labels: list[int]) -> None:
    out["input_ids"].append(ids)
    out["labels"].append(labels)


def _counts(row: dict[str, list[int]]) -> bool:
    """Whether any token of the row is in the loss."""
    return any(label != IGNORED for label in row["labels"])
