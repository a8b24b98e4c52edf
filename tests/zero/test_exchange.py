"""Exchanges in the real engine: ZeRO 0-3, 1-3 ranks, resumed runs, and what is refused."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from tests.checkpoint.saved import differences, whole_state
from tests.ranks import run_processes
from tests.tiny import dense_model, dense_moe, prune_, tiny_config, tiny_moe
from tests.zero.test_engine import check_export, config, live_mask, tokens

FULL = bool(os.environ.get("SEFT_FULL"))
STEPS = 14
WAYS = [  # (ZeRO stage, bf16, settings)
    (0, False, {}),
    (1, True, {}),
    (2, False, {"scope": "layer"}),
    (3, False, {}),
    (3, True, {"drop_fraction": 0.3, "scope": "layer"}),
    (2, False, {"drop_fraction": 0.3, "release": "revert"}),
]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`dense` and `pruned` in fp32, and the same in bf16."""
    folder = tmp_path_factory.mktemp("exchange")
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        model = dense_model("llama", dtype)
        model.save_pretrained(folder / name / "dense")
        prune_(model)
        model.save_pretrained(folder / name / "pruned")
    return folder


def start(home: Path, stage: int, bf16: bool, **seft):
    from transformers import AutoModelForCausalLM

    import seft_ds

    folder = home / ("bf16" if bf16 else "fp32")
    model = AutoModelForCausalLM.from_pretrained(folder / "pruned", dtype="auto")
    settings = {
        "dense_model": str(folder / "dense"),
        "exchange": 0.1,
        "exchanges": 2,
        "total_steps": STEPS,
        **seft,
    }
    engine, *_ = seft_ds.initialize(model=model, config=config(stage, bf16, **settings))
    return engine


def step(engine, number: int) -> None:
    """The same rows on every rank, so that the mean over ranks doesn't depend on their number."""
    ids = tokens(number)
    loss = engine(input_ids=ids, labels=ids).loss
    engine.backward(loss)
    engine.step()


def train(home: Path, stage: int, bf16: bool, seft: dict) -> dict:
    """One rank: what every exchange must keep, from the shards of all ranks."""
    from safetensors.torch import load_file

    from seft_ds.zero import shards

    engine = start(home, stage, bf16, **seft)
    evolution = engine.seft
    records: list[dict] = []
    evolution.listeners.append(records.append)
    dense = load_file(home / ("bf16" if bf16 else "fp32") / "dense" / "model.safetensors")
    wanted = evolution.live_counts()
    states = list(enumerate(evolution.states))
    first = [live_mask(evolution, i, s.target.numel) for i, s in states]
    for number in range(STEPS):
        before = [live_mask(evolution, i, s.target.numel) for i, s in states]
        step(engine, number)
        found = [r for r in records if r["kind"] == "exchange" and r["step"] == number + 1]
        told = [r for r in records if r["kind"] == "event" and r["step"] == number + 1]
        changed = {r["target"]: r["changed"] for r in told}
        if found:  # comes after the step's events
            changed |= {name: t["changed"] for name, t in found[0]["targets"].items()}
        for (i, s), old in zip(states, first, strict=True):
            if s.target.name in changed:
                moved = live_mask(evolution, i, s.target.numel) ^ old
                assert changed[s.target.name] == int(moved.sum())
        if not found:
            continue
        evolution.check()
        counts = evolution.live_counts()
        assert counts == [t["live"] for t in found[0]["targets"].values()]
        assert sum(counts) == sum(wanted)
        assert counts == wanted or seft.get("scope") != "layer"
        assert 0 < found[0]["exchanged"] == min(found[0]["most"], found[0]["paying"])
        events = any(r["kind"] == "event" and r["step"] == number + 1 for r in records)
        for (i, s), old in zip(states, before, strict=True):
            live = live_mask(evolution, i, s.target.numel)
            weight = shards.gather_whole(s.weight, evolution.ranks).view(-1)
            assert not weight[~live].any()
            if not events:  # which revive positions as well, at 0
                back = live & ~old
                assert int(back.sum()) == found[0]["targets"][s.target.name]["revived"]
                assert torch.equal(weight[back], dense[f"{s.target.name}.weight"].view(-1)[back])
    assert {r["step"] for r in records if r["kind"] == "exchange"} == {3, 8}
    check_export(engine, "llama", tokens(0, 7))
    return {
        "live": [live_mask(evolution, i, s.target.numel) for i, s in states],
        "exchanged": [r["exchanged"] for r in records if r["kind"] == "exchange"],
        "moved": sum(evolution.changed_positions()),
    }


def sizes(way: int) -> tuple[int, ...]:
    """On how many ranks a way is run: one, and another number in turns."""
    return (1, 2, 3) if FULL else (1, 3 - way % 2)


def train_all(home: Path, size: int) -> dict[int, dict]:
    return {n: train(home, *way) for n, way in enumerate(WAYS) if size in sizes(n)}


@pytest.mark.timeout(600)
def test_counts_values_and_the_same_choice_on_any_ranks(home: Path) -> None:
    results = {size: run_processes(size, train_all, home, size)[0] for size in (1, 2, 3)}
    for n, way in enumerate(WAYS):
        first, *others = (results[size][n] for size in sizes(n))
        assert first["moved"] > 0
        for other in others:
            if way[1]:  # bf16 rounds sums of another order differently, and the worths with them
                assert other["exchanged"] == pytest.approx(first["exchanged"], rel=0.05), way
                continue
            assert other["exchanged"] == first["exchanged"], way
            for a, b in zip(first["live"], other["live"], strict=True):
                assert torch.equal(a, b), way


def train_experts(home: Path) -> dict:
    """Experts from their files: every matrix keeps its count, and what comes back is the dense model's."""
    from transformers import AutoModelForCausalLM

    import seft_ds
    from seft_ds.zero import shards

    results = {}
    for kind, stage in (("deepseek_v3", 3), ("mixtral", 2)):
        folder = home / kind
        model = AutoModelForCausalLM.from_pretrained(folder / "pruned", dtype=torch.float32)
        settings = {"dense_model": str(folder / "dense"), "exchange": 0.1, "exchanges": 2}
        settings |= {"total_steps": 9, "checkpoint_base": "reference"}
        engine, *_ = seft_ds.initialize(model=model, config=config(stage, **settings))
        evolution, records = engine.seft, []
        evolution.listeners.append(records.append)
        wanted = [s.count_by_part(s.live_bits) for s in evolution.states]
        wanted = [evolution.ranks.sum_(counts).tolist() for counts in wanted]
        for number in range(9):
            step(engine, number)
            if number == 3:
                engine.save_checkpoint(str(home / f"{kind}-{evolution.ranks.size}"), "here")
        dense, live = AutoModelForCausalLM.from_pretrained(folder / "dense").state_dict(), {}
        for i, (s, before) in enumerate(zip(evolution.states, wanted, strict=True)):
            counts = evolution.ranks.sum_(s.count_by_part(s.live_bits)).tolist()
            live[s.target.name] = live_mask(evolution, i, s.target.numel)
            if not s.target.experts:
                continue  # with the default scope budgets move between linear layers
            assert counts == before == s.target.live_by_part
            weight = shards.gather_whole(s.weight, evolution.ranks).view(-1)
            started = live_mask_of(s.start_bits, evolution.ranks, s)
            back = live[s.target.name] & ~started
            assert back.any() and torch.equal(weight[back], dense[s.target.name].view(-1)[back])
        seft_ds.save_model(engine, folder / "pruned", home / f"out-{kind}-{evolution.ranks.size}")
        moved = [r["exchanged"] for r in records if r["kind"] == "exchange"]
        results[kind] = {"live": live, "exchanged": moved}
    return results


def live_mask_of(bits, ranks, state) -> torch.Tensor:
    from seft_ds.sparse import mask

    mine = mask.unpack(bits, state.hi - state.lo).to(torch.uint8)
    return torch.cat(ranks.gather(mine)).bool()


@pytest.mark.timeout(600)
def test_experts_exchange_within_themselves(tmp_path: Path) -> None:
    from seft_ds import verify

    for kind in ("deepseek_v3", "mixtral"):
        for name, make in (("dense", dense_moe), ("pruned", tiny_moe)):
            make(kind).save_pretrained(tmp_path / kind / name)
    results = {size: run_processes(size, train_experts, tmp_path)[0] for size in (1, 3)}
    for kind, first in results[1].items():
        other = results[3][kind]
        assert min(first["exchanged"]) > 0 and other["exchanged"] == first["exchanged"]
        for name, live in first["live"].items():
            assert torch.equal(other["live"][name], live), name
        assert verify(tmp_path / f"out-{kind}-3").ok


def resumed(home: Path, folder: str, base: str) -> list[str]:
    """Stop inside an exchange's window (step 7 of 6 to 8), go on in a new engine, compare at the end."""
    engine = start(home, 2, False, checkpoint_base=base)
    for number in range(7):
        step(engine, number)
    engine.save_checkpoint(folder, "here")
    again = start(home, 2, False, checkpoint_base=base)
    again.load_checkpoint(folder, "here")
    for number in range(7, STEPS):
        step(engine, number)
        step(again, number)
    return differences(whole_state(engine), whole_state(again))


@pytest.mark.parametrize("base", ["copy", "reference"])
def test_resume_inside_the_window_of_an_exchange(home: Path, tmp_path: Path, base: str) -> None:
    assert run_processes(2, resumed, home, str(tmp_path), base) == [[], []]


def refusals(home: Path, folder: Path) -> dict[str, str]:
    said = {}

    def attempt(name: str, **seft) -> None:
        try:
            start(home, 1, False, **seft)
            said[name] = "no error"
        except ValueError as error:
            said[name] = str(error)

    other = tiny_config("llama")
    other.intermediate_size = 48
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_config(other).save_pretrained(folder / "other")
    other.num_hidden_layers, other.intermediate_size = 1, 40
    AutoModelForCausalLM.from_config(other).save_pretrained(folder / "short")
    attempt("none", dense_model=str(folder / "nothing"))
    attempt("pruned", dense_model=str(home / "fp32/pruned"))
    attempt("shape", dense_model=str(folder / "other"))
    attempt("layers", dense_model=str(folder / "short"))
    with pytest.warns(UserWarning, match="no exchange fits into 14 steps"):
        attempt("late", window=12, interval=12)
    return said


def test_what_is_refused(home: Path, tmp_path: Path) -> None:
    from seft_ds.config import parse_seft

    (said,) = run_processes(1, refusals, home, tmp_path)
    assert said["late"] == "no error"
    assert "is no folder" in said["none"]
    assert "pruned itself" in said["pruned"]
    assert "has shape (24, 48), the model has (24, 40)" in said["shape"]
    for case in ("shape", "layers"):
        assert said[case].startswith("dense_model is not the model that was pruned: "), said[case]
    assert "model.layers.1." in said["layers"] and "missing from the files" in said["layers"]
    with pytest.raises(ValueError, match="give dense_model"):
        parse_seft({"exchange": 0.1})
    with pytest.raises(ValueError, match="adapt false prunes none"):
        parse_seft({"dense_model": "d", "adapt": False, "pattern": "none"})
    with pytest.raises(ValueError, match='trainable "live"'):
        parse_seft({"dense_model": "d", "trainable": "live"})
    chosen = parse_seft({"dense_model": "d"})
    assert (chosen.scope, chosen.drop_fraction, chosen.exchange) == ("global", 0.0, 0.05)


def not_finite(home: Path, folder: Path) -> dict:
    """An exchange with an infinite curvature in one weight, and one with such a dense model."""
    import warnings

    engine = start(home, 3, False)
    seft, records = engine.seft, []
    seft.listeners.append(records.append)
    before = live_mask(seft, 2, seft.states[2].target.numel)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for number in range(3):
            if number == 2:  # squares of many steps add up: nothing in a step itself is infinite
                seft.states[2].curvature.output.fill_(3e38)
                seft.states[2].curvature.input.fill_(3e38)
            step(engine, number)
    seft.check()
    [record] = [r for r in records if r["kind"] == "exchange"]
    out = [name for name, t in record["targets"].items() if t["not_finite"]]
    assert out == [seft.states[2].target.name] and record["exchanged"] > 0
    assert torch.equal(live_mask(seft, 2, seft.states[2].target.numel), before)
    said = " ".join(str(w.message) for w in caught)
    engine = start(home, 2, False, dense_model=str(folder / "dense"))
    for number in range(2):
        step(engine, number)
    try:
        step(engine, 2)
        return {"warned": said, "refused": "no error"}
    except ValueError as error:
        return {"warned": said, "refused": str(error)}


def test_what_is_not_finite_is_named_on_every_rank(home: Path, tmp_path: Path) -> None:
    dense = dense_model("llama")
    broken = dense.model.layers[1].mlp.up_proj.weight.data
    broken.view(-1)[int(broken.abs().argmin())] = torch.inf  # the smallest one: it was pruned
    dense.save_pretrained(tmp_path / "dense")
    first, second = run_processes(2, not_finite, home, tmp_path)
    assert "curvature of model.layers.0.self_attn.v_proj overflowed" in first["warned"]
    assert "overflowed" not in second["warned"]  # once a run, not once a rank
    assert "model.layers.1.mlp.up_proj: a weight of the dense model" in first["refused"]
    assert second["refused"] == first["refused"]
