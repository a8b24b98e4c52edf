"""launch/evaluate.py: what it refuses, and whole runs on one and two ranks."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.prune.models import WORDS, tiny_model, tiny_tokenizer
from tests.prune.test_launch import ROOT, load_script

script = load_script("evaluate")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("model")
    tiny_model().save_pretrained(folder / "tiny")
    tiny_tokenizer().save_pretrained(folder / "tiny")
    (folder / "text.txt").write_text(" ".join(WORDS) * 2)
    return folder / "tiny", folder / "text.txt"


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"text_file": None}, "nothing to measure"),
        ({"text_file": "/nowhere/text.txt"}, "no file"),
        ({"dtype": "int8"}, "wanted one of"),
        ({"batch_size": 0}, "above 0"),
        ({"limit": -1.0}, "above 0"),
        ({"output_path": "."}, "is a folder"),
        ({"model_name_or_path": "/nowhere/model"}, "no folder"),
    ],
)
def test_mistakes_are_refused_before_any_work(inputs, changes, message):
    model, text = inputs
    usual = {"model_name_or_path": str(model), "text_file": str(text)}
    with pytest.raises(ValueError, match=message):
        script.check(script.EvaluateArguments(**(usual | changes)))


def test_limits_and_names_read_as_written():
    assert script.limit_of(None) is None and script.limit_of(0.25) == 0.25
    assert script.limit_of(100.0) == 100 and isinstance(script.limit_of(100.0), int)
    assert script.task_names(" a, b,,c ") == ["a", "b", "c"]


def launch(launcher: list[str], *arguments: object) -> subprocess.CompletedProcess:
    command = [*launcher, str(ROOT / "launch" / "evaluate.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=280)


def test_one_and_two_ranks_write_the_same_figure(inputs, tmp_path):
    model, text = inputs
    figures = []
    two = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
    for launcher in (
        [sys.executable],
        [*two, "--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0"],
    ):
        output = tmp_path / f"{len(figures)}.json"
        usual = ["--model_name_or_path", model, "--text_file", text, "--max_length", 16]
        result = launch(launcher, *usual, "--output_path", output)
        assert result.returncode == 0, result.stderr
        assert result.stdout.count("perplexity ") == 1
        said = result.stdout + result.stderr
        assert "\r" not in said and "Loading weights" not in said and "it/s]" not in said, said
        figures.append(json.loads(output.read_text())["perplexity"])
    assert figures[0]["predictions"] == figures[1]["predictions"] == 7 * 15
    assert figures[0]["perplexity"] == pytest.approx(figures[1]["perplexity"], rel=1e-9)


def test_a_mistake_is_one_line_without_a_traceback(inputs):
    model, text = inputs
    result = launch(
        [sys.executable], "--model_name_or_path", model, "--text_file", text, "--max_length", 4096
    )
    assert result.returncode == 2
    assert "error: got --max_length 4096, but the model takes 32 tokens" in result.stderr
    assert "Traceback" not in result.stderr
