"""SeftCallback in transformers' own Trainer, as somebody adds it to a script that exists."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.ranks import run_processes
from tests.tiny import dense_model, tiny_model


def deepspeed_config(stage: int) -> dict:
    return {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "zero_optimization": {"stage": stage},
        "steps_per_print": 10**9,
        "seft": {"interval": "auto", "window": 3, "density": 0.05, "waves": False},
    }


def train(folder: str, stage: int) -> tuple[list[float], int, int]:
    from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

    from seft_ds import SeftCallback
    from seft_ds.distributed.collectives import init_ranks

    init_ranks()
    out = Path(folder) / f"stage{stage}"
    args = TrainingArguments(
        output_dir=str(out), deepspeed=deepspeed_config(stage), use_cpu=True, max_steps=16,
        per_device_train_batch_size=2, learning_rate=1e-2, logging_steps=1, save_strategy="no",
        report_to="none", dataloader_pin_memory=False, disable_tqdm=True,
    )  # fmt: skip
    # After the arguments, as scripts do: under ZeRO-3 the model is then partitioned while it loads.
    model = AutoModelForCausalLM.from_pretrained(f"{folder}/pruned", dtype=torch.float32)
    g = torch.Generator().manual_seed(0)
    rows = [{"input_ids": (ids := torch.randint(0, 128, (16,), generator=g)), "labels": ids}] * 64
    callback = SeftCallback()
    trainer = Trainer(model=model, args=args, train_dataset=rows, callbacks=[callback])
    trainer.train()
    record = callback.save_model(out / "model")
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    return losses, sum(callback.seft.live_counts()), record["live"]


def train_all(folder: str) -> list:
    return [train(folder, 2), train(folder, 3)]


@pytest.mark.timeout(300)
def test_an_existing_trainer_script_with_one_callback(tmp_path: Path) -> None:
    from seft_ds.checkpoint.verify import verify

    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "pruned")
    live = sum(
        int(m.weight.count_nonzero()) for n, m in model.named_modules() if n.endswith("_proj")
    )
    (losses2, *counts2), (losses3, *counts3) = run_processes(2, train_all, str(tmp_path))[0]
    assert losses2[-1] < losses2[0] and len(losses2) == 16
    assert losses2 == pytest.approx(losses3, rel=1e-4)
    assert counts2 == counts3 == [live, live]
    assert verify(tmp_path / "stage2/model").ok and verify(tmp_path / "stage3/model").ok
    lines = (tmp_path / "stage2/journal.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    kinds = [record["kind"] for record in records]
    assert kinds[0] == "run" and kinds[-1] == "end" and kinds.count("event") == 14
    check_measurements(records)


def check_measurements(records: list[dict]) -> None:
    """What the run measured of itself agrees with what it says when it ends."""
    last = {r["target"]: r for r in records if r["kind"] == "event"}
    assert sum(r["changed"] for r in last.values()) == records[-1]["changed_positions"]
    memory, deltas = (next(r for r in records if r["kind"] == k) for k in ("memory", "deltas"))
    assert (
        memory["measured"]["weights"] > 0 and memory["peak_bytes"] > memory["measured"]["weights"]
    )
    assert set(deltas["targets"]) == {t["name"] for t in records[0]["targets"]}
    assert all(0 < d["rms"] <= d["largest"] for d in deltas["targets"].values())


def without_deepspeed(folder: str) -> list[str]:
    """What is said where the arguments name no config, and where accelerate makes no engine of it."""
    import os

    from transformers import Trainer, TrainingArguments

    import seft_ds
    from seft_ds import SeftCallback

    args = TrainingArguments(output_dir=folder, use_cpu=True, report_to="none")
    callback = SeftCallback()
    callback.model = seft_ds.attach(tiny_model("llama"), deepspeed_config(2))
    os.environ["ACCELERATE_USE_CPU"] = "true"  # as accelerate launch --cpu sets it
    said = []
    for attempt in (
        lambda: Trainer(model=tiny_model("llama"), args=args, callbacks=[SeftCallback()]),
        lambda: callback.on_train_begin(args, None, None),  # type: ignore[arg-type]
    ):
        try:
            attempt()
            said.append("no error")
        except ValueError as error:
            said.append(str(error))
    return said


def test_a_trainer_without_deepspeed_is_told_so(tmp_path: Path) -> None:
    first, second = run_processes(1, without_deepspeed, str(tmp_path))[0]
    assert "uses DeepSpeed" in first
    assert "accelerate launch --cpu trains without it" in second and "init_ranks()" in second


def raw_loop_mistakes() -> list[str]:
    import seft_ds

    base = {"train_batch_size": 4, "zero_optimization": {"stage": 2}}
    said = []
    for model, config in [
        (tiny_model("llama"), {**base, "seft": {}}),
        (dense_model("llama"), {**base, "seft": {"total_steps": 10}}),
        (tiny_model("llama"), {"train_batch_size": 4, "seft": {"total_steps": 10}}),
        (tiny_model("llama"), {**base, "seft": {"total_steps": 10, "targets": ["q_prj"]}}),
        (
            tiny_model("llama"),
            {**base, "train_micro_batch_size_per_gpu": 3, "seft": {"total_steps": 10}},
        ),
        (
            tiny_model("llama"),
            {**base, "fp16": {"enabled": False}, "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
             "zero_allow_untested_optimizer": True, "seft": {"total_steps": 10}},
        ),
    ]:  # fmt: skip
        try:
            seft_ds.initialize(model=model, config=config)
            said.append("no error")
        except ValueError as error:
            said.append(str(error))
    return said


def test_mistakes_in_a_raw_loop() -> None:
    wanted = [
        'set "total_steps"',
        "nothing to repair",
        'no "zero_optimization" section',
        "matches no linear layer",
        "can't be had on 1 ranks",
        "whose state SEFT can't repair",
    ]
    said = run_processes(1, raw_loop_mistakes)[0]
    for message, part in zip(said, wanted, strict=True):
        assert part in message
