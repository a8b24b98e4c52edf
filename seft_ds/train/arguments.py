"""The arguments of `launch/finetune.py`: names as in transformers and TRL, plus a few of our own.

A run is described by `--config FILE.yaml` with flags on top. `--seft.NAME VALUE` sets one entry of the
"seft" block of the DeepSpeed config.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from trl import SFTConfig

from seft_ds.baselines.methods import METHODS, find_method, fixed_settings, rank_of
from seft_ds.checkpoint.model_files import main_dtype
from seft_ds.config import SeftConfig, load_deepspeed_config, with_overrides
from seft_ds.console import model_folder
from seft_ds.json_file import shown
from seft_ds.tensor_files import stored_tensors
from seft_ds.train.evaluating import check_evaluation
from seft_ds.train.flags import (
    DataclassParser,
    flag_names,
    plain_value,
    split_seft_flags,
    warn,
    with_recipe,
)
from seft_ds.train.journaling import check_reporters
from seft_ds.train.known_fields import (
    CHOICES,
    FOREIGN,
    NO_EFFECT,
    REFUSED,
    check_best,
    check_fields,
    check_optimizer,
)
from seft_ds.train.sources import check_sources


@dataclass
class ModelArguments:
    """Which model is repaired."""

    model_name_or_path: str = field(metadata={"help": "folder of the pruned model"})
    dtype: str = field(default="auto", metadata={"help": "auto (as stored), float32 or bfloat16"})
    attn_implementation: str | None = field(
        default=None,
        metadata={"help": "sdpa, eager, flash_attention_2 ...; default: what transformers chooses"},
    )


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
    """What it is repaired with: files, or datasets by name, and what is held out of them (docs/data.md)."""

    train_file: list[str] | None = field(
        default=None,
        metadata={
            "help": "one or more of .txt (a text a line), .json, .jsonl, .csv, .parquet; also .gz"
        },
    )
    dataset_name: list[str] | None = field(
        default=None,
        metadata={
            "help": "one or more names of datasets, or folders; NAME:CONFIG for one of its configurations"
        },
    )
    dataset_config: str | None = field(
        default=None, metadata={"help": "configuration of the one dataset that is named"}
    )
    dataset_train_split: str = field(
        default="train", metadata={"help": "split of the datasets to train on; train[:10%%] works"}
    )
    mix_weights: list[float] | None = field(
        default=None,
        metadata={
            "help": "of each file or dataset, its share of the rows; default: all rows, one after the other"
        },
    )
    rename_columns: list[str] | None = field(
        default=None,
        metadata={"help": "OLD=NEW of each column with another name, such as question=prompt"},
    )
    streaming: bool = field(
        default=False, metadata={"help": "read rows while training; needs --max_steps"}
    )
    validation_file: str | None = field(
        default=None, metadata={"help": "a file like those to train on, for evaluation"}
    )
    dataset_test_split: str | None = field(
        default=None, metadata={"help": "split of the dataset for evaluation"}
    )
    val_set_size: float | None = field(
        default=None,
        metadata={"help": "hold out rows for evaluation: a share below 1, or a number of them"},
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "use the first N rows"})
    max_eval_samples: int | None = field(
        default=None, metadata={"help": "evaluate on the first N rows"}
    )


@dataclass
class EvaluationArguments:
    """What is measured beside the loss at each evaluation of a run (docs/evaluation.md)."""

    eval_tasks: str | None = field(default=None, metadata={"help": "lm-eval tasks, comma between"})
    eval_include_path: str | None = field(
        default=None, metadata={"help": "folder of the tasks' YAML files"}
    )
    eval_limit: float | None = field(
        default=None, metadata={"help": "documents of each task; below 1 a share of them"}
    )
    eval_text_file: str | None = field(
        default=None, metadata={"help": "perplexity on a .txt, .json or .jsonl file, also .gz"}
    )
    eval_max_windows: int | None = field(
        default=None, metadata={"help": "only the text's first windows of max_length tokens"}
    )


@dataclass
class RunArguments(SFTConfig):
    """TRL's SFTConfig (all of transformers' TrainingArguments) and how a run starts and ends."""

    resume: str = field(
        default="never", metadata={"help": "auto (the newest checkpoint), never, or a checkpoint"}
    )
    overwrite: bool = field(default=False, metadata={"help": "replace the run in output_dir"})
    dry_run: bool = field(default=False, metadata={"help": "show targets and a sample, then stop"})
    add_bos_token: bool = field(
        default=True,
        metadata={
            "help": "begin windows and rows cut from a text with what the tokenizer puts before one"
        },
    )
    # SFTConfig's defaults are for dense models. AdamW moves a delta by about the learning rate a step,
    # and few weights have to move far: 5e-3 repaired a 135M model in 100 steps (docs/results.md).
    learning_rate: float = field(default=1e-3, metadata={"help": "of the deltas; try 1e-3 to 5e-3"})
    eval_strategy: str = field(
        default="auto",
        metadata={
            "help": "no, steps, epoch; auto: ten times a run if there is something to evaluate"
        },
    )
    save_strategy: str = field(
        default="auto",
        metadata={
            "help": "no, steps, epoch or best; auto: steps if --save_steps is given, else no"
        },
    )
    log_level_replica: str = field(
        default="error", metadata={"help": "of other ranks than the first of each machine"}
    )
    report_to: list[str] = field(
        default_factory=lambda: ["none"],
        metadata={"help": "none, or some of tensorboard, wandb ..."},
    )
    report_each_weight: bool = field(
        default=False, metadata={"help": "sparsity and churn of each weight too, for report_to"}
    )


@dataclass
class Arguments:
    method: MethodArguments
    model: ModelArguments
    data: DataArguments
    evaluation: EvaluationArguments
    run: RunArguments
    deepspeed: dict[str, Any]  # the config, with --seft.* merged in


def parse(argv: list[str]) -> Arguments:
    """Flags and YAML to checked arguments. Call after `init_ranks()`: transformers looks for the ranks.

    Raises:
        ValueError: an unknown or bad setting, a missing file, no DeepSpeed config.
    """
    argv, seft_flags = split_seft_flags(argv)
    method_by_flag = "method" in flag_names(argv)
    parser = parser_of_runs()
    argv, recipe = with_recipe(argv, parser)
    seft_yaml = recipe.seft
    values = vars(parser.parse_args(argv))
    check_fields(values, parser.get_default, recipe.called, warn)
    check_best(values)
    if values["save_strategy"] == "auto":
        values["save_strategy"] = "steps" if "save_steps" in flag_names(argv) else "no"
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
    config = with_overrides(_deepspeed_config(values["deepspeed"]), overrides)
    values["deepspeed"] = config
    check_optimizer(values, parser.get_default("optim"))
    _check_values(values)
    _check_method(values)
    if not values["output_dir"]:
        raise ValueError("give --output_dir, the folder that the run and the model go to")
    _adapt_to_machine(values)
    try:
        method, model, data, evaluation, run = parser.parse_dict(values)
    except (ValueError, AttributeError, KeyError, TypeError, ArithmeticError, OSError) as error:
        # Some of its arguments are objects in JSON, which transformers takes apart without looking.
        raise ValueError(
            'transformers refuses an argument, or a section of the DeepSpeed config beside "seft": '
            f"{type(error).__name__}: {error}"
        ) from error
    return Arguments(method, model, data, evaluation, run, config)


def parser_of_runs() -> DataclassParser:
    """The parser of all flags but `--config` and `--seft.*`, which are taken out before."""
    parser = DataclassParser(
        [MethodArguments, ModelArguments, DataArguments, EvaluationArguments, RunArguments]  # type: ignore[list-item]
    )
    parser.also_known = ["config", *(f"seft.{name}" for name in SeftConfig.model_fields)]
    parser.foreign, parser.unlikely = FOREIGN, {*REFUSED, *NO_EFFECT}
    for action in parser._actions:
        action.choices = CHOICES.get(action.dest, action.choices)
    return parser


def _deepspeed_config(source: Any) -> dict[str, Any]:
    """The DeepSpeed config. Raises ValueError that names the file."""
    try:
        return load_deepspeed_config(source)
    except ValueError as error:
        named = "" if str(source) in str(error) else f"--deepspeed {source!s:.200}: "
        raise ValueError(f"{named}{error}") from None


def _on_top(lower: dict[str, Any], upper: dict[str, Any]) -> dict[str, Any]:
    """`upper` over `lower`. Both `trainable` and `density` set the number of slots: either replaces both."""
    rest = dict(lower)
    for one, other in (("trainable", "density"), ("density", "trainable")):
        if one in upper:
            rest.pop(other, None)
    return {**rest, **upper}


def _with_trainable(seft_flags: dict[str, Any], text: str) -> dict[str, Any]:
    """`--trainable` is short for `--seft.trainable`."""
    value = plain_value(text)
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
                "ranks only and are not checked here; leave out --resume, --save_strategy and --save_steps"
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


def _check_values(values: dict[str, Any]) -> None:
    for name, value in values.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"--{name} {value}: wanted a finite number")
        if isinstance(value, str) and "\x00" in value:
            raise ValueError(f"--{name} {shown(value)}: wanted text without NUL")
    check_reporters(values["report_to"])
    check_sources(values)
    check_evaluation(values)


def _adapt_to_machine(values: dict[str, Any]) -> None:
    if values["streaming"] and values["accelerator_config"] is None:
        # Each rank reads the stream and takes its rows: packed rows can't be dealt out by one of them.
        values["accelerator_config"] = {"dispatch_batches": False}
    if not torch.cuda.is_available():
        values["use_cpu"] = True
        values["dataloader_pin_memory"] = False
    elif values["use_cpu"]:
        raise ValueError(
            "--use_cpu true on a machine with GPUs: start with CUDA_VISIBLE_DEVICES= instead"
        )
    _rename_checkpointing(values)
    dtype = model_dtype(model_folder(values["model_name_or_path"]), values["dtype"])
    in_bf16 = dtype == torch.bfloat16
    if values["bf16"] is not None and values["bf16"] != in_bf16:
        given, name = str(values["bf16"]).lower(), str(dtype).removeprefix("torch.")
        raise ValueError(
            f"--bf16 {given}, but the model trains in {name} "
            "(--dtype, or as it is stored): give --dtype bfloat16 or float32, and leave --bf16 out"
        )
    values["bf16"] = in_bf16


def _rename_checkpointing(values: dict[str, Any]) -> None:
    """Recent versions of transformers warn of the older name, which TRL's defaults still use."""
    for old in ("gradient_checkpointing", "gradient_checkpointing_kwargs"):
        new = old.replace("gradient", "activation")
        if new in values and values[new] is None:
            values[new], values[old] = values[old], None


def model_dtype(folder: Path, name: str) -> torch.dtype:
    """The dtype to train in: the one named, or the one that most of the model's numbers are stored in.

    Raises:
        ValueError: another name, a model in a dtype that we don't train in, or files that can't be read.
    """
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    if name == "auto":
        stored = main_dtype(stored_tensors(folder, pickles=True))
        if stored not in known.values():
            word = str(stored).removeprefix("torch.")
            raise ValueError(
                f"{folder} is stored in {word}; train it with --dtype bfloat16 or float32"
            )
        return stored
    if name not in known:
        raise ValueError(f"dtype {shown(name)}: wanted auto, float32 or bfloat16")
    return known[name]
