"""Tiny random models and a tokenizer, made on the spot."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

WORDS = [f"w{i}" for i in range(60)]
KINDS = ["llama", "mistral", "qwen2"]
SIZES = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    # Explicit: the defaults name ids that a vocabulary of 64 may lack.
    "bos_token_id": 1,
    "eos_token_id": 1,
    "pad_token_id": 1,
}


def tiny_model(kind: str = "llama", seed: int = 0, dtype: torch.dtype = torch.float32):
    """A causal language model of 3 blocks with random weights large enough to matter."""
    torch.manual_seed(seed)
    if kind == "llama":
        model = LlamaForCausalLM(LlamaConfig(**SIZES))
    elif kind == "mistral":
        model = MistralForCausalLM(MistralConfig(**SIZES, sliding_window=4))
    else:
        # Blocks of two kinds: full attention first, then a sliding window.
        config = Qwen2Config(
            **SIZES, use_sliding_window=True, sliding_window=4, max_window_layers=1
        )
        model = Qwen2ForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.normal_(0, 0.3)
    return model.to(dtype).eval()


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word w0 ... w59; anything else is unknown."""
    vocabulary = {"<unk>": 0, "</s>": 1} | {word: i + 2 for i, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>")


def tokens(sequences: int, length: int, seed: int = 0) -> torch.Tensor:
    """int64 (sequences, length) of random token ids."""
    return torch.randint(0, 64, (sequences, length), generator=torch.Generator().manual_seed(seed))
