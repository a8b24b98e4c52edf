"""JSON files that are no JSON, or more than that: each a ValueError that names the file."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from seft_ds.json_file import printable, read_object, shown


def test_an_object_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    value = {"a": [1, 2.5, None, True, "é"], "b": {"c": {}}}
    path.write_text(json.dumps(value))
    assert read_object(path) == read_object(path, strict=True) == value


@pytest.mark.parametrize(
    "data",
    [b"", b"{", b"[1]", b"5", b"null", b"\xff{}", b"[" * 100_000,
     b'{"a": ' + b"9" * 5000 + b"}", b'{"a":' * 200 + b"1" + b"}" * 200, b'{"a": "\\ud800"}', b" " * 2000],
)  # fmt: skip
def test_what_is_no_object_is_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(data)
    with pytest.raises(ValueError, match="a.json") as caught:
        read_object(path, limit_bytes=200_000)
    assert type(caught.value) is ValueError and len(str(caught.value)) < 500


@pytest.mark.parametrize("text", ['{"a": 1, "a": 1}', '{"a": NaN}', '{"a": -Infinity}'])
def test_strict_refuses_what_python_takes(tmp_path: Path, text: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(text)
    assert "a" in read_object(path)
    with pytest.raises(ValueError, match="a.json"):
        read_object(path, strict=True)


def test_no_plain_file_is_waited_for_or_read_to_its_end(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    (tmp_path / "folder").mkdir()
    (tmp_path / "huge").touch()
    os.truncate(tmp_path / "huge", 1 << 40)
    for name in ("pipe", "zero", "folder", "huge", "none", "x" * 5000, "a\x00b"):
        with pytest.raises(ValueError, match="no such file|bytes"):
            read_object(tmp_path / name)


def test_values_are_shown_short_and_printable() -> None:
    nested: list = []
    for _ in range(100_000):
        nested = [nested]
    for value in (
        nested,
        "x" * 10**6,
        "\x1b[2J\n",
        "\ud800",
        10**400,
        {1: {2: {3: 4}}},
        [1] * 1000,
    ):
        text = shown(value)
        assert len(text) < 500 and text.isprintable()
    assert printable("a\n\x1b\ud800é", 5) == r"a\n\x1b\ud800é" and printable("abc", 2) == "ab"


def test_a_byte_order_mark_is_no_part_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"a": 1}', encoding="utf-8-sig")
    assert read_object(tmp_path / "a.json") == {"a": 1}
