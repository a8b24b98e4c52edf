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


MOE_KINDS = ("deepseek_v3", "deepseek_v2", "mixtral", "qwen3_moe", "qwen2_moe")


def tiny_moe_config(kind: str):
    """Six experts, two for each token; of DeepSeek and Qwen2 also a shared one; MLA with odd sizes."""
    from transformers import AutoConfig

    sizes = dict(
        vocab_size=128, hidden_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=64, num_experts_per_tok=2,
    )  # fmt: skip
    mla = dict(
        q_lora_rank=10, kv_lora_rank=12, qk_rope_head_dim=4, qk_nope_head_dim=6, v_head_dim=7,
        n_routed_experts=6, n_group=2, topk_group=1, first_k_dense_replace=1, n_shared_experts=1,
        moe_intermediate_size=16, intermediate_size=40,
    )  # fmt: skip
    own = {
        "deepseek_v2": {**mla, "topk_method": "group_limited_greedy"},
        "deepseek_v3": mla,
        "mixtral": dict(intermediate_size=16, num_local_experts=6, head_dim=8),
        "qwen3_moe": dict(
            intermediate_size=40, moe_intermediate_size=16, num_experts=6, head_dim=8
        ),
        "qwen2_moe": dict(
            intermediate_size=40, moe_intermediate_size=16, shared_expert_intermediate_size=20,
            num_experts=6,
        ),
    }  # fmt: skip
    return AutoConfig.for_model(kind, **sizes, **own[kind])


def dense_moe(kind: str, dtype: torch.dtype = torch.float32):
    """A random mixture of experts, its weights large enough that tokens go to different experts."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_moe_config(kind))
    for p in model.parameters():
        if p.dim() > 1:
            p.data.mul_(4)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.uniform_(-0.1, 0.1)
    return model.to(dtype)


def tiny_moe(kind: str, dtype: torch.dtype = torch.float32, pattern: tuple[int, int] | None = None):
    """A pruned mixture of experts: 60 % of every matrix of every expert, and of every linear layer, is 0, or
    what a pattern says."""
    model = dense_moe(kind, dtype)
    for name, p in model.named_parameters():
        if name.endswith(("gate_up_proj", "down_proj")):
            matrices = 2 if name.endswith("gate_up_proj") else 1
            for part in p.data.view(p.shape[0] * matrices, -1, p.shape[2]):
                prune_matrix_(part, 0.6, pattern)
    prune_(model, 0.6, pattern)
    return model


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
        if isinstance(module, torch.nn.Linear) and not name.endswith(("lm_head", "_gate")):
            prune_matrix_(module.weight.data, sparsity, pattern)


def prune_matrix_(w: torch.Tensor, sparsity: float, pattern: tuple[int, int] | None) -> None:
    """Magnitude pruning of one matrix, in place."""
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
