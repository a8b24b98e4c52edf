"""Rows as tokens, before TRL cuts and packs them: how much of what counts in the loss each will keep."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, IterableDataset

from seft_ds.console import is_first_rank
from seft_ds.prune.limits import check_ids
from seft_ds.train.forms import Rows, Say

_ROWS_AT_ONCE = 4096


@dataclass(frozen=True)
class Cut:
    """Which tokens of a row stay."""

    tokens: int | None  # at most; None: all, if need be in several rows
    keep_end: bool = False
    begins: int = 0  # tokens that stand again before the end that stays
    joined: bool = False  # rows go on where others end: their first tokens are predicted too

    @classmethod
    def of(cls, args: Any, begins: int = 0) -> Cut:
        """As rows are cut with these arguments; begins: see above."""
        if args.packing:
            whole = args.packing_strategy != "bfd"
            joined = args.packing_strategy == "wrapped"
            return cls(None if whole else args.max_length, joined=joined)
        return cls(args.max_length, args.truncation_mode == "keep_end", begins)

    def __str__(self) -> str:
        return f"the {'last' if self.keep_end else 'first'} {self.tokens} tokens (--max_length)"


@dataclass(frozen=True)
class Counts:
    """Of each row: its tokens, those that count in the loss, and those of them that stay."""

    tokens: np.ndarray
    counted: np.ndarray
    left: np.ndarray


def counts_of(table: pa.Table, cut: Cut) -> Counts:
    """Count over the columns input_ids and labels."""
    labels = table.column("labels")
    lengths = pc.list_value_length(labels).to_numpy()
    counts = pc.list_flatten(labels).to_numpy() != -100
    row: np.ndarray = np.repeat(np.arange(len(lengths)), lengths)
    position = np.arange(len(counts)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    if not cut.joined:
        counts &= position > 0  # nothing stands before it to predict it from
    stays = counts
    if cut.tokens is not None and cut.keep_end:
        # The first of what stays is predicted only if something stands before it again.
        first = lengths - cut.tokens + cut.begins + (cut.begins == 0)
        first[lengths <= cut.tokens] = 0
        stays = counts & (position >= first[row])
    elif cut.tokens is not None:
        stays = counts & (position < cut.tokens)
    size = len(lengths)
    return Counts(
        lengths,
        np.bincount(row, counts, size).astype(np.int64),
        np.bincount(row, stays, size).astype(np.int64),
    )


def looked_at(
    rows: Rows, cut: Cut, embedding_rows: int | None, tokenizer: Any, what: str, say: Say
) -> Rows:
    """Leave out the rows that would teach nothing, and say how many, and how many are cut short.

    Args:
        rows: with input_ids and labels, whole.
        what: they are for, in words.

    Raises:
        ValueError: a token that the embedding has no row for; no row is left.
    """
    if isinstance(rows, IterableDataset):
        return rows.filter(Passing(cut, embedding_rows, tokenizer, what))
    found = []
    for table in tables_of(rows):
        _check(table, embedding_rows, tokenizer, f"{what} rows")
        found.append(counts_of(table, cut))
    tokens, counted, left = (
        np.concatenate([getattr(c, n) for c in found]) for n in ("tokens", "counted", "left")
    )
    lines = lines_of(Counts(tokens, counted, left), cut, what)
    kept = np.flatnonzero(left)
    if not len(kept):
        verb = "evaluate" if what == "evaluation" else "train"
        raise ValueError(f"no row is left to {verb} on: {'; '.join(lines)}")
    for line in lines:
        say(line)
    return rows if len(kept) == len(rows) else rows.select(kept)


def lines_of(counts: Counts, cut: Cut, what: str) -> list[str]:
    """What is said of rows that are left out or cut short; nothing if there are none."""
    total = len(counts.tokens)
    none, lost = counts.counted == 0, (counts.counted > 0) & (counts.left == 0)
    lines = []
    if none.any():
        lines.append(
            f"{none.sum()} of {total} {what} rows left out: nothing in them counts in the loss"
        )
    if lost.any():
        lines.append(
            f"{lost.sum()} of {total} {what} rows left out: nothing in {cut} counts in the loss"
        )
    if cut.tokens is not None:
        long = (counts.tokens > cut.tokens) & (counts.left > 0)
        short = long & (counts.left < counts.counted)
        if long.any():
            lines.append(
                f"{long.sum()} of {total} {what} rows are longer: {cut} stay, and in {short.sum()} of them "
                "part of what counts in the loss is cut away"
            )
    return lines


def tables_of(rows: Dataset, at_once: int = _ROWS_AT_ONCE) -> Iterator[pa.Table]:
    arrow = rows.select_columns(["input_ids", "labels"]).with_format("arrow")
    yield from arrow.iter(batch_size=at_once)


def _check(table: pa.Table, rows: int | None, tokenizer: Any, what: str) -> None:
    ids = pc.list_flatten(table.column("input_ids"))
    if rows is not None and len(ids) and pc.max(ids).as_py() >= rows:
        check_ids(pc.unique(ids).to_pylist(), rows, tokenizer, what)


class Passing:
    """The same for rows of a stream: says how many were left out, each time that their number has doubled."""

    def __init__(self, cut: Cut, embedding_rows: int | None, tokenizer: Any, what: str):
        self.cut, self.rows, self.tokenizer, self.what = cut, embedding_rows, tokenizer, what
        self.seen = self.left_out = 0

    def __call__(self, row: dict[str, Any]) -> bool:
        check_ids(row["input_ids"], self.rows, self.tokenizer, f"{self.what} rows")
        table = pa.table({"input_ids": [row["input_ids"]], "labels": [row["labels"]]})
        passes = bool(counts_of(table, self.cut).left[0])
        self.seen += 1
        self.left_out += not passes
        if not passes and self.left_out & (self.left_out - 1) == 0 and is_first_rank():
            print(
                f"warning: {self.left_out} of the first {self.seen} {self.what} rows left out: nothing in "
                f"{self.cut if self.cut.tokens else 'them'} counts in the loss",
                flush=True,
            )
        return passes
