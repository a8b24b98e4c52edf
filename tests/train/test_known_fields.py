"""Arguments of transformers and TRL: each is known, and what a run can't do is refused in one line."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from trl import SFTConfig

from seft_ds.train.arguments import parse, parser_of_runs
from seft_ds.train.known_fields import CHOICES, FOREIGN, HONOURED, NO_EFFECT, REFUSED
from tests.train.test_arguments import base

FIELDS = {f.name for f in dataclasses.fields(SFTConfig) if f.init}


def test_every_argument_of_the_installed_versions_is_in_one_table() -> None:
    tables = [HONOURED, set(NO_EFFECT), set(REFUSED)]
    assert set().union(*tables) == FIELDS
    assert sum(map(len, tables)) == len(FIELDS), "one is in two tables"
    assert set(CHOICES) <= FIELDS
    flags = {a.dest for a in parser_of_runs()._actions}
    assert not flags & set(FOREIGN)


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--fp16", "true"], ["--fp16 true", "--dtype"]),
        (["--bf16", "true"], ["--bf16 true", "float32", "--dtype bfloat16"]),
        (["--fsdp", "full_shard"], ["--fsdp full_shard", "--deepspeed"]),
        (["--fsdp_config", "f.json"], ["--fsdp_config f.json", "--deepspeed"]),
        (["--torch_compile"], ["--torch_compile true"]),
        (["--push_to_hub", "true"], ["launch/push.py"]),
        (["--hub_strategy", "end"], ["launch/push.py"]),
        (["--load_best_model_at_end", "true"], ["launch/export.py"]),
        (["--auto_find_batch_size", "true"], ["launch/plan.py"]),
        (["--do_eval", "true"], ["nothing is evaluated", "--validation_file"]),
        (["--do_predict"], ["launch/evaluate.py"]),
        (["--no_dataloader_in_order"], ["--dataloader_in_order false"]),
        (["--use_peft"], ["--method lora"]),
        (["--deepspeed_plugin", "x"], ["--deepspeed ds_configs"]),
        (["--optim", "adamw_torhc"], ["did you mean adamw_torch?"]),
        (["--optim_args", "a=1"], ["--optim_args a=1", "none for this optimizer"]),
        (["--optim", "ademamix", "--optim_args", "gamma=1"], ["NAME=VALUE of alpha, beta1"]),
        (["--metric_for_best_model", "loss"], ["this run measures nothing"]),
        (["--save_strategy", "best"], ["--metric_for_best_model"]),
    ],
)  # fmt: skip
def test_what_a_run_cannot_do_is_refused(tmp_path: Path, flags: list[str], said: list[str]) -> None:
    with pytest.raises(ValueError) as caught:
        parse([*base(tmp_path), *flags])
    text = str(caught.value)
    assert all(part in text for part in said) and len(text) < 400, text


def test_a_token_is_never_repeated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("hub_token: hf_secret\n")
    for flags in (
        ["--hub_token", "hf_secret"],
        ["--push_to_hub_token", "hf_secret"],
        ["--config", str(recipe)],
    ):
        with pytest.raises(ValueError, match="hub_token is not supported") as caught:
            parse([*base(tmp_path), *flags])
        assert "hf_secret" not in str(caught.value) + "".join(capsys.readouterr())


def test_defaults_written_out_and_harmless_flags_are_taken(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = parse([*base(tmp_path), "--fp16", "false", "--push_to_hub", "false", "--do_train"]).run
    assert run.do_train and not capsys.readouterr().err
    parse([*base(tmp_path), "--ddp_timeout", "7200"])
    assert "warning: --ddp_timeout has no effect" in capsys.readouterr().err


def test_the_lowest_perplexity_is_the_best(tmp_path: Path) -> None:
    flags = ["--eval_text_file", str(tmp_path / "text.txt"), "--metric_for_best_model"]
    assert parse([*base(tmp_path), *flags, "perplexity"]).run.greater_is_better is False
    with pytest.raises(ValueError, match="measures perplexity"):
        parse([*base(tmp_path), *flags, "loss"])
    with pytest.raises(ValueError, match="measures perplexity"):  # tasks have no loss either
        parse([*base(tmp_path), *flags, "loss", "--eval_tasks", "arc_easy"])


def test_an_optimizer_by_flag_and_another_by_config(tmp_path: Path) -> None:
    flags = base(tmp_path)
    config = json.loads((tmp_path / "ds.json").read_text())
    config["optimizer"] = {"type": "AdamW", "params": {"lr": "auto"}}
    (tmp_path / "ds.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match='has its own "optimizer"'):
        parse([*flags, "--optim", "lion_8bit"])
    assert parse(flags).deepspeed["optimizer"]["type"] == "AdamW"
