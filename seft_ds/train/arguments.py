"""The arguments of `launch/finetune.py`: names as in transformers and TRL, plus a few of our own.

A run is described by `--config FILE.yaml` with flags on top. `--seft.NAME VALUE` sets one entry of the
"seft" block of the DeepSpeed config.
"""

from __future__ import annotations

import json
import math
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import HfArgumentParser
from trl import SFTConfig

from seft_ds.baselines.methods import METHODS, find_method, fixed_settings, rank_of
from seft_ds.config import load_deepspeed_config, with_overrides
from seft_ds.json_file import read_object, read_text, shown

_RECIPE_BYTES = 1 << 20


@dataclass
class ModelArguments:
    """Which model is repaired."""

    model_name_or_path: str = field(metadata={"help": "folder of the pruned model"})
    dtype: str = field(default="auto", metadata={"help": "auto (as stored), float32 or bfloat16"})


@dataclass
class MethodArguments:
    """How it is repaired: SEFT, or what it is compared with."""

    method: str = field(default="seft", metadata={"help": ", ".join(METHODS)})
    trainable: str | None = field(
        default=None,
        metadata={"help": 'how much trains: a count, or "rank=8" for as many as LoRA of that rank'},
    )
    lora_alpha: float | None = field(
        default=None,
        metadata={"help": "scale of adapters times their rank; default: twice the rank"},
    )
    lora_dropout: float | None = field(
        default=None, metadata={"help": "of the adapters' input; default: 0"}
    )
    calibration_rows: int = field(
        default=128, metadata={"help": "training sequences that lora_pruned scores weights with"}
    )
    distill: str | None = field(
        default=None, metadata={"help": "folder of the dense model to learn from as well"}
    )
    distill_weight: float = field(
        default=0.5, metadata={"help": "share of the dense model in the loss, above 0 and up to 1"}
    )


@dataclass
class DataArguments:
    """What it is repaired with: one of a file and a dataset name."""

    train_file: str | None = field(
        default=None,
        metadata={"help": ".txt (a text a line), .json, .jsonl, .csv, .parquet; also .gz"},
    )
    dataset_name: str | None = field(default=None, metadata={"help": "name of a datasets dataset"})
    dataset_config: str | None = field(default=None, metadata={"help": "its configuration"})
    validation_file: str | None = field(default=None, metadata={"help": "the same, for evaluation"})
    max_train_samples: int | None = field(default=None, metadata={"help": "use the first N rows"})


@dataclass
class RunArguments(SFTConfig):
    """TRL's SFTConfig (all of transformers' TrainingArguments) and how a run starts and ends."""

    resume: str = field(
        default="never", metadata={"help": "auto (the newest checkpoint), never, or a checkpoint"}
    )
    overwrite: bool = field(default=False, metadata={"help": "replace the run in output_dir"})
    dry_run: bool = field(default=False, metadata={"help": "show targets and a sample, then stop"})
    # SFTConfig's defaults are for dense models. AdamW moves a delta by about the learning rate a step,
    # and few weights have to move far: 5e-3 repaired a 135M model in 100 steps (docs/results.md).
    learning_rate: float = field(default=1e-3, metadata={"help": "of the deltas; try 1e-3 to 5e-3"})
    save_strategy: str = field(default="no", metadata={"help": "no, steps or epoch"})
    report_to: str = field(default="none", metadata={"help": "none, tensorboard, wandb"})


@dataclass
class Arguments:
    method: MethodArguments
    model: ModelArguments
    data: DataArguments
    run: RunArguments
    deepspeed: dict[str, Any]  # the config, with --seft.* merged in


def parse(argv: list[str]) -> Arguments:
    """Flags and YAML to checked arguments. Call after `init_ranks()`: transformers looks for the ranks.

    Raises:
        ValueError: an unknown or bad setting, a missing file, no DeepSpeed config.
    """
    argv, seft_flags = split_seft_flags(argv)
    method_by_flag = any(flag.partition("=")[0] == "--method" for flag in argv)
    argv, seft_yaml = _expand_yaml(argv)
    parser = HfArgumentParser(
        [MethodArguments, ModelArguments, DataArguments, RunArguments],  # type: ignore[arg-type]
        allow_abbrev=False,
    )
    values = vars(parser.parse_args(argv))
    if not values.get("deepspeed"):
        raise ValueError(
            "SEFT runs on DeepSpeed: give a config, for example --deepspeed ds_configs/zero3.json"
        )
    if values["trainable"] is not None:
        seft_flags = _with_trainable(seft_flags, values["trainable"])
    # What a recipe says gives way to a method that is named by flag.
    chosen = seft_flags if method_by_flag else _on_top(seft_yaml, seft_flags)
    fixed = fixed_settings(values["method"], chosen)
    overrides = _on_top(_on_top(seft_yaml, seft_flags), fixed)
    config = with_overrides(load_deepspeed_config(values["deepspeed"]), overrides)
    values["deepspeed"] = config
    _check_values(values)
    _check_method(values)
    if not values["output_dir"]:
        raise ValueError("give --output_dir, the folder that the run and the model go to")
    if values["save_only_model"]:
        raise ValueError(
            "--save_only_model would leave checkpoints without weights: those of a SEFT checkpoint are in "
            "the engine's files; leave it out, and make models with launch/export.py"
        )
    if values["load_best_model_at_end"]:
        raise ValueError(
            "--load_best_model_at_end is not supported; leave it out, and make a model of the best "
            "checkpoint with launch/export.py"
        )
    _adapt_to_machine(values)
    try:
        method, model, data, run = parser.parse_dict(values)
    except (ValueError, AttributeError, KeyError, TypeError, ArithmeticError, OSError) as error:
        # Some of its arguments are objects in JSON, which transformers takes apart without looking.
        raise ValueError(
            'transformers refuses an argument, or a section of the DeepSpeed config beside "seft": '
            f"{type(error).__name__}: {error}"
        ) from error
    return Arguments(method, model, data, run, config)


def _on_top(lower: dict[str, Any], upper: dict[str, Any]) -> dict[str, Any]:
    """`upper` over `lower`. Both `trainable` and `density` set the number of slots: either replaces both."""
    rest = dict(lower)
    for one, other in (("trainable", "density"), ("density", "trainable")):
        if one in upper:
            rest.pop(other, None)
    return {**rest, **upper}


def _with_trainable(seft_flags: dict[str, Any], text: str) -> dict[str, Any]:
    """`--trainable` is short for `--seft.trainable`."""
    value = _plain_value(text)
    for name in ("trainable", "density"):
        if name in seft_flags and seft_flags[name] != value:
            raise ValueError(
                f"--trainable {text:.40} and --seft.{name} {shown(seft_flags[name])} both say how much "
                "trains: give one of them"
            )
    return {**seft_flags, "trainable": value}


def _check_method(values: dict[str, Any]) -> None:
    """ValueError for arguments that the method or distillation can't be run with."""
    name, method = values["method"], find_method(values["method"])
    if method.adapter is not None:
        rank_of(values["deepspeed"]["seft"].get("trainable"), name)
    if method.adapter is None:
        for flag in ("lora_alpha", "lora_dropout"):
            if values[flag] is not None:
                raise ValueError(
                    f"--{flag} is of adapters, and --method {name} has none; leave it out"
                )
    else:
        if values["resume"] != "never" or values["save_strategy"] != "no":
            raise ValueError(
                f"--method {name} is not resumed: DeepSpeed's own checkpoints of it would fit one number of "
                "ranks only and are not checked here; leave out --resume and --save_strategy"
            )
        alpha, dropout = values["lora_alpha"], values["lora_dropout"]
        if (alpha is not None and alpha <= 0) or (dropout is not None and not 0 <= dropout < 1):
            raise ValueError(
                f"--lora_alpha {alpha} --lora_dropout {dropout}: wanted a number above 0, and one from 0 "
                "up to but without 1"
            )
        if values["calibration_rows"] < 1:
            raise ValueError(f"--calibration_rows {values['calibration_rows']}: wanted 1 or more")
    if not 0 < values["distill_weight"] <= 1:
        raise ValueError(f"--distill_weight {values['distill_weight']}: wanted above 0 and up to 1")
    if values["distill"] and (values["loss_type"] == "dft" or values["label_smoothing_factor"]):
        raise ValueError(
            "--distill mixes its own loss; leave out --loss_type dft and --label_smoothing_factor"
        )


def split_seft_flags(argv: list[str]) -> tuple[list[str], dict[str, Any]]:
    """Take `--seft.NAME VALUE` and `--seft.NAME=VALUE` out of the flags."""
    rest, found = [], {}
    flags = iter(argv)
    for flag in flags:
        if not flag.startswith("--seft."):
            rest.append(flag)
            continue
        name, eq, value = flag.removeprefix("--seft.").partition("=")
        if not eq:
            value = next(flags, "")
        if value == "" or value.startswith("--"):
            raise ValueError(f"--seft.{name} needs a value")
        found[name] = _plain_value(value)
    return rest, found


def _plain_value(text: str) -> Any:
    """A number, true, false, null or list as JSON writes them; anything else is a string (2:4)."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


class RecipeLoader(yaml.SafeLoader):
    """YAML in which 2:4 is a string (not 124, a number to base 60) and 5e-3 a number.

    Without aliases: a few lines of them stand for more text than any memory holds.
    """

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError(
                f"*{self.peek_event().anchor}: write the value out where it is used"
            )
        return super().compose_node(parent, index)


_INT, _FLOAT = "tag:yaml.org,2002:int", "tag:yaml.org,2002:float"
RecipeLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in (_INT, _FLOAT)]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
RecipeLoader.add_implicit_resolver(_INT, re.compile(r"[-+]?\d+$"), list("-+0123456789"))
RecipeLoader.add_implicit_resolver(
    _FLOAT, re.compile(r"[-+]?(\d+\.\d*|\.?\d+)([eE][-+]?\d+)?$"), list("-+.0123456789")
)


def _expand_yaml(argv: list[str]) -> tuple[list[str], dict[str, Any]]:
    """Put the entries of `--config FILE.yaml` before the flags, so that flags win."""
    if "--config" not in argv:
        return argv, {}
    at = argv.index("--config")
    path = Path(argv[at + 1]) if at + 1 < len(argv) else Path("")
    if not os.path.isfile(path):
        raise ValueError(f"--config {path}: no such file")
    text = read_text(path, _RECIPE_BYTES)
    try:
        recipe = yaml.load(text, RecipeLoader) or {}
    except Exception as error:  # yaml's constructors raise whatever the conversion of a value meets
        reason = f"{type(error).__name__}: {error}"[:300]
        raise ValueError(f"--config {path} is not YAML that can be read ({reason})") from None
    if not isinstance(recipe, dict):
        raise ValueError(f"--config {path}: wanted NAME: VALUE lines, got {type(recipe).__name__}")
    seft = recipe.pop("seft", {}) or {}
    if not isinstance(seft, dict):
        raise ValueError(f"--config {path}: seft: wanted NAME: VALUE lines, got {shown(seft)}")
    flags: list[str] = []
    for name, value in recipe.items():
        if value is None:
            continue
        flags.append(f"--{name}")
        if isinstance(value, list):
            flags += [str(v) for v in value]
        else:
            flags.append(json.dumps(value) if isinstance(value, dict) else str(value))
    return flags + argv[:at] + argv[at + 2 :], seft


def _check_values(values: dict[str, Any]) -> None:
    for name, value in values.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"--{name} {value}: wanted a finite number")
        if isinstance(value, str) and "\x00" in value:
            raise ValueError(f"--{name} {shown(value)}: wanted text without NUL")
    if bool(values["train_file"]) == bool(values["dataset_name"]):
        raise ValueError("give one of --train_file and --dataset_name")
    for name in ("train_file", "validation_file"):
        if values[name] and not os.path.isfile(values[name]):
            raise ValueError(f"--{name} {values[name]}: no such file")


def _adapt_to_machine(values: dict[str, Any]) -> None:
    if not torch.cuda.is_available():
        values["use_cpu"] = True
        values["dataloader_pin_memory"] = False
    values["bf16"] = model_dtype(values["model_name_or_path"], values["dtype"]) == torch.bfloat16


def model_dtype(folder: str, name: str) -> torch.dtype:
    """The dtype to train in: the one named, or the one that the model's config.json states.

    Raises:
        ValueError: another name, or a model in a dtype that we don't train in.
    """
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    if name == "auto":
        path = Path(folder) / "config.json"
        stored = read_object(path) if os.path.isfile(path) else {}
        name = str(stored.get("dtype") or stored.get("torch_dtype") or "float32")
        if name == "float16":
            raise ValueError(
                f"{folder} is stored in float16; train it with --dtype bfloat16 or float32"
            )
    if name not in known:
        raise ValueError(f"dtype {shown(name)}: wanted auto, float32 or bfloat16")
    return known[name]
