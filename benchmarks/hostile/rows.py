"""Bad data files and journals."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

from benchmarks.hostile import damage
from benchmarks.hostile.made import copy
from benchmarks.hostile.runner import Source, note
from seft_ds.report.facts import churn, deviations, facts_of, live_totals
from seft_ds.report.journal import read_journal

NAMES = ("journal.jsonl",)


def sources(home: Path) -> list[Source]:
    found = [
        data_file(
            home, kind, lambda rng, path, kind=kind: damage.DAMAGE[kind](rng, path, path.parent)
        )
        for kind in damage.DAMAGE
    ]
    found += [
        data_file(home, "wrong columns", wrong_columns),
        data_file(home, "other types in columns", wrong_types),
        data_file(home, "no rows", no_rows),
        data_file(home, "odd names", odd_names),
    ]
    found += [
        journal(
            home, kind, lambda rng, path, kind=kind: damage.DAMAGE[kind](rng, path, path.parent)
        )
        for kind in damage.DAMAGE
        if kind != "swapped"
    ]
    return [*found, journal(home, "hostile records", hostile_records)]


def data_file(home: Path, kind: str, change: Callable[[Random, Path], Any]) -> Source:
    def attempt(rng: Random, place: Path) -> str | None:
        import datasets

        from seft_ds.train.data import load_rows
        from seft_ds.train.forms import FORMS

        datasets.disable_progress_bars()
        datasets.config.HF_DATASETS_CACHE = place / "cache"  # type: ignore[assignment]
        folder = copy(home / "data", place / "data")
        path = rng.choice(sorted(folder.iterdir()))
        changed = change(rng, path)
        note(place, f"{path.name}: {changed}")
        path = changed if isinstance(changed, Path) else path
        rows = load_rows(str(path), None, None, "train")
        if len(rows) == 0 or set(rows.column_names) not in [set(f) for f in FORMS]:
            return f"{len(rows)} rows of {rows.column_names}"
        for row in rows:
            for name, value in row.items():
                if name != "messages" and not isinstance(value, str):
                    return f"{name} = {value!r:.50}"
                if name == "messages" and not all(
                    isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
                    for m in value
                ):
                    return f"messages = {value!r:.50}"
        return lost_lines(path, len(rows))

    return Source("load_rows", kind, attempt)


def lost_lines(path: Path, n_rows: int) -> str | None:
    """Of a .jsonl file every line is a row, or the file is refused."""
    if ".jsonl" not in path.suffixes:
        return None
    data = path.read_bytes()
    data = gzip.decompress(data) if path.suffix == ".gz" else data
    lines = [line for line in data.split(b"\n") if line.strip()]
    try:
        for line in lines:
            json.loads(line)
    except ValueError:
        return f"a line that is no JSON was passed over; {n_rows} rows of {len(lines)} lines"
    return None


def _write_rows(path: Path, rows: list[dict]) -> Path:
    new = path.with_name("rows.jsonl")
    new.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return new


def wrong_columns(rng: Random, path: Path) -> Path:
    rows = [
        [{"texts": "a"}],
        [{"prompt": "a"}],
        [{"completion": "a"}],
        [{"instruction": "a", "input": "b"}],
        [{"": "a"}],
        [{"text ": "a"}],
        [{"Text": "a"}],
        [{}],
        [{str(i): i for i in range(2000)}],
        [{"x" * 10_000: "a"}],
    ]
    return _write_rows(path, rng.choice(rows) * rng.choice([1, 5]))


def wrong_types(rng: Random, path: Path) -> Path:
    values: list[Any] = [
        None, 5, 1.5, True, [], ["a"], [1], {}, {"a": "b"}, [[]], "", " ", [{"role": "user"}],
        [{"content": "x"}],
        [{"role": 5, "content": "x"}], [{"role": "user", "content": None}], [None], [{"role": "user",
         "content": []}],
    ]  # fmt: skip
    columns = rng.choice([["text"], ["messages"], ["prompt", "completion"], ["instruction", "output"],
                          ["instruction", "input", "output"]])  # fmt: skip
    good = dict.fromkeys(columns, "a") if columns != ["messages"] else {}
    bad = {**good, rng.choice(columns): rng.choice(values)}
    rows = [bad] * 3
    if rng.random() < 0.3 and good:
        rows = [good, bad, good]
    return _write_rows(path, rows)


def no_rows(rng: Random, path: Path) -> Path:
    new = path.with_name(
        rng.choice(["a.jsonl", "a.json", "a.txt", "a.csv", "a.parquet", "a.jsonl.gz"])
    )
    data = rng.choice(
        [b"", b"\n\n\n", b"{}", b"[]", b"null", b"text\n", b"\x00" * 100, gzip.compress(b"")]
    )
    new.write_bytes(data)
    return new


def odd_names(rng: Random, path: Path) -> Path:
    name = rng.choice(
        ["a", "a.", ".jsonl", "a.zip", "a.jsonl.zip", "a.pkl", "a.py", "*.jsonl", "[a].jsonl", "a?.jsonl",
         "a b.jsonl", "é.jsonl", "a.JSONL", "a.jsonl.gz.gz", "none.jsonl", "x" * 300 + ".jsonl",
         "a\x00.jsonl",
         "a\n.jsonl", "{a,b}.jsonl", "a::b.jsonl", "https:a.jsonl", "**.jsonl"]
    )  # fmt: skip
    new = path.with_name(name)
    if "none" not in name and "\x00" not in name and len(name) < 200:
        new.write_bytes(path.read_bytes())
    return new


def journal(home: Path, kind: str, change: Callable[[Random, Path], str]) -> Source:
    def attempt(rng: Random, place: Path) -> str | None:
        path = copy(home / "run", place / "run") / "journal.jsonl"
        good = path.read_bytes()
        note(place, change(rng, path))
        records = read_journal(path)
        if not all(isinstance(r, dict) and isinstance(r.get("kind"), str) for r in records):
            return "what is no record"
        whole = path.read_bytes().count(b"\n") if path.stat().st_size < 1 << 30 else 0
        if kind in ("truncated", "longer") and len(records) < min(whole, good.count(b"\n")):
            return f"{len(records)} records of {whole} whole lines"
        facts = facts_of(records)
        live_totals(facts), deviations(facts), churn(facts, "dropped")
        return None

    return Source("read_journal", kind, attempt, NAMES)


def hostile_records(rng: Random, path: Path) -> str:
    lines = path.read_text().splitlines()
    at = rng.randrange(len(lines))
    way = rng.randrange(5)
    if way == 0:
        what, data = damage.strange_text(rng, lines[at])
        text = data.replace(b"\n", b" ")
    elif way == 1:
        what, text = damage.duplicate_key(rng, lines[at])
    elif way == 2:
        what = "no record"
        text = rng.choice(
            [b"[]", b"5", b'{"step": 5}', b'{"kind": 5}', b'{"kind": null}', b"\xff", b"{"]
        )
    else:
        record = json.loads(lines[at])
        what = damage.edit_field(rng, record)
        text = damage.dumps(record).replace("\n", " ").encode()
    every = [line.encode() for line in lines]
    every[at] = text
    path.write_bytes(b"\n".join(every) + b"\n")
    return f"line {at + 1}: {what}"
