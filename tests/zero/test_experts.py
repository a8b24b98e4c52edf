"""Mixtures of experts on the real engine: events, exact counts per expert, resume, export, and no hang.

Each launch (1, 2 and 3 ranks) trains every family, saves in the middle, and goes on with what the launch
before it saved, which had another number of ranks. By default a family takes one ZeRO stage a launch, 2 and
3 in turns; with SEFT_FULL=1 both.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoint.saved import differences, whole_state
from tests.ranks import run_processes
from tests.tiny import MOE_KINDS, tiny_moe

STEPS, SAVED = 8, 4  # the save is in the middle of windows, with events before and after it
FULL = bool(os.environ.get("SEFT_FULL"))
SIZES = (1, 2, 3) if FULL else (1, 3)
# What is the same for all runs of a family, so that they can be compared.
SETTINGS: dict[str, dict[str, Any]] = {
    "deepseek_v3": {"checkpoint_base": "reference"},
    "deepseek_v2": {"release": "revert", "checkpoint_base": "reference"},
    "mixtral": {"checkpoint_base": "reference"},
    "qwen3_moe": {"scope": "global", "waves": False},
    "qwen2_moe": {"start": "gradient"},
}


def pruned(kind: str) -> Any:
    """The model that a family's runs start from; one has a pattern."""
    return tiny_moe(kind, pattern=(2, 4) if kind == "qwen2_moe" else None)


def stages(kind: str, size: int) -> tuple[int, ...]:
    return (2, 3) if FULL else ((MOE_KINDS.index(kind) + SIZES.index(size)) % 2 + 2,)


def config(stage: int, bf16: bool = False, **seft: Any) -> dict:
    return {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {"stage": stage},
        "bf16": {"enabled": bf16},
        "optimizer": {"type": "AdamW", "params": {"lr": 5e-3, "torch_adam": True}},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
        "seft": {
            "interval": 3,
            "window": 2,
            "density": 0.05,
            "total_steps": STEPS,
            "seed": 1,
            "nm": "swap",
            **({} if "dense_model" in seft else {"drop_fraction": 0.2}),
            **seft,
        },
    }


def start(folder: Path, kind: str, stage: int) -> Any:
    """The engine on the pruned model in `folder`, under ZeRO-3 partitioned while it loads."""
    from transformers import AutoModelForCausalLM
    from transformers.integrations import HfDeepSpeedConfig

    import seft_ds
    from seft_ds.distributed.collectives import init_ranks

    init_ranks()
    settings = config(stage, **SETTINGS[kind])
    partitions = HfDeepSpeedConfig(settings)  # as long as it lives, under ZeRO-3
    model = AutoModelForCausalLM.from_pretrained(folder / kind, dtype=torch.float32)
    del partitions
    return seft_ds.initialize(model=model, config=settings)[0]


def step(engine: Any, ids: torch.Tensor) -> float:
    loss = engine(input_ids=ids, labels=ids).loss
    engine.backward(loss)
    engine.step()
    engine.seft.check()  # zeros, slots and counts by expert, from the shards of all ranks
    return loss.item()


def tokens(step: int) -> torch.Tensor:
    return torch.randint(0, 128, (2, 16), generator=torch.Generator().manual_seed(step))


def train(folder: Path, kind: str, stage: int) -> dict:
    """Train, with a save on the way; what came out, and that only targets moved."""
    from seft_ds.zero import shards

    engine = start(folder, kind, stage)
    seft, size = engine.seft, engine.seft.ranks.size
    records: list[dict] = []
    seft.listeners.append(records.append)
    with torch.no_grad():
        logits = engine(tokens(99)).logits
    losses = []
    for i in range(STEPS):
        losses.append(step(engine, tokens(i)))
        if i + 1 == SAVED:
            engine.save_checkpoint(str(folder / f"{kind}-{stage}-{size}"), "here")
    final = {s.target.name: shards.gather_whole(s.weight, seft.ranks) for s in seft.states}
    return {
        "losses": losses, "final": final, "logits": logits, "state": whole_state(engine),
        "revived": sum(r["revived"] for r in records if r["kind"] == "event"),
        "router": any("gate." in name and "experts" not in name for name in final),
        "leaves": sum(getattr(m, "_z3_leaf", False) for m in engine.module.modules()),
    }  # fmt: skip


def resume(
    folder: Path, kind: str, stage: int, saved_by: tuple[int, int]
) -> dict[str, torch.Tensor]:
    """Go on from another number of ranks' checkpoint; save the model and a checkpoint at the end."""
    import seft_ds

    engine = start(folder, kind, stage)
    engine.load_checkpoint(str(folder / f"{kind}-{saved_by[0]}-{saved_by[1]}"), "here")
    for i in range(SAVED, STEPS):
        step(engine, tokens(i))
    size = engine.seft.ranks.size
    seft_ds.save_model(engine, folder / kind, folder / f"model-{kind}-{stage}-{size}")
    engine.save_checkpoint(str(folder / f"end-{kind}-{stage}-{size}"), "here")
    return whole_state(engine)


def launch(folder: Path, before: int | None) -> dict:
    """One number of ranks: train every family, and go on with what `before` ranks saved."""
    from seft_ds.distributed.collectives import init_ranks

    size = init_ranks().size
    results = {}
    for kind in MOE_KINDS:
        for stage in stages(kind, size):
            results[kind, stage] = train(folder, kind, stage)
        for stage in stages(kind, size) if before else ():
            results[kind, stage]["resumed"] = resume(
                folder, kind, stage, (stages(kind, before)[0], before)
            )
    return results


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    folder = tmp_path_factory.mktemp("experts")
    for kind in MOE_KINDS:
        pruned(kind).save_pretrained(folder / kind)
    return folder, {
        size: run_processes(size, launch, folder, before)[0]
        for before, size in zip((None, *SIZES), SIZES, strict=False)
    }


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("kind", MOE_KINDS)
def test_any_ranks_train_the_same_experts(runs: tuple[Path, dict], kind: str) -> None:
    folder, by_size = runs
    first = by_size[1][kind, stages(kind, 1)[0]]
    with torch.no_grad():
        logits = pruned(kind).eval()(tokens(99)).logits
    torch.testing.assert_close(first["logits"], logits, rtol=1e-4, atol=1e-5)
    assert first["revived"] > 0 and not first["router"]
    for size in SIZES:
        for stage in stages(kind, size):
            other = by_size[size][kind, stage]
            assert other["leaves"] >= (1 if kind.startswith("deepseek") else 2)
            torch.testing.assert_close(
                torch.tensor(other["losses"]), torch.tensor(first["losses"]), rtol=2e-5, atol=2e-5
            )
            for name, weight in first["final"].items():
                assert torch.equal(other["final"][name] != 0, weight != 0), (name, size, stage)
                torch.testing.assert_close(other["final"][name], weight, rtol=1e-4, atol=2e-5)


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("kind", MOE_KINDS)
def test_a_run_goes_on_on_other_ranks(runs: tuple[Path, dict], kind: str) -> None:
    """The same live positions and slots in the end, and values but for the order of sums."""
    _, by_size = runs
    for size in SIZES[1:]:
        for stage in stages(kind, size):
            run = by_size[size][kind, stage]
            off = [n for n in differences(run["state"], run["resumed"]) if "counters" not in n]
            for name in off:
                assert not name.endswith((".live", ".position", ".born_dead", ".fresh")), name
                torch.testing.assert_close(
                    run["resumed"][name], run["state"][name], rtol=1e-3, atol=2e-5, equal_nan=True
                )


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("kind", MOE_KINDS)
def test_files_and_exported_checkpoints_hold_each_expert(
    runs: tuple[Path, dict], kind: str
) -> None:
    """By the names that the family's files have; what transformers loads has the engine's live positions."""
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    from seft_ds import verify
    from seft_ds.checkpoint.from_checkpoint import export_checkpoint

    folder, by_size = runs
    size, stage = 3, stages(kind, 3)[0]
    saved = folder / f"model-{kind}-{stage}-{size}"
    result = verify(saved)
    assert result.ok, result.problems
    mixtral = kind == "mixtral"
    expert = "block_sparse_moe.experts.5.w" if mixtral else "mlp.experts.5."
    live = 192 if kind == "qwen2_moe" else 384 - 230  # 2:4, or 60 % dead
    for matrix in ("1", "2", "3") if mixtral else ("gate_proj", "up_proj", "down_proj"):
        entry = result.record["targets"][f"model.layers.1.{expert}{matrix}.weight"]
        assert entry["shape"] in ([16, 24], [24, 16]) and entry["target_live"] == live
        assert entry["live"] == entry["target_live"] or SETTINGS[kind].get("scope") == "global"
    assert not any(
        n.endswith(("gate.weight", "expert_gate.weight")) for n in result.record["targets"]
    )
    assert sum(t["changed_positions"] for t in result.record["targets"].values()) > 0
    loaded = AutoModelForCausalLM.from_pretrained(saved).state_dict()
    for name, weight in by_size[size][kind, stage]["resumed"].items():
        if name.endswith(".weight"):
            own = name if name in loaded else name.removesuffix(".weight")
            assert torch.equal(loaded[own].view(-1) != 0, live_of(by_size[size][kind, stage], name))
            same = (
                loaded[own].abs() > 1e-30
            )  # revived ones are raised from 0 to the smallest number
            assert torch.equal(loaded[own][same], weight.view(loaded[own].shape)[same])
    export_checkpoint(folder / f"end-{kind}-{stage}-{size}", folder / f"out-{kind}")
    assert verify(folder / f"out-{kind}").ok
    one, two = (load_file(f / "model.safetensors") for f in (saved, folder / f"out-{kind}"))
    assert one.keys() == two.keys() == load_file(folder / kind / "model.safetensors").keys()
    assert all(torch.equal(one[n], two[n]) for n in one)


def live_of(run: dict, name: str) -> torch.Tensor:
    from seft_ds.sparse import mask

    target = name.removesuffix(".weight")
    return mask.unpack(run["resumed"][f"{target}.live"], run["resumed"][name].numel())


def route_apart(folder: Path) -> list[tuple[int, bool]]:
    """Every rank sees one token over and over, and its neighbour another one: each sends all to two experts,
    and at least two of six get nothing at all. Idle matrices by event, and whether as many never changed."""
    from seft_ds.zero import shards

    results = []
    for kind in ("deepseek_v3", "mixtral", "qwen2_moe"):
        for stage in (2, 3):
            engine = start(folder, kind, stage)
            seft = engine.seft
            records: list[dict] = []
            seft.listeners.append(records.append)
            fused = [s for s in seft.states if s.target.experts]
            before = [shards.gather_whole(s.weight, seft.ranks).clone() for s in fused]
            for _ in range(STEPS):  # the same tokens all along: who is idle is idle in every window
                step(engine, torch.full((2, 16), 7 + 40 * (seft.ranks.rank % 2)))
            idle = [r["idle"] for r in records if r["kind"] == "event" and "idle" in r]
            kept = []
            for state, old in zip(fused, before, strict=True):
                new = shards.gather_whole(state.weight, seft.ranks)
                parts = new.view(state.target.n_parts, -1), old.view(state.target.n_parts, -1)
                kept.append(sum(torch.equal(a, b) for a, b in zip(*parts, strict=True)))
            results.append((min(idle), sum(kept) >= min(idle) > 0))
    return results


@pytest.mark.timeout(900)
@pytest.mark.parametrize("size", [2, 3])
def test_ranks_with_different_routing_do_not_wait_for_each_other(
    runs: tuple[Path, dict], size: int
) -> None:
    """Experts without any token included: they stay as they were, and are never starved."""
    try:
        results = run_processes(size, route_apart, runs[0], timeout=400)[0]
    except TimeoutError as error:
        pytest.fail(
            f"{error}: ranks that send their tokens to different experts wait for each other, in a gather of "
            "ZeRO-3 or a sum of a window that only some of them reach"
        )
    assert all(idle > 0 and kept for idle, kept in results), results


def refusal(model: Any, **seft: Any) -> str:
    from seft_ds.config import parse_seft
    from seft_ds.zero.attach import attach_slots
    from tests.ranks import run_threads

    with pytest.raises(ValueError) as said:
        run_threads(1, lambda ranks: attach_slots(model, parse_seft(seft), ranks))
    return str(said.value)


def test_what_is_refused() -> None:
    """Routers as targets, families and forms that were not tried, and adapters beside fused experts."""
    from seft_ds.baselines.adapters import attach_adapters
    from seft_ds.config import parse_seft
    from tests.prune.test_experts import unfused
    from tests.ranks import run_threads

    model = tiny_moe("qwen2_moe")
    assert "routers are never targets" in refusal(model, targets=["shared_expert_gate"])
    assert "modules of their own" in refusal(unfused(model))
    config = parse_seft({"trainable": "rank=2"})
    with pytest.raises(ValueError, match="experts are fused in one weight"):
        run_threads(1, lambda ranks: attach_adapters(model, "lora", config, ranks))
    model.model.layers[1].mlp.experts.is_transposed = True
    assert "weights are transposed" in refusal(model)
    model.config.model_type = "another_moe"
    said = refusal(model)
    assert "experts of a family that was not tried" in said and '"targets"' in said


def test_one_fused_weight_of_two() -> None:
    """Named alone, the other is frozen as it is."""
    from seft_ds.config import parse_seft
    from seft_ds.zero.attach import attach_slots
    from tests.ranks import run_threads

    model = tiny_moe("qwen3_moe")
    config = parse_seft({"targets": ["experts.down_proj"], "density": 0.05})
    (attached,) = run_threads(1, lambda ranks: attach_slots(model, config, ranks))
    assert [a.target.name.rpartition(".")[2] for a in attached] == ["down_proj"] * 2
    experts = model.model.layers[0].mlp.experts
    assert set(experts.seft_slot_ends) == {"down_proj"}
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert trained == [f"model.layers.{i}.mlp.experts.down_proj_seft_delta" for i in range(2)]
