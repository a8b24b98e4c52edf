"""Adapters and masked full training in real DeepSpeed engines: every ZeRO stage and 1 or 2 ranks train the
same, and the files hold what the engine computes with."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.ranks import run_processes
from tests.tiny import tiny_model
from tests.zero.test_engine import tokens

STEPS, ROWS = 2, 2  # rows a step, over all ranks
FULL = bool(os.environ.get("SEFT_FULL"))
STAGES = {1: [0, 1, 2, 3] if FULL else [0, 3], 2: [0, 1, 2, 3]}  # of each number of ranks
# (what trains, the model): SPP's and SparsePEFT's zeros under a pattern as well.
CASES = [("lora", "llama"), ("spp", "llama24"), ("sqft", "mistral"), ("masked_full", "llama")]


def config(stage: int) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": 1e-2, "torch_adam": True, "weight_decay": 0},
        },
        "steps_per_print": 10**9,
        "seft": {"total_steps": STEPS, "drop_fraction": 0, "trainable": "live", "lr_scale": "none"},
    }


def train(engine: Any, rank: int, size: int) -> None:
    """ROWS rows a step, dealt to the ranks; one rank accumulates them."""
    engine.train()
    for step in range(STEPS):
        for row in range(rank, ROWS, size):
            ids = tokens(step, row=row)
            engine.backward(engine(input_ids=ids, labels=ids).loss)
            engine.step()


def adapted(stage: int, size: int, method: str, kind: str, folder: Path) -> None:
    """Train adapters, then write the merged model; for LoRA also the one that is pruned again."""
    import deepspeed

    from seft_ds.baselines.adapters import attach_adapters
    from seft_ds.baselines.again import input_square_sums
    from seft_ds.baselines.merge import save_merged
    from seft_ds.config import parse_seft
    from seft_ds.distributed.collectives import init_ranks

    ranks = init_ranks()
    model = tiny_model(kind)
    adapters = attach_adapters(model, method, parse_seft({"trainable": "rank=2"}), ranks)
    settings = config(stage) | {"gradient_accumulation_steps": ROWS // size}
    trained = [p for p in model.parameters() if p.requires_grad]
    engine, *_ = deepspeed.initialize(model=model, model_parameters=trained, config=settings)
    train(engine, ranks.rank, size)
    engine.eval()
    with torch.no_grad():
        logits = engine(tokens(99)).logits
    out = folder / f"{method}-{stage}-{size}"
    save_merged(engine, adapters, ranks, folder / kind, out, {"logits": logits.tolist()})
    if method == "lora":
        adapters.method = "lora_pruned"
        sums = input_square_sums(engine, adapters.layers, list(tokens(7, rows=3)), ranks)
        listed = {name: total.tolist() for name, total in sums.items()}
        pruned = folder / f"lora_pruned-{stage}-{size}"
        save_merged(engine, adapters, ranks, folder / kind, pruned, {"sums": listed}, sums)


def masked(stage: int, size: int, method: str, kind: str, folder: Path) -> None:
    import seft_ds

    settings = config(stage) | {"gradient_accumulation_steps": ROWS // size}
    engine, *_ = seft_ds.initialize(model=tiny_model(kind), config=settings)
    train(engine, engine.seft.ranks.rank, size)
    engine.eval()
    with torch.no_grad():
        logits = engine(tokens(99)).logits
    about = {"logits": logits.tolist()}
    seft_ds.save_model(engine, folder / kind, folder / f"{method}-{stage}-{size}", about)


def all_runs(size: int, stages: list[int], folder: str) -> None:
    for stage in stages:
        for method, kind in CASES:
            (masked if method == "masked_full" else adapted)(
                stage, size, method, kind, Path(folder)
            )


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("engines")
    for kind in {kind for _, kind in CASES}:
        tiny_model(kind).save_pretrained(folder / kind)
    for size, stages in STAGES.items():
        run_processes(size, all_runs, size, stages, str(folder))
    return folder


def folders(runs: Path, method: str) -> list[Path]:
    found = sorted(runs.glob(f"{method}-[0-3]-[12]"))
    assert len(found) == sum(map(len, STAGES.values()))
    return found


def loaded(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.parametrize("method, kind", CASES)
def test_the_files_are_what_the_engine_computed_with(runs: Path, method: str, kind: str) -> None:
    from seft_ds.checkpoint.verify import verify

    for folder in folders(runs, method):
        assert verify(folder).ok, verify(folder).problems
        wanted = torch.tensor(json.loads((folder / "sparsity.json").read_text())["logits"])
        model = loaded(folder)
        with torch.no_grad():
            torch.testing.assert_close(model(tokens(99)).logits, wanted, rtol=1e-4, atol=1e-5)
        names = {n for n, _ in model.named_parameters()}
        assert names == {n for n, _ in tiny_model(kind).named_parameters()}


@pytest.mark.parametrize("method, kind", [*CASES, ("lora_pruned", "llama")])
def test_every_stage_and_number_of_ranks_trains_the_same(
    runs: Path, method: str, kind: str
) -> None:
    first, *others = (dict(loaded(f).named_parameters()) for f in folders(runs, method))
    start = dict(tiny_model(kind).named_parameters())
    moved = [n for n in start if not torch.equal(first[n], start[n])]
    assert moved and all("_proj" in n for n in moved)
    for other in others:
        for name, weight in first.items():
            torch.testing.assert_close(other[name], weight, rtol=1e-3, atol=1e-4)
    for name in moved:  # what became of the zeros
        dead, now_dead = start[name] == 0, first[name] == 0
        if method == "lora":
            assert now_dead.sum() < 0.01 * dead.sum()
        elif method == "lora_pruned":
            assert torch.equal(dead.sum(1), now_dead.sum(1)) and not torch.equal(dead, now_dead)
        else:
            assert torch.equal(dead, now_dead)


def test_masked_full_is_adam_on_the_live_weights(runs: Path) -> None:
    """Against torch alone: whole weights train, gradients of dead entries are zeroed."""
    model = tiny_model("llama").train()
    weights = {n: p for n, p in model.named_parameters() if n.endswith("_proj.weight")}
    live = {n: w != 0 for n, w in weights.items()}
    for name, param in model.named_parameters():
        param.requires_grad_(name in weights)
    optimizer = torch.optim.AdamW(weights.values(), lr=1e-2, weight_decay=0)
    for step in range(STEPS):
        for row in range(ROWS):
            ids = tokens(step, row=row)
            (model(input_ids=ids, labels=ids).loss / ROWS).backward()
        for name, weight in weights.items():
            weight.grad[~live[name]] = 0
        optimizer.step()
        optimizer.zero_grad()
    for folder in folders(runs, "masked_full"):
        for name, weight in loaded(folder).named_parameters():
            if name in weights:
                torch.testing.assert_close(weight, weights[name], rtol=1e-3, atol=1e-4)


def test_calibration_sums_are_those_of_the_merged_model(runs: Path) -> None:
    """By hooks on the merged files, one sequence at a time."""
    for folder in folders(runs, "lora_pruned"):
        sums = json.loads((folder / "sparsity.json").read_text())["sums"]
        seen = sums_by_hand(
            loaded(folder.with_name(folder.name.replace("_pruned", ""))), list(sums)
        )
        for name, total in sums.items():
            wanted = seen[name]
            torch.testing.assert_close(torch.tensor(total).double(), wanted, rtol=1e-4, atol=1e-6)


def sums_by_hand(model: nn.Module, names: list[str]) -> dict[str, torch.Tensor]:
    sums: dict[str, torch.Tensor] = {}

    def adder(name: str) -> Any:
        def add(module: nn.Module, args: tuple, out: Any) -> None:
            total = args[0].double().square().sum(dim=(0, 1))
            sums[name] = sums.get(name, torch.zeros_like(total)) + total

        return add

    for name in names:
        model.get_submodule(name).register_forward_hook(adder(name))
    with torch.no_grad():
        for ids in tokens(7, rows=3).split(1):
            model(input_ids=ids)
    return sums
