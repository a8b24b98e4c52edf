"""What becomes of each argument of transformers and TRL: honoured, without an effect, or refused.

`tests/train/test_known_fields.py` compares the three tables with the installed versions, so that an argument
of a new version is looked at before a run takes it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

HONOURED = frozenset(
    """
    output_dir deepspeed local_rank seed data_seed full_determinism run_name report_to project
    trackio_space_id trackio_bucket_id trackio_static_space_id disable_tqdm
    per_device_train_batch_size gradient_accumulation_steps num_train_epochs max_steps learning_rate
    lr_scheduler_type lr_scheduler_kwargs warmup_steps optim optim_args weight_decay adam_beta1 adam_beta2
    adam_epsilon max_grad_norm label_smoothing_factor average_tokens_across_devices loss_type
    router_aux_loss_coef neftune_noise_alpha bf16 tf32 activation_checkpointing
    activation_checkpointing_kwargs gradient_checkpointing gradient_checkpointing_kwargs
    torch_empty_cache_steps logging_strategy logging_steps logging_first_step logging_nan_inf_filter
    log_on_each_node log_level log_level_replica include_num_input_tokens_seen skip_memory_metrics
    eval_strategy eval_steps eval_delay eval_on_start per_device_eval_batch_size eval_accumulation_steps
    eval_packing prediction_loss_only eval_do_concat_batches eval_use_gather_object
    save_strategy save_steps save_total_limit metric_for_best_model greater_is_better
    accelerator_config dataloader_drop_last dataloader_num_workers dataloader_pin_memory
    dataloader_persistent_workers dataloader_prefetch_factor dataloader_multiprocessing_context
    remove_unused_columns train_sampling_strategy length_column_name dataset_num_proc
    chat_template_path eos_token pad_token max_length truncation_mode shuffle_dataset packing
    packing_strategy padding_free pad_to_multiple_of completion_only_loss assistant_only_loss
    do_train do_eval use_cpu resume_from_checkpoint
    """.split()
)

# Taken, with a warning that says why nothing changes.
NO_EFFECT = {
    **dict.fromkeys(
        "ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph".split(),
        "gradients are summed by DeepSpeed",
    ),
    "ddp_backend": "DeepSpeed chooses the backend by the device",
    "ddp_timeout": "the ranks have met before it is read; a lost rank is noticed within seconds",
    "batch_eval_metrics": "evaluations have no compute_metrics",
    "include_for_metrics": "evaluations have no compute_metrics",
}

_HUB = (
    "a run pushes nothing; afterwards launch/push.py RUN --repo_id OWNER/NAME recounts the model and "
    "pushes it"
)
_FSDP = "SEFT runs on DeepSpeed, which divides the model itself: --deepspeed ds_configs/zero3.json"
_COMPILE = "SEFT's layers were never tried in compiled models; leave it out"
_DTYPE = "a run trains in float32 or bfloat16: --dtype says which"
_IN_DTYPE = "evaluations use the dtype of the training: --dtype float32 or bfloat16 sets both"
_IN_ORDER = "a resumed run goes on behind the last row that it saw; leave it out"

# Refused when set to something other than its default, with what to do instead.
REFUSED = {
    "fp16": _DTYPE,
    "fp16_full_eval": _IN_DTYPE,
    "bf16_full_eval": _IN_DTYPE,
    "fsdp": _FSDP,
    "fsdp_config": _FSDP,
    "parallelism_config": _FSDP,
    "torch_compile": _COMPILE,
    "torch_compile_backend": _COMPILE,
    "torch_compile_mode": _COMPILE,
    "use_liger_kernel": "its kernels were never tried with SEFT's layers; leave it out",
    "liger_kernel_config": "its kernels were never tried with SEFT's layers; leave it out",
    "activation_offloading": "it was never tried here; --gradient_checkpointing saves memory",
    "push_to_hub": _HUB,
    "hub_token": _HUB,
    "hub_private_repo": _HUB,
    "hub_model_id": _HUB,
    "hub_strategy": _HUB,
    "hub_always_push": _HUB,
    "hub_revision": _HUB,
    "auto_find_batch_size": "the schedule depends on the batch size; launch/plan.py says which one fits",
    "optim_target_modules": "no supported optimizer has it; --seft.targets names the layers",
    "save_only_model": "a checkpoint's weights are in the engine's files; make models with launch/export.py",
    "load_best_model_at_end": "make a model of the best checkpoint with launch/export.py",
    "use_cache": "training has no use for a key-value cache; leave it out",
    "enable_jit_checkpoint": "SIGTERM writes a checkpoint by itself; leave it out",
    "save_on_each_node": "a checkpoint is one folder that all machines share; leave it out",
    "ignore_data_skip": _IN_ORDER,
    "dataloader_in_order": _IN_ORDER,
    "restore_callback_states_from_checkpoint": "a resumed run restores its own state; leave it out",
    "label_names": "labels are made from the rows (docs/data.md); leave it out",
    "debug": "a loss that is not finite is told anyway, with its rows; leave it out",
    "do_predict": "measure the model that was written with launch/evaluate.py",
    "model_init_kwargs": "give --dtype and --attn_implementation",
    "trust_remote_code": "code from a model's folder is never run; leave it out",
    "dataset_text_field": "give --rename_columns NAME=text",
    "dataset_kwargs": "rows are prepared as docs/data.md says; leave it out",
}

# Flags of other tools, and names that are in use elsewhere.
FOREIGN = {
    "use_peft": "adapters are --method lora --trainable rank=8 (docs/baselines.md)",
    **dict.fromkeys(["lora_r", "lora_rank"], "give --trainable rank=8 (docs/baselines.md)"),
    "lora_target_modules": "give --seft.targets",
    "lora_target": "give --seft.targets",
    **dict.fromkeys(
        ["load_in_4bit", "load_in_8bit", "quantization_bit", "bnb_4bit_quant_type"],
        "a pruned model is trained in its own dtype; ds_configs/zero3_8bit.json keeps moments in 8 bits",
    ),
    "deepspeed_plugin": "give --deepspeed ds_configs/zero3.json",
    "deepspeed_config": "give --deepspeed ds_configs/zero3.json",
    **dict.fromkeys(
        ["fsdp_transformer_layer_cls_to_wrap", "fsdp_min_num_params", "fsdp_plugin"], _FSDP
    ),
    "compute_dtype": _DTYPE,
    "seft": "give --seft.NAME VALUE, such as --seft.interval 20 (docs/configuration.md)",
    "lr": "give --learning_rate",
    "epochs": "give --num_train_epochs",
    "num_epochs": "give --num_train_epochs",
    "micro_batch_size": "give --per_device_train_batch_size",
    "cutoff_len": "give --max_length",
    "sequence_len": "give --max_length",
    "model_max_length": "give --max_length",
    "data_path": "give --train_file or --dataset_name",
    "gradient_clipping": "give --max_grad_norm",
    "template": "give --chat_template_path, or none: the tokenizer's own is used",
}

# Of arguments that transformers and TRL declare as text.
CHOICES = {
    "eval_strategy": ("auto", "no", "steps", "epoch"),
    "save_strategy": ("auto", "no", "steps", "epoch", "best"),
    "train_sampling_strategy": ("random", "sequential", "group_by_length"),
    "packing_strategy": ("bfd", "bfd_split", "wrapped"),
    "truncation_mode": ("keep_start", "keep_end"),
    "loss_type": ("nll", "dft"),
}


def check_fields(
    values: Mapping[str, Any],
    default: Callable[[str], Any],
    called: Callable[[str], str],
    warn: Callable[[str], None],
) -> None:
    """Refuse what a run can't do, and warn of what changes nothing.

    Args:
        values: the arguments by name.
        default: of an argument's name.
        called: what the user knows the argument as: a flag, or an entry of a file.

    Raises:
        ValueError: an argument of `REFUSED` is set. A token is not repeated.
    """
    for name, why in REFUSED.items():
        if name in values and _is_set(values[name], default(name)):
            value = "" if name.endswith("token") else f" {_as_written(values[name])}"
            raise ValueError(f"{called(name)}{value} is not supported: {why}")
    for name, why in NO_EFFECT.items():
        if name in values and _is_set(values[name], default(name)):
            warn(f"{called(name)} has no effect: {why}")


def _as_written(value: Any) -> str:
    value = getattr(value, "value", value)
    return str(value).lower() if isinstance(value, bool) else f"{value!s:.60}"


def _is_set(value: Any, default: Any) -> bool:
    return (value or None) != (default or None)


# What `optim_args` may hold; transformers passes over other names, and over all for other optimizers.
_OPTIM_ARGS = {
    "ademamix": ("alpha", "beta1", "beta2", "beta3", "eps", "t_alpha", "t_beta3"),
    "adagrad": ("eps", "lr_decay", "weight_decay"),
}


def check_optimizer(values: Mapping[str, Any], default: str) -> None:
    """Refuse arguments of the optimizer that nobody would read.

    Args:
        values: the arguments by name, `deepspeed` as the config itself.
        default: the optimizer that is used if none is named.

    Raises:
        ValueError: the DeepSpeed config has an optimizer or a schedule, and a flag names another one.
    """
    config = values["deepspeed"]
    for section, name, usual in (
        ("optimizer", "optim", default),
        ("scheduler", "lr_scheduler_type", "linear"),
    ):
        given = str(getattr(values[name], "value", values[name]))
        if section in config and given != str(getattr(usual, "value", usual)):
            raise ValueError(
                f'--{name} {given}, but the DeepSpeed config has its own "{section}": leave the flag out, or '
                "take the section out of the config"
            )
    _check_optim_args(
        str(getattr(values["optim"], "value", values["optim"])), values["optim_args"], config
    )


def _check_optim_args(optim: str, text: str | None, config: Mapping[str, Any]) -> None:
    if not text:
        return
    if "optimizer" in config:
        raise ValueError(
            '--optim_args: the DeepSpeed config has its own "optimizer"; write them there'
        )
    known = next((names for kind, names in _OPTIM_ARGS.items() if kind in optim), ())
    for pair in text.replace(" ", "").split(","):
        name, equals, _ = pair.partition("=")
        if not equals or name not in known:
            wanted = f"NAME=VALUE of {', '.join(known)}" if known else "none for this optimizer"
            raise ValueError(f"--optim_args {pair:.60} with --optim {optim}: wanted {wanted}")


def check_best(values: dict[str, Any]) -> None:
    """Settle which metric tells the best checkpoint, and which of two values is better.

    Raises:
        ValueError: no evaluation measures it.
    """
    metric = values["metric_for_best_model"]
    if metric is None:
        if values["save_strategy"] == "best":
            raise ValueError("--save_strategy best needs --metric_for_best_model, such as loss")
        return
    rows = any(values[f] for f in ("validation_file", "dataset_test_split", "val_set_size"))
    measured = ["loss"] * rows + ["perplexity"] * bool(values["eval_text_file"])
    name = metric.removeprefix("eval_")
    of_tasks = values["eval_tasks"] and name not in ("loss", "perplexity")  # checked with the tasks
    if name not in measured and not of_tasks:
        raise ValueError(
            f"--metric_for_best_model {metric:.60}: this run measures {' and '.join(measured) or 'nothing'} "
            "(docs/evaluation.md)"
        )
    if values["greater_is_better"] is None and metric.endswith(("perplexity", "bits_per_byte")):
        values["greater_is_better"] = False  # transformers would take the largest
