"""A small random LLaMA and a sparse directory made of it, for the tests of export and verify."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from seft_ds.checkpoint.pruned import save_pruned


def dense_dir(path: Path, dtype: torch.dtype = torch.bfloat16, tied: bool = False) -> Path:
    """An ordinary model directory with a few files beside the weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=40,
        tie_word_embeddings=tied,
    )
    LlamaForCausalLM(config).to(dtype).save_pretrained(path)
    (path / "tokenizer.json").write_text("{}")
    (path / "chat_template.jinja").write_text("{{ messages }}")
    (path / "LICENSE").write_text("the base model's licence")
    (path / "trainer_state.json").write_text("{}")
    return path


def pruned_model(source: Path) -> tuple[LlamaForCausalLM, dict[str, str | None]]:
    """The model with 2:4 in attention and every third weight zero in the MLP; {target: pattern}."""
    model = LlamaForCausalLM.from_pretrained(source)
    targets: dict[str, str | None] = {}
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "self_attn" in name:
                weight.view(-1, 4)[:, 1::2] = 0
                targets[name] = "2:4"
            elif "mlp" in name:
                weight.view(-1)[::3] = 0
                targets[name] = None
    return model.eval(), targets


def sparse_dir(tmp_path: Path, max_shard_bytes: int = 2**30, **about: object) -> Path:
    """A directory as `save_pruned` writes it."""
    source = dense_dir(tmp_path / "dense")
    model, targets = pruned_model(source)
    out = tmp_path / "sparse"
    save_pruned(model, source, out, targets, dict(about), max_shard_bytes=max_shard_bytes)
    return out
