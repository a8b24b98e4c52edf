"""What the engine must do beyond keeping counts: same training on any split of the batch, checkpointing,
bf16, repaired optimizer state, exact files, exact resume, and awkward sizes."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.ranks import run_processes
from tests.tiny import prune_, tiny_model
from tests.zero.test_engine import config, live_mask, tokens

FULL = bool(os.environ.get("SEFT_FULL"))
ACCUMULATION = 6  # micro-batches a step over all ranks: 1, 2 and 3 ranks divide it


def split_batch(size: int, stage: int, checkpointing: str | None) -> dict:
    """6 different micro-batches a step, dealt to the ranks, with clipping that bites."""
    import seft_ds
    from seft_ds.zero import shards

    torch.manual_seed(0)
    model = tiny_model("llama")
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing == "reentrant"})
    model.train()
    settings = config(stage, total_steps=8, interval=3, window=2, drop_fraction=0.5)
    each = ACCUMULATION // size
    settings |= {"gradient_accumulation_steps": each, "gradient_clipping": 0.05}
    engine, *_ = seft_ds.initialize(model=model, config=settings)
    rank = engine.seft.ranks.rank
    for step in range(8):
        for micro in range(each):
            ids = tokens(step, row=rank * each + micro)
            engine.backward(engine(input_ids=ids, labels=ids).loss)
            engine.step()
    engine.seft.check()
    return {
        s.target.name: (
            shards.gather_whole(s.weight, engine.seft.ranks),
            live_mask(engine.seft, i, s.target.numel),
        )
        for i, s in enumerate(engine.seft.states)
    }


def split_batches(size: int) -> dict:
    ways = [
        (0, None),
        (1, "reentrant"),
        (2, None),
        (3, None),
        (3, "reentrant"),
        (3, "nonreentrant"),
    ]
    if not FULL and size > 1:  # each way on one other number of ranks
        ways = ways[size % 2 :: 2]
    return {way: split_batch(size, *way) for way in ways}


@pytest.mark.timeout(900)
def test_accumulation_clipping_and_checkpointing_agree_on_every_split() -> None:
    results = {size: run_processes(size, split_batches, size)[0] for size in (1, 2, 3)}
    first = results[1][0, None]
    for size, by_way in results.items():
        for way, weights in by_way.items():
            for name, (weight, live) in weights.items():
                assert torch.equal(live, first[name][1]), (size, way, name)
                torch.testing.assert_close(weight, first[name][0], rtol=1e-4, atol=5e-5)


def bf16_run(stage: int, folder: str) -> None:
    """16 steps in bf16, then: are the files what the engine computes with?"""
    from transformers import AutoModelForCausalLM

    import seft_ds

    torch.manual_seed(0)
    source, target = Path(folder) / "source", Path(folder) / f"repaired-{stage}"
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    engine, *_ = seft_ds.initialize(model=model, config=config(stage, bf16=True))
    for step in range(16):
        ids = tokens(step)
        engine.backward(engine(input_ids=ids, labels=ids).loss)
        engine.step()
    engine.seft.check()
    engine.eval()
    probe = tokens(99, 3)
    with torch.no_grad():
        trained = engine(probe).logits
    record = seft_ds.save_model(engine, source, target)
    assert record["live"] == sum(s.target.target_live for s in engine.seft.states)
    assert sum(t["changed_positions"] for t in record["targets"].values()) > 0
    if engine.seft.ranks.rank == 0:
        loaded = AutoModelForCausalLM.from_pretrained(target, dtype=torch.bfloat16).eval()
        with torch.no_grad():
            assert torch.equal(loaded(probe).logits, trained)
        assert not any("seft" in name for name, _ in loaded.named_parameters())
    engine.seft.ranks.barrier()


def bf16_runs(folder: str) -> None:
    for stage in (0, 1, 2, 3):
        bf16_run(stage, folder)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("size", [1, 3])
def test_bf16_and_what_the_files_hold(size: int, tmp_path: Path) -> None:
    from seft_ds.checkpoint.pruned import save_pruned
    from seft_ds.checkpoint.verify import verify

    model = tiny_model("llama", torch.bfloat16)
    dense = tmp_path / "dense"
    model.save_pretrained(dense)
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]
    save_pruned(model, dense, tmp_path / "source", {f"{n}.weight": None for n in names}, {})
    run_processes(size, bf16_runs, str(tmp_path))
    for stage in (0, 1, 2, 3):
        assert verify(tmp_path / f"repaired-{stage}").ok


def fresh_updates(stage: int, repair: bool) -> list[float]:
    """Largest update of a fresh slot after each event, in learning rates, late in a run.

    Adam's step count is set to 10,000: there its bias correction is gone, and zero moments hurt most.
    """
    import seft_ds
    from seft_ds.zero import weight_state

    torch.manual_seed(0)
    engine, *_ = seft_ds.initialize(model=tiny_model("llama"), config=config(stage))
    updates, checked = [], [0]
    apply = weight_state.WeightState.apply

    def check(self, change):
        part, steps = self.slot_shard, self.window.steps
        before = part.master.clone()
        apply(self, change)
        mine = (change.released_slot >= part.lo) & (change.released_slot < part.hi)
        at = change.released_slot[mine] - part.lo
        stay = torch.ones(part.hi - part.lo, dtype=torch.bool)
        stay[at] = False
        assert torch.equal(part.master[stay], before[stay])
        if at.numel():
            assert not part.master[at].any()
            assert torch.equal(part.moment("mean")[at], change.fresh_G[mine] / steps)
            assert torch.equal(part.moment("square")[at], change.fresh_Q[mine] / steps)
            checked[0] += at.numel()
            if not repair:
                part.moment("mean")[at] = 0.0
                part.moment("square")[at] = 0.0

    def note(record: dict) -> None:
        if record["kind"] == "fresh":
            updates.append(record["largest_update"] / record["learning_rate"])

    weight_state.WeightState.apply = check
    engine.seft.listeners.append(note)
    try:
        for step in range(30):
            ids = tokens(step)
            engine.backward(engine(input_ids=ids, labels=ids).loss)
            engine.step()
            if step == 0:
                inner = getattr(engine.optimizer, "optimizer", engine.optimizer)
                for state in inner.state.values():
                    state["step"].fill_(10_000)
    finally:
        weight_state.WeightState.apply = apply
    assert sum(engine.seft.ranks.gather_object(checked[0])) > 0
    return updates


def fresh_updates_all() -> tuple[list[float], list[float]]:
    repaired = [
        u for stage in ((0, 1, 2, 3) if FULL else (1, 3)) for u in fresh_updates(stage, True)
    ]
    return repaired, fresh_updates(3, False)


@pytest.mark.timeout(600)
def test_fresh_slots_get_their_windows_moments_and_step_like_the_others() -> None:
    repaired, unrepaired = run_processes(2, fresh_updates_all)[0]
    assert repaired and max(repaired) < 2.0
    assert max(unrepaired) > 3.0  # what the repair is for


class Awkward(nn.Module):
    """Weights that no rank count divides, smaller than the rank count, with one slot each."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(7, 11)
        self.tiny = nn.Linear(11, 3, bias=False)
        self.single = nn.Linear(3, 1, bias=False)
        self.out = nn.Linear(1, 5)

    def forward(self, x):
        return self.out(self.single(self.tiny(self.first(x).relu())))


def awkward(stage: int, scope: str, constant: bool) -> list:
    """constant: all inputs zero, so that every gradient, and every score, is zero."""
    import seft_ds

    torch.manual_seed(0)
    model = Awkward()
    prune_(model, 0.5)
    wanted = [int(m.weight.count_nonzero()) for m in (model.first, model.tiny, model.single)]
    settings = config(
        stage, targets=["first", "tiny", "single"], trainable=3, drop_fraction=1.0, scope=scope,
        waves=False, density=0.01,
    )  # fmt: skip
    del settings["seft"]["density"]
    engine, *_ = seft_ds.initialize(model=model, config=settings)
    assert [s.target.n_slots for s in engine.seft.states] == [1, 1, 1]
    for step in range(12):
        x = (
            torch.zeros(4, 7)
            if constant
            else torch.randn(4, 7, generator=torch.Generator().manual_seed(step))
        )
        loss = engine(x).square().mean() * (0.0 if constant else 1.0)
        engine.backward(loss)
        engine.step()
        engine.seft.check()
    counts = engine.seft.live_counts()
    assert sum(counts) == sum(wanted) and (scope == "global" or counts == wanted)
    return [engine.seft.live_bits(i).tolist() for i in range(3)]


def awkward_all() -> dict:
    cases = itertools.product((0, 1, 2, 3), ("layer", "global"), (False, True))
    return {case: awkward(*case) for case in cases}


@pytest.mark.timeout(600)
def test_awkward_sizes_and_all_scores_zero() -> None:
    alone = run_processes(1, awkward_all)[0]
    assert run_processes(4, awkward_all)[0] == alone
    assert alone[0, "layer", False] == alone[3, "layer", False]


def interrupted(
    stage: int, bf16: bool, stop: int, kind: str, seft: dict, zero: dict, folder: str
) -> tuple[list, list]:
    """Weights after 20 steps in one go, and after stopping at `stop` and resuming in a new engine."""
    import seft_ds
    from seft_ds.zero import shards

    def start():
        torch.manual_seed(0)
        model = tiny_model(kind, torch.bfloat16 if bf16 else torch.float32)
        settings = config(stage, bf16, total_steps=20, **seft)
        settings["zero_optimization"] |= zero
        settings["zero_force_ds_cpu_optimizer"] = False  # torch's is there uncompiled
        return seft_ds.initialize(model=model, config=settings)[0]

    def steps(engine, first: int, last: int):
        for step in range(first, last):
            ids = tokens(step, row=engine.seft.ranks.rank)
            engine.backward(engine(input_ids=ids, labels=ids).loss)
            engine.step()

    def state(engine) -> list:
        e = engine.seft
        return [
            (
                shards.gather_whole(s.weight, e.ranks),
                shards.gather_whole(s.position, e.ranks),
                e.live_bits(i),
                e.gather_deltas([i])[0],
            )
            for i, s in enumerate(e.states)
        ]

    whole = start()
    steps(whole, 0, stop)
    whole.save_checkpoint(folder, "here")
    steps(whole, stop, 20)
    resumed = start()
    resumed.load_checkpoint(folder, "here")
    assert resumed.seft.step == stop
    steps(resumed, stop, 20)
    resumed.seft.check()
    return state(whole), state(resumed)


def interrupted_all(folder: str) -> list:
    results = []
    # 8 is inside the windows of some weights and an event of others; 10 is an event step.
    cpu = {"device": "cpu"}
    cases: list[tuple] = [
        (0, False, 8, "llama", {}, {}),
        (1, True, 8, "llama", {"release": "revert", "grow": "random", "start": "gradient"}, {}),
        (2, False, 10, "llama", {"scope": "global", "waves": False, "release": "revert"}, {}),
        (3, True, 8, "llama24", {"release": "revert"}, {}),
        (3, False, 9, "llama", {"prune": "fisher"}, {"sub_group_size": 40}),
        (3, True, 9, "llama", {}, {"offload_param": cpu, "offload_optimizer": cpu}),
    ]
    for n, case in enumerate(cases):
        results.append(interrupted(*case, f"{folder}/{n}"))
    return results


@pytest.mark.timeout(600)
def test_resuming_on_the_same_ranks_is_bit_identical(tmp_path: Path) -> None:
    for whole, resumed in run_processes(2, interrupted_all, str(tmp_path))[0]:
        for a, b in zip(whole, resumed, strict=True):
            for x, y in zip(a, b, strict=True):
                assert torch.equal(x, y)


def awkward_patterns() -> tuple[list, str]:
    """A 2:4 model with an accidental zero, and a second engine on a model that has one."""
    import seft_ds

    torch.manual_seed(0)
    model = tiny_model("llama24")
    weight = model.model.layers[0].mlp.up_proj.weight
    weight.data[3, weight[3].nonzero()[0]] = 0.0
    engine, *_ = seft_ds.initialize(model=model, config=config(2))
    for step in range(16):
        ids = tokens(step)
        engine.backward(engine(input_ids=ids, labels=ids).loss)
        engine.step()
    engine.seft.check()
    counts = []
    for i, state in enumerate(engine.seft.states):
        assert state.target.pattern == (2, 4)
        groups = live_mask(engine.seft, i, state.target.numel).view(-1, 4).sum(1)
        counts.append(groups.unique().tolist())
    try:
        seft_ds.initialize(model=model, config=config(2))
    except ValueError as error:
        return counts, str(error)
    return counts, "no error"


def test_an_accidental_zero_does_not_hide_a_pattern_and_one_engine_a_model() -> None:
    counts, said = run_processes(1, awkward_patterns)[0]
    assert counts == [[2]] * 14
    assert "has a SEFT engine already" in said


def broken_invariants(stage: int) -> list[str]:
    """What `check` says after each of several things has been broken by hand, and mended again."""
    import seft_ds
    from seft_ds.zero import shards

    torch.manual_seed(0)
    settings = config(stage, density=0.2)  # a slot of every weight on every rank
    engine, *_ = seft_ds.initialize(model=tiny_model("llama"), config=settings)
    evolution = engine.seft
    state = evolution.states[2]
    _, values = shards.held(state.weight, evolution.ranks)
    _, position = shards.held(state.position, evolution.ranks)
    dead = int((~state.live()).nonzero()[0])
    slot = int(state.slots.position[state.slots.between(state.lo, state.hi)][0]) - state.lo

    def said() -> str:
        try:
            evolution.check()
        except RuntimeError as error:
            return str(error)
        return "holds"

    results = [said()]
    for broken in (1e-8, -0.0):
        values[dead] = broken
        results.append(said())
        values[dead] = 0.0
    keep = state.live_bits.clone()
    state.live_bits[slot // 8] &= ~(1 << slot % 8)
    results.append(said())
    state.live_bits.copy_(keep)
    position[0] += 1
    results.append(said())
    position[0] -= 1
    return [*results, said()]


def broken_invariants_all() -> list[list[str]]:
    return [broken_invariants(stage) for stage in (2, 3)]


def test_check_finds_what_is_broken_and_names_the_weight() -> None:
    for said in run_processes(2, broken_invariants_all)[0]:
        assert said[0] == said[-1] == "holds"
        name = "model.layers.0.self_attn.v_proj"
        assert f"{name}: a dead position is not +0.0" in said[1]
        assert f"{name}: a dead position is not +0.0" in said[2]
        assert f"{name}: a slot sits on a dead position" in said[3] and "live counts" in said[3]
        assert f"{name}: slot positions and slot table differ" in said[4]
