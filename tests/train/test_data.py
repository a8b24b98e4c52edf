"""Data files that `load_rows` can't train on are refused with the file and the column."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path
from typing import Any

import datasets
import pytest

from seft_ds.train.data import load_rows

CHAT = [{"role": "user", "content": "hello"}]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def lines(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    "row, columns",
    [
        ({"text": "a", "n": 1}, ["text"]),
        ({"messages": CHAT}, ["messages"]),
        ({"prompt": "a", "completion": "b"}, ["prompt", "completion"]),
        ({"prompt": CHAT, "completion": CHAT}, ["prompt", "completion"]),
        ({"instruction": "a", "output": "b"}, ["prompt", "completion"]),
    ],
)
def test_known_forms(tmp_path: Path, row: dict, columns: list[str]) -> None:
    rows = load_rows(str(lines(tmp_path / "a.jsonl", row, row)), None, None, "train")
    assert sorted(rows.column_names) == sorted(columns) and len(rows) == 2


def test_messages_with_other_keys_in_some_rows(tmp_path: Path) -> None:
    tool = [{"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}]
    path = lines(tmp_path / "a.jsonl", {"messages": CHAT}, {"messages": [*CHAT, *tool]})
    assert len(load_rows(str(path), None, None, "train")) == 2


@pytest.mark.parametrize(
    "row, said",
    [
        ({"text": 5}, "text holds"),
        ({"text": None}, "text holds"),
        ({"messages": "hello"}, "wanted messages"),
        ({"messages": ["hello"]}, "wanted messages"),
        ({"messages": [{"role": "user"}]}, "wanted messages"),
        ({"prompt": "a", "completion": ["b"]}, "completion holds"),
        ({"prompt": "a", "completion": CHAT}, "wanted the same"),
        ({"instruction": "a", "output": 5}, "output holds"),
        ({"texts": "a"}, "wanted one of"),
    ],
)
def test_columns_without_text(tmp_path: Path, row: dict, said: str) -> None:
    path = lines(tmp_path / "a.jsonl", row, row)
    with pytest.raises(ValueError, match=said) as caught:
        load_rows(str(path), None, None, "train")
    assert "a.jsonl" in str(caught.value)


def test_a_row_without_an_answer(tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", {"prompt": "a", "completion": "b"}, {"prompt": "a"})
    with pytest.raises(ValueError, match="1 rows have no completion"):
        load_rows(str(path), None, None, "train")


@pytest.mark.parametrize(
    "name, data, said",
    [
        ("a.jsonl", b"null\n", "starts with"),  # ends the process in pyarrow
        ("a.jsonl", b'{"text": "a"}\n' + b"\x00" * 512, "NUL"),
        ("a.jsonl", b"", "empty"),
        ("a.jsonl", b'{"text": "a"}\n{"te', "can't read"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "a"}\n', mtime=0)[:-4], "can't read"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "a"}\n', mtime=0) + b"\x00" * 512, "NUL"),
        ("a.parquet", b"PAR1", "can't read"),
        ("a.csv", b"text\n\xff\xfe\n", "can't read"),
        ("a.bin", b"text", "wanted a .txt"),
    ],
)
def test_damaged_files(tmp_path: Path, name: str, data: bytes, said: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=said) as caught:
        load_rows(str(tmp_path / name), None, None, "train")
    assert name in str(caught.value) and type(caught.value) is ValueError


def test_bytes_that_are_no_text_in_a_column(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    broken = pa.array([b"good", b"\xff\xfe"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": broken}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="text is damaged"):
        load_rows(str(tmp_path / "a.parquet"), None, None, "train")


def test_a_pipe_is_not_waited_for_and_a_name_is_no_pattern(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(ValueError, match="no such file"):
        load_rows(str(tmp_path / "pipe.jsonl"), None, None, "train")
    (tmp_path / "pipe.jsonl").unlink()
    lines(tmp_path / "a.jsonl", {"text": "a"})
    lines(tmp_path / "*.jsonl", {"text": "star"})
    assert load_rows(str(tmp_path / "*.jsonl"), None, None, "train")["text"] == ["star"]
