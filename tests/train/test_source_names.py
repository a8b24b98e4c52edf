"""What a run writes has the names of the files that it read, whatever transformers calls them."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from seft_ds.checkpoint.from_checkpoint import export_checkpoint
from seft_ds.checkpoint.verify import verify
from tests import forked
from tests.train.test_finetune import ROOT, WORDS, tokenizer_into

HEAD = "embed_out.weight"


def pruned_neox(folder: Path) -> dict[str, torch.Tensor]:
    """A pruned GPT-NeoX in bf16 whose config ties the head, and whose file holds another one; its tensors."""
    from transformers import AutoModelForCausalLM, GPTNeoXConfig

    torch.manual_seed(0)
    config = GPTNeoXConfig(
        vocab_size=128, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=32, tie_word_embeddings=False,
        bos_token_id=1, eos_token_id=1,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    for name, weight in model.named_parameters():
        if "layers" in name and weight.dim() == 2:
            weight.data.view(-1)[::2] = 0
    model.save_pretrained(folder)
    settings = json.loads((folder / "config.json").read_text())
    settings.pop("dtype", None)
    (folder / "config.json").write_text(json.dumps(settings | {"tie_word_embeddings": True}))
    tokenizer_into(folder)
    return load_file(folder / "model.safetensors")


def written(folder: Path) -> dict[str, tuple[torch.Size, torch.dtype]]:
    found = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            found |= {k: (file.get_tensor(k).shape, file.get_tensor(k).dtype) for k in file.keys()}  # noqa: SIM118
    return found


def test_names_dtypes_and_the_head_are_those_of_the_source(tmp_path: Path) -> None:
    before = pruned_neox(tmp_path / "pruned")
    assert HEAD in before and not torch.equal(before[HEAD], before["gpt_neox.embed_in.weight"])
    (tmp_path / "text.txt").write_text("\n".join(" ".join(WORDS[i % 9 :]) for i in range(40)))
    flags = [
        "--model_name_or_path", "pruned", "--train_file", "text.txt", "--output_dir", "run",
        "--deepspeed", str(ROOT / "ds_configs/zero3.json"), "--max_length", "16",
        "--max_steps", "2", "--save_steps", "1", "--seft.interval", "2", "--seft.window", "1",
    ]  # fmt: skip
    env = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    done = forked.start("finetune", flags, tmp_path, env).finish(280)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    assert "config.json ties lm_head.weight, but the files hold one that differs" in said
    export_checkpoint(tmp_path / "run" / "checkpoint-1", tmp_path / "exported")
    wanted = {name: (tensor.shape, tensor.dtype) for name, tensor in before.items()}
    for name in ("run", "exported"):
        assert written(tmp_path / name) == wanted
        assert verify(tmp_path / name).ok
        settings = json.loads((tmp_path / name / "config.json").read_text())
        assert settings["tie_word_embeddings"] is False
        after = load_file(tmp_path / name / "model.safetensors")
        assert torch.equal(after[HEAD], before[HEAD])
    # A file without it is another model, whatever the stage.
    save_file(
        {n: t for n, t in before.items() if not n.endswith("1.mlp.dense_h_to_4h.weight")},
        tmp_path / "pruned" / "model.safetensors",
        {"format": "pt"},
    )
    flags[flags.index("run")] = "other"
    refused = forked.start("finetune", flags, tmp_path, env).finish(280)
    assert refused.returncode == 2 and "1.mlp.dense_h_to_4h.weight of" in refused.stderr
    assert not (tmp_path / "other").exists() and "Traceback" not in refused.stderr
