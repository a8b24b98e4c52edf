"""The two calls that make a DeepSpeed run a SEFT run: `attach` and `initialize`."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import deepspeed
from torch import nn

from seft_ds.config import SeftConfig, load_deepspeed_config, parse_seft
from seft_ds.distributed.collectives import Ranks, init_ranks
from seft_ds.zero.attach import AttachedTarget, attach_slots
from seft_ds.zero.engine import extend, trainable_parameters

_ATTACHED = "seft_attached"


class Attached:
    """What `attach` leaves on the model for the engine to pick up."""

    def __init__(self, targets: list[AttachedTarget], config: SeftConfig, ranks: Ranks):
        self.targets, self.config, self.ranks = targets, config, ranks


def attach(model: nn.Module, config: dict | str | Path | SeftConfig) -> nn.Module:
    """Give the pruned layers of `model` their slots and freeze the rest, before DeepSpeed gets it.

    From then on any code that calls `deepspeed.initialize` with this model (transformers' Trainer, TRL,
    accelerate, your own) gets an engine that runs SEFT. A collective.

    Args:
        model: a pruned model, whole or built under `deepspeed.zero.Init`.
        config: a DeepSpeed config (dict or file) with a "seft" block, or a SeftConfig.

    Raises:
        ValueError: a bad setting, a dense model, more slots than live weights.
    """
    if getattr(model, _ATTACHED, None) is not None:
        raise ValueError("this model has SEFT slots already: attach it once")
    if not isinstance(config, SeftConfig):
        config = parse_seft(load_deepspeed_config(config).get("seft", {}))
    ranks = init_ranks()
    setattr(model, _ATTACHED, Attached(attach_slots(model, config, ranks), config, ranks))
    _keep_inputs_differentiable(model)
    # Saved models hold the effective weights; the slots are ours and no part of the model.
    ignore = set(getattr(model, "_keys_to_ignore_on_save", None) or [])
    model._keys_to_ignore_on_save = ignore | {  # type: ignore[assignment]
        f"{t.target.name}.{p}"
        for t in get_attached(model).targets
        for p in ("seft_delta", "seft_position")
    }
    _watch_deepspeed_initialize()
    return model


def get_attached(model: nn.Module) -> Attached:
    """What `attach` found. ValueError if the model has not been attached."""
    found = getattr(model, _ATTACHED, None)
    if found is None:
        raise ValueError("the model has no SEFT slots: call seft_ds.attach(model, config) first")
    return found


def initialize(
    model: nn.Module, config: dict | str | Path, **kwargs: Any
) -> tuple[Any, Any, Any, Any]:
    """`deepspeed.initialize` for a SEFT run: (engine, optimizer, dataloader, scheduler).

    The config's "seft" block needs "total_steps", since the schedule depends on it. Other arguments go to
    `deepspeed.initialize`; the optimizer gets the deltas only.
    """
    checked = load_deepspeed_config(config)
    settings = parse_seft(checked.get("seft", {}))
    if settings.total_steps == "auto":
        raise ValueError(
            'set "total_steps" in the "seft" block to the optimizer steps of the whole run: a loop of your '
            "own can't tell SEFT how long it will be (transformers' Trainer can)"
        )
    if getattr(model, _ATTACHED, None) is None:
        attach(model, settings)
    kwargs.setdefault("model_parameters", trainable_parameters(model))
    return deepspeed.initialize(model=model, config=checked, **kwargs)


def _keep_inputs_differentiable(model: nn.Module) -> None:
    """Reentrant checkpointing drops all gradients of a block none of whose inputs needs one."""
    enable = getattr(model, "enable_input_require_grads", None)
    if enable is not None:
        enable()


def _watch_deepspeed_initialize() -> None:
    """Extend engines made from attached models, whoever makes them.

    DeepSpeed hard-codes its engine class, and trainers call `deepspeed.initialize` themselves; wrapping
    this one function is the only place that all of them pass through. Other models are left alone.
    """
    original = deepspeed.initialize
    if getattr(original, "extends_seft", False):
        return

    @functools.wraps(original)
    def initialize_and_extend(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        engine = result[0]
        attached = getattr(engine.module, _ATTACHED, None)
        if attached is not None:
            extend(engine, attached.targets, attached.config, attached.ranks)
        return result

    initialize_and_extend.extends_seft = True  # type: ignore[attr-defined]
    deepspeed.initialize = initialize_and_extend
