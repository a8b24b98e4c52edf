"""The "seft" block of a DeepSpeed config: typed, constrained, cross-checked.

Every wrong value is a ValueError that says what came, what was wanted and what to change. "auto" is
resolved in one place only (`schedule.resolve_interval`, `SparseEvolution.begin`), and the result is logged.
"""

from __future__ import annotations

import difflib
import json
import re
import typing
from collections.abc import Collection
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from seft_ds.json_file import read_object, shown
from seft_ds.targets import parse_pattern

Auto = Literal["auto"]
# Above any real run, and small enough for what is made of them: floats, int64 seeds, loops over a window.
_MOST = 1 << 40
_LONGEST_WINDOW = 10_000
# What stands at the top of a DeepSpeed config.
_SECTIONS = (
    """seft zero_optimization bf16 bfloat16 fp16 amp optimizer scheduler gradient_clipping train_batch_size
    train_micro_batch_size_per_gpu gradient_accumulation_steps steps_per_print wall_clock_breakdown
    activation_checkpointing communication_data_type data_types zero_allow_untested_optimizer
    zero_force_ds_cpu_optimizer prescale_gradients gradient_predivide_factor sparse_gradients
    sparse_attention disable_allgather fp32_allreduce dump_state memory_breakdown flops_profiler
    comms_logger tensorboard wandb comet csv_monitor monitor autotuning elasticity checkpoint pipeline
    compression_training data_efficiency curriculum_learning aio nebula hybrid_engine compile timers
    tensor_parallel torch_autocast load_universal_checkpoint use_node_local_storage sequence_parallel_size"""
).split()
# And in its "zero_optimization" section, where stage3_ may be left out; a test compares with DeepSpeed's own.
_ZERO_NAMES = (
    """stage contiguous_gradients reduce_scatter reduce_bucket_size use_multi_rank_bucket_allreduce
    allgather_partitions allgather_bucket_size overlap_comm compute_grad_norm load_from_fp32_weights
    elastic_checkpoint offload_param offload_optimizer zenflow sub_group_size cpu_offload_param
    cpu_offload_use_pin_memory cpu_offload stage3_prefetch_bucket_size stage3_param_persistence_threshold
    stage3_model_persistence_threshold stage3_max_live_parameters stage3_max_reuse_distance
    stage3_gather_16bit_weights_on_model_save stage3_module_granularity_threshold
    stage3_use_all_reduce_for_fetch_params stage3_allgather_sequential
    stage3_gather_fp16_weights_on_model_save ignore_unused_parameters legacy_stage1
    round_robin_gradients parameter_alignment zero_hpz_partition_size zero_quantized_weights
    zero_quantized_nontrainable_weights zero_quantized_gradients memory_efficient_linear
    pipeline_loading_checkpoint override_module_apply log_trace_cache_warnings enable_sanity_checks
    save_muon_momentum_buffer_in_memory leaf_module prefetch_bucket_size param_persistence_threshold
    model_persistence_threshold max_live_parameters max_reuse_distance gather_16bit_weights_on_model_save
    module_granularity_threshold use_all_reduce_for_fetch_params allgather_sequential"""
).split()
_TRAINABLE = "live|rank=[1-9][0-9]{0,8}"


WITH_DENSE_MODEL: dict[str, Any] = {"scope": "global", "drop_fraction": 0.0, "window": 10}


class SeftConfig(BaseModel):
    """Settings of sparsity evolution fine-tuning. What each means: docs/configuration.md."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    targets: list[str] | Auto = Field(
        "auto", description="Names of linear layers to train (suffixes); auto: every pruned one."
    )
    density: float = Field(
        0.01, gt=0, le=1, description="Trainable share of the target weights' entries."
    )
    trainable: int | str | None = Field(
        None,
        description='Instead of density: a count, "rank=8" for as many as LoRA of that rank, or "live".',
    )
    scope: Literal["layer", "global"] = Field(
        "layer", description="Live count exact per weight, or over all weights together."
    )
    waves: bool = Field(True, description="Weights take turns; false: all evolve in the same step.")
    interval: int | Auto = Field("auto", description="Steps between two events of a weight.")
    window: int = Field(
        2,
        ge=1,
        le=_LONGEST_WINDOW,
        description="Steps before an event whose gradients are scored, or before an exchange.",
    )
    drop_fraction: float = Field(
        0.1, ge=0, le=1, description="Share of slots dropped at first; falls to 0 at stop (cosine)."
    )
    stop: float = Field(
        0.8, gt=0, le=1, description="Share of all steps after which nothing evolves."
    )
    start: Literal["random_live", "gradient"] = Field(
        "random_live", description="Where slots start; gradient: the first event replaces them all."
    )
    lr_scale: Literal["input", "none"] = Field(
        "input", description="Slots on large inputs take shorter steps, or all slots alike."
    )
    release: Literal["fold", "revert"] = Field(
        "fold", description="A dropped slot keeps its trained value, or goes back to its base."
    )
    grow: Literal["magnitude", "consistency", "gain", "random"] = Field(
        "magnitude", description="Growth score."
    )
    grow_among: Literal["all", "live"] = Field(
        "all", description="Dead positions compete, or slots move among live ones only."
    )
    prune: Literal["curvature", "taylor", "fisher", "magnitude"] = Field(
        "curvature", description="Prune score."
    )
    adapt: bool = Field(
        True, description="Prune as many as came alive; false: live counts may grow (as in SpIEL)."
    )
    dense_model: str | None = Field(
        None,
        description="Folder of the model before pruning: pruned weights may come back with their old values. "
        "Sets scope to global, drop_fraction to 0 and window to 10 where they are not given.",
    )
    exchange: float = Field(
        0.05,
        gt=0,
        le=0.5,
        description="With dense_model: share of the target weights' entries that an exchange may bring back.",
    )
    exchanges: int = Field(
        1,
        ge=1,
        le=_MOST,
        description="How many exchanges, an interval apart, the first after the first window.",
    )
    pattern: str = Field("auto", description='N:M pattern: auto (from the zeros), none, or "2:4".')
    nm: Literal["swap", "fixed"] = Field("fixed", description="N:M patterns stay fixed, or evolve.")
    min_sparsity: float = Field(
        0.05, gt=0, lt=1, description="A weight with a smaller share of zeros counts as dense."
    )
    max_skipped_steps: int = Field(
        5,
        ge=0,
        le=_MOST,
        description="Steps in a row with a loss or gradient that isn't finite, before the run stops.",
    )
    checkpoint_base: Literal["copy", "reference"] = Field(
        "copy",
        description="Checkpoints hold the frozen weights, or only what differs from the base model.",
    )
    total_steps: int | Auto = Field("auto", description="Optimizer steps of the whole run.")
    seed: int = Field(0, ge=0, le=_MOST, description="Seed of the random slots.")

    @model_validator(mode="before")
    @classmethod
    def _for_exchanges(cls, given: Any) -> Any:
        """With the dense model at hand, budgets move between weights, and slots stay where they are: what
        measured best (docs/results.md)."""
        if isinstance(given, dict) and given.get("dense_model") is not None:
            return {**WITH_DENSE_MODEL, **given}
        return given

    @field_validator("interval", "total_steps")
    @classmethod
    def _at_least_one(cls, value: int | str) -> int | str:
        if isinstance(value, int) and not 1 <= value <= _MOST:
            raise ValueError('wanted "auto" or a whole number of steps, at least 1')
        return value

    @field_validator("trainable")
    @classmethod
    def _count_or_rank(cls, value: int | str | None) -> int | str | None:
        ok = value is None or (isinstance(value, int) and 1 <= value <= _MOST)
        if not ok and not (isinstance(value, str) and re.fullmatch(_TRAINABLE, value)):
            raise ValueError('wanted a count of at least 1, "rank=8" or "live"')
        return value

    @field_validator("pattern")
    @classmethod
    def _pattern_form(cls, value: str) -> str:
        if value not in ("auto", "none"):
            parse_pattern(value)
        return value

    @model_validator(mode="after")
    def _cross_checks(self) -> SeftConfig:
        if isinstance(self.interval, int) and self.interval < self.window:
            raise ValueError(
                f"interval {self.interval} is shorter than window {self.window}: a weight would be "
                "scored for two events at once; raise interval or lower window"
            )
        if self.scope == "global" and self.waves and "waves" in self.model_fields_set:
            raise ValueError(
                "scope global decides over all weights in the same step, so it can't run in waves; "
                "set waves to false"
            )
        if self.trainable is not None and "density" in self.model_fields_set:
            raise ValueError("density and trainable both set the number of slots: give one of them")
        if self.trainable == "live" and self.drop_fraction > 0:
            raise ValueError(
                'trainable "live" puts a slot on every live weight, so that none is left to prune and '
                "nothing can evolve; set drop_fraction to 0"
            )
        if self.dense_model is None and self.model_fields_set & {"exchange", "exchanges"}:
            raise ValueError(
                "an exchange brings pruned weights back with the values that they had: give dense_model, the "
                "folder of the model before pruning, or leave exchange and exchanges out"
            )
        if self.dense_model is not None and (self.trainable == "live" or not self.adapt):
            raise ValueError(
                "dense_model lets pruned weights come back for live ones that no slot holds; trainable "
                '"live" leaves none, and adapt false prunes none: leave that setting out, or dense_model'
            )
        if not self.adapt and self.pattern != "none":
            raise ValueError(
                "adapt false lets weights come alive without pruning others, which no N:M pattern allows; "
                'set pattern to "none", which treats weights as unstructured'
            )
        return self

    @property
    def in_waves(self) -> bool:
        """Whether weights take turns; `scope: global` rules it out."""
        return self.waves and self.scope == "layer"

    @property
    def weighs_by_curvature(self) -> bool:
        """Whether events prune, and by a curvature that windows measure."""
        evolves = self.drop_fraction > 0 or self.start == "gradient"
        prunes = evolves and self.adapt and self.grow_among == "all"
        return prunes and self.prune == "curvature"


def parse_seft(block: Any) -> SeftConfig:
    """Check a "seft" block. ValueError for an unknown key (with the nearest right one) or bad value."""
    if not isinstance(block, dict):
        raise ValueError(f'"seft" must be an object of settings, got {type(block).__name__}')
    known = SeftConfig.model_fields
    for key, value in block.items():
        if isinstance(value, bool) and key in known and known[key].annotation is not bool:
            raise ValueError(f'"seft" block: {key} = {value}: wanted a value, not true or false')
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
            raise ValueError(f'unknown setting {shown(key)} in the "seft" block; {hint}')
    try:
        return SeftConfig(**block)
    except ValidationError as error:
        raise ValueError(_explain(error)) from None


def check_each(block: dict[str, Any], where: str) -> None:
    """Raises ValueError, beginning with `where`, for an entry that is wrong whatever the others are."""
    for name, value in block.items():
        try:
            SeftConfig(**{name: value})
        except ValidationError as error:
            if error.errors()[0]["loc"]:  # none: it is the combination
                raise ValueError(f"{where}{_explain(error)}") from None


def _explain(error: ValidationError) -> str:
    """One line a setting: what came, what was wanted, what the setting means."""
    wanted: dict[str, list[str]] = {}
    came: dict[str, Any] = {}
    for e in error.errors():
        name = str(e["loc"][0]) if e["loc"] else ""
        came.setdefault(name, e["input"])
        wanted.setdefault(name, []).append(e["msg"].removeprefix("Value error, "))
    lines = []
    for name, messages in wanted.items():
        text = " or: ".join(dict.fromkeys(messages))
        if name:
            about = SeftConfig.model_fields[name].description
            text = f"{name} = {shown(came[name])}: {text} ({about})"
        lines.append(f'"seft" block: {text}')
    return "\n".join(lines)


def reference_table() -> str:
    """All settings as a Markdown table; docs/configuration.md holds it, and a test compares."""
    lines = ["| setting | type | default | meaning |", "|---|---|---|---|"]
    for name, field in SeftConfig.model_fields.items():
        kind, default = _type_text(field.annotation), json.dumps(field.default)
        lines.append(f"| `{name}` | {kind} | `{default}` | {field.description} |")
    return "\n".join(lines) + "\n"


def _type_text(annotation: Any) -> str:
    """A type as a reader of JSON would put it: "fold" or "revert", number, list of string ..."""
    parts = typing.get_args(annotation)
    if typing.get_origin(annotation) is Literal:
        return " or ".join(json.dumps(value) for value in parts)
    if typing.get_origin(annotation) is list:
        return f"list of {_type_text(parts[0])}"
    if parts:
        return " or ".join(_type_text(part) for part in parts)
    names = {int: "whole number", float: "number", str: "string", bool: "true or false"}
    return names.get(annotation, "null")


def load_deepspeed_config(source: str | Path | dict) -> dict:
    """A DeepSpeed config as a dict of its own, from a dict or a JSON file, with its "seft" block checked.

    Raises:
        ValueError: no such file, not JSON, a bad "seft" block, or one without DeepSpeed's ZeRO section.
    """
    try:
        if isinstance(source, dict):
            config = json.loads(json.dumps(source))
        else:
            config = read_object(Path(source), strict=True)
    except (TypeError, ValueError, RecursionError) as error:  # of json.dumps: what is no JSON
        raise ValueError(f"DeepSpeed config: {error}") from None
    _check_sections(config)
    _check_zero(config)
    parse_seft(config.get("seft", {}))
    return config


def _check_sections(config: dict) -> None:
    """Raises ValueError for a name that is one of DeepSpeed's but for its spelling; it passes over them."""
    _check_spelling(config, _SECTIONS, "the DeepSpeed config")


def _check_zero(config: dict) -> None:
    section = config.get("zero_optimization")
    if section is None:
        raise ValueError(
            'the DeepSpeed config has no "zero_optimization" section; '
            'add "zero_optimization": {"stage": 3} (or 2, 1, 0), see ds_configs/'
        )
    stage = section.get("stage", 0) if isinstance(section, dict) else None
    if type(stage) is not int or not 0 <= stage <= 3:
        came = shown(section if stage is None else stage)
        raise ValueError(f'"zero_optimization" = {came}: wanted an object with a "stage" of 0 to 3')
    # Those that are near nothing are left to DeepSpeed, whose next version may know them.
    _check_spelling(section, _ZERO_NAMES, '"zero_optimization" of the DeepSpeed config')


def _check_spelling(section: dict, known: Collection[str], where: str) -> None:
    """ValueError for a name that is one of `known` but for its spelling."""
    for name in section:
        near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.7)
        if name not in known and near:
            raise ValueError(f"unknown name {shown(name)} in {where}; did you mean {near[0]!r}?")


def check_batch_sizes(config: dict, n_ranks: int) -> None:
    """ValueError if the config's batch sizes can't be had with this many ranks.

    DeepSpeed wants train_batch_size = micro batch · accumulation · ranks; "auto" and missing ones are free.
    """
    names = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    for name in names:
        value = config.get(name)
        if value not in (None, "auto") and (type(value) is not int or value < 1):
            raise ValueError(
                f'{name} = {shown(value)} in the DeepSpeed config: wanted "auto" or a whole number from 1'
            )
    total, micro, steps = (v if isinstance(v := config.get(n), int) else None for n in names)
    if total is None:
        return
    known = (micro or 1) * (steps or 1) * n_ranks
    if total % known or (micro and steps and total != known):
        raise ValueError(
            f"train_batch_size {total} can't be had on {n_ranks} ranks with micro batch "
            f"{micro or 'free'} and {steps or 'free'} accumulation steps, whose product it has to be; "
            f"change one of {', '.join(names)} (one may be left out), or the number of ranks"
        )


def with_overrides(config: dict, overrides: dict[str, Any]) -> dict:
    """The config with flags such as `--seft.interval 60` merged into its "seft" block, checked again.

    `trainable` and `density` both set the number of slots: either one given here replaces the other.
    """
    block = dict(config.get("seft", {}))
    for one, other in (("trainable", "density"), ("density", "trainable")):
        if one in overrides and other not in overrides:
            block.pop(other, None)
    merged = {**config, "seft": {**block, **overrides}}
    parse_seft(merged["seft"])
    return merged
