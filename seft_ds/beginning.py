"""What a tokenizer puts before a text, and windows of tokens that begin with it.

Gemma and LLaMA are trained with a token such as <bos> before every text. Without it Gemma predicts poorly.
A window from the middle of a text has none of its own, so every window is given one. Tokenizers that put
nothing before a text (GPT-2, Qwen, SmolLM2) leave windows as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

_PROBE = "a"  # any text: what stands before its own tokens is added


def beginning_of(tokenizer: Any) -> list[int]:
    """Find the token ids that the tokenizer puts before a text; [] if it puts none."""
    ids = list(tokenizer(_PROBE, verbose=False)["input_ids"])
    own = list(tokenizer(_PROBE, add_special_tokens=False, verbose=False)["input_ids"])
    if own:
        for start in range(len(ids) - len(own) + 1):
            if ids[start : start + len(own)] == own:
                return ids[:start]
    # A tokenizer without a token for the probe, or one that writes it otherwise on its own.
    return ids[:1] if ids and ids[0] == getattr(tokenizer, "bos_token_id", None) else []


def in_words(tokenizer: Any, add_bos_token: bool) -> str | None:
    """The tokens that each window begins with, for records; None if there are none."""
    tokens = beginning_of(tokenizer) if add_bos_token else []
    return " ".join(tokenizer.convert_ids_to_tokens(tokens)) or None


def described(tokenizer: Any, add_bos_token: bool, what: str = "window") -> str:
    """A phrase for people, with a comma before it; empty for tokenizers that add nothing."""
    added = in_words(tokenizer, True)
    if added is None:
        return ""
    if add_bos_token:
        return f", each {what} begins with {added}"
    return f", no {what} begins with {added} (--add_bos_token false)"


def without(beginning: Sequence[int], ids: Sequence[int]) -> list[int]:
    """The ids of a text without `beginning` before them, also where the text itself starts with it."""
    ids, size = list(ids), len(beginning)
    while size and ids[:size] == list(beginning):
        ids = ids[size:]
    return ids


def cut(tokens: Sequence[int], beginning: Sequence[int], length_tokens: int) -> torch.Tensor:
    """int64 (windows, length_tokens): tokens of a text cut into windows, `beginning` before each of them.

    The tokens that fill no window are dropped.
    """
    own = length_tokens - len(beginning)
    count = len(tokens) // own
    pieces = torch.tensor(tokens[: count * own], dtype=torch.int64).view(count, own)
    return torch.cat([torch.tensor(beginning, dtype=torch.int64).expand(count, -1), pieces], dim=1)
