"""A mixture of experts through the scripts, as a user runs them: prune, repair, resume, export."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from seft_ds.checkpoint.verify import verify
from tests import forked
from tests.tiny import dense_moe
from tests.train.test_finetune import WORDS, finetune, tokenizer_into


def script(name: str, folder: Path, *argv: str) -> str:
    done = forked.start(name, [*argv], folder, {"DS_ACCELERATOR": "cpu"}).finish(280)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.timeout(900)
def test_from_a_dense_model_to_an_exported_checkpoint(tmp_path: Path) -> None:
    """DeepSeek-V3 in bf16 under ZeRO-3: each expert's counts are those that pruning left, to the end."""
    model = dense_moe("deepseek_v3", torch.float32)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            wanted, bias = name, buffer.clone()
    model.to(torch.bfloat16)
    model.get_buffer(wanted).data = bias  # fp32, as published
    model.save_pretrained(tmp_path / "dense")
    tokenizer_into(tmp_path / "dense")
    lines = [" ".join(WORDS[(i * j) % len(WORDS)] for j in range(1, 12)) for i in range(60)]
    (tmp_path / "text.txt").write_text("\n".join(lines))
    script(
        "prune", tmp_path, "--model_name_or_path", "dense", "--output_dir", "pruned", "--method", "wanda",
        "--sparsity", "0.5", "--calibration_file", "text.txt", "--calibration_samples", "6",
        "--max_length", "16",
    )  # fmt: skip
    flags = [
        "--model_name_or_path", "pruned", "--train_file", "text.txt", "--output_dir", "run",
        "--max_steps", "6", "--per_device_train_batch_size", "2", "--learning_rate", "1e-2",
        "--save_strategy", "steps", "--save_steps", "3", "--seft.interval", "3", "--seft.window", "2",
        "--seft.density=0.05", "--seft.checkpoint_base", "reference",
    ]  # fmt: skip
    done = finetune(tmp_path, *flags, ranks=2)
    assert done.returncode == 0, done.stdout + done.stderr
    before, after = (verify(tmp_path / name) for name in ("pruned", "run"))
    assert before.ok and after.ok, after.problems
    assert {t.name: t.live for t in after.targets} == {t.name: t.live for t in before.targets}
    experts = [t for t in after.targets if ".experts." in t.name]
    assert len(experts) == 3 * 6 and all(t.live == t.target_live == 192 for t in experts)
    assert after.record["events"] > 0
    files = load_file(tmp_path / "run" / "model.safetensors")
    assert files.keys() == load_file(tmp_path / "dense" / "model.safetensors").keys()
    assert torch.equal(files[wanted], bias), "the router's correction is not rounded"
    script("export", tmp_path, "--checkpoint", "run/checkpoint-3", "--output_dir", "half")
    script("export", tmp_path, "--checkpoint", "run/checkpoint-6", "--output_dir", "whole")
    assert verify(tmp_path / "half").ok
    whole = load_file(tmp_path / "whole" / "model.safetensors")
    assert files.keys() == whole.keys() and all(torch.equal(files[n], whole[n]) for n in files)
    flags[flags.index("run")] = "again"
    rows = ("--per_device_train_batch_size", "4")  # on one rank as many as on two
    again = finetune(tmp_path, *flags, *rows, "--resume", "run/checkpoint-3")
    assert again.returncode == 0, again.stdout + again.stderr
    result = verify(tmp_path / "again")
    assert result.ok and {t.name: t.live for t in result.targets} == {
        t.name: t.live for t in before.targets
    }
