"""Tiny random models of the supported families, already pruned. Odd sizes on purpose."""

from __future__ import annotations

import torch


def tiny_config(kind: str):
    from transformers import LlamaConfig, MistralConfig, Qwen2Config

    sizes = dict(
        vocab_size=128, hidden_size=24, intermediate_size=40, num_hidden_layers=2,
        num_attention_heads=3, num_key_value_heads=1, head_dim=8, max_position_embeddings=64,
    )  # fmt: skip
    cls = {"mistral": MistralConfig, "qwen2": Qwen2Config}.get(kind, LlamaConfig)
    if cls is Qwen2Config:
        sizes.pop("head_dim")
    return cls(**sizes)


def dense_model(kind: str, dtype: torch.dtype = torch.float32, seed: int = 0):
    """A random model, `kind` one of llama, mistral, qwen2 (biases)."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(kind)).to(dtype)
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            p.data.normal_(std=0.1)
    return model


def prune_(model, sparsity: float = 0.6, pattern: tuple[int, int] | None = None) -> None:
    """Magnitude pruning of every linear layer but the head, in place: small and obvious."""
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            w = module.weight.data
            if pattern is None:
                order = w.abs().flatten().float().argsort()
                w.view(-1)[order[: int(sparsity * w.numel())]] = 0.0
            else:
                n, m = pattern
                groups = w.view(-1, m)
                worst = groups.abs().float().argsort(1)[:, : m - n]
                groups.scatter_(1, worst, 0.0)


def tiny_model(kind: str, dtype: torch.dtype = torch.float32, seed: int = 0):
    """A pruned tiny model; kind: llama, mistral, qwen2, llama24 (2:4 pruned)."""
    model = dense_model(kind.removesuffix("24"), dtype, seed)
    prune_(model, pattern=(2, 4) if kind.endswith("24") else None)
    return model
