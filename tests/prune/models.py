"""Tiny random models and a tokenizer, made on the spot."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

WORDS = [f"w{i}" for i in range(60)]
KINDS = ["llama", "llama3", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3"]
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
    model = AutoModelForCausalLM.from_config(tiny_config(kind))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.normal_(0, 0.3)
    return model.to(dtype).eval()


def tiny_config(kind: str):
    """A configuration of the family, with what is peculiar to its attention."""
    # Blocks of two kinds: full attention and a sliding window.
    mixed = ["full_attention", "sliding_attention", "full_attention"]
    if kind == "llama3":
        scaled = {
            "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
        }  # fmt: skip
        return LlamaConfig(**SIZES, rope_parameters=scaled, tie_word_embeddings=True)
    if kind == "mistral":
        return MistralConfig(**SIZES, sliding_window=4)
    if kind == "qwen2":
        return Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=4, max_window_layers=1)
    if kind == "qwen3":
        return Qwen3Config(**SIZES, head_dim=8)
    if kind == "gemma":
        return GemmaConfig(**SIZES, head_dim=4)
    if kind == "gemma2":
        return Gemma2Config(**SIZES, head_dim=4, sliding_window=4, layer_types=mixed)
    if kind == "gemma3":
        return Gemma3TextConfig(**SIZES, head_dim=4, sliding_window=4, layer_types=mixed)
    return LlamaConfig(**SIZES)


def saved(model, folder: Path, **settings) -> Path:
    """The folder, with the model and a tokenizer in it."""
    model.save_pretrained(folder, **settings)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def tiny_tokenizer(template: str = "$A") -> PreTrainedTokenizerFast:
    """One token a word w0 ... w59; anything else is unknown.

    template: what is put around a text; "<bos> $A" as Gemma's does, "$A </s>" as T5's.
    """
    vocabulary = {"<unk>": 0, "</s>": 1} | {word: i + 2 for i, word in enumerate(WORDS)}
    vocabulary |= {"<bos>": 62, "<sop>": 63}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    added = [(name, vocabulary[name]) for name in ("<bos>", "<sop>", "</s>") if name in template]
    if added:
        tokenizer.post_processor = processors.TemplateProcessing(template, None, added)
    names = {"unk_token": "<unk>", "eos_token": "</s>"}
    if "<bos>" in template:
        names["bos_token"] = "<bos>"
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def tokens(sequences: int, length: int, seed: int = 0) -> torch.Tensor:
    """int64 (sequences, length) of random token ids."""
    return torch.randint(0, 64, (sequences, length), generator=torch.Generator().manual_seed(seed))
