"""Text files and the sequences cut from them."""

from __future__ import annotations

import gzip
import json

import pytest
import torch

from seft_ds.prune.calibrate import dataset_texts, default_texts, read_texts, sequences
from tests.prune.models import tiny_tokenizer

TEXTS = ["w1 w2 w3", "w4 w5", "w6 w7 w8 w9", "w10"]


def write(path, content: str):
    data = content.encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


@pytest.mark.parametrize("end", ["", ".gz"])
def test_every_kind_of_file_gives_the_same_texts(tmp_path, end):
    rows = [{"text": text, "other": 1} for text in TEXTS]
    contents = {
        "a.txt": "\n".join([TEXTS[0], "", *TEXTS[1:], "  "]),
        "a.json": json.dumps(rows),
        "a.jsonl": "\n".join(json.dumps(row) for row in [*rows, {"text": " "}]) + "\n\n",
    }
    for name, content in contents.items():
        assert read_texts(write(tmp_path / (name + end), content)) == TEXTS


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.csv", "x", "no known kind.*.txt"),
        ("a.gz", "x", "no known kind"),
        ("a.jsonl", '{"text": "x"}\n{"body": "y"}', r"row 1 of .*no \"text\" string .*body"),
        ("a.jsonl", '{"text": "x"}\n{broken', "row 1 of .* is not JSON"),
        ("a.json", "[1]", "row 0 .*got int"),
        ("a.txt", "\n \n", "holds no text"),
    ],
)
def test_unusable_files_say_why(tmp_path, name, content, message):
    with pytest.raises(ValueError, match=message):
        read_texts(write(tmp_path / name, content))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match="there is no file .*absent.txt"):
        read_texts(tmp_path / "absent.txt")


def test_sequences_are_the_texts_in_the_seeds_order():
    tokenizer = tiny_tokenizer()
    got = sequences(tokenizer, TEXTS, count=2, length_tokens=4, seed=3)
    order = torch.randperm(4, generator=torch.Generator().manual_seed(3)).tolist()
    stream = [token for i in order for token in tokenizer(TEXTS[i])["input_ids"]]
    assert got.dtype == torch.int64 and got.tolist() == [stream[:4], stream[4:8]]


def test_the_seed_decides():
    texts = [f"w{i} w{i + 1}" for i in range(50)]
    one, same, other = (sequences(tiny_tokenizer(), texts, 4, 5, seed) for seed in (0, 0, 1))
    assert torch.equal(one, same) and not torch.equal(one, other)


def test_only_as_much_is_tokenized_as_needed():
    class Counting:
        texts = 0

        def __call__(self, batch, **settings):
            self.texts += len(batch)
            return {"input_ids": [[1, 2] for _ in batch]}

    tokenizer = Counting()
    assert sequences(tokenizer, ["x"] * 10_000, 10, 10, seed=0).shape == (10, 10)
    assert tokenizer.texts <= 128


def test_too_little_text_says_how_much_is_missing():
    with pytest.raises(ValueError, match="hold 10 tokens; 3 sequences of 4 need 12"):
        sequences(tiny_tokenizer(), TEXTS, 3, 4, seed=0)
    with pytest.raises(ValueError, match="at least 1"):
        sequences(tiny_tokenizer(), TEXTS, 0, 4, seed=0)


def test_fewer_sequences_where_that_is_allowed():
    got = sequences(tiny_tokenizer(), TEXTS, 30, 4, seed=3, fewer=True)
    assert torch.equal(got, sequences(tiny_tokenizer(), TEXTS, 2, 4, seed=3))
    with pytest.raises(ValueError, match="hold 10 tokens"):
        sequences(tiny_tokenizer(), TEXTS, 1, 11, seed=3, fewer=True)


def test_the_built_in_text_is_a_lot_of_english():
    texts = default_texts()
    assert sum(map(len, texts)) > 300_000 and all(text.strip() == text != "" for text in texts)


def test_a_data_set_is_read_or_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "set"
    folder.mkdir()
    write(folder / "train.jsonl", "\n".join(json.dumps({"text": t}) for t in TEXTS))
    column = dataset_texts(str(folder))
    assert list(column) == TEXTS
    got = sequences(tiny_tokenizer(), column, 2, 4, seed=3)
    assert torch.equal(got, sequences(tiny_tokenizer(), TEXTS, 2, 4, seed=3))
    other = tmp_path / "other"
    other.mkdir()
    write(other / "train.jsonl", '{"body": "x"}')
    with pytest.raises(ValueError, match="columns .*body.*wanted one named"):
        dataset_texts(str(other))
    with pytest.raises(ValueError, match="could not load data set .*--calibration_file"):
        dataset_texts(str(tmp_path / "absent"))
