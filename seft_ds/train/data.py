"""Training data from files and datasets, as rows in one of the forms that `forms.py` knows."""

from __future__ import annotations

import glob
import gzip
import os
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset, load_dataset

from seft_ds.json_file import shown
from seft_ds.prune.calibrate import check_encoding
from seft_ds.train.arrow import has_plain_types, read_plain
from seft_ds.train.chat_template import Template
from seft_ds.train.forms import CHATS, Rows, Say, in_known_form, stream_in_known_form

_END_BYTES = 1 << 16
_LOOKED_AT = 100  # rows of a stream that are checked before training
_LOADERS = {".txt": "text", ".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}


def load_rows(
    file: str | None,
    name: str | None,
    config: str | None,
    split: str,
    *,
    streaming: bool = False,
    renames: dict[str, str] | None = None,
    template: Template | None = None,
    say: Say = lambda line: None,
) -> Rows:
    """The rows of a local file or a named dataset, in a form of `forms.FORMS`.

    Args:
        template: that writes messages; None: they are not tried.
        say: told what is left out.

    Raises:
        ValueError: no such file, an unknown type, no rows, none of the known columns, or a row that can't be
            trained on. Of a stream the first rows are looked at; a later one ends the run when it is read.
    """
    what = file or (name if split == "train" else f"{name} ({split})")
    assert what is not None
    if file is not None:
        rows = _read_file(file, streaming)
    else:
        rows = _read(lambda: load_dataset(name, config, split=split, streaming=streaming), what)
    renames = renames or {}
    if not isinstance(rows, IterableDataset):
        return in_known_form(_renamed(rows, rows.column_names, renames, what), what, template, say)
    looked_at = _read(lambda: list(rows.take(_LOOKED_AT)), what)
    if not looked_at:
        raise ValueError(f"{what} has no rows")
    columns = list(looked_at[0])
    stream = _renamed(rows, columns, renames, what)
    sample = Dataset.from_list(looked_at, on_mixed_types="use_json")
    sample = _renamed(sample, columns, renames, what)
    return stream_in_known_form(stream, sample, what, template, say)


def _read_file(file: str, streaming: bool) -> Rows:
    if not os.path.isfile(file):  # a pipe would be waited for
        raise ValueError(f"{file}: no such file")
    suffixes = [s for s in Path(file).suffixes if s != ".gz"]
    kind = _LOADERS.get(suffixes[-1]) if suffixes else None
    if kind is None:
        raise ValueError(f"{file}: wanted a {', '.join(_LOADERS)} file (or one of them .gz)")
    _check_ends(file, kind)
    if kind == "parquet" and not _read(lambda: has_plain_types(file), file):
        rows = _read(lambda: read_plain(file), file)
        return rows.to_iterable_dataset() if streaming else rows
    # The name is that of one file, and no pattern.
    files = glob.escape(file)
    return _read(
        lambda: load_dataset(kind, data_files=files, split="train", streaming=streaming), file
    )


def _check_ends(file: str, kind: str) -> None:
    """ValueError for what a look at both ends of a file can tell.

    A crash may leave zeros at the end, and readers would go through all of them, however many there are,
    before they say so. JSON that starts with a bare null ends the process in pyarrow (26.0.1).
    """
    packed = file.endswith((".gz", ".parquet"))
    try:
        if not (size := os.path.getsize(file)):
            raise ValueError(f"{file} has no rows: it is empty")
        with open(file, "rb") as opened:
            opened.seek(max(0, size - _END_BYTES))
            tail = opened.read(_END_BYTES)
        cut = tail.endswith(b"\x00" * 8) if packed else b"\x00" in tail
        gzipped = file.endswith(".gz")
        head = b"" if cut and gzipped else _head(file)  # gzip goes through all zeros at the end
    except OSError as error:
        raise ValueError(f"can't read {file}: {error}") from None
    check_encoding(head, file)
    if cut or (not packed and b"\x00" in head):
        raise ValueError(
            f"{file} has NUL bytes in it: it is no text in UTF-8, or was not wholly written"
        )
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
    if kind == "json" and start and start not in (b"{", b"["):
        raise ValueError(
            f"{file} starts with {start!r}: wanted JSON objects, one a line or in a list"
        )


def _head(file: str) -> bytes:
    """The first bytes of a file, unpacked; none if they can't be, which its reader says better."""
    if not file.endswith(".gz"):
        with open(file, "rb") as opened:
            return opened.read(_END_BYTES)
    with suppress(EOFError, zlib.error, gzip.BadGzipFile), gzip.open(file) as unpacked:
        return unpacked.read(_END_BYTES)
    return b""


def _read(load: Callable[[], Any], what: str) -> Any:
    try:
        return load()
    except Exception as error:  # datasets raises many kinds for a bad file or an unreachable name
        cause: BaseException = error
        while cause.__cause__ is not None:  # of "an error occurred" the one that it came from
            cause = cause.__cause__
        reason = f"{type(cause).__name__}: {cause}"[:600]
        raise ValueError(f"can't read {what}: {reason}") from error


def _renamed(rows: Any, columns: list[str], renames: dict[str, str], what: str) -> Any:
    """`columns` of rows by their new names; a column that takes the place of another one replaces it."""
    for old, new in renames.items():
        if old not in columns:
            if new in columns:  # one of several sources has the right name already
                continue
            raise ValueError(
                f"--rename_columns {old}={new}: {what} has the columns {shown(sorted(columns))}"
            )
        if new in columns:
            rows = rows.remove_columns(new)
        rows = rows.rename_column(old, new)
    return rows


def forms_of(rows: Dataset | IterableDataset) -> str:
    """The columns and what they hold, in words; equal for rows that can be mixed."""
    sample = next(iter(rows))
    names = sorted(n for n in sample if n != "tools")  # a source without them has none
    return " + ".join(
        f"{n} ({'messages' if n in CHATS and isinstance(sample[n], list) else 'text'})"
        for n in names
    )
