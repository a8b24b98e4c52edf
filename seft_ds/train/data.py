"""Training data: rows of a file or a dataset in one of the forms that TRL knows.

| columns                        | what is learnt                                          |
|--------------------------------|---------------------------------------------------------|
| text                           | every token                                             |
| messages                       | every token of the chat template, or (assistant_only_loss) the answers |
| conversations                  | as messages; "from" and "value", as ShareGPT has them   |
| prompt, completion             | the completion                                          |
| instruction, (input,) output   | the output; worded as the Alpaca prompt                 |
"""

from __future__ import annotations

import glob
import gzip
import os
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset, List, Value, load_dataset
from trl.data_utils import maybe_convert_to_chatml

from seft_ds.json_file import shown

FORMS = (
    ("text",),
    ("messages",),
    ("prompt", "completion"),
    ("instruction", "output"),
    ("conversations",),
)
_MAY_BE_CHATS = ("messages", "prompt", "completion", "conversations")
_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant"}
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
) -> Dataset | IterableDataset:
    """The rows of a local file or a named dataset, in a form of `FORMS`.

    Raises:
        ValueError: no such file, an unknown type, no rows, none of the known columns, or one without text.
            Of a stream the first rows are looked at; a later one without text ends the run when it is read.
    """
    what = file or str(name)
    if file is not None:
        if not os.path.isfile(file):  # a pipe would be waited for
            raise ValueError(f"{file}: no such file")
        suffixes = [s for s in Path(file).suffixes if s != ".gz"]
        kind = _LOADERS.get(suffixes[-1]) if suffixes else None
        if kind is None:
            raise ValueError(f"{file}: wanted a {', '.join(_LOADERS)} file (or one of them .gz)")
        _check_ends(file, kind)
        # The name is that of one file, and no pattern.
        files = glob.escape(file)
        rows = _read(
            lambda: load_dataset(kind, data_files=files, split="train", streaming=streaming), what
        )
    else:
        rows = _read(lambda: load_dataset(name, config, split=split, streaming=streaming), what)
    if isinstance(rows, IterableDataset):
        return _stream_in_known_form(rows, what, renames or {})
    return in_known_form(_renamed(rows, rows.column_names, renames or {}, what), what)


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
        head = b"" if cut else _head(file)  # gzip, too, goes through all zeros at the end
    except OSError as error:
        raise ValueError(f"can't read {file}: {error}") from None
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
    names = sorted(rows.column_names or next(iter(rows)))
    sample = next(iter(rows))
    return " + ".join(
        f"{n} ({'messages' if isinstance(sample[n], list) else 'text'})" for n in names
    )


def _form(columns: set[str], what: str) -> tuple[str, ...]:
    form = next((f for f in FORMS if columns.issuperset(f)), None)
    if form is None:
        wanted = "; ".join(" + ".join(f) for f in FORMS)
        raise ValueError(
            f"{what} has the columns {shown(sorted(columns))}; wanted one of: {wanted} (columns with other "
            "names: --rename_columns OLD=NEW)"
        )
    return form


def in_known_form(rows: Dataset, what: str) -> Dataset:
    """Keep the columns of the form that the rows have; Alpaca rows become prompt and completion."""
    form = _form(set(rows.column_names), what)
    if len(rows):
        _check_columns(rows, form, what)
    if form == ("text",):
        rows = rows.filter(_has_text)
    if len(rows) == 0:
        raise ValueError(f"{what} has no rows with text in them")
    return _converted(rows, form, rows.column_names)


def _stream_in_known_form(
    stream: IterableDataset, what: str, renames: dict[str, str]
) -> IterableDataset:
    """The same for rows that come one by one: the first ones are checked together, others as they come."""
    looked_at = _read(lambda: list(stream.take(_LOOKED_AT)), what)
    if not looked_at:
        raise ValueError(f"{what} has no rows")
    columns = list(looked_at[0])
    stream = _renamed(stream, columns, renames, what)
    sample = _renamed(Dataset.from_list(looked_at), columns, renames, what)
    form = _form(set(sample.column_names), what)
    in_known_form(sample, what)

    def whole(row: dict[str, Any]) -> bool:
        missing = [n for n in form if row.get(n) is None]
        if missing and form != ("text",):
            raise ValueError(
                f"{what}: a row has no {missing[0]} ({shown(row)}); fill it in, or take it out"
            )
        return form != ("text",) or _has_text(row)

    return _converted(stream.filter(whole), form, sample.column_names)


def _has_text(row: dict[str, Any]) -> bool:
    return bool(row["text"] and row["text"].strip())


def _converted(rows: Any, form: tuple[str, ...], columns: list[str]) -> Any:
    if form == ("instruction", "output"):
        return rows.map(_from_alpaca, remove_columns=columns)
    if form == ("conversations",):
        return rows.map(_from_sharegpt, remove_columns=columns)
    return rows.select_columns(list(form))


def _check_columns(rows: Dataset, form: tuple[str, ...], what: str) -> None:
    """ValueError unless the columns of `form` hold text, or messages where those may be, in every row."""
    chats = set()
    for name in form:
        try:
            rows.data.column(name).validate(full=True)
        except ValueError as error:  # bytes that are no UTF-8, mostly
            raise ValueError(f"{what}: column {name} is damaged ({error})") from None
        kind = rows.features[name]
        if _is_text(kind) and name != "messages":
            chats.add(False)
        elif name in _MAY_BE_CHATS and _holds_messages(rows, name):
            chats.add(True)
        else:
            wanted = "messages with role and content" if name in _MAY_BE_CHATS else "text"
            raise ValueError(f"{what}: column {name} holds {str(kind):.100}; wanted {wanted}")
        missing = rows.data.column(name).null_count
        if missing and name != "text":  # rows without text are left out
            raise ValueError(f"{what}: {missing} rows have no {name}; fill it in, or take them out")
    if len(chats) > 1:
        raise ValueError(
            f"{what}: of {' and '.join(form)} one holds text and one messages; wanted the same"
        )


def _is_text(kind: Any) -> bool:
    return isinstance(kind, Value) and kind.dtype in ("string", "large_string")


def _holds_messages(rows: Dataset, name: str) -> bool:
    kind = rows.features[name]
    parts = kind.feature if isinstance(kind, List) else None
    if isinstance(parts, dict):
        kinds = ("role", "content") if "role" in parts else ("from", "value")
        return all(_is_text(parts.get(k)) for k in kinds) and (
            name == "conversations" or "role" in parts
        )
    if isinstance(parts, Value) or parts is None:
        return False
    # Messages that differ in their keys (tool calls, say) come as JSON, whose type says nothing.
    return all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and "content" in m
        for messages in rows[name]
        for m in messages or []
    )


def _from_alpaca(row: dict[str, str]) -> dict[str, str]:
    """One instruction row in the wording that Alpaca-style models are trained with."""
    if row.get("input"):
        opening = "an instruction that describes a task, paired with an input that provides further context"
        middle = f"### Input:\n{row['input']}\n\n"
    else:
        opening, middle = "an instruction that describes a task", ""
    prompt = (
        f"Below is {opening}. Write a response that appropriately completes the request.\n\n"
        f"### Instruction:\n{row['instruction']}\n\n{middle}### Response:\n"
    )
    return {"prompt": prompt, "completion": row["output"]}


def _from_sharegpt(row: dict[str, Any]) -> dict[str, Any]:
    """Messages with the roles that chat templates know."""
    plain = [
        {k: m[k] for k in ("from", "value", "role", "content") if m.get(k) is not None}
        for m in row["conversations"]
    ]
    messages = maybe_convert_to_chatml({"conversations": plain})["messages"]
    return {
        "messages": [
            {"role": _ROLES.get(m["role"], m["role"]), "content": m["content"]} for m in messages
        ]
    }
