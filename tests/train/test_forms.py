"""What is left out of a source is said, in rows and in columns; what can't be meant is refused by its row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from seft_ds.train.chat_template import Template, template_of
from seft_ds.train.data import load_rows
from tests.prune.models import tiny_tokenizer
from tests.train.test_data import lines, own_cache

__all__ = ["own_cache"]  # a fixture
CHAT = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "a"}]
PLAIN = "{% for m in messages %}{{ m['role'] + ' ' + m['content'] + ' ' }}{% endfor %}"
TURNS = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must take turns') }}{% endif %}{{ m['content'] }}{% endfor %}"
)
CALLS = PLAIN + "{{ tools }}{% for m in messages %}{{ m.tool_calls }}{% endfor %}"


def template(text: str, marks: bool = False) -> Template:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = text
    found = template_of(tokenizer, marks)
    assert found is not None
    return found


def load(path: Path, text: str | None = PLAIN, **more: Any) -> tuple[list[dict], list[str]]:
    said: list[str] = []
    known = None if text is None else template(text)
    rows = load_rows(str(path), None, None, "train", template=known, say=said.append, **more)
    return list(rows), [line.removeprefix(f"{path}: ") for line in said]


@pytest.mark.parametrize("streaming", [False, True])
def test_columns_are_used_or_named(tmp_path: Path, streaming: bool) -> None:
    sharegpt = {
        "conversations": [
            {"from": "human", "value": "weather"},
            {"from": "function_call", "value": '{"name": "weather"}'},
            {"from": "observation", "value": "sun"},
            {"from": "gpt", "value": "the sun"},
        ],
        "system": "be short",
        "tools": '[{"name": "weather"}]',
        "id": 7,
    }
    path = lines(tmp_path / "a.jsonl", sharegpt, sharegpt)
    rows, said = load(path, CALLS, streaming=streaming)
    row = rows[1]
    roles = ["system", "user", "assistant", "tool", "assistant"]
    assert [m["role"] for m in row["messages"]] == roles
    assert row["messages"][0]["content"] == "be short" and row["tools"] == [{"name": "weather"}]
    assert row["messages"][2]["tool_calls"][0]["function"]["name"] == "weather"
    [line] = said
    assert "system becomes the first message" in line and line.endswith("columns left out: id")
    with pytest.raises(ValueError, match="call functions, and the chat template doesn't write"):
        load(path, PLAIN, streaming=streaming)
    chat = lines(tmp_path / "b.jsonl", {"messages": CHAT, "tools": "[]", "weight": 1})
    _, [line] = load(chat, PLAIN, streaming=streaming)
    assert line.endswith("left out: tools (the chat template doesn't write them), weight")


def test_columns_of_other_forms(tmp_path: Path) -> None:
    row = {"instruction": "c", "output": "d", "history": [["a", "b"]], "text": None}
    rows, [line] = load(lines(tmp_path / "a.jsonl", {k: v for k, v in row.items() if v}))
    assert "### Response:\nb" in rows[0]["prompt"] and "history goes before the prompt" in line
    _, [line] = load(lines(tmp_path / "b.jsonl", {"text": "a", "id": 1, "system": "s"}))
    assert line == "columns left out: id, system"
    _, [line] = load(lines(tmp_path / "c.jsonl", {"prompt": "a", "completion": "b", "system": "s"}))
    assert line == "columns left out: system"
    own = [{"role": "system", "content": "own"}, *CHAT]
    _, [first, second] = load(lines(tmp_path / "d.jsonl", {"messages": own, "system": "other"}))
    assert second.startswith("1 of 1 rows: the system column is left out")


@pytest.mark.parametrize("streaming", [False, True])
def test_rows_without_text_are_left_out_and_counted(tmp_path: Path, streaming: bool) -> None:
    null = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": None}]
    some = [{"messages": m} for m in (CHAT, [], CHAT, null, None)]
    path = lines(tmp_path / "a.jsonl", *some)
    rows, said = load(path, streaming=streaming)
    assert [r["messages"] for r in rows] == [CHAT, CHAT]
    assert [line.partition(": ")[2] if streaming else line for line in said] == [
        "2 of 5 rows left out: no messages (rows 2, 5, counted from 1)",
        "1 of 5 rows left out: a turn without text (row 4, counted from 1)",
    ]
    (tmp_path / "b.txt").write_text("one\n\n \ntwo\n")
    rows, said = load(tmp_path / "b.txt", streaming=streaming)
    assert [r["text"] for r in rows] == ["one", "two"]
    assert said[0].endswith("2 of 4 rows left out: no text (rows 2, 3, counted from 1)")


@pytest.mark.parametrize("streaming", [False, True])
def test_rows_that_cannot_be_meant_are_refused_by_number(tmp_path: Path, streaming: bool) -> None:
    bad = [{"role": "system", "content": "s"}, *CHAT]
    path = lines(tmp_path / "a.jsonl", *[{"messages": CHAT}] * 3, *[{"messages": bad}] * 2)
    with pytest.raises(ValueError, match=r"row 4 .*roles must take turns.*1 more rows") as caught:
        load(path, TURNS, streaming=streaming)
    assert "a.jsonl" in str(caught.value) and "system, user, assistant" in str(caught.value)
    odd = [{"from": "human", "value": "a"}, {"from": "critic", "value": "b"}]
    path = lines(tmp_path / "b.jsonl", {"conversations": odd})
    with pytest.raises(ValueError, match="row 1 .*role 'critic'"):
        load(path, streaming=streaming)
    late = lines(tmp_path / "c.jsonl", *[{"messages": CHAT}] * 150, {"messages": bad})
    with pytest.raises(ValueError, match="c.jsonl, row 151 .*roles must take turns"):
        load(late, TURNS, streaming=streaming)


def test_answers_that_no_template_marks(tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", {"messages": CHAT}, {"messages": CHAT[:1]})
    marks = (
        "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }} {% else %}{% generation %}"
    )
    marks += "{{ m.content }}{% endgeneration %}{% endif %}{% endfor %}"
    said: list[str] = []
    rows = load_rows(
        str(path), None, None, "train", template=template(marks, True), say=said.append
    )
    assert len(rows) == 1 and "1 of 2 rows left out: the chat template marks no answer" in said[0]
    with pytest.raises(ValueError, match="--assistant_only_loss: the chat template doesn't mark"):
        template(PLAIN, True)


STRUCT = pa.struct([("content", pa.string()), ("role", pa.string()), ("name", pa.null())])
NAMES = pa.struct([("role", pa.dictionary(pa.int32(), pa.string())), ("content", pa.string())])
LARGE = pa.struct([("role", pa.large_string()), ("content", pa.large_string())])


@pytest.mark.parametrize(
    "kind",
    [
        pa.list_(STRUCT), pa.list_(NAMES), pa.large_list(LARGE), pa.list_(LARGE, 2),
        pa.list_view(LARGE), pa.large_list_view(NAMES),
    ],
    ids=str,
)  # fmt: skip
def test_chats_of_any_arrow_type(tmp_path: Path, kind: pa.DataType) -> None:
    table = pa.table({"messages": pa.array([CHAT] * 3, kind), "nothing": pa.nulls(3)})
    pq.write_table(table, tmp_path / "a.parquet")
    for streaming in (False, True):
        rows, said = load(tmp_path / "a.parquet", streaming=streaming)
        assert [r["messages"] for r in rows] == [CHAT] * 3
        assert said[0].endswith("columns left out: nothing")


@pytest.mark.parametrize(
    "kind", [pa.large_string(), pa.string_view(), pa.dictionary(pa.int8(), pa.string())], ids=str
)
def test_text_of_any_arrow_type(tmp_path: Path, kind: pa.DataType) -> None:
    pq.write_table(pa.table({"text": pa.array(["a b", "c"], kind)}), tmp_path / "a.parquet")
    for streaming in (False, True):
        rows, _ = load(tmp_path / "a.parquet", streaming=streaming)
        assert [r["text"] for r in rows] == ["a b", "c"]


@pytest.mark.parametrize("name", ["a.txt", "a.csv", "a.json", "a.jsonl", "a.txt.gz", "a.jsonl.gz"])
def test_byte_order_marks_are_no_text(tmp_path: Path, name: str) -> None:
    import gzip

    data = {
        "txt": "the fox\nthe dog\n", "csv": "text\nthe fox\nthe dog\n",
        "json": '[{"text": "the fox"}, {"text": "the dog"}]',
        "jsonl": '{"text": "the fox"}\n{"text": "the dog"}\n',
    }[name.split(".")[1]]  # fmt: skip
    opener: Any = gzip.open if name.endswith(".gz") else open
    for encoding in ("utf-8-sig", "utf-16"):
        with opener(tmp_path / name, "wt", encoding=encoding) as file:
            file.write(data)
        if encoding == "utf-8-sig":
            for streaming in (False, True):
                rows, _ = load(tmp_path / name, streaming=streaming)
                assert [r["text"] for r in rows] == ["the fox", "the dog"]
        else:
            with pytest.raises(ValueError, match="is text in UTF-16.*iconv -f UTF-16"):
                load(tmp_path / name)
