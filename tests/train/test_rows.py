"""Rows from the middle of a text begin as their text did, on TRL's own packing."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from datasets import Dataset
from trl import SFTTrainer

from seft_ds.train.arguments import RunArguments
from seft_ds.train.rows import check_length, describe_beginning, ends, split, wrapped
from seft_ds.train.trainer import SparseSFTTrainer
from tests.prune.models import tiny_model, tiny_tokenizer

B, E, X = 62, 1, -100  # <bos>, </s>, not in the loss


def batch(*texts: list[int]) -> dict[str, list[list[int]]]:
    return {"input_ids": list(texts), "labels": [list(text) for text in texts]}


def test_long_texts_are_split_into_pieces_with_a_beginning() -> None:
    got = split(batch([B, 2, 3, 4, 5, 6, 7, 8], [B, 9], [10, 11, 12, 13, 14]), [B], 4)
    assert got["input_ids"] == [
        [B, 2, 3, 4], [B, 5, 6, 7], [B, 8], [B, 9], [10, 11, 12, 13], [14],
    ]  # fmt: skip
    assert got["labels"] == [
        [B, 2, 3, 4], [X, 5, 6, 7], [X, 8], [B, 9], [10, 11, 12, 13], [14],
    ]  # fmt: skip


def test_wrapped_rows_begin_as_the_text_that_they_go_on_with() -> None:
    got = wrapped(batch([B, 2, 3, 4, 5], [B, 6], [B, 7, 8], [9, 10, 11, 12, 13]), [B], 4)
    assert got["input_ids"] == [
        [B, 2, 3, 4], [B, 5, B, 6], [B, 7, 8, 9], [10, 11, 12, 13],
    ]  # fmt: skip
    assert got["labels"] == [[B, 2, 3, 4], [X, 5, B, 6], [B, 7, 8, 9], [10, 11, 12, 13]]
    # Two tokens before a text, cut between them: the row begins with both, and the second one is its own.
    got = wrapped(batch([9, B, 63, 2, 3, 4], [B, 63, 5, 6, 7]), [B, 63], 7)
    assert got["input_ids"] == [[9, B, 63, 2, 3, 4, B], [B, 63, 5, 6, 7]]
    assert got["labels"] == [[9, B, 63, 2, 3, 4, B], [X, 63, 5, 6, 7]]


def test_the_end_of_a_long_text_follows_its_beginning() -> None:
    got = ends(batch([B, 2, 3, 4, 5], [B, 6, 7], [8, 9, 10, 11, 12]), [B], 4)
    assert got["input_ids"] == [[B, 3, 4, 5], [B, 6, 7], [9, 10, 11, 12]]
    assert got["labels"] == [[X, 3, 4, 5], [B, 6, 7], [9, 10, 11, 12]]


@pytest.fixture(scope="module")
def model():
    return tiny_model("gemma")


def prepared(tmp: Path, model, rows: list[dict], kind=SparseSFTTrainer, template="<bos> $A", **run):
    """The trainer that TRL makes of the rows, and its rows."""
    tokenizer = tiny_tokenizer(template)
    tokenizer.pad_token = "</s>"
    settings = {"output_dir": str(tmp), "use_cpu": True, "bf16": False, "max_length": 5} | run
    trainer = kind(
        model=model,
        args=RunArguments(**settings, eval_strategy="no", save_strategy="no"),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    return trainer, [(r["input_ids"], r["labels"]) for r in trainer.train_dataset]


LONG = [{"text": "w0 w1 w2 w3 w4 w5 w6 w7 </s>"}, {"text": "w10 w11 </s>"}]


@pytest.mark.parametrize(
    "run, rows",
    [
        (
            {"packing": True, "packing_strategy": "bfd"},
            [([B, 2, 3, 4, 5], [B, 2, 3, 4, 5]), ([B, 12, 13, E], [B, 12, 13, E])],
        ),
        (
            {"packing": True, "packing_strategy": "bfd_split"},
            [
                ([B, 2, 3, 4, 5], [B, 2, 3, 4, 5]),
                ([B, 6, 7, 8, 9], [X, 6, 7, 8, 9]),
                ([B, 12, 13, E], [B, 12, 13, E]),
                ([B, E], [X, E]),
            ],
        ),
        (
            {"packing": True, "packing_strategy": "wrapped"},
            [
                ([B, 2, 3, 4, 5], [B, 2, 3, 4, 5]),
                ([B, 6, 7, 8, 9], [X, 6, 7, 8, 9]),
                ([B, E, B, 12, 13], [X, E, B, 12, 13]),
                ([B, E], [X, E]),
            ],
        ),
        (
            {"truncation_mode": "keep_end"},
            [([B, 7, 8, 9, E], [X, 7, 8, 9, E]), ([B, 12, 13, E], [B, 12, 13, E])],
        ),
        (
            {"truncation_mode": "keep_start"},
            [([B, 2, 3, 4, 5], [B, 2, 3, 4, 5]), ([B, 12, 13, E], [B, 12, 13, E])],
        ),
    ],
)
def test_rows_of_a_trainer(tmp_path, model, run, rows) -> None:
    trainer, got = prepared(tmp_path, model, LONG, **run)
    assert got == rows
    assert trainer.args.max_length == 5 and not trainer.args.shuffle_dataset
    made = trainer.data_collator(list(trainer.train_dataset))
    if run.get("packing_strategy") in ("bfd", "bfd_split"):
        # Texts and pieces know where they start, and no start is in the loss.
        starts = made["position_ids"][0] == 0
        assert made["input_ids"][0][starts].tolist() == [B] * int(starts.sum())
        assert int(starts.sum()) == (2 if run["packing_strategy"] == "bfd" else 4)
        assert made["labels"][0][starts].tolist() == [X] * int(starts.sum())
    if run.get("packing"):
        held = [token for ids, _ in rows for token in ids if token != B]
        if run["packing_strategy"] != "bfd":
            assert sorted(held) == sorted([*range(2, 10), 12, 13, E, E])


def test_rows_of_a_stream(tmp_path, model) -> None:
    tokenizer = tiny_tokenizer("<bos> $A")
    run = RunArguments(
        output_dir=str(tmp_path), use_cpu=True, bf16=False, max_length=5, max_steps=1, packing=True,
        packing_strategy="wrapped", eval_strategy="no", save_strategy="no",
    )  # fmt: skip
    stream = Dataset.from_list(LONG).to_iterable_dataset()
    trainer = SparseSFTTrainer(
        model=model, args=run, train_dataset=stream, processing_class=tokenizer
    )
    rows = [row["input_ids"] for row in trainer.train_dataset]
    assert rows == [[B, 2, 3, 4, 5], [B, 6, 7, 8, 9], [B, E, B, 12, 13], [B, E]]


def test_several_pieces_share_a_row(tmp_path, model) -> None:
    trainer, got = prepared(
        tmp_path, model, LONG, max_length=7, packing=True, packing_strategy="bfd_split"
    )
    assert got == [
        ([B, 2, 3, 4, 5, 6, 7], [B, 2, 3, 4, 5, 6, 7]),
        ([B, 8, 9, E], [X, 8, 9, E]),
        ([B, 12, 13, E], [B, 12, 13, E]),
    ]
    trainer, got = prepared(
        tmp_path, model, LONG, max_length=8, packing=True, packing_strategy="bfd_split"
    )
    assert [ids for ids, _ in got] == [[B, 2, 3, 4, 5, 6, 7, 8], [B, 12, 13, E, B, 9, E]]
    assert trainer.train_dataset[1]["seq_lengths"] == [4, 3]


def test_a_completion_that_goes_on_in_another_row(tmp_path, model) -> None:
    rows = [{"prompt": "w0 w1 ", "completion": "w2 w3 w4 w5 </s>"}]
    _, got = prepared(tmp_path, model, rows, packing=True, packing_strategy="bfd_split")
    assert got == [([B, 2, 3, 4, 5], [X, X, X, 4, 5]), ([B, 6, 7, E], [X, 6, 7, E])]
    # Held back to their ends, the completion of the first row stays and a prompt alone is left out.
    _, got = prepared(
        tmp_path, model, [*rows, {"prompt": "w8 ", "completion": "w9 </s>"}], max_length=3,
        truncation_mode="keep_end",
    )  # fmt: skip
    assert got == [([B, 7, E], [X, 7, E]), ([B, 11, E], [X, 11, E])]


@pytest.mark.parametrize("strategy", ["bfd_split", "wrapped"])
@pytest.mark.parametrize("template, added", [("$A", True), ("<bos> $A", False)])
def test_otherwise_rows_are_those_of_trl(tmp_path, model, strategy, template, added) -> None:
    run = {"packing": True, "packing_strategy": strategy, "template": template}
    _, got = prepared(tmp_path, model, LONG, **run, add_bos_token=added)
    _, theirs = prepared(tmp_path, model, LONG, SFTTrainer, **run)
    assert got == theirs and len(got) >= 3


def test_rows_too_short_for_a_beginning_are_refused_and_beginnings_told() -> None:
    run = SimpleNamespace(
        packing=True, packing_strategy="wrapped", max_length=1, add_bos_token=True
    )
    with pytest.raises(ValueError, match="--max_length 1: each row begins with 1 tokens"):
        check_length(run, tiny_tokenizer("<bos> $A"))
    check_length(run, tiny_tokenizer())
    assert describe_beginning(run, tiny_tokenizer()) == ""
    told = describe_beginning(run, tiny_tokenizer("<bos> $A"))
    assert told == ", each row from the middle of a text begins with <bos>"
    run.packing_strategy = "bfd"
    assert describe_beginning(run, tiny_tokenizer("<bos> $A")) == ""
    check_length(run, tiny_tokenizer("<bos> $A"))
