"""The real DeepSpeed engine on tiny models: ZeRO 0-3, 1-4 ranks, fp32.

One launch a rank count runs many engines after each other: starting the ranks costs more than they do. Each
kind and stage is compared with one rank on one other count; with SEFT_FULL=1 on all of them.
"""

from __future__ import annotations

import itertools
import os

import pytest
import torch

from tests.ranks import run_processes
from tests.tiny import tiny_config, tiny_model

STEPS, WINDOW, INTERVAL = 30, 3, 5
TRAINED = 12  # of the steps that are planned: two events of each weight
KINDS = ("llama", "mistral", "qwen2", "llama24")
STAGES = (0, 1, 2, 3)
FULL = bool(os.environ.get("SEFT_FULL"))


def config(stage: int, bf16: bool = False, **seft) -> dict:
    return {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 1,
        "zero_optimization": {"stage": stage},
        "bf16": {"enabled": bf16},
        "optimizer": {"type": "AdamW", "params": {"lr": 5e-3, "torch_adam": True}},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
        "seft": {
            "interval": INTERVAL,
            "window": WINDOW,
            "density": 0.02,
            "total_steps": STEPS,
            "seed": 1,
            "nm": "swap",
            "prune": "fisher",
            **({} if "dense_model" in seft else {"drop_fraction": 0.2}),
            **seft,
        },
    }


def tokens(step: int, row: int = 0, rows: int = 2) -> torch.Tensor:
    g = torch.Generator().manual_seed(1000 * step + row)
    return torch.randint(0, 128, (rows, 16), generator=g)


def train(kind: str, stage: int, bf16: bool, **seft) -> dict:
    """One rank: some steps with the invariants checked after every event."""
    import seft_ds
    from seft_ds.zero import shards

    torch.manual_seed(0)
    model = tiny_model(kind, torch.bfloat16 if bf16 else torch.float32)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    probe = tokens(0, 7)
    with torch.no_grad():
        pruned_logits = model(probe).logits
    engine, *_ = seft_ds.initialize(model=model, config=config(stage, bf16, **seft))
    evolution = engine.seft
    records: list[dict] = []
    evolution.listeners.append(records.append)
    with torch.no_grad():
        assert torch.equal(engine(probe).logits, pruned_logits), "step 0 is not the pruned model"
    states = {s.target.name: s for s in evolution.states}
    wanted = {n: int(before[f"{n}.weight"].count_nonzero()) for n in states}
    losses = []
    for step in range(TRAINED):
        ids = tokens(
            step
        )  # the same on every rank: the mean over ranks doesn't depend on their number
        loss = engine(input_ids=ids, labels=ids).loss
        losses.append(loss.item())
        engine.backward(loss)
        engine.step()
        events = [r for r in records if r["kind"] == "event" and r["step"] == step + 1]
        if events:
            evolution.check()  # zeros, slots and counts from the shards of all ranks
            for event in events:
                if evolution.config.scope == "layer":
                    assert event["live"] == wanted[event["target"]]
    assert sum(evolution.live_counts()) == sum(wanted.values())
    final = {}
    for i, (name, state) in enumerate(states.items()):
        weight = shards.gather_whole(state.weight, evolution.ranks)
        live = live_mask(evolution, i, weight.numel())
        assert not weight.view(-1)[~live].any() and not torch.signbit(weight.view(-1)[~live]).any()
        if kind.endswith("24"):
            assert (live.view(-1, 4).sum(1) == 2).all()
        final[name] = (weight, live)
    check_export(engine, kind, probe)
    ours = ("seft_delta", "seft_position")
    for name, p in model.named_parameters():  # nothing but the targets moved
        if not name.endswith(ours) and name.removesuffix(".weight") not in states:
            assert torch.equal(shards.gather_whole(p, evolution.ranks), before[name]), name
    return {"losses": losses, "final": final, "records": records}


def check_export(engine, kind: str, probe: torch.Tensor) -> None:
    """The files hold exactly the live counts, and the model that loads from them is the engine's."""
    import tempfile

    from transformers import AutoModelForCausalLM

    import seft_ds

    engine.eval()
    with torch.no_grad():
        trained = engine(probe).logits
    with tempfile.TemporaryDirectory() as folder:  # rank 0's is the one that is written to
        tiny_config(kind.removesuffix("24")).save_pretrained(folder)
        record = seft_ds.save_model(engine, folder, f"{folder}/model")
        for state in engine.seft.states:
            entry = record["targets"][f"{state.target.name}.weight"]
            assert entry["live"] == entry["target_live"] or engine.seft.config.scope == "global"
            assert entry["pattern"] == ("2:4" if kind.endswith("24") else None)
        assert record["live"] == sum(s.target.target_live for s in engine.seft.states)
        if engine.seft.ranks.rank == 0:
            loaded = AutoModelForCausalLM.from_pretrained(f"{folder}/model", dtype=trained.dtype)
            with torch.no_grad():
                torch.testing.assert_close(loaded.eval()(probe).logits, trained, rtol=0, atol=1e-6)
        engine.seft.ranks.barrier()
    engine.train()


def live_mask(evolution, target: int, numel: int) -> torch.Tensor:
    from seft_ds.sparse import mask

    return mask.unpack(evolution.live_bits(target), numel)


def compared(kind: str, stage: int) -> tuple[int, ...]:
    """On how many ranks it is trained besides one; every stage meets every count."""
    counts = (2, 3, 4)
    return counts if FULL else (counts[(KINDS.index(kind) + stage) % 3],)


def train_all(size: int) -> dict:
    """Every kind on every stage as far as `compared` says. Waves, scope and release take turns."""
    turns = itertools.cycle(
        [
            {},
            {"waves": False},
            {"release": "revert", "prune": "curvature"},
            {"scope": "global"},
            {"prune": "curvature", "start": "gradient", "drop_fraction": 0.0},
        ]
    )
    return {
        (kind, stage): train(kind, stage, bf16=False, **seft)
        for (kind, stage), seft in zip(itertools.product(KINDS, STAGES), turns)
        if size in (1, *compared(kind, stage))
    }


@pytest.fixture(scope="module")
def runs() -> dict:
    """{ranks: {(kind, stage): result of rank 0}}."""
    return {size: run_processes(size, train_all, size)[0] for size in (1, 2, 3, 4)}


@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stage", STAGES)
def test_every_rank_count_makes_the_same_model(runs: dict, kind: str, stage: int) -> None:
    first = runs[1][kind, stage]
    events = [r for r in first["records"] if r["kind"] == "event"]
    assert sum(r["revived"] for r in events) > 0
    assert sum(r["revived"] - r["died"] - r["pruned"] for r in events) == 0
    for size in compared(kind, stage):
        other = runs[size][kind, stage]
        torch.testing.assert_close(
            torch.tensor(other["losses"]), torch.tensor(first["losses"]), rtol=2e-5, atol=2e-5
        )
        for name, (weight, live) in first["final"].items():
            assert torch.equal(other["final"][name][1], live), (name, size)
            torch.testing.assert_close(other["final"][name][0], weight, rtol=1e-4, atol=2e-5)
