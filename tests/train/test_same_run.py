"""A run goes on with the data and the settings that it began with, or not at all."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from datasets import Dataset, concatenate_datasets

from seft_ds.train import same_run
from seft_ds.train.same_run import RunFacts, check_data, check_settings, digest_of, settings_of
from tests import forked
from tests.train.test_finetune import ROOT, make_models

ENV = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}


def tokens(*rows: list[int]) -> Dataset:
    return Dataset.from_dict({"input_ids": list(rows), "labels": list(rows)})


def test_the_digest_is_of_tokens_in_their_order() -> None:
    one = digest_of(tokens([1, 2], [3]))
    assert one == digest_of(concatenate_datasets([tokens([1, 2]), tokens([3])]))
    assert one == digest_of(tokens([3], [1, 2]).select([1, 0]))
    others = [tokens([3], [1, 2]), tokens([1], [2, 3]), tokens([1, 2]), tokens([1, 2], [4])]
    masked = Dataset.from_dict({"input_ids": [[1, 2], [3]], "labels": [[-100, 2], [3]]})
    assert len({digest_of(rows) for rows in others} | {one, digest_of(masked)}) == 6


def resolved(**run: Any) -> dict[str, Any]:
    usual = {
        "learning_rate": 1e-3,
        "seed": 42,
        "max_steps": -1,
        "num_train_epochs": 3.0,
        "save_steps": 5,
    }
    data = dict.fromkeys(same_run._DATA)
    method = {"method": "seft", "distill_weight": 0.5}
    return {"run": usual | run, "data": data, "method": method, "deepspeed": {}}


def test_settings_that_decide_about_steps(tmp_path: Path) -> None:
    mine = settings_of(resolved(), None)
    data = SimpleNamespace(train_file=None, dataset_name=["rows"])
    RunFacts(mine, tokens([1, 2]), data).write(tmp_path / same_run.NAME)
    for free in ({"save_steps": 1}, {"output_dir": "x"}, {"per_device_train_batch_size": 2}):
        check_settings(tmp_path, settings_of(resolved(**free), None))
    for name, value in (("learning_rate", 1e-4), ("seed", 7), ("num_train_epochs", 1.0)):
        with pytest.raises(ValueError, match=f"--{name} {value} .it had"):
            check_settings(tmp_path, settings_of(resolved(**{name: value}), None))
    optimizer = resolved() | {"deepspeed": {"optimizer": {"params": {"betas": [0.9, 0.99]}}}}
    with pytest.raises(ValueError, match="optimizer.params.betas"):
        check_settings(tmp_path, settings_of(optimizer, None))
    with pytest.raises(ValueError, match="--distill "):
        check_settings(tmp_path, settings_of(resolved(), tmp_path))
    check_data(tmp_path, RunFacts(mine, tokens([1, 2]), data))
    with pytest.raises(ValueError, match="1 rows then, 2 now"):
        check_data(tmp_path, RunFacts(mine, tokens([1, 2], [3]), data))


def test_streams_are_compared_by_their_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one")
    stream = tokens([1, 2]).to_iterable_dataset()
    run = RunFacts(
        {}, stream, SimpleNamespace(train_file=[str(tmp_path / "a.txt")], dataset_name=[])
    )
    run.write(tmp_path / same_run.NAME)
    (tmp_path / "b.txt").write_text("one")
    moved = SimpleNamespace(train_file=[str(tmp_path / "b.txt")], dataset_name=[])
    check_data(tmp_path, RunFacts({}, stream, moved))
    (tmp_path / "b.txt").write_text("two")
    with pytest.raises(ValueError, match=r"changed: .*b.txt"):
        check_data(tmp_path, RunFacts({}, stream, moved))


def test_a_checkpoint_that_does_not_say(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    check_settings(tmp_path, {"seed": 1})
    assert "an older version wrote it" in capsys.readouterr().err
    (tmp_path / same_run.NAME).write_text('{"format": "seft_ds-run-1", "settings": {}, "data": []}')
    with pytest.raises(ValueError, match="run_settings.json"):
        check_settings(tmp_path, {"seed": 1})


def test_a_run_does_not_go_on_with_something_else(tmp_path: Path) -> None:
    make_models(tmp_path)
    text = tmp_path / "text.txt"
    flags = [
        "--model_name_or_path", "pruned", "--train_file", "text.txt", "--max_length", "16",
        "--max_steps", "4", "--per_device_train_batch_size", "2",
        "--deepspeed", str(ROOT / "ds_configs/zero3.json"),
    ]  # fmt: skip

    def run(*more: str) -> Any:
        return forked.start("finetune", [*flags, *more], tmp_path, ENV).finish(240)

    done = run("--output_dir", "a", "--save_steps", "2", "--learning_rate", "1e-2")
    assert done.returncode == 0, done.stderr
    checkpoint = tmp_path / "a/checkpoint-2"
    listed = json.loads((checkpoint / "manifest.json").read_text())["files"]
    assert same_run.NAME in listed
    again = ["--output_dir", "b", "--resume", str(checkpoint)]
    done = run(*again, "--learning_rate", "1e-3")
    assert done.returncode == 2 and "--learning_rate 0.001 (it had 0.01)" in done.stderr
    text.write_text(text.read_text() + "\nthe quick brown fox")
    done = run(*again, "--learning_rate", "1e-2")
    assert done.returncode == 2 and "200 rows then, 201 now; changed: text.txt" in done.stderr
    assert "Traceback" not in done.stderr and not list(tmp_path.glob("b/*"))
