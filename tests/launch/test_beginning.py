"""Prune, evaluate and repair a small Gemma as a user does: windows begin with <bos>, and records say so."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from seft_ds.checkpoint.verify import verify
from tests import forked
from tests.prune.models import WORDS, tiny_model, tiny_tokenizer
from tests.train.test_finetune import finetune


def script(name: str, folder: Path, *argv: str) -> str:
    done = forked.start(name, [*argv], folder, {"DS_ACCELERATOR": "cpu"}).finish(280)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def home(tmp_path: Path) -> Path:
    tiny_model("gemma3").save_pretrained(tmp_path / "dense")
    tokenizer = tiny_tokenizer("<bos> $A")
    tokenizer.pad_token = "</s>"
    tokenizer.save_pretrained(tmp_path / "dense")
    lines = [" ".join(WORDS[i:] + WORDS[:i]) for i in range(20)]
    (tmp_path / "text.txt").write_text("\n".join(lines))
    return tmp_path


def test_said_and_recorded_by_every_script(home: Path) -> None:
    prune = [
        "--model_name_or_path", "dense", "--method", "wanda", "--sparsity", "0.5", "--max_length", "16",
        "--calibration_file", "text.txt", "--calibration_samples", "4", "--output_dir",
    ]  # fmt: skip
    said = script("prune", home, *prune, "pruned")
    assert "with 4 sequences of 16 tokens, each sequence begins with <bos>" in said
    said = script("prune", home, *prune, "without", "--add_bos_token", "false")
    assert "no sequence begins with <bos> (--add_bos_token false)" in said
    records = [json.loads((home / n / "sparsity.json").read_text()) for n in ("pruned", "without")]
    assert [r["pruning"]["begins_with"] for r in records] == ["<bos>", None]
    assert [r["pruning"]["add_bos_token"] for r in records] == [True, False]
    assert records[0]["mask_digest"] != records[1]["mask_digest"]

    usual = ["--model_name_or_path", "pruned", "--text_file", "text.txt", "--max_length", "16"]
    said = script("evaluate", home, *usual, "--output_path", "with.json")
    # 1200 tokens, 15 of them in a window, each predicted.
    assert "(1,200 predictions in 80 windows of 16 tokens), each window begins with <bos>" in said
    said = script("evaluate", home, *usual, "--add_bos_token", "false", "--output_path", "off.json")
    assert "(1,125 predictions in 75 windows of 16 tokens), no window begins with <bos>" in said
    figures = [json.loads((home / n).read_text()) for n in ("with.json", "off.json")]
    assert [f["begins_with"] for f in figures] == ["<bos>", None]
    assert figures[0]["perplexity"]["perplexity"] != figures[1]["perplexity"]["perplexity"]

    done = finetune(
        home, "--model_name_or_path", "pruned", "--train_file", "text.txt", "--output_dir", "run",
        "--max_steps", "2", "--packing", "true", "--packing_strategy", "wrapped", "--logging_steps", "1",
        "--eval_text_file", "text.txt", "--eval_strategy", "steps", "--eval_steps", "2",
        "--learning_rate", "0", "--seft.density=0.1",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "each row from the middle of a text begins with <bos>" in done.stdout
    assert "each window or request begins with <bos>" in done.stdout
    journal = [json.loads(line) for line in (home / "run/journal.jsonl").read_text().splitlines()]
    assert journal[0]["begins_with"] == "<bos>"
    # Nothing was learnt at a rate of 0, so that the figure is that of launch/evaluate.py.
    (measured,) = [r["value"] for r in journal if r.get("name") == "eval_perplexity"]
    assert measured == pytest.approx(figures[0]["perplexity"]["perplexity"], rel=1e-5)
    result = verify(home / "run")
    assert result.ok and result.record["begins_with"] == "<bos>"
