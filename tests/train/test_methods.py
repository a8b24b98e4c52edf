"""`launch/finetune.py --method`, from arguments to files, several runs in one process; distillation."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from seft_ds.checkpoint.verify import verify
from tests.ranks import run_processes
from tests.train.test_finetune import ROOT, make_models

SEFT = ["--seft.interval", "3", "--seft.window", "2", "--seft.waves", "false"]
RUNS: dict[str, tuple[int, list[str]]] = {  # name -> ZeRO stage, flags
    "spiel": (3, ["--method", "spiel", "--trainable", "rank=2", *SEFT,
                  "--save_strategy", "steps", "--save_steps", "5"]),
    "resumed": (3, ["--method", "spiel", "--trainable", "rank=2", *SEFT,
                    "--resume", "spiel/checkpoint-5"]),
    "masked_full": (2, ["--method", "masked_full"]),
    "lora_pruned": (3, ["--method", "lora_pruned", "--trainable", "rank=2", "--lora_dropout", "0.1"]),
    "sqft": (2, ["--method", "sqft", "--trainable", "rank=2", "--lora_alpha", "16"]),
    "distilled": (3, ["--method", "sqft", "--trainable", "rank=2", "--lora_alpha", "16",
                      "--distill", "dense", "--distill_weight", "1e-9"]),
}  # fmt: skip
RANKS = {1: ["spiel", "resumed", "masked_full", "lora_pruned"], 2: ["sqft", "distilled"]}
STEPS = 10


def run_all(size: int, folder: str) -> None:
    from accelerate.state import AcceleratorState

    from seft_ds.console import prepare_device
    from seft_ds.distributed.collectives import init_ranks
    from seft_ds.train.run import repair

    prepare_device()
    ranks = init_ranks()
    os.chdir(folder)
    for name in RANKS[size]:
        stage, flags = RUNS[name]
        AcceleratorState._reset_state(True)  # one process, several DeepSpeed configs
        repair(
            ["--model_name_or_path", "pruned", "--train_file", "text.txt", "--output_dir", name,
             "--deepspeed", str(ROOT / f"ds_configs/zero{stage}.json"), "--max_steps", str(STEPS),
             "--max_length", "16", "--per_device_train_batch_size", str(4 // size), "--learning_rate", "1e-2",
             "--packing", "true", "--packing_strategy", "wrapped", "--logging_steps", "1",
             "--disable_tqdm", "true", "--dtype", "float32", *flags], ranks
        )  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("methods")
    make_models(folder)
    for size in RANKS:
        run_processes(size, run_all, size, str(folder))
    return folder


def journal(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "journal.jsonl").read_text().splitlines()]


def record(run: Path) -> dict[str, Any]:
    return json.loads((run / "sparsity.json").read_text())


@pytest.mark.parametrize("name", RUNS)
def test_every_method_leaves_the_same_run_directory(home: Path, name: str) -> None:
    run, (_, flags) = home / name, RUNS[name]
    method = flags[1]
    assert verify(run).ok, verify(run).problems
    found, lines = record(run), journal(run)
    assert found["method"] == method and found["steps"] == STEPS
    assert lines[0]["kind"] == "run" and lines[-1]["kind"] == "end"
    assert lines[0]["method"] == method and name in RANKS[lines[0]["ranks"]]
    assert lines[-1]["live"] == found["live"] and lines[-1]["step"] == STEPS
    losses = [line["loss"] for line in lines if line["kind"] == "step"]
    assert len(losses) == (STEPS - 5 if name == "resumed" else STEPS) and losses[-1] < losses[0]
    assert f"method: {method}" in (run / "resolved_config.yaml").read_text()
    for file in ("report.html", "README.md", "tokenizer.json"):
        assert (run / file).stat().st_size > 0, file
    changed = [t["changed_positions"] for t in found["targets"].values()]
    assert (sum(changed) > 0) == (method in ("spiel", "lora_pruned"))
    before = record(home / "pruned")
    if method != "spiel":
        assert found["live"] == before["live"]
        assert all(t["live"] == t["target_live"] for t in found["targets"].values())


def test_equal_budgets(home: Path) -> None:
    slots = {name: sum(t["slots"] for t in journal(home / name)[0]["targets"]) for name in RUNS}
    rank_2 = sum(2 * sum(t["shape"]) for t in record(home / "pruned")["targets"].values())
    assert slots["spiel"] == slots["resumed"] == slots["lora_pruned"] == slots["sqft"] == rank_2
    assert slots["masked_full"] == record(home / "pruned")["live"]


def test_spiels_live_count_is_what_its_journal_adds_up_to(home: Path) -> None:
    """Nothing is pruned; what comes alive and what dies is told, and no more changes."""
    lines, found = journal(home / "spiel"), record(home / "spiel")
    live = {t["name"]: t["live"] for t in lines[0]["targets"]}
    events = [line for line in lines if line["kind"] == "event"]
    assert len(events) > len(live)  # a first one that replaces all slots, and later ones
    for event in events:
        assert event["pruned"] == 0
        live[event["target"]] += event["revived"] - event["died"]
        assert event["live"] == live[event["target"]]
    first = [e for e in events if e["step"] == events[0]["step"]]
    assert all(e["dropped"] == e["slots"] for e in first)
    assert sum(e["died"] for e in events) > 0
    assert {f"{n}.weight": c for n, c in live.items()} == {
        n: t["live"] for n, t in found["targets"].items()
    }
    assert found["sparsity"] < record(home / "pruned")["sparsity"]
    assert all(t["target_live"] is None for t in found["targets"].values())


def test_spiel_resumes_and_exports_although_its_live_counts_grow(home: Path) -> None:
    from safetensors.torch import load_file

    from seft_ds.checkpoint.from_checkpoint import export_checkpoint

    export_checkpoint(home / "spiel/checkpoint-10", home / "exported", str(home / "pruned"))
    assert verify(home / "exported").ok
    first, *others = (
        load_file(home / name / "model.safetensors") for name in ("spiel", "exported", "resumed")
    )
    for other in others:
        assert all(torch.equal(first[n], other[n]) for n in first)
    assert record(home / "pruned")["live"] < record(home / "spiel")["live"]


def test_next_to_no_distillation_is_ordinary_training(home: Path) -> None:
    """Another ZeRO stage, and the loss by way of whole logits: the same losses over 2 ranks."""
    plain, distilled = (
        [line["loss"] for line in journal(home / name) if line["kind"] == "step"]
        for name in ("sqft", "distilled")
    )
    assert distilled == pytest.approx(plain, rel=1e-5)
    assert record(home / "distilled")["distilled_from"] == "dense"
    tokens = [sum(ln.get("tokens", 0) for ln in journal(home / n)) for n in ("sqft", "distilled")]
    assert tokens[0] == tokens[1] > 0


def test_token_losses_entry_by_entry() -> None:
    from math import exp, log

    from seft_ds.train.distill import token_losses

    torch.manual_seed(0)
    ours, theirs = torch.randn(2, 5, 7), torch.randn(2, 5, 7)
    labels = torch.randint(0, 7, (2, 5))
    labels[0, :2] = -100
    labels[1, 4] = -100
    nll, kl, count = token_losses(ours, theirs, labels)

    def softmax(row: list[float]) -> list[float]:
        total = sum(exp(v) for v in row)
        return [exp(v) / total for v in row]

    wanted_nll = wanted_kl = 0.0
    counted = 0
    for r in range(2):
        for t in range(4):
            label = int(labels[r, t + 1])
            if label == -100:
                continue
            q, p = softmax(ours[r, t].tolist()), softmax(theirs[r, t].tolist())
            wanted_nll -= log(q[label])
            wanted_kl += sum(b * (log(b) - log(a)) for a, b in zip(q, p, strict=True))
            counted += 1
    assert int(count) == counted == 6
    assert float(nll) == pytest.approx(wanted_nll, rel=1e-5)
    assert float(kl) == pytest.approx(wanted_kl, rel=1e-5)
    assert float(token_losses(theirs, theirs, labels)[1]) == pytest.approx(0.0, abs=1e-6)


def test_a_teacher_with_another_vocabulary_is_refused(tmp_path: Path) -> None:
    from seft_ds.train.distill import check_teacher

    for name, size in (("a", 128), ("b", 130), ("c", None)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({"vocab_size": size}))
    check_teacher(tmp_path / "a", tmp_path / "a")
    for teacher in ("b", "c"):
        with pytest.raises(ValueError, match="the dense model that it was pruned from"):
            check_teacher(tmp_path / teacher, tmp_path / "a")
