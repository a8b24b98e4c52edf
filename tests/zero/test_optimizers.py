"""Every supported optimizer: exact events as with AdamW, and state repaired on the slot's own entries only.

Each event is compared with the slow reference (tests/reference.py), which knows nothing of slots, shards or
optimizers; each edit of 8-bit state with the bytes before it. With SEFT_FULL=1 every optimizer runs under
every stage on every number of ranks; without it, on one of them.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests import reference
from tests.ranks import run_processes
from tests.tiny import tiny_model
from tests.zero.test_engine import config, tokens

FULL = bool(os.environ.get("SEFT_FULL"))
STEPS = 16 if FULL else 11
LR = 2e-3


def bnb(name: str, **kwargs: Any) -> Callable[[list], Any]:
    def make(params: list) -> Any:
        import bitsandbytes as bitsandbytes_

        return getattr(bitsandbytes_.optim, name)(params, lr=LR, **kwargs)

    return make


def torch_optimizer(name: str) -> Callable[[list], Any]:
    return lambda params: getattr(torch.optim, name)(params, lr=LR)


# Blocks of 256 in tensors of this size: several blocks a rank, cut by no target's border.
SMALL: dict[str, Any] = {"min_8bit_size": 64}
OPTIMIZERS: dict[str, Any] = {
    "AdamW": torch_optimizer("AdamW"),
    "Adagrad": torch_optimizer("Adagrad"),
    "AdamW8bit": bnb("AdamW8bit", **SMALL),
    "Adam8bit": {"type": "Adam8bit", "params": {"lr": LR, **SMALL}},  # by the DeepSpeed config
    "Lion8bit": bnb("Lion8bit", **SMALL),
    "AdEMAMix8bit": bnb("AdEMAMix8bit", **SMALL),
    "PagedAdamW8bit": bnb("PagedAdamW8bit", **SMALL),
    "AdamW8bit, small": bnb("AdamW8bit"),  # every tensor under 4096 entries: kept in fp32
    "Lion": bnb("Lion"),
    "AdEMAMix": bnb("AdEMAMix"),
}
CASES = list(itertools.product(OPTIMIZERS, (1, 2, 3)))
OFFLOAD = ", offloaded"  # the optimizer's state on the CPU's side of DeepSpeed
CASES += [(f"{n}{OFFLOAD}", stage) for n in ("AdamW", "AdamW8bit") for stage in (1, 2, 3)]
# Only in ZeRO-3: the weights offloaded too; several sub-groups of deltas, each with a state of its own.
WHOLLY, IN_GROUPS = ", wholly offloaded", ", in sub-groups"
if not FULL:
    CASES = CASES[::2]
CASES += [(f"{n}{how}", 3) for n in ("AdamW", "AdamW8bit") for how in (WHOLLY, IN_GROUPS)]
# DeepSpeed's own, which it compiles at first use: a minute each.
COMPILED = {
    "FusedAdam": {"type": "AdamW", "params": {"lr": LR}},
    "DeepSpeedCPUAdam": {"type": "AdamW", "params": {"lr": LR}},
    "DeepSpeedCPULion": {"type": "Lion", "params": {"lr": LR}},
    "DeepSpeedCPUAdagrad": {"type": "Adagrad", "params": {"lr": LR}},
}
if FULL:
    OPTIMIZERS |= COMPILED
    CASES += [("FusedAdam", stage) for stage in (1, 2, 3)]
    CASES += [(f"{n}{OFFLOAD}", s) for n in list(COMPILED)[1:] for s in (1, 2, 3)]


def split(name: str) -> tuple[str, str]:
    """A case's optimizer, and how it runs."""
    if name in OPTIMIZERS:
        return name, ""
    plain, _, how = name.partition(", ")
    return plain, how


def raw_state(part: Any) -> dict[str, torch.Tensor]:
    """Copies of the optimizer's own tensors of the flat tensor that these slots lie in."""
    state = part.optimizer.state.get(part.flat, {}) if part.flat is not None else {}
    return {n: t.clone() for n, t in state.items() if torch.is_tensor(t) and t.numel() > 1}


def check_repair(
    part: Any, before: dict[str, torch.Tensor], index: Any, G: Any, Q: Any, w: int
) -> int:
    """Only the entries of the fresh slots changed, and to what they should be. Returns how many."""
    from seft_ds.optim import families

    after = raw_state(part)
    assert before.keys() == after.keys()
    at = index + part.offset
    for name in before:
        if name.startswith(("qmap", "absmax")):
            assert torch.equal(before[name], after[name]), name
            continue
        rows_before, rows_after = (x[name].view(-1, part.flat.numel()) for x in (before, after))
        stays = torch.ones(part.flat.numel(), dtype=torch.bool)
        stays[at] = False
        assert torch.equal(rows_before[:, stays], rows_after[:, stays]), name
    group = part.optimizer.param_groups[part.group]
    for name, moment in part.moments().items():
        wanted = families.fresh(name, G, Q, w, group, part.steps())
        if "square" in part.moments() and name != "square":  # no longer a step than was wanted
            square = families.fresh("square", G, Q, w, group, part.steps())
            there = part.moments()["square"].read(0, part.flat.numel())[at]
            ratio = [
                min(1.0, h / s) ** 0.5 if s else 1.0
                for h, s in zip(there.tolist(), square.tolist())
            ]
            wanted = wanted * torch.tensor(ratio)
        if isinstance(moment, families.Plain):
            assert torch.equal(moment.values[at], wanted), name
            continue
        for j, value in zip(at.tolist(), wanted.tolist(), strict=True):  # slow and obvious
            limit = float(moment.absmax[j // 256])
            scaled = max(-1.0, min(1.0, value / limit)) if limit else 0.0
            distance = (moment.qmap - scaled).abs()
            assert float(distance[int(moment.codes[j])]) <= float(distance.min()) + 1e-7, name
    return index.numel()


def as_reference(views: list[Any], target: Any) -> reference.State:
    """One weight's shards of all ranks, in plain Python."""
    weight, live, G, Q = [], [], [], []
    delta, base, born = {}, {}, set()
    for view in views:
        weight += view.weight.float().tolist()
        live += view.live.tolist()
        G += view.G.tolist()
        Q += view.Q.tolist()
        for p, d, b, dead in zip(
            view.position.tolist(), view.delta.tolist(), view.base.float().tolist(),
            view.born_dead.tolist(), strict=True,
        ):  # fmt: skip
            delta[p], base[p] = d, b
            born |= {p} if dead else set()
    return reference.State(
        weight, {p for p, yes in enumerate(live) if yes}, delta, base, born, G, Q, target.pattern
    )


def run(name: str, stage: int) -> dict[str, Any]:
    """A run whose every event is checked; what it did."""
    import seft_ds
    from seft_ds.zero import engine as engine_module
    from seft_ds.zero import weight_state
    from seft_ds.zero.optimizer_state import flats

    torch.manual_seed(0)
    model = tiny_model("llama")
    settings = config(stage, total_steps=STEPS, density=0.15, stop=1.0)
    del (
        settings["optimizer"],
        settings["zero_allow_untested_optimizer"],
    )  # which is set for the user
    plain, how = split(name)
    optimizer: Any = OPTIMIZERS[plain]
    zero = settings["zero_optimization"]
    if "offloaded" in how:
        zero["offload_optimizer"] = {"device": "cpu"}
    if "wholly" in how:
        zero["offload_param"] = {"device": "cpu"}
    if "groups" in how:
        zero["sub_group_size"] = 300
    if isinstance(optimizer, dict):
        settings["optimizer"], optimizer = optimizer, None
    else:
        seft_ds.attach(model, settings)
        optimizer = optimizer([p for p in model.parameters() if p.requires_grad])
    engine, *_ = seft_ds.initialize(model=model, config=settings, optimizer=optimizer)
    ranks = engine.seft.ranks
    seen = {"events": 0, "repaired": 0, "chosen": [], "updates": []}
    plan, apply = engine_module.plan, weight_state.WeightState.apply

    def checked_plan(views: list, rate: float, event: Any, ranks_: Any) -> list:
        changes = plan(views, rate, event, ranks_)
        targets = {s.target.name: s.target for s in engine.seft.states}
        for per_weight, change in zip(
            zip(*ranks.gather_object(views), strict=True), changes, strict=True
        ):
            state = as_reference(list(per_weight), targets[per_weight[0].name])
            [want] = reference.event([state], rate, event.release, event.prune, "layer", event.nm)
            assert change.released.tolist() == sorted(want.released)
            assert change.fresh.tolist() == sorted(want.fresh)
            assert change.pruned.tolist() == sorted(want.pruned)
            seen["events"] += 1
            seen["chosen"].append((change.fresh.tolist(), change.pruned.tolist()))
        return changes

    def checked_apply(self: Any, change: Any) -> None:
        part, window = self.slot_shard, self.window.steps
        before = raw_state(part)
        master = part.master.clone()
        apply(self, change)
        mine = (change.released_slot >= part.lo) & (change.released_slot < part.hi)
        index = change.released_slot[mine] - part.lo
        stays = torch.ones(part.hi - part.lo, dtype=torch.bool)
        stays[index] = False
        assert torch.equal(part.master[stays], master[stays]) and not part.master[index].any()
        if index.numel():
            G, Q = change.fresh_G[mine], change.fresh_Q[mine]
            seen["repaired"] += check_repair(part, before, index, G, Q, window)

    def note(record: dict) -> None:
        if record["kind"] == "fresh":
            seen["updates"].append(record["largest_update"] / record["learning_rate"])

    engine.seft.listeners.append(note)
    engine_module.plan, weight_state.WeightState.apply = checked_plan, checked_apply
    try:
        for step in range(STEPS):
            ids = tokens(step)
            engine.backward(engine(input_ids=ids, labels=ids).loss)
            engine.step()
            engine.seft.check()
    finally:
        engine_module.plan, weight_state.WeightState.apply = plan, apply
    kinds = {type(m).__name__ for s in engine.seft.states for m in s.slot_shard.moments().values()}
    seen["flats"] = len(flats([s.slot_shard for s in engine.seft.states]))
    seen["inner"] = type(getattr(engine.optimizer, "optimizer", engine.optimizer)).__name__
    seen["kinds"] = sorted({k for per in ranks.gather_object(kinds) for k in per})
    seen["repaired"] = sum(ranks.gather_object(seen["repaired"]))
    return seen


def run_all(cases: list[tuple[str, int]]) -> dict:
    return {case: run(*case) for case in cases}


@pytest.mark.timeout(5400 if FULL else 900)
def test_events_and_state_repair_with_every_optimizer() -> None:
    for size in (1, 2, 3):
        cases = [c for n, c in enumerate(CASES) if FULL or n % 3 == size - 1]
        for (name, stage), seen in run_processes(
            size, run_all, cases, timeout=1500 if FULL else 300
        )[0].items():
            case = (name, stage, size)
            plain, _ = split(name)
            assert seen["events"] > 14 and seen["repaired"] > 14, case
            eight_bit = plain.endswith("8bit")
            assert seen["kinds"] == (["Blocks"] if eight_bit else ["Plain"]), (case, seen["kinds"])
            assert (seen["flats"] > 1) == name.endswith(IN_GROUPS), (case, seen["flats"])
            assert plain not in COMPILED or seen["inner"] == plain, (case, seen["inner"])
            if "Adagrad" not in plain:  # its steps shrink as its sums grow, and early are long
                assert max(seen["updates"]) < 2.0, (case, seen["updates"])
