"""Where the deltas' fp32 master values and their moments are, for each ZeRO stage.

DeepSpeed keeps them in flat buffers (read in DeepSpeed 0.19.8):

| stage  | fp32 master                            | where a parameter is in it            |
|--------|----------------------------------------|---------------------------------------|
| 0 fp32 | the parameter itself                   | whole                                 |
| 0 bf16 | fp32_groups[g][i]                      | whole, in the order of fp16_groups    |
| 1, 2   | single_partition_of_fp32_groups[g]     | _hp_mapping; None: not on this rank   |
| 1 bf16, fp32 accumulation | fp32_groups_flat_partition[g] | _hp_mapping               |
| 3      | fp32_partitioned_groups_flat[g]        | grad_position                         |
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from seft_ds.optim import families
from seft_ds.optim.families import Moment
from seft_ds.sparse.shard import shard_range


@dataclass
class SlotShard:
    """The slots [lo, hi) of one delta vector that this rank optimizes."""

    lo: int
    hi: int
    flat: torch.Tensor | None  # the tensor that the inner optimizer steps; None: no slot here
    offset: int  # where slot `lo` is in it
    optimizer: Any  # the inner optimizer, keyed by `flat`
    group: int = 0  # its parameter group

    @property
    def master(self) -> torch.Tensor:
        """fp32 (hi - lo,), a view: writing to it changes the deltas."""
        if self.flat is None:
            return torch.empty(0)
        return self.flat.data.view(-1)[self.offset : self.offset + self.hi - self.lo]

    def moments(self) -> dict[str, Moment]:
        """The optimizer's moments of the whole flat tensor, by name; empty before the first step."""
        state = self.optimizer.state.get(self.flat, {}) if self.flat is not None else {}
        return families.moments_of(self.optimizer, state)

    def moment(self, name: str) -> torch.Tensor | None:
        """fp32 (hi - lo,): one moment of these slots, a view where it is kept so; None before a step."""
        found = self.moments().get(name)
        return found.read(self.offset, self.offset + self.hi - self.lo) if found else None

    def moment_names(self) -> list[str]:
        """What the optimizer keeps per slot, sorted; empty before the first step."""
        return sorted(self.moments())

    def repair(
        self, index: torch.Tensor, G: torch.Tensor, Q: torch.Tensor, window_steps: int
    ) -> torch.Tensor:
        """δ = 0 and the window's moments for the fresh slots at `index` (m,), counted from `lo`.

        G, Q: fp32 (m,), their window sums. Returns how many moments a block of 8-bit state could not hold
        and were cut, int64 ().
        """
        self.master[index] = 0.0
        hyper = self.optimizer.param_groups[self.group]
        # Before the first step there is no state: every slot starts from zeros alike.
        moments = self.moments()
        taken = self.steps() or 0.0
        values = {name: families.fresh(name, G, Q, window_steps, hyper, taken) for name in moments}
        return families.place(moments, index + self.offset, values)

    def steps(self) -> float | None:
        """The optimizer's own count of steps, which bias correction needs; None before the first."""
        state = self.optimizer.state.get(self.flat, {}) if self.flat is not None else {}
        return float(state["step"]) if "step" in state else None

    def prepare(self, steps: float) -> None:
        """Give an optimizer that may not have stepped yet its state, as its first step would."""
        if self.flat is None:
            return
        group = self.optimizer.param_groups[self.group]
        state = self.optimizer.state[self.flat]
        if hasattr(self.optimizer, "init_state"):  # bitsandbytes
            if not state:
                listed = group["params"]  # ZeRO-3 lists a tensor only while it is stepped
                group["params"] = [self.flat]
                self.optimizer.init_state(group, self.flat, self.group, 0)
                group["params"] = listed
            state["step"] = int(steps)
            return
        _torch_like_state(state, self.flat, self.optimizer, group, steps)

    def forget(self) -> None:
        """Drop the moments: the checkpoint that is loaded was made before the first step."""
        if self.flat is not None:
            self.optimizer.state.pop(self.flat, None)


def _torch_like_state(
    state: dict[str, Any], flat: torch.Tensor, optimizer: Any, group: dict[str, Any], steps: float
) -> None:
    """The state of torch's and DeepSpeed's optimizers, zeros where there was none."""
    for name in families.tensor_names(optimizer).values():
        state.setdefault(name, torch.zeros_like(flat.data))
    if torch.is_tensor(state.get("step")):
        state["step"].fill_(steps)
    elif isinstance(optimizer, (torch.optim.Adam, torch.optim.Adagrad)):  # AdamW is an Adam
        on_device = group.get("fused") or group.get("capturable")
        device = flat.device if on_device else torch.device("cpu")
        state["step"] = torch.tensor(steps, dtype=torch.float32, device=device)
    else:
        state["step"] = int(steps)
        if "step" in group:  # FusedAdam
            group["step"] = int(steps)


@dataclass
class Flat:
    """One tensor that the inner optimizer steps, and which slots of which targets lie in it."""

    parts: list[tuple[int, SlotShard]]  # (number of the target, its slots)

    @property
    def numel(self) -> int:
        flat = self.parts[0][1].flat
        assert flat is not None
        return flat.numel()

    def moments(self) -> dict[str, Moment]:
        return self.parts[0][1].moments()

    def layout(self) -> list:
        """What decides which slots share a block of 8-bit state, as plain data."""
        return [self.numel, [[i, p.lo, p.hi, p.offset] for i, p in self.parts]]


def flats(parts: list[SlotShard]) -> list[Flat]:
    """The distinct flat tensors of this rank, in the order of their first target."""
    found: dict[int, Flat] = {}
    for i, part in enumerate(parts):
        if part.flat is not None:
            found.setdefault(id(part.flat), Flat([])).parts.append((i, part))
    return list(found.values())


def is_replicated(engine: Any) -> bool:
    """ZeRO-0: every rank optimizes every slot."""
    return engine.zero_optimization_stage() == 0


def find(engine: Any, param: nn.Parameter, rank: int, size: int) -> SlotShard:
    """Locate one delta vector, after deepspeed.initialize.

    Raises:
        ValueError: the optimizer wrapper is one that we don't know how to edit.
    """
    outer = engine.optimizer
    kind = type(outer).__name__
    if kind == "DeepSpeedZeroOptimizer_Stage3":
        return _stage3(outer, param, rank, size)
    if kind == "DeepSpeedZeroOptimizer":
        return _fragment(outer, outer.single_partition_of_fp32_groups, param)
    if kind == "BF16_Optimizer":
        return _fragment(outer, outer.fp32_groups_flat_partition, param)
    if kind == "FP16_UnfusedOptimizer":
        for g, group in enumerate(outer.fp16_groups):
            for p, master in zip(group, outer.fp32_groups[g], strict=True):
                if p is param:
                    return SlotShard(0, master.numel(), master, 0, outer.optimizer, g)
    if isinstance(outer, torch.optim.Optimizer) and param.dtype == torch.float32:
        group = next(
            g
            for g, group in enumerate(outer.param_groups)
            if any(p is param for p in group["params"])
        )
        return SlotShard(0, param.numel(), param, 0, outer, group)
    raise ValueError(
        f"DeepSpeed chose the optimizer wrapper {kind}, whose state SEFT can't edit; use torch AdamW "
        '("torch_adam": true in the optimizer\'s params) with ZeRO 0, 1, 2 or 3 in fp32 or bf16'
    )


def _stage3(outer: Any, param: nn.Parameter, rank: int, size: int) -> SlotShard:
    # A group of parameters is stepped in sub-groups, each a flat tensor of whole parameters.
    sub_group, offset, _ = outer.grad_position[outer.get_param_id(param)]
    lo, hi = shard_range(param.ds_numel, rank, size)
    flat = outer.fp32_partitioned_groups_flat[sub_group]
    part = SlotShard(lo, hi, flat if hi > lo else None, offset, outer.optimizer)
    part.group = outer.sub_group_to_group_id[sub_group]
    return part


def _fragment(outer: Any, flats: list[torch.Tensor], param: nn.Parameter) -> SlotShard:
    fragment = param._hp_mapping  # type: ignore[attr-defined]
    if fragment is None:
        return SlotShard(0, 0, None, 0, outer.optimizer)
    lo = fragment.lp_fragment_address.start
    where = fragment.hp_fragment_address
    flat = flats[fragment.param_group_index]
    return SlotShard(
        lo, lo + where.numel, flat, where.start, outer.optimizer, fragment.param_group_index
    )


def gradient_scale(engine: Any, fp32_norm: float | None) -> float | None:
    """What the summed gradient of all ranks is multiplied by before the optimizer sees it.

    The mean over ranks, times the clipping factor; None if the step's gradients were not finite.
    fp32_norm: the gradient norm before clipping where DeepSpeed doesn't report one (ZeRO-0, fp32).
    """
    limit = engine.gradient_clipping()
    norm = engine.get_global_grad_norm() if fp32_norm is None else fp32_norm
    mean = 1.0 / engine.dp_world_size
    if norm is None or not limit:
        return mean
    norm = float(norm)
    if not torch.isfinite(torch.tensor(norm)):
        return None
    return mean / max(1.0, (norm + 1e-6) / limit)


def skip_step(engine: Any, take_step: Callable[[Any], None], lr_kwargs: Any) -> None:
    """Have DeepSpeed go through a step whose gradients are not finite without changing anything.

    DeepSpeed clears its gradient buffers inside its step, in a way of its own for each stage, and skips
    by itself only in some of them. So its step runs, with an inner optimizer and a scheduler that don't.
    """
    inner = getattr(engine.optimizer, "optimizer", engine.optimizer)
    step, scheduler, skipped = inner.step, engine.lr_scheduler, engine.skipped_steps
    inner.step = lambda *args, **kwargs: None
    engine.lr_scheduler = None
    try:
        take_step(lr_kwargs)
    finally:
        inner.step, engine.lr_scheduler = step, scheduler
    engine._step_applied = False
    engine.skipped_steps = skipped + 1


def hyperparameters(engine: Any) -> list[dict[str, Any]]:
    """The learning rate and its like of each parameter group, as plain numbers."""
    inner = getattr(engine.optimizer, "optimizer", engine.optimizer)
    return [
        {k: v.item() if torch.is_tensor(v) else v for k, v in group.items() if k != "params"}
        for group in inner.param_groups
    ]


def set_hyperparameters(engine: Any, groups: list[dict[str, Any]]) -> None:
    """Put back what `hyperparameters` gave. Groups that this run doesn't have are left out."""
    inner = getattr(engine.optimizer, "optimizer", engine.optimizer)
    for group, saved in zip(inner.param_groups, groups, strict=False):
        for name, value in saved.items():
            if torch.is_tensor(group.get(name)):
                group[name].fill_(value)
            else:
                group[name] = value
