"""Flags of earlier versions of transformers and TRL."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from seft_ds.train.arguments import (
    DataArguments,
    EvaluationArguments,
    MethodArguments,
    ModelArguments,
    RunArguments,
    parse,
)
from seft_ds.train.old_names import CHANGED, GONE, RENAMED, translate
from tests.train.test_arguments import base

CLASSES = (MethodArguments, ModelArguments, DataArguments, EvaluationArguments, RunArguments)
FIELDS = {f.name for c in CLASSES for f in dataclasses.fields(c)}


def test_what_is_translated_is_old_and_what_it_becomes_exists() -> None:
    # resume_from_checkpoint is still a name, but runs here resume by another one.
    assert not FIELDS & {*RENAMED, *GONE, *CHANGED} - {"resume_from_checkpoint"}
    assert set(RENAMED.values()) <= FIELDS


@pytest.mark.parametrize(
    "old, new",
    [
        (["--warmup_ratio", "0.1"], ["--warmup_steps", "0.1"]),
        (["--evaluation-strategy=epoch"], ["--eval_strategy", "epoch"]),
        (["--no_cuda"], ["--use_cpu"]),
        (["--group_by_length", "true"], ["--train_sampling_strategy", "group_by_length"]),
        (["--group_by_length", "false"], []),
        (["--validation_split_percentage", "5"], ["--val_set_size", "0.05"]),
        (["--resume_from_checkpoint", "true"], ["--resume", "auto"]),
        (["--resume_from_checkpoint", "RUN/checkpoint-5"], ["--resume", "RUN/checkpoint-5"]),
        (["--save_safetensors", "false", "--seed", "1"], ["--seed", "1"]),
    ],
)
def test_flags_by_todays_names(old: list[str], new: list[str]) -> None:
    current, said = translate(["--a", "1", "2", *old])
    assert current == ["--a", "1", "2", *new] and len(said) == 1
    assert translate(current) == (current, [])


def test_an_old_recipe_is_taken_with_warnings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "old.yaml"
    recipe.write_text("warmup_ratio: 0.25\nmax_seq_length: 64\ntorch_dtype: float32\n")
    arguments = parse(["--config", str(recipe), *base(tmp_path), "--max_steps", "8"])
    assert arguments.run.get_warmup_steps(8) == 2 and arguments.run.max_length == 64
    assert arguments.model.dtype == "float32"
    said = capsys.readouterr().err
    assert said.count("warning: ") == 3 and "--warmup_ratio is now --warmup_steps 0.25" in said
    with pytest.raises(ValueError, match="wanted a number"):
        parse(["--validation_split_percentage", "some", *base(tmp_path)])
