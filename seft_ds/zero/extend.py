"""Make one DeepSpeed engine run SEFT, or say why it can't."""

from __future__ import annotations

from typing import Any

import torch

from seft_ds.config import SeftConfig
from seft_ds.distributed.collectives import Ranks
from seft_ds.optim.families import family_of
from seft_ds.zero import optimizer_state
from seft_ds.zero.attach import AttachedTarget
from seft_ds.zero.dense_model import DenseModel
from seft_ds.zero.engine import SparseEvolution


def extend(
    engine: Any,
    attached: list[AttachedTarget],
    config: SeftConfig,
    ranks: Ranks,
    fingerprints: dict[str, str] | None = None,
    dense: DenseModel | None = None,
) -> SparseEvolution:
    """Make a DeepSpeed engine run SEFT, in place; also reachable as `engine.seft`."""
    _refuse_untested(engine, attached)
    seft = SparseEvolution(engine, attached, config, ranks, fingerprints, dense)
    engine.seft = seft
    seft.guard.watch(engine)
    take_step = engine._take_model_step

    def step_and_evolve(lr_kwargs: Any) -> None:
        if seft.over:
            optimizer_state.skip_step(engine, take_step, lr_kwargs)
            return
        taken = seft.before_step()
        fp32_norm, lr = (seft.fp32_norm() if taken else None), seft.lr
        if taken:
            take_step(lr_kwargs)
        else:
            optimizer_state.skip_step(engine, take_step, lr_kwargs)
        seft.after_step(taken and engine.was_step_applied(), fp32_norm, lr)

    engine._take_model_step = step_and_evolve
    return seft


def _refuse_untested(engine: Any, attached: list[AttachedTarget]) -> None:
    """ValueError for what would break exactness or has not been tested."""
    zero = engine._config.zero_config
    wanted: dict[str, bool] = {
        "fp16: use bf16 or fp32": engine.fp16_enabled(),
        "zero_hpz_partition_size > 1": zero.zero_hpz_partition_size > 1,
        "zero_quantized_nontrainable_weights": zero.zero_quantized_nontrainable_weights,
        "zero_quantized_weights": zero.zero_quantized_weights,
        "torch_autocast: use the bf16 section": engine.torch_autocast_enabled(),
        "offload_param or offload_optimizer to nvme, since every step writes into the weights and every "
        "event into the optimizer's state, which would have to be swapped in and out for it: use cpu": any(
            part is not None and part.device not in ("none", "cpu")
            for part in (zero.offload_param, zero.offload_optimizer)
        ),
        "tensor, pipeline or sequence parallel": engine.dp_world_size != engine.world_size,
    }
    inner = getattr(engine.optimizer, "optimizer", engine.optimizer)
    if family_of(inner) is None:
        wanted[
            f"the optimizer {type(inner).__module__}.{type(inner).__name__}"
            f"{' with amsgrad' if any(g.get('amsgrad') for g in inner.param_groups) else ''}, whose state "
            "SEFT can't repair: use AdamW, Adam, Lion, Adagrad, or AdamW8bit, Lion8bit, AdEMAMix8bit of "
            "bitsandbytes"
        ] = True
    found = [name for name, present in wanted.items() if present]
    if found:
        raise ValueError(
            f"not supported with SEFT yet: {'; '.join(found)}. Remove it from the DeepSpeed config"
        )
    dtype = attached[0].weight.dtype
    expected = torch.bfloat16 if engine.bfloat16_enabled() else torch.float32
    if dtype != expected:
        raise ValueError(
            f"the weights are {dtype}, but the DeepSpeed config trains in {expected}: load the model with "
            f"dtype={expected}, or set bf16={dtype == torch.bfloat16} in the Trainer's arguments (in a loop "
            'of your own "bf16": {"enabled": ...} in the config)'
        )
