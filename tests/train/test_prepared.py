"""Rows that would teach nothing are left out with a word, and rows that are cut short are counted."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset

from seft_ds.prune.limits import check_ids, check_positions, embedding_rows, longest_tokens
from seft_ds.train.prepared import Cut, counts_of, looked_at
from tests.prune.models import tiny_tokenizer
from tests.tiny import dense_model

# Six rows: labels -100 don't count. Long ones have 8 tokens, and 5 are to stay.
LABELS = [
    [-100, 1, 1, 1, 1, 1, 1, 1],  # cut short
    [-100, -100, -100, -100, -100, -100, 1, 1],  # its answer is cut away
    [-100, -100, 1],
    [1],  # nothing stands before it
    [-100, -100, -100],
    [1, 1, 1, 1, -100, -100, -100, -100],  # longer, but what counts stays
]


def settings(**more: Any) -> Any:
    usual = dict(packing=False, max_length=5, truncation_mode="keep_start", packing_strategy="bfd")
    return SimpleNamespace(**usual | more)


@pytest.mark.parametrize(
    "args, left",
    [
        (settings(), [4, 0, 1, 0, 0, 3]),
        (settings(packing=True), [4, 0, 1, 0, 0, 3]),
        (settings(max_length=None), [7, 2, 1, 0, 0, 3]),
        (settings(truncation_mode="keep_end"), [4, 2, 1, 0, 0, 0]),
        (settings(packing=True, packing_strategy="bfd_split"), [7, 2, 1, 0, 0, 3]),
        (settings(packing=True, packing_strategy="wrapped"), [7, 2, 1, 1, 0, 4]),
    ],
)
def test_what_counts_and_stays(args: Any, left: list[int]) -> None:
    rows = Dataset.from_dict({"input_ids": LABELS, "labels": LABELS})
    counts = counts_of(rows.data.table, Cut.of(args))
    assert counts.left.tolist() == left and counts.tokens.tolist() == [8, 8, 3, 1, 3, 8]


def test_an_end_after_what_its_text_began_with() -> None:
    rows = Dataset.from_dict({"input_ids": LABELS, "labels": LABELS})
    cut = Cut.of(settings(truncation_mode="keep_end"), begins=1)
    assert counts_of(rows.data.table, cut).left.tolist() == [4, 2, 1, 0, 0, 0]


def test_rows_left_out_are_said() -> None:
    ids = [[7] * len(row) for row in LABELS]
    rows, said = Dataset.from_dict({"input_ids": ids, "labels": LABELS}), []
    kept = looked_at(rows, Cut(5), 8, None, "training", said.append)
    assert kept["labels"] == [LABELS[0], LABELS[2], LABELS[5]]
    assert said == [
        "2 of 6 training rows left out: nothing in them counts in the loss",
        "1 of 6 training rows left out: nothing in the first 5 tokens (--max_length) counts in the loss",
        "2 of 6 training rows are longer: the first 5 tokens (--max_length) stay, and in 1 of them part of "
        "what counts in the loss is cut away",
    ]
    streamed = looked_at(rows.to_iterable_dataset(), Cut(5), 8, None, "training", said.append)
    assert [row["labels"] for row in streamed] == kept["labels"]
    with pytest.raises(ValueError, match="no row is left to evaluate on: 2 of 2"):
        looked_at(rows.select([3, 4]), Cut(5), 8, None, "evaluation", said.append)


def test_tokens_without_an_embedding() -> None:
    tokenizer = tiny_tokenizer()
    size = len(tokenizer)
    tokenizer.add_tokens(["<think>", "<spare>"], special_tokens=True)
    model = dense_model("llama")
    assert embedding_rows(model) == 128
    model.set_input_embeddings(torch.nn.Embedding(size, 24))
    assert embedding_rows(model) == size
    ids = tokenizer("the <think> w1").input_ids
    check_ids([i for i in ids if i < size], size, tokenizer, "data")  # spare ones may exceed it
    for rows in (Dataset.from_dict({"input_ids": [ids], "labels": [ids]}),):
        for some in (rows, rows.to_iterable_dataset()):
            with pytest.raises(ValueError, match=rf"'<think>' \(id {size}\).* {size} rows"):
                list(looked_at(some, Cut(5), size, tokenizer, "training", print))


@pytest.mark.parametrize(
    "kind, settings, longest",
    [
        ("llama", {"max_position_embeddings": 64}, 64),
        ("gpt2", {"n_positions": 96}, 96),
        ("opt", {"max_position_embeddings": 128}, 128),
        ("mpt", {"max_seq_len": 80}, 80),
        ("bloom", {}, None),  # ALiBi
        ("falcon", {"alibi": True}, None),
        ("falcon", {"alibi": False, "max_position_embeddings": 64}, 64),
        ("mistral", {"max_position_embeddings": 64, "sliding_window": 16}, 64),
        ("mamba", {}, None),
        (
            "llama",
            {
                "max_position_embeddings": 64,
                "rope_parameters": {
                    "rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0,
                    "original_max_position_embeddings": 64,
                },
            },
            256,
        ),
        (
            "llama",
            {
                "max_position_embeddings": 64,
                "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
            },
            None,
        ),
    ],
)  # fmt: skip
def test_how_long_a_row_may_be(kind: str, settings: dict[str, Any], longest: int | None) -> None:
    from transformers import AutoConfig

    config = AutoConfig.for_model(kind, **settings)
    assert longest_tokens(config) == longest
    check_positions(longest, config, "m")
    if longest is not None:
        with pytest.raises(ValueError, match=f"m takes {longest} tokens"):
            check_positions(longest + 1, config, "m")
