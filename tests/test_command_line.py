"""Mistakes in command lines and recipes: one line each, with the nearest right name, status 2."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from seft_ds.command_line import nearest
from seft_ds.train.arguments import parse
from tests import forked
from tests.train.test_arguments import base

MODEL = ["--model_name_or_path", "m"]
WRONG = {
    "finetune": [(["--learning_rat", "1"], "did you mean --learning_rate?")],
    "prune": [
        ([*MODEL, "--output_dir", "o", "--sparsty", "0.6"], "did you mean --sparsity?"),
        ([*MODEL, "--output_dir", "o", "--sparsity", "half"], "--sparsity 'half': wanted a number"),
        (["--output_dri", "o"], "did you mean --output_dir?"),
        (["--output_dir", "o"], "give --model_name_or_path"),
    ],
    "evaluate": [
        ([*MODEL, "--task", "x"], "did you mean --tasks?"),
        ([*MODEL, "--batch_size"], "--batch_size needs a value"),
    ],
    "verify": [(["m", "--al"], "did you mean --all?"), ([], "give directory")],
    "plan": [([*MODEL, "--gpu_memory", "80"], "did you mean --gpu_memory_gib?"),
             ([*MODEL, "--seft.intervall", "20"], "did you mean 'interval'?")],
    "export": [(["--chekpoint", "c"], "did you mean --checkpoint?")],
    "pack": [(["pak", "a", "b"], "did you mean pack?"), (["pack", "a"], "give target"),
             (["pack", "a", "b", "--fast"], "--fast")],
    "push": [(["m", "--repoid", "a/b"], "did you mean --repo_id?")],
    "card": [(["m", "--evalution", "r.json"], "did you mean --evaluation?")],
    "quickstart": [(["--smoek"], "did you mean --smoke?"),
                   (["--ranks", "two"], "--ranks 'two': wanted a whole number")],
    "quickstart_inputs": [(["--output", "x"], "did you mean --output_dir?")],
}  # fmt: skip


def test_every_script_says_in_one_line_what_is_wrong(tmp_path: Path) -> None:
    env = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    launch = Path(forked.ROOT / "launch")
    assert set(WRONG) == {path.stem for path in launch.glob("*.py")}
    for script, cases in WRONG.items():
        for argv, said in cases:
            done = forked.start(script, argv, tmp_path, env).finish(60)
            told = [line for line in done.stderr.splitlines() if "no GPU found" not in line]
            assert done.returncode == 2, f"{script} {argv}: {done.stderr}"
            assert len(told) == 1 and told[0].startswith("error: "), f"{script} {argv}: {told}"
            assert said in told[0], f"{script} {argv}: {told}"
    helped = forked.start("prune", ["--help"], tmp_path, env).finish(60)
    assert helped.returncode == 0 and "--sparsity" in helped.stdout
    assert not [name for name in os.listdir(tmp_path) if not name.startswith(".")]


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--max-step", "3"], "no flag --max-step; did you mean --max_steps?"),
        (["--max_steps", "ten"], "--max_steps 'ten': wanted a whole number"),
        (["--max_steps"], "--max_steps needs a value"),
        (["--save_strategy", "nope"], "wanted one of auto, no, steps, epoch"),
        (["--packing", "5"], "--packing '5': wanted true or false"),
        (["--packing", "true", "more"], "'more' follows no flag"),
        (["--interval", "20"], "did you mean --seft.interval?"),
        (["--seft.intervall", "20"], "--seft.intervall: there is no such setting; did you mean 'in"),
        (["--tasks", "piqa"], "did you mean --eval_tasks?"),
        (["--model", "m"], "did you mean --model_name_or_path?"),
        (["--hub_model", "m"], "no flag --hub_model"),
        (["--config=none.yaml"], "--config none.yaml: no such file"),
        (["--config"], "--config needs a value"),
        (["--lr", "1"], "--learning_rate"),
    ],
)  # fmt: skip
def test_flags_of_a_run(tmp_path: Path, flags: list[str], said: str) -> None:
    with pytest.raises(ValueError) as caught:
        parse([*base(tmp_path), *flags])
    assert said in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.parametrize(
    "text, said",
    [
        ("max_step: 3", "there is no setting 'max_step'; did you mean max_steps?"),
        ("max_steps: ten", "max_steps 'ten': wanted a whole number"),
        ("max_steps: [1, 2]", "max_steps: wanted one value, got 2"),
        ("max_steps: {a: 1}", "max_steps '{\"a\": 1}': wanted a whole number"),
        ("eval_tasks: true", "eval_tasks: wanted text, got true"),
        ("fp16: true", "fp16 true is not supported"),
        ("seft: {intervall: 3}", "intervall: there is no such setting; did you mean 'interval'?"),
        ("seft: {interval: x}", "interval = 'x'"),
        ("max_steps: 5\nmax_steps: 6", "max_steps is there twice"),
        ("no_dataloader_pin_memory: true", "write dataloader_pin_memory: false"),
        ("config: other.yaml", "there is no setting 'config'"),
        ("lr: 1", "give --learning_rate"),
        ("1: 2", "there is no setting '1'"),
        ("run_name: --x", "a value can't begin with --"),
        ("train_file: []", "wanted plain values"),
    ],
)
def test_entries_of_a_recipe_name_the_file(tmp_path: Path, text: str, said: str) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(text)
    with pytest.raises(ValueError) as caught:
        parse([*base(tmp_path), "--config", str(recipe)])
    assert "r.yaml: " in str(caught.value) or "r.yaml is not YAML" in str(caught.value)
    assert said in str(caught.value)


def test_what_yaml_means_is_taken(tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        "save_strategy: no\npacking: yes\nmax_grad_norm: 0.5\nmax_steps: null\nrun_name: -5\n"
    )
    run = parse([*base(tmp_path), "--config", str(recipe), "--max_grad_norm", "2"]).run
    assert (run.save_strategy, run.packing, run.max_grad_norm) == ("no", True, 2.0)
    assert (run.max_steps, run.run_name) == (-1, "-5")


@pytest.mark.parametrize(
    "name, near", [("sfet", "seft"), ("bf61", "bf16"), ("optimiser", "optimizer")]
)
def test_names_of_a_deepspeed_config(tmp_path: Path, name: str, near: str) -> None:
    flags = base(tmp_path)
    (tmp_path / "ds.json").write_text(f'{{"zero_optimization": {{"stage": 2}}, "{name}": {{}}}}')
    with pytest.raises(ValueError, match=f"ds.json: unknown name '{name}'.*did you mean '{near}'"):
        parse(flags)


def test_the_nearest_name() -> None:
    known = ["eval_tasks", "eval_text_file", "max_steps", "save_steps"]
    assert nearest("max_stepps", known) == ["max_steps"]
    assert nearest("tasks", known) == ["eval_tasks"]
    assert nearest("eval", known) == ["eval_tasks", "eval_text_file"]
    assert nearest("zzz", known) == []
