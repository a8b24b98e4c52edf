"""Rows of one source in a form that TRL trains on, and what of the source is left out.

| columns                        | what is learnt                                          |
|--------------------------------|---------------------------------------------------------|
| text                           | every token                                             |
| messages                       | every token of the chat template, or (assistant_only_loss) the answers |
| conversations                  | as messages; "from" and "value", as ShareGPT has them   |
| prompt, completion             | the completion                                          |
| instruction, (input,) output   | the output; worded as the Alpaca prompt                 |

Every row is read once, by `Reading`, which says whether it is taken, left out or refused. Its answer is
part of the rows that `datasets` caches, so that a later run and the other ranks say the same.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import pyarrow.compute as pc
from datasets import Dataset, Features, IterableDataset, Json, LargeList, List, Value

from seft_ds.console import is_first_rank
from seft_ds.json_file import shown
from seft_ds.train.chat_template import Template
from seft_ds.train.chats import (
    Empty,
    alpaca_prompt,
    calls_functions,
    messages_of,
    tools_of,
    unwritten_keys,
    with_system,
    without_nothing,
)

Rows: TypeAlias = Dataset | IterableDataset
Say: TypeAlias = Callable[[str], None]

FORMS = (
    ("text",),
    ("messages",),
    ("prompt", "completion"),
    ("instruction", "output"),
    ("conversations",),
)
CHATS = (
    "messages",
    "prompt",
    "completion",
)  # columns that hold messages, once they are in known form
LEFT_OUT, REFUSED, NOTE = _SAID = ("seft_left_out", "seft_refused", "seft_note")
_MAY_BE_CHATS = (*CHATS, "conversations")
_TEXT = ("string", "large_string", "string_view")
_SHOWN_COLUMNS = 24


@dataclass(frozen=True)
class Form:
    """What the columns of a source are, and which of them are used for what."""

    columns: tuple[str, ...]  # of FORMS
    chats: bool
    extra: tuple[str, ...]  # columns used beside them
    exact: tuple[str, ...]  # of all these, the ones in which None was written by somebody

    @property
    def kept(self) -> tuple[str, ...]:
        """The columns of the rows in known form."""
        names = {"conversations": ("messages",), "instruction": ("prompt", "completion")}
        more = tuple(n for n in self.extra if n in ("tools", "chat_template_kwargs"))
        return (*names.get(self.columns[0], self.columns), *more)

    @property
    def features(self) -> Features:
        """Of the rows in known form, and of what is said of them."""
        kept = {n: Json() if self.chats else Value("string") for n in self.kept}
        return Features(kept | {n: Value("string") for n in _SAID})


def columns_of(names: set[str], what: str) -> tuple[str, ...]:
    """The form that a source's columns have. ValueError if they have none."""
    form = next((f for f in FORMS if names.issuperset(f)), None)
    if form is None:
        wanted = "; ".join(" + ".join(f) for f in FORMS)
        raise ValueError(
            f"{what} has the columns {shown(sorted(names))}; wanted one of: {wanted} (columns with other "
            "names: --rename_columns OLD=NEW)"
        )
    return form


def form_of(rows: Dataset, what: str, template: Template | None) -> Form:
    """What is used of a source's columns.

    Raises:
        ValueError: none of the known forms; columns that hold neither text nor messages, or damaged text.
    """
    names = set(rows.column_names)
    columns = columns_of(names, what)
    kinds = {name: _kind(rows, name, what) for name in columns} if len(rows) else {}
    if len(set(kinds.values())) > 1:
        raise ValueError(
            f"{what}: of {' and '.join(columns)} one holds text and one messages; wanted the same"
        )
    chats = "chats" in kinds.values()
    extra: list[str] = []
    if chats:
        extra = [n for n in ("system", "chat_template_kwargs") if n in names]
        if "tools" in names and (template is None or template.writes_tools):
            extra.append("tools")
    elif columns == ("instruction", "output"):
        extra = [n for n in ("input", "system", "history") if n in names]
        if "history" in extra and not _is_list(rows.features["history"]):
            extra.remove("history")
    used = [*columns, *extra]
    exact = tuple(n for n in used if "Json" in repr(rows.features[n]))
    return Form(columns, chats, tuple(extra), exact)


def column_line(form: Form, names: list[str], what: str) -> str | None:
    """What is said of the columns beside those of the form; None if there are none."""
    roles = {
        "system": "system becomes the first message" if form.chats else "system opens the prompt",
        "tools": "tools go to the chat template",
        "history": "history goes before the prompt",
    }
    used = [roles[name] for name in form.extra if name in roles]
    left = sorted(set(names) - set(form.columns) - set(form.extra))
    if "tools" in left and form.chats:
        left[left.index("tools")] = "tools (the chat template doesn't write them)"
    if len(left) > _SHOWN_COLUMNS:
        left[_SHOWN_COLUMNS:] = [f"and {len(left) - _SHOWN_COLUMNS} more"]
    parts = [", ".join(used)] if used else []
    parts += [f"columns left out: {', '.join(left)}"] if left else []
    return f"{what}: {'; '.join(parts)}" if parts else None


def _kind(rows: Dataset, name: str, what: str) -> str:
    """ "text" or "chats". ValueError for a column that holds something else, or bytes that are no UTF-8."""
    try:
        rows.data.column(name).validate(full=True)
    except ValueError as error:
        raise ValueError(f"{what}: column {name} is damaged ({error})") from None
    kind = rows.features[name]
    if _is_text(kind) and name not in ("messages", "conversations"):
        return "text"
    if name in _MAY_BE_CHATS and _may_hold_turns(kind, name):
        return "chats"
    wanted = "messages with role and content" if name in _MAY_BE_CHATS else "text"
    raise ValueError(f"{what}: column {name} holds {str(kind):.100}; wanted {wanted}")


def _is_text(kind: Any) -> bool:
    return isinstance(kind, Value) and kind.dtype in _TEXT


def _is_list(kind: Any) -> bool:
    return isinstance(kind, (List, LargeList, Json))


def _may_hold_turns(kind: Any, name: str) -> bool:
    """Lists of dicts with role and content; of JSON, whose type says nothing, the rows are looked at."""
    if isinstance(kind, Json):
        return True
    parts = kind.feature if isinstance(kind, (List, LargeList)) else None
    if not isinstance(parts, dict):
        return isinstance(parts, Json)
    by_role = "role" in parts and "content" in parts
    return by_role or (name == "conversations" and "from" in parts and "value" in parts)


@dataclass(frozen=True)
class Reading:
    """Turns one row of a source into a row in known form; three further columns hold what is said of it."""

    form: Form
    template: Template | None
    as_json: bool = True  # what a table keeps; a stream passes objects on

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        said: dict[str, str | None] = {LEFT_OUT: None, REFUSED: None, NOTE: None}
        found: dict[str, Any] = {}
        try:
            found, said[NOTE] = self._read(row)
        except Empty as reason:
            said[LEFT_OUT] = str(reason)
        except ValueError as error:
            said[REFUSED] = str(error)
        if self.as_json and self.form.chats:
            found = {k: None if v is None else json.dumps(v) for k, v in found.items()}
        return {name: found.get(name) for name in self.form.kept} | said

    def _read(self, row: dict[str, Any]) -> tuple[dict[str, Any], str | None]:
        columns = self.form.columns
        if columns != ("text",) and not self.form.chats:
            for name in columns:
                if row.get(name) is None:
                    raise ValueError(f"it has no {name}")
                if not isinstance(row[name], str):
                    raise ValueError(f"{name} is {shown(row[name])}; wanted text")
        if columns == ("text",):
            text = row.get("text")
            if text is not None and not isinstance(text, str):
                raise ValueError(f"text is {shown(text)}; wanted text")
            text = (text or "").removeprefix(
                "\ufeff"
            )  # a byte order mark, which the text reader keeps
            if not text.strip():
                raise Empty("no text")
            return {"text": text}, None
        if columns == ("instruction", "output"):
            return {"prompt": alpaca_prompt(row), "completion": row["output"]}, None
        if not self.form.chats:
            return {name: row[name] for name in columns}, None
        return self._read_chats(row)

    def _read_chats(self, row: dict[str, Any]) -> tuple[dict[str, Any], str | None]:
        row = {k: v if k in self.form.exact else without_nothing(v) for k, v in row.items()}
        template = self.template
        extra_roles = template.named if template is not None else ()
        parts = {n: messages_of(row.get(n), extra_roles) for n in self.form.columns}
        if "conversations" in parts:
            parts = {"messages": parts["conversations"]}
        first = next(iter(parts))
        system = row.get("system") if "system" in self.form.extra else None
        whole = with_system(parts[first], system)
        notes = []
        if whole is parts[first] and system and whole[0]["content"] != system:
            notes.append("the system column is left out, since the messages have a system message")
        parts[first] = whole
        found: dict[str, Any] = dict(parts)
        if "tools" in self.form.extra:
            found["tools"] = tools_of(row.get("tools"))
        if "chat_template_kwargs" in self.form.extra:
            found["chat_template_kwargs"] = row.get("chat_template_kwargs") or {}
        everything = [message for messages in parts.values() for message in messages]
        if template is not None:
            if calls_functions(everything) and not template.writes_calls:
                raise Empty(
                    "they call functions, and the chat template doesn't write tool_calls "
                    "(--chat_template_path gives another)"
                )
            template.check(found)
            if unwritten := unwritten_keys(everything, template.text):
                notes.append(f"keys of turns that aren't used: {', '.join(unwritten)}")
        return found, "; ".join(notes) or None


def in_known_form(
    rows: Dataset, what: str, template: Template | None = None, say: Say = lambda line: None
) -> Dataset:
    """The rows of a source that can be trained on, each as text, messages, or prompt and completion.

    Says which columns and how many rows are left out.

    Raises:
        ValueError: no known form, a row that can't be what its author meant, or no row that is left.
    """
    form = form_of(rows, what, template)
    if line := column_line(form, rows.column_names, what):
        say(line)
    _check_answers(rows, form, what)
    total = len(rows)
    reading = Reading(form, template if form.chats else None)
    read = rows.map(reading, remove_columns=rows.column_names, features=form.features)
    table = read.data.table if read._indices is None else read.flatten_indices().data.table
    refused = _numbers(table.column(REFUSED))
    if refused:
        raise ValueError(_refusal(what, refused))
    for reason, numbers in _grouped(_numbers(table.column(NOTE))).items():
        say(f"{what}: {len(numbers)} of {total} rows: {reason}")
    left_out = _numbers(table.column(LEFT_OUT))
    for reason, numbers in _grouped(left_out).items():
        say(f"{what}: {_count_line(numbers, total, reason)}")
    if len(left_out) == total:
        why = f": {left_out[0][1]}" if left_out else ""
        raise ValueError(f"{what} has no rows with text in them that can be trained on{why}")
    if left_out:
        gone = {number for number, _ in left_out}
        read = read.select([i for i in range(total) if i + 1 not in gone])
    return read.remove_columns(list(_SAID))


def _check_answers(rows: Dataset, form: Form, what: str) -> None:
    """ValueError for prompts without completions, which somebody may have lost."""
    if form.columns == ("text",) or form.chats:
        return
    for name in form.columns:
        missing = rows.data.column(name).null_count
        if missing:
            first = pc.index(pc.is_null(rows.data.column(name)), True).as_py() + 1
            raise ValueError(
                f"{what}: {missing} rows have no {name} (the first: row {first}); fill it in, or take "
                "them out"
            )


def _numbers(column: Any) -> list[tuple[int, str]]:
    """(row number, text) of the rows of which a column says something; counted from 1."""
    there = pc.is_valid(column)
    texts = column.filter(there).to_pylist()
    positions = pc.indices_nonzero(there).to_pylist()
    return [(i + 1, text) for i, text in zip(positions, texts, strict=True)]


def _grouped(found: list[tuple[int, str]]) -> dict[str, list[int]]:
    groups: dict[str, list[int]] = {}
    for number, text in found:
        groups.setdefault(text, []).append(number)
    return groups


def _count_line(numbers: list[int], total: int, reason: str) -> str:
    few = ", ".join(map(str, numbers[:3])) + (" ..." if len(numbers) > 3 else "")
    rows = "row" if len(numbers) == 1 else "rows"
    return f"{len(numbers)} of {total} rows left out: {reason} ({rows} {few}, counted from 1)"


def _refusal(what: str, refused: list[tuple[int, str]]) -> str:
    number, reason = refused[0]
    more = f"; {len(refused) - 1} more rows are refused" if len(refused) > 1 else ""
    return f"{what}, row {number} (counted from 1): {reason}; correct it, or take it out{more}"


def stream_in_known_form(
    stream: IterableDataset,
    sample: Dataset,
    what: str,
    template: Template | None = None,
    say: Say = lambda line: None,
) -> IterableDataset:
    """The same for rows that come one by one: the first ones are looked at together, others as they come."""
    in_known_form(sample, f"{what}, first {len(sample)} rows", template, say)
    form = form_of(sample, what, template)
    read = Streamed(Reading(form, template, as_json=False), what, len(sample))
    rows = stream.map(read, with_indices=True, remove_columns=sample.column_names)
    return rows.filter(_is_taken).remove_columns(list(_SAID))


def _is_taken(row: dict[str, Any]) -> bool:
    return row[LEFT_OUT] is None


class Streamed:
    """`Reading` for rows that come while training: ends the run at one that is refused, and says how many
    were left out each time that their number has doubled."""

    def __init__(self, reading: Reading, what: str, told: int):
        self.reading, self.what, self.told = reading, what, told
        self.left_out = 0

    def __call__(self, row: dict[str, Any], index: int) -> dict[str, Any]:
        found = self.reading(row)
        if found[REFUSED] is not None:
            raise ValueError(_refusal(self.what, [(index + 1, found[REFUSED])]))
        if found[LEFT_OUT] is not None:
            self.left_out += 1
            doubled = self.left_out & (self.left_out - 1) == 0
            if index >= self.told and doubled and is_first_rank():
                print(
                    f"warning: {self.what}: {self.left_out} rows left out up to row {index + 1}, this one "
                    f"because: {found[LEFT_OUT]}",
                    flush=True,
                )
        return found
