"""Sizes of well-known models, so that a run can be planned without downloading their config.

Each entry holds what the config.json of the published model says of its sizes, and the number of parameters
that its authors or its files state, which a test compares with what we count.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Preset:
    """A model by its name: transformers' family, and the entries of its config."""

    model_type: str
    parameters: int  # as published; a router's corrections, which are buffers, among them
    config: dict[str, Any]


def _decoder(
    hidden: int, inner: int, layers: int, heads: int, key_heads: int, vocabulary: int, **more: Any
) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_heads,
        "vocab_size": vocabulary,
        "tie_word_embeddings": False,
        **more,
    }


_TIED = {"tie_word_embeddings": True}
_LATENT = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128}
_DEEPSEEK_V2_LITE = _LATENT | {
    "q_lora_rank": None, "moe_intermediate_size": 1408, "n_routed_experts": 64, "n_shared_experts": 2,
    "num_experts_per_tok": 6, "first_k_dense_replace": 1,
}  # fmt: skip
_DEEPSEEK_V3 = _LATENT | {
    "q_lora_rank": 1536, "moe_intermediate_size": 2048, "n_routed_experts": 256, "n_shared_experts": 1,
    "num_experts_per_tok": 8, "first_k_dense_replace": 3, "n_group": 8, "topk_group": 4,
}  # fmt: skip
_QWEN3_30B = {
    "head_dim": 128, "moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8,
}  # fmt: skip

PRESETS: dict[str, Preset] = {
    "smollm2-135m": Preset("llama", 134_515_008, _decoder(576, 1536, 30, 9, 3, 49152, **_TIED)),
    "llama2-7b": Preset("llama", 6_738_415_616, _decoder(4096, 11008, 32, 32, 32, 32000)),
    "llama2-13b": Preset("llama", 13_015_864_320, _decoder(5120, 13824, 40, 40, 40, 32000)),
    "llama2-70b": Preset("llama", 68_976_648_192, _decoder(8192, 28672, 80, 64, 8, 32000)),
    "llama3-1b": Preset(
        "llama", 1_235_814_400, _decoder(2048, 8192, 16, 32, 8, 128256, head_dim=64, **_TIED)
    ),
    "llama3-3b": Preset(
        "llama", 3_212_749_824, _decoder(3072, 8192, 28, 24, 8, 128256, head_dim=128, **_TIED)
    ),
    "llama3-8b": Preset("llama", 8_030_261_248, _decoder(4096, 14336, 32, 32, 8, 128256)),
    "llama3-70b": Preset("llama", 70_553_706_496, _decoder(8192, 28672, 80, 64, 8, 128256)),
    "llama3-405b": Preset("llama", 405_853_388_800, _decoder(16384, 53248, 126, 128, 8, 128256)),
    "mistral-7b": Preset("mistral", 7_241_732_096, _decoder(4096, 14336, 32, 32, 8, 32000)),
    "mixtral-8x7b": Preset(
        "mixtral",
        46_702_792_704,
        _decoder(4096, 14336, 32, 32, 8, 32000, num_local_experts=8, num_experts_per_tok=2),
    ),
    "qwen2.5-7b": Preset("qwen2", 7_615_616_512, _decoder(3584, 18944, 28, 28, 4, 152064)),
    "qwen2.5-32b": Preset("qwen2", 32_763_876_352, _decoder(5120, 27648, 64, 40, 8, 152064)),
    "qwen2.5-72b": Preset("qwen2", 72_706_203_648, _decoder(8192, 29568, 80, 64, 8, 152064)),
    "qwen3-8b": Preset(
        "qwen3", 8_190_735_360, _decoder(4096, 12288, 36, 32, 8, 151936, head_dim=128)
    ),
    "qwen3-30b-a3b": Preset(
        "qwen3_moe", 30_532_122_624, _decoder(2048, 6144, 48, 32, 4, 151936, **_QWEN3_30B)
    ),
    "gemma2-9b": Preset(
        "gemma2", 9_241_705_984, _decoder(3584, 14336, 42, 16, 8, 256000, head_dim=256, **_TIED)
    ),
    "deepseek-v2-lite": Preset(
        "deepseek_v2",
        15_706_484_224,
        _decoder(2048, 10944, 27, 16, 16, 102400, **_DEEPSEEK_V2_LITE),
    ),
    "deepseek-v3": Preset(
        "deepseek_v3", 671_026_419_200, _decoder(7168, 18432, 61, 128, 128, 129280, **_DEEPSEEK_V3)
    ),
}
# The same sizes under another name.
PRESETS["deepseek-r1"] = PRESETS["deepseek-v3"]


def preset_config(name: str) -> Any:
    """The transformers config of a preset. KeyError for a name that is none."""
    from transformers import AutoConfig

    preset = PRESETS[name]
    return AutoConfig.for_model(preset.model_type, **preset.config)
