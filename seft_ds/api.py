"""The calls that make a DeepSpeed run a SEFT run: `attach` and `initialize`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from seft_ds.checkpoint.hooks import carry_state
from seft_ds.checkpoint.model import files_of
from seft_ds.config import SeftConfig, check_batch_sizes, load_deepspeed_config, parse_seft
from seft_ds.distributed.agreement import agree, all_or_none
from seft_ds.distributed.collectives import init_ranks
from seft_ds.zero.initialize import attach_model, find_attached, make_engine, source_of


def attach(model: nn.Module, config: dict | str | Path | SeftConfig) -> nn.Module:
    """Give the pruned layers of `model` their slots and freeze the rest, before DeepSpeed gets it.

    From then on any code that calls `deepspeed.initialize` with this model (transformers' Trainer, TRL,
    accelerate, your own) gets an engine that runs SEFT. A collective.

    Args:
        model: a pruned model, whole or built under `deepspeed.zero.Init`.
        config: a DeepSpeed config (dict or file) with a "seft" block, or a SeftConfig.

    Raises:
        ValueError: a bad setting, a dense model, more slots than live weights, a model that is not the one in
            the folder that it was loaded from.
    """
    if not isinstance(config, SeftConfig):
        config = parse_seft(load_deepspeed_config(config).get("seft", {}))
    source = source_of(model)
    ranks = init_ranks()
    # What the files lack is random numbers in the model, and what it lacks would be missing from the result.
    all_or_none(ranks, lambda: files_of(model, source))
    attached = attach_model(
        model, config, on_engine=[], naming_in=lambda folder: files_of(model, folder).naming
    )
    attached.on_engine.append(lambda engine: carry_state(engine, attached.source_dir))
    return model


def initialize(
    model: nn.Module, config: dict | str | Path, **kwargs: Any
) -> tuple[Any, Any, Any, Any]:
    """`deepspeed.initialize` for a SEFT run: (engine, optimizer, dataloader, scheduler).

    The "seft" block needs "total_steps", since the schedule depends on it. Other arguments go to
    `deepspeed.initialize`; the optimizer gets the deltas only. `engine.seft` is the extension.

    Raises:
        ValueError: as `attach`; also a missing "total_steps" or "zero_optimization" section.
    """
    checked = load_deepspeed_config(config)
    settings = parse_seft(checked.get("seft", {}))
    if settings.total_steps == "auto":
        raise ValueError(
            'set "total_steps" in the "seft" block to the optimizer steps of the whole run: a loop of '
            "your own can't tell SEFT how long it will be (transformers' Trainer can)"
        )
    ranks = init_ranks()
    check_batch_sizes(checked, ranks.size)
    agree(ranks, checked, "the DeepSpeed config")
    attached = find_attached(model)
    if attached is None:
        attach(model, settings)
    elif attached.config != settings:
        raise ValueError(
            'the model was attached with other settings than this config\'s "seft" block; give the same '
            "config to both calls, or leave attach() out"
        )
    return make_engine(model, checked, **kwargs)
