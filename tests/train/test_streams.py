"""A run from streams that are mixed and packed, and one that goes on from its checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from seft_ds.checkpoint.verify import verify
from tests.test_examples import journal, on_ranks
from tests.train.test_finetune import ROOT, make_models


def test_a_stream_goes_on_where_it_was(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    make_models(tmp_path)
    answers = [
        {"prompt": f"the w{20 + i}", "completion": f" fox w{20 + i % 7} jumps"} for i in range(60)
    ]
    tasks = [{"instruction": f"lazy w{30 + i}", "output": f"dog w{i % 9 + 40}"} for i in range(40)]
    for name, rows in (("a", answers), ("b", tasks)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    flags = [
        "--model_name_or_path", "pruned", "--train_file", "a.jsonl", "b.jsonl", "--mix_weights", "2", "1",
        "--streaming", "true", "--val_set_size", "6", "--packing", "true", "--max_length", "32",
        "--deepspeed", str(ROOT / "ds_configs/zero3.json"), "--per_device_train_batch_size", "2",
        "--max_steps", "6", "--warmup_ratio", "0.5", "--learning_rate", "1e-2", "--logging_steps", "1",
        "--eval_steps", "6", "--seft.density", "0.05", "--seft.interval", "3", "--seft.window", "2",
    ]  # fmt: skip
    said = on_ranks(
        tmp_path, 2, "launch", "finetune", *flags, "--output_dir", "whole",
        "--save_strategy", "steps", "--save_steps", "3",
    )  # fmt: skip
    assert "none sees another" in said and "⟦" in said
    on_ranks(
        tmp_path, 2, "launch", "finetune", *flags, "--output_dir", "again",
        "--resume", str(tmp_path / "whole/checkpoint-3"),
    )  # fmt: skip
    whole, again = (journal(tmp_path / run, "step") for run in ("whole", "again"))
    assert [s["loss"] for s in whole[3:]] == [s["loss"] for s in again]
    assert [s["learning_rate"] for s in whole[:3]] == pytest.approx([0, 1e-2 / 3, 2e-2 / 3])
    held_out = [journal(tmp_path / run, "eval")[-1]["value"] for run in ("whole", "again")]
    assert held_out[0] == held_out[1] and held_out[0] > 0
    final = [load_file(tmp_path / run / "model.safetensors") for run in ("whole", "again")]
    assert all(torch.equal(final[0][name], final[1][name]) for name in final[0])
    assert verify(tmp_path / "again").ok
