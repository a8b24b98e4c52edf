"""Between an attached model and the engine that DeepSpeed makes of it."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.utils import set_z3_leaf_module
from torch import nn

from seft_ds.config import SeftConfig
from seft_ds.distributed.agreement import agree
from seft_ds.distributed.collectives import Ranks, init_ranks
from seft_ds.naming import Naming, naming_of_model
from seft_ds.sparse.experts import is_fused_experts
from seft_ds.sparse.linear import DELTA, POSITION, is_slot_parameter
from seft_ds.zero.attach import AttachedTarget, attach_slots
from seft_ds.zero.dense_model import DenseModel, open_dense_model
from seft_ds.zero.extend import extend
from seft_ds.zero.fingerprint import model_fingerprints

_ATTACHED = "seft_attached"
# What may stand as the optimizer's type in a DeepSpeed config beside DeepSpeed's own and torch's.
BITSANDBYTES = (
    "AdamW8bit", "Adam8bit", "Lion8bit", "AdEMAMix8bit", "PagedAdamW8bit", "PagedAdam8bit",
    "PagedLion8bit", "PagedAdEMAMix8bit",
)  # fmt: skip
logger = logging.getLogger(__name__)


@dataclass
class Attached:
    """What is known of a model with slots; left on the model for the engine to pick up."""

    targets: list[AttachedTarget]
    config: SeftConfig
    ranks: Ranks
    source_dir: str  # the pruned model's folder
    on_engine: list[Callable[[Any], None]]  # called with the engine once it runs SEFT
    fingerprints: dict[str, str]  # of every weight of the pruned model
    dense: DenseModel | None = None
    engine: Any = None


def attach_model(
    model: nn.Module,
    config: SeftConfig,
    on_engine: list[Callable[[Any], None]],
    naming_in: Callable[[Path], Naming] | None = None,
) -> Attached:
    """Give the pruned layers their slots and freeze the rest. A collective; ValueError if it can't be.

    naming_in: what the files of a folder (the dense model's) call this model's tensors; default: what the
        model's family calls them.
    """
    if find_attached(model) is not None:
        raise ValueError("this model has SEFT slots already: attach it once")
    ranks = init_ranks()
    agree(ranks, config.model_dump(), 'the "seft" settings')
    targets = attach_slots(model, config, ranks)
    naming_in = naming_in or (lambda folder: naming_of_model(model))
    dense = open_dense_model(config, targets, ranks, naming_in)
    source = source_of(model)
    frozen = {n: p for n, p in model.named_parameters() if not is_slot_parameter(n)}
    attached = Attached(
        targets, config, ranks, source, on_engine, model_fingerprints(frozen, ranks), dense
    )
    setattr(model, _ATTACHED, attached)
    _keep_inputs_differentiable(model)
    # A saved model holds the effective weights; the slots are ours and no part of it.
    ours = {t.target.slot_name(part) for t in targets for part in (DELTA, POSITION)}
    model._keys_to_ignore_on_save = (
        set(getattr(model, "_keys_to_ignore_on_save", None) or []) | ours
    )  # type: ignore[assignment]
    _mark_leaves(model)
    _watch_deepspeed_initialize()
    return attached


def source_of(model: nn.Module) -> str:
    """The folder that a model was loaded from, or its name on a hub."""
    # Absolute: a later export may run in another folder.
    source = str(getattr(getattr(model, "config", None), "_name_or_path", "") or "")
    return str(Path(source).resolve()) if source and Path(source).is_dir() else source


def _mark_leaves(model: nn.Module) -> None:
    """Have ZeRO-3 gather a module of experts as a whole, whichever of them run.

    Fused experts are one module a layer, so that no hook depends on the routing; it is set to be sure.
    """
    for module in model.modules():
        if is_fused_experts(module):
            set_z3_leaf_module(module, True)


def _buffers_in_fp32(model: nn.Module) -> list[tuple[nn.Module, str, torch.Tensor]]:
    """The fp32 buffers that a saved model holds: routers correct their choices by some (DeepSeek-V3)."""
    return [
        (module, name, buffer.clone())
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
        if buffer.dtype == torch.float32 and name not in module._non_persistent_buffers_set
    ]


def find_attached(model: nn.Module) -> Attached | None:
    """What `attach_model` left on the model, or None."""
    return getattr(model, _ATTACHED, None)


def make_engine(model: nn.Module, config: dict, **kwargs: Any) -> tuple[Any, Any, Any, Any]:
    """`deepspeed.initialize` with the deltas as the parameters to optimize."""
    deltas = [p for p in model.parameters() if p.requires_grad]
    kwargs.setdefault("model_parameters", deltas)
    return deepspeed.initialize(model=model, config=config, **kwargs)


def bitsandbytes_class(config: dict) -> Any:
    """The optimizer class of bitsandbytes that a DeepSpeed config names as its optimizer's type, or None."""
    name = str(config.get("optimizer", {}).get("type", ""))
    if name not in BITSANDBYTES:
        return None
    import bitsandbytes

    return getattr(bitsandbytes.optim, name)


def _make_bitsandbytes(config: dict, params: list) -> Any:
    section = config["optimizer"]
    try:
        return bitsandbytes_class(config)(params, **section.get("params", {}))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"the DeepSpeed config's optimizer {section['type']} doesn't take its params "
            f"{section.get('params', {})}: {error}"
        ) from None


def _with_optimizer(config: dict, kwargs: dict[str, Any], model: nn.Module) -> dict:
    """The config for DeepSpeed; an optimizer of bitsandbytes that it names is made and put into `kwargs`,
    since DeepSpeed's config knows only its own and torch's.

    Raises:
        ValueError: the optimizer's parameters are not what it takes.
    """
    if kwargs.get("optimizer") is None and bitsandbytes_class(config) is not None:
        params = list(kwargs.get("model_parameters") or model.parameters())
        if not isinstance(params[0], dict):
            params = [p for p in params if p.requires_grad]
        kwargs["optimizer"] = _make_bitsandbytes(config, params)
        config = {k: v for k, v in config.items() if k != "optimizer"}
    return allow_untested(config, "optimizer" not in config)


def allow_untested(config: dict, client_optimizer: bool) -> dict:
    """The config with the switches that DeepSpeed wants for an optimizer that it has not tested itself.

    We have (tests/zero/test_optimizers.py); one whose state we can't repair is refused later.
    """
    wanted: dict[str, Any] = {}
    if client_optimizer:
        wanted["zero_allow_untested_optimizer"] = True
        if _offloads_optimizer(config):
            wanted["zero_force_ds_cpu_optimizer"] = False
    changed = {k: v for k, v in wanted.items() if config.get(k) != v}
    if changed:
        logger.info("set in the DeepSpeed config, for an optimizer of your own: %s", changed)
    return {**config, **changed}


def _offloads_optimizer(config: dict) -> bool:
    section = config.get("zero_optimization", {}).get("offload_optimizer") or {}
    return section.get("device", "none") != "none"


def _keep_inputs_differentiable(model: nn.Module) -> None:
    """Reentrant checkpointing drops all gradients of a block none of whose inputs needs one."""
    enable = getattr(model, "enable_input_require_grads", None)
    if enable is not None:
        enable()


def _refuse_second_engine(model: Any) -> None:
    """The weights already contain the first engine's deltas; a second one would add them again."""
    attached = find_attached(model) if model is not None else None
    if attached is not None and attached.engine is not None:
        raise ValueError(
            "this model has a SEFT engine already, and its weights contain that engine's deltas; load the "
            "pruned model anew for another run"
        )


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
        model = args[0] if args else kwargs.get("model")
        _refuse_second_engine(model)
        ours = model is not None and find_attached(model) is not None
        if ours:
            for name in ("config", "config_params"):  # trainers call with either
                if isinstance(kwargs.get(name), dict):
                    kwargs[name] = _with_optimizer(kwargs[name], kwargs, model)
        kept = _buffers_in_fp32(model) if ours else []
        result = original(*args, **kwargs)
        engine = result[0]
        attached = find_attached(engine.module)
        for module, name, buffer in kept:  # a bf16 engine has rounded them
            module._buffers[name] = buffer.to(engine.device)
        # An engine without an optimizer (evaluation before training) has nothing to evolve.
        if attached is not None and hasattr(engine.optimizer, "param_groups"):
            extend(
                engine, attached.targets, attached.config, attached.ranks, attached.fingerprints,
                attached.dense,
            )  # fmt: skip
            attached.engine = engine
            for call in attached.on_engine:
                call(engine)
        return result

    initialize_and_extend.extends_seft = True  # type: ignore[attr-defined]
    deepspeed.initialize = initialize_and_extend
