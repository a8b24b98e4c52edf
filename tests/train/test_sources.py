"""Which rows a run reads: mixtures, held-out rows, streams, columns by other names."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from seft_ds.train.arguments import DataArguments
from seft_ds.train.sources import check_sources, read_sources
from tests.train.test_data import lines, own_cache

__all__ = ["own_cache"]  # a fixture


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    rows = {
        "many": [{"text": f"m{i}"} for i in range(90)],
        "few": [{"text": f"f{i}"} for i in range(10)],
        "asks": [{"question": f"q{i}", "answer": f"a{i}", "text": "x"} for i in range(5)],
        "tasks": [{"instruction": f"t{i}", "input": "", "output": f"o{i}"} for i in range(5)],
        "chats": [
            {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": f"h{i}"}]}
            for i in range(3)
        ],
    }
    return {name: str(lines(tmp_path / f"{name}.jsonl", *some)) for name, some in rows.items()}


def read(files: dict[str, str], *names: str, **settings: Any) -> tuple[list[dict], list[dict]]:
    data = DataArguments(train_file=[files[n] for n in names], **settings)
    values = vars(data) | {"max_steps": 10}
    check_sources(values)
    rows, held_out = read_sources(data, seed=0)
    return list(rows), list(held_out) if held_out is not None else []


@pytest.mark.parametrize("streaming", [False, True])
def test_a_mixture_has_its_shares(files: dict[str, str], streaming: bool) -> None:
    rows, _ = read(files, "many", "few", mix_weights=[1, 3], streaming=streaming)
    kinds = Counter(row["text"][0] for row in rows)
    assert len({row["text"] for row in rows}) == 100, "nothing is left out"
    assert kinds["f"] / len(rows) == pytest.approx(0.75, abs=0.08)
    again, _ = read(files, "many", "few", mix_weights=[1, 3], streaming=streaming)
    assert again == rows, "the seed decides"
    plain, _ = read(files, "many", "few", streaming=streaming)
    assert [row["text"][0] for row in plain] == ["m"] * 90 + ["f"] * 10


@pytest.mark.parametrize("size, count", [(0.1, 9), (7, 7)])
def test_held_out_rows_are_not_trained_on(files: dict[str, str], size: float, count: int) -> None:
    rows, held_out = read(files, "many", val_set_size=size)
    assert len(held_out) == count and len(rows) == 90 - count
    assert not {r["text"] for r in rows} & {r["text"] for r in held_out}


def test_held_out_rows_of_a_stream_and_first_rows(files: dict[str, str]) -> None:
    rows, held_out = read(
        files, "many", streaming=True, val_set_size=7, max_train_samples=5, max_eval_samples=2
    )
    assert [r["text"] for r in held_out] == ["m0", "m1"]
    assert [r["text"] for r in rows] == [f"m{i}" for i in range(7, 12)]
    rows, held_out = read(files, "many", validation_file=files["few"])
    assert len(rows) == 90 and len(held_out) == 10


def test_a_folder_is_a_dataset_with_splits(tmp_path: Path) -> None:
    (tmp_path / "own").mkdir()
    for split, count in (("train", 6), ("test", 3)):
        lines(tmp_path / f"own/{split}.jsonl", *[{"text": f"{split}{i}"} for i in range(count)])
    data = DataArguments(
        dataset_name=[str(tmp_path / "own")],
        dataset_train_split="train[:50%]",
        dataset_test_split="test",
    )
    check_sources(vars(data) | {"max_steps": 10})
    rows, held_out = read_sources(data, seed=0)
    assert held_out is not None and len(rows) == 3 and len(held_out) == 3
    with pytest.raises(ValueError, match="can't read .*own"):
        read_sources(DataArguments(dataset_name=[f"{tmp_path}/own:none"]), seed=0)


@pytest.mark.parametrize("streaming", [False, True])
def test_forms_become_what_trl_knows(files: dict[str, str], streaming: bool) -> None:
    renames = ["question=prompt", "answer=completion", "nothing=text"]
    with pytest.raises(ValueError, match="nothing=text|has the columns"):
        read(files, "tasks", rename_columns=renames[:1], streaming=streaming)
    rows, _ = read(files, "asks", rename_columns=["text=x", *renames[:2]], streaming=streaming)
    assert rows[1] == {"prompt": "q1", "completion": "a1"}
    rows, _ = read(files, "tasks", "tasks", streaming=streaming)
    assert len(rows) == 10 and "### Instruction:\nt0" in rows[0]["prompt"]
    rows, _ = read(files, "chats", streaming=streaming)
    assert rows[2]["messages"] == [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "h2"},
    ]


def test_a_late_row_of_a_stream_without_an_answer(tmp_path: Path) -> None:
    whole = {"prompt": "a", "completion": "b"}
    path = lines(tmp_path / "a.jsonl", *[whole] * 150, whole | {"completion": None})
    data = DataArguments(train_file=[str(path)], streaming=True)
    rows, _ = read_sources(data, seed=0)
    with pytest.raises(ValueError, match="a.jsonl, row 151 .counted from 1.: it has no completion"):
        list(rows)


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"train_file": None}, "give --train_file or --dataset_name"),
        ({"mix_weights": [1.0]}, "for each of 2 files"),
        ({"mix_weights": [1.0, 0.0]}, "above 0"),
        ({"mix_weights": [1.0, float("nan")]}, "above 0"),
        ({"val_set_size": 1.5}, "whole number of rows"),
        ({"val_set_size": 0.5, "streaming": True}, "no share"),
        ({"val_set_size": 5, "validation_file": "few"}, "give one of"),
        ({"dataset_test_split": "test"}, "of one dataset"),
        ({"dataset_config": "main"}, "of one dataset"),
        ({"rename_columns": ["a"]}, "OLD=NEW"),
        ({"max_train_samples": 0}, "1 or more"),
        ({"max_length": 1}, "nothing to predict"),
        ({"validation_file": "none.txt"}, "no such file"),
    ],
)
def test_settings_that_cannot_be_meant(
    files: dict[str, str], settings: dict[str, Any], said: str
) -> None:
    usual = vars(DataArguments(train_file=[files["many"], files["few"]])) | {"max_steps": 10}
    settings = settings | (
        {"validation_file": files["few"]} if settings.get("validation_file") == "few" else {}
    )
    with pytest.raises(ValueError, match=said):
        check_sources(usual | settings)
    with pytest.raises(ValueError, match="--max_steps"):
        check_sources(usual | {"streaming": True, "max_steps": -1})


def test_forms_that_cannot_be_mixed(files: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="many.jsonl has text .text. and .*tasks.jsonl has comp"):
        read(files, "many", "tasks")
