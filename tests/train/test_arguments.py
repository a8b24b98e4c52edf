"""Recipes and flags that can't be meant: refused before anything is built from them."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from seft_ds.checkpoint.model_files import load_config
from seft_ds.train.arguments import model_dtype, parse

BOMB = "a0: &a0 [x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 30)
)


def base(folder: Path) -> list[str]:
    (folder / "text.txt").write_text("a text\n")
    (folder / "model").mkdir(exist_ok=True)
    (folder / "model" / "config.json").write_text("{}")
    save_file({"w": torch.ones(2)}, folder / "model" / "model.safetensors")
    config = {"zero_optimization": {"stage": 2}, "bf16": {"enabled": "auto"}}
    (folder / "ds.json").write_text(json.dumps(config))
    return [
        "--model_name_or_path", str(folder / "model"), "--train_file", str(folder / "text.txt"),
        "--output_dir", str(folder / "out"), "--deepspeed", str(folder / "ds.json"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    "text",
    [BOMB, BOMB + "seft: {targets: *a29}\n", "a: &a [*a]\n", "a: !!python/object/apply:os.getcwd []\n",
     "a: !!int x\n", "a: !!bool x\n", "a: !!timestamp x\n", "a: 2026-13-45\n", "a: \x00\n", "a: 'b\n",
     "a: " + "9" * 5000 + "\n", "seft: " + "[" * 5000, "? [a]\n: 1\n", "- a\n"],
)  # fmt: skip
def test_bad_recipes_name_their_file(tmp_path: Path, text: str) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(text)
    with pytest.raises(ValueError, match="r.yaml") as caught:
        parse(["--config", str(recipe), *base(tmp_path)])
    assert type(caught.value) is ValueError and len(str(caught.value)) < 1000


def test_recipes_that_are_no_text(tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_bytes("max_steps: 5".encode("utf-16"))
    with pytest.raises(ValueError, match="r.yaml"):
        parse(["--config", str(recipe)])
    recipe.unlink()
    os.mkfifo(recipe)
    with pytest.raises(ValueError, match="no such file"):
        parse(["--config", str(recipe)])


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--learning_rate", "nan"], "--learning_rate nan: wanted a finite number"),
        (["--max_grad_norm", "inf"], "--max_grad_norm inf"),
        (["--accelerator_config", "none.json"], "transformers refuses"),
        (["--seft.targets", "[" * 5000], "targets = "),
        (["--seft.window", "9" * 5000], "window = "),
        (["--train_file", "x" * 5000], "no such file"),
        (["--output_dir", "a\x00b"], "NUL"),
        (["--report_to", "tensorbord"], "wanted none, or some of"),
        (["--eval_strategy", "steps"], "nothing to evaluate"),
        (["--eval_text_file", "none.txt"], "no file none.txt"),
        (["--eval_tasks", "arc_easy", "--eval_include_path", "none"], "no such folder"),
        (["--eval_tasks", "arc_easy", "--eval_limit", "1.5"], "whole number"),
        (["--eval_limit", "5"], "--eval_limit is of --eval_tasks"),
    ],
)
def test_bad_flags_are_named(tmp_path: Path, flags: list[str], said: str) -> None:
    with pytest.raises(ValueError) as caught:
        parse([*base(tmp_path), *flags])
    assert said in str(caught.value)


def test_when_a_run_saves_checkpoints(tmp_path: Path) -> None:
    plain = base(tmp_path)
    assert parse(plain).run.save_strategy == "no"
    run = parse([*plain, "--save_steps", "5"]).run
    assert (run.save_strategy, run.save_steps) == ("steps", 5)
    assert parse([*plain, "--save_steps=5"]).run.save_strategy == "steps"
    assert parse([*plain, "--save-steps", "5"]).run.save_strategy == "steps"
    assert parse([*plain, "--save_steps", "5", "--save_strategy", "no"]).run.save_strategy == "no"


def test_when_a_run_is_evaluated(tmp_path: Path) -> None:
    plain = base(tmp_path)
    assert parse(plain).run.eval_strategy == "no"
    run = parse([*plain, "--val_set_size", "2"]).run
    assert (run.eval_strategy, run.eval_steps) == ("steps", 0.1)
    run = parse([*plain, "--eval_text_file", str(tmp_path / "text.txt"), "--eval_steps", "7"]).run
    assert (run.eval_strategy, run.eval_steps) == ("steps", 7)
    assert parse([*plain, "--val_set_size", "2", "--eval_strategy", "no"]).run.eval_strategy == "no"


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"dtype": 5}', '{"dtype": {"a": "b"}}', "[" * 100_000]
)
def test_a_models_config_that_is_damaged(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match="config.json of .* cannot be used") as caught:
        load_config(tmp_path)
    assert len(str(caught.value)) < 1000


def test_the_dtype_is_that_of_the_files(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"dtype": "float32"}')
    many, few = torch.ones(9, dtype=torch.bfloat16), torch.ones(2)
    save_file({"a": many, "b": few}, tmp_path / "model.safetensors")
    assert model_dtype(tmp_path, "auto") == torch.bfloat16
    assert model_dtype(tmp_path, "float32") == torch.float32
    save_file({"a": many.half()}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="stored in float16; train it with --dtype bfloat16"):
        model_dtype(tmp_path, "auto")
