"""Flags by names that transformers and TRL no longer know, as scripts and recipes of earlier years have them.

Each is translated, and told in a warning with what to write today. Without it transformers 5 would refuse
`--warmup_ratio`; `--resume_from_checkpoint` would be taken and ignored, since runs here resume by `--resume`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

Values = list[str]

# Another name for the same thing.
RENAMED = {
    "evaluation_strategy": "eval_strategy",
    "warmup_ratio": "warmup_steps",  # below 1 it is a share of the steps, as the ratio was
    "no_cuda": "use_cpu",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "per_gpu_eval_batch_size": "per_device_eval_batch_size",
    "overwrite_output_dir": "overwrite",
    "push_to_hub_model_id": "hub_model_id",
    "push_to_hub_token": "hub_token",
    "torch_dtype": "dtype",
    "max_seq_length": "max_length",
    "block_size": "max_length",
    "dataset_config_name": "dataset_config",
    "dataset_streaming": "streaming",
    "test_split_size": "val_set_size",
    "include_tokens_per_second": "include_num_input_tokens_seen",
}
# What no longer has an effect anywhere: left out.
GONE = {
    "save_safetensors": "models are always written as safetensors",
    "half_precision_backend": "bf16 follows from --dtype",
    "fp16_backend": "bf16 follows from --dtype",
    "fp16_opt_level": "apex is not used",
    "sharded_ddp": "DeepSpeed's config says what is sharded",
    "ray_scope": "there is no search for hyperparameters here",
    "past_index": "transformers has removed it",
    "jit_mode_eval": "transformers has removed it",
    "use_ipex": "transformers has removed it",
    "use_mps_device": "transformers finds the device by itself",
    "tpu_num_cores": "DeepSpeed doesn't run on TPUs",
    "mp_parameters": "transformers has removed it",
    "dataset_batch_size": "TRL has removed it",
    "num_of_sequences": "TRL has removed it",
    "chars_per_token": "TRL has removed it",
    "logging_dir": "set TENSORBOARD_LOGGING_DIR in the environment; it is RUN/runs otherwise",
}


def _is_true(values: Values) -> bool:
    return not values or values[0].lower() in ("true", "1", "yes", "y", "t")


def _group_by_length(values: Values) -> list[str]:
    return ["--train_sampling_strategy", "group_by_length"] if _is_true(values) else []


def _adafactor(values: Values) -> list[str]:
    return ["--optim", "adafactor"] if _is_true(values) else []


def _percentage(values: Values) -> list[str]:
    try:
        return ["--val_set_size", str(float(values[0]) / 100)]
    except (IndexError, ValueError):
        raise ValueError(
            f"--validation_split_percentage {' '.join(values):.40}: wanted a number; today it is "
            "--val_set_size, a share below 1 or a number of rows"
        ) from None


def _resume(values: Values) -> list[str]:
    if not values or values[0].lower() in ("true", "false"):
        return ["--resume", "auto" if _is_true(values) else "never"]
    return ["--resume", values[0]]


# Another name, and other values.
CHANGED: dict[str, Callable[[Values], list[str]]] = {
    "group_by_length": _group_by_length,
    "adafactor": _adafactor,
    "validation_split_percentage": _percentage,
    "resume_from_checkpoint": _resume,
}


def translate(argv: Iterable[str]) -> tuple[list[str], list[str]]:
    """(flags by today's names, a warning for each that was translated).

    `--name value ...` and `--name=value` are known; dashes in a name stand for underscores.
    """
    current: list[str] = []
    said: list[str] = []
    for flag, values in grouped(argv):
        name, equals, value = flag.partition("=")
        name = name.removeprefix("--").replace("-", "_")
        given = [value, *values] if equals else values
        if not flag.startswith("--") or name not in {*RENAMED, *GONE, *CHANGED}:
            current += [flag, *values]
        elif name in GONE:
            said.append(f"--{name} is left out: {GONE[name]}")
        else:
            new = [f"--{RENAMED[name]}", *given] if name in RENAMED else CHANGED[name](given)
            now = new[:1] if name.endswith("token") else new  # a secret is not repeated
            said.append(f"--{name} is now {' '.join(now) or 'the default'}"[:200])
            current += new
    return current, said


def grouped(argv: Iterable[str]) -> list[tuple[str, Values]]:
    """Each flag with the values that follow it."""
    groups: list[tuple[str, Values]] = []
    for word in argv:
        if word.startswith("--") or not groups:
            groups.append((word, []))
        else:
            groups[-1][1].append(word)
    return groups
