"""launch/prune.py: what it refuses, and a whole run with its files."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from seft_ds.prune.empty import empty_model
from tests.prune.models import WORDS, saved, tiny_model

ROOT = Path(__file__).resolve().parents[2]


def load_script(name: str):
    """The launch script as a module."""
    spec = importlib.util.spec_from_file_location(f"launch_{name}", ROOT / "launch" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


script = load_script("prune")


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> Path:
    return saved(tiny_model(dtype=torch.bfloat16), tmp_path_factory.mktemp("dense") / "tiny")


@pytest.fixture
def text(tmp_path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("\n".join(" ".join(WORDS[i:] + WORDS[:i]) for i in range(10)))
    return path


def options(dense, tmp_path, **changes):
    usual = {"model_name_or_path": str(dense), "output_dir": str(tmp_path / "out")}
    usual |= {"method": "magnitude", "sparsity": 0.5}
    return script.PruneArguments(**(usual | changes))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"sparsity": None}, "exactly one"),
        ({"pattern": "2:4"}, "exactly one"),
        ({"sparsity": 60}, "between 0 and 1"),
        ({"sparsity": None, "pattern": "4:2"}, "N:M"),
        ({"method": "oracle"}, "wanda, magnitude, sparsegpt"),
        (
            {"budget": "column"},
            "--budget column; for --method magnitude wanted auto or one of weight",
        ),
        ({"method": "wanda", "budget": "global"}, "row, weight"),
        ({"method": "sparsegpt", "budget": "row"}, "auto or one of weight"),
        ({"sparsity": None, "pattern": "2:4", "budget": "row"}, "leave both out"),
        ({"sparsity": None, "pattern": "2:4", "layerwise": "owl"}, "leave both out"),
        ({"layerwise": "owl"}, "owl looks at the inputs"),
        ({"layerwise": "plan"}, "uniform, owl"),
        ({"owl_lambda": 2.0}, "--owl_lambda 2.0"),
        ({"dtype": "int4"}, "auto, float32, bfloat16"),
        ({"method": "wanda", "calibration_file": "/nowhere/x.txt"}, "no file"),
        (
            {"method": "wanda", "calibration_file": "x", "calibration_dataset": "y"},
            "give one source",
        ),
        ({"method": "wanda", "calibration_samples": 0}, "at least 1 and 2"),
        ({"model_name_or_path": "/nowhere/model"}, "no folder"),
    ],
)
def test_mistakes_are_refused_before_any_work(dense, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        script.check(options(dense, tmp_path, **changes))


def test_folders_that_hold_no_model_are_refused(dense, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ValueError, match="no config.json"):
        script.check(options(dense, tmp_path, model_name_or_path=str(empty)))
    (empty / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="holds no weights"):
        script.check(options(dense, tmp_path, model_name_or_path=str(empty)))


def test_outputs_that_would_harm_are_refused(dense, tmp_path):
    output = tmp_path / "out"
    output.mkdir()
    script.check(options(dense, tmp_path))  # an empty folder is fine
    (output / "notes").write_text("keep me")
    with pytest.raises(ValueError, match="not empty.*--overwrite"):
        script.check(options(dense, tmp_path))
    with pytest.raises(ValueError, match="no model"):
        script.check(options(dense, tmp_path, overwrite=True))
    (output / "config.json").write_text("{}")
    script.check(options(dense, tmp_path, overwrite=True))
    for harmful in (dense, dense.parent):
        with pytest.raises(ValueError, match="holds the dense model"):
            script.check(options(dense, tmp_path, output_dir=str(harmful), overwrite=True))


def test_a_failed_replacement_keeps_the_old_model(tmp_path):
    output = tmp_path / "out"
    output.mkdir()
    (output / "config.json").write_text("old")
    with pytest.raises(RuntimeError), script.replacing(output):
        output.mkdir()
        (output / "config.json").write_text("half")
        raise RuntimeError
    assert (output / "config.json").read_text() == "old"
    work = script.Work(output)
    work.begin({}, overwrite=False)
    with pytest.raises(RuntimeError), script.replacing(output):
        work.begin_assembling()
        raise RuntimeError
    assert (output / "config.json").read_text() == "old" and work.folder.is_dir()
    assert not script.is_resumable(output), "an old model is no half-written new one"
    work.remove()
    with script.replacing(output):
        output.mkdir()
        (output / "config.json").write_text("new")
    assert (output / "config.json").read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def launch(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "launch" / "prune.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=240)


def test_a_whole_run(dense, text, tmp_path):
    usual = ["--model_name_or_path", dense, "--output_dir", tmp_path / "out", "--sparsity", 0.6]
    usual += ["--calibration_file", text, "--calibration_samples", 4, "--max_length", 16]
    result = launch(*usual, "--local_rank=0")
    assert result.returncode == 0, result.stderr
    assert result.stderr.splitlines() in ([], ["no GPU found: running on CPU"])
    assert "\r" not in result.stdout
    record = json.loads((tmp_path / "out" / "sparsity.json").read_text())
    assert record["base_model"] == "tiny"
    assert record["pruning"]["method"] == "wanda" and record["pruning"]["dtype"] == "bfloat16"
    assert record["pruning"]["calibration_file"] == "text.txt"
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert len(record["targets"]) == 21
    for name in record["targets"]:
        columns = weights[name].shape[1]
        assert ((weights[name] == 0).sum(dim=1) == int(0.6 * columns)).all(), name
    again = launch(*usual)
    assert again.returncode == 2
    assert again.stderr.strip().splitlines()[-1].startswith("error: ")
    assert "not empty" in again.stderr and "Traceback" not in again.stderr


def test_a_dry_run_tells_the_plan_and_writes_nothing(dense, tmp_path, capsys):
    script.prune(options(dense, tmp_path, method="sparsegpt", dry_run=True))
    said = capsys.readouterr().out
    assert "sparsegpt, 0.5 per weight: 21 weights in 3 blocks, 5,760 entries" in said
    assert "memory of a rank while pruning" in said and "hidden states" in said
    assert not (tmp_path / "out").exists()


def test_the_built_in_text_gives_what_it_has(dense, tmp_path, capsys):
    chosen = options(dense, tmp_path, method="wanda", calibration_samples=10**6, max_length=32)
    model = empty_model(dense, torch.float32, torch.device("cpu"))
    found, begins_with = script.calibration(chosen, dense, model)
    assert 1000 < len(found) < 10**6 and found.shape[1] == 32 and begins_with is None
    said = capsys.readouterr().out
    assert f"{len(found)} sequences of 32 tokens of Python's own manual, which has no more" in said
    few, _ = script.calibration(
        options(dense, tmp_path, method="wanda", max_length=8), dense, model
    )
    assert few.shape == (128, 8) and "no more" not in capsys.readouterr().out
    with pytest.raises(ValueError, match="the model takes 32 tokens"):
        script.calibration(options(dense, tmp_path, method="wanda"), dense, model)
