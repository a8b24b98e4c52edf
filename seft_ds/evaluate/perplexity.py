"""Perplexity of a causal language model on one long text.

The protocol of the pruning papers: tokenize the whole text, cut it into windows of L tokens, drop the
remainder, and take exp of the mean negative log-likelihood. A window of L tokens makes L - 1
predictions: its first token has nothing before it and is not predicted. Where the tokenizer puts a token
before a text, each window begins with it and holds L - 1 tokens of the text (seft_ds/beginning.py).

Ranks take the windows in turn. What they add up are float64 sums of losses and a count, so the figure
does not depend on the number of ranks beyond the last digits of float64.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from seft_ds.bars import with_progress
from seft_ds.beginning import beginning_of, cut, without
from seft_ds.distributed.collectives import Ranks
from seft_ds.evaluate.lockstep import Lockstep
from seft_ds.prune.calibrate import check_text_file, read_texts, text_kind, whole_text

_ROWS = 256  # predictions whose fp32 logits are held at a time


@dataclass(frozen=True)
class Perplexity:
    """A measured perplexity and what it was measured on."""

    perplexity: float
    nll: float  # mean negative log-likelihood per prediction, in nats
    predictions: int
    windows: int
    window_tokens: int

    def as_json(self) -> dict[str, Any]:
        return dict(self.__dict__)


def read_text(path: str | Path) -> str:
    """One string: a .txt file as it is, the texts of .json or .jsonl joined by blank lines; also .gz.

    Raises:
        ValueError: the file is missing, of another kind, or empty.
    """
    path = Path(path)
    check_text_file(path)
    if text_kind(path) != ".txt":
        return "\n\n".join(read_texts(path))
    text = whole_text(path)
    if not text.strip():
        raise ValueError(f"{path} holds no text; give a file with text")
    return text


def windows_of(
    tokenizer: Any,
    text: str,
    window_tokens: int,
    max_windows: int | None = None,
    *,
    add_bos_token: bool = True,
) -> torch.Tensor:
    """int64 (windows, window_tokens): the tokens of `text` cut into windows, the remainder dropped.

    add_bos_token: begin each window with what the tokenizer puts before a text, if it puts something.

    Raises:
        ValueError: windows of fewer than 2 tokens, fewer than 1 of them, or a text that fills none.
    """
    added = beginning_of(tokenizer)
    begins = added if add_bos_token else []
    fewest = max(2, len(begins) + 1)
    if window_tokens < fewest:
        raise ValueError(
            f"got --max_length {window_tokens}; a window needs at least {fewest} tokens"
        )
    if max_windows is not None and max_windows < 1:
        raise ValueError(f"got --max_windows {max_windows}; wanted 1 or more")
    tokens = without(added, tokenizer(text, verbose=False)["input_ids"])
    if len(tokens) < window_tokens - len(begins):
        raise ValueError(
            f"the text has {len(tokens)} tokens, fewer than one window of {window_tokens}; give more "
            "text, or lower --max_length"
        )
    return cut(tokens, begins, window_tokens)[:max_windows]


def nll_sum(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """float64 scalar: Σ -log p of each next token, for `logits` (L, vocabulary) and `tokens` (L,).

    The softmax is taken in fp32, a few rows at a time, so that its memory does not grow with L.
    """
    total = torch.zeros((), dtype=torch.float64, device=logits.device)
    for rows, targets in zip(logits[:-1].split(_ROWS), tokens[1:].split(_ROWS)):
        losses = torch.nn.functional.cross_entropy(rows.float(), targets, reduction="none")
        total += losses.sum(dtype=torch.float64)
    return total


@torch.no_grad()
def measure(
    model: torch.nn.Module,
    windows: torch.Tensor,  # (windows, tokens) int64, the same on every rank
    ranks: Ranks,
    *,
    begin_tokens: int = 0,
    progress: bool = False,
    sharded: bool = False,
    device: torch.device | None = None,
) -> Perplexity:
    """Perplexity of `model` on `windows`, shared over the ranks, one at a time.

    One collective, at the end; with `sharded` (a model under ZeRO-3) one before each forward pass too.

    Args:
        begin_tokens: how many tokens of each window stand before its text, and so are not predicted.

    Raises:
        ValueError: the loss is not finite.
    """
    device = device or next(model.parameters()).device
    was_training = model.training
    model.eval()
    total = torch.zeros((), dtype=torch.float64, device=device)
    mine = windows[ranks.rank :: ranks.size]
    first = max(1, begin_tokens)  # the first token has nothing to be predicted from
    with Lockstep(model, ranks, sharded, device):
        for window in with_progress(mine, "perplexity", "window", progress):
            window = window.to(device)
            logits = model(input_ids=window.unsqueeze(0), use_cache=False).logits[0]
            total += nll_sum(logits[first - 1 :], window[first - 1 :])
    model.train(was_training)
    return _summary(float(ranks.sum_(total)), windows, first)


def _summary(total_nll: float, windows: torch.Tensor, first: int) -> Perplexity:
    count, window_tokens = windows.shape
    predictions = count * (window_tokens - first)
    nll = total_nll / predictions
    if not math.isfinite(nll):
        raise ValueError(
            f"the loss is {nll}: the model's outputs are not finite; check its weights, or evaluate in "
            "--dtype float32"
        )
    # A ruined model's mean loss can exceed what exp holds; an infinite perplexity is the truth then.
    perplexity = math.exp(nll) if nll < 700 else math.inf
    return Perplexity(perplexity, nll, predictions, count, window_tokens)


def as_line(result: Perplexity) -> str:
    """One line for people."""
    return (
        f"perplexity {result.perplexity:.3f} ({result.predictions:,} predictions in {result.windows} "
        f"windows of {result.window_tokens} tokens)"
    )


def write_json(path: str | Path, results: dict[str, Any]) -> None:
    """Write results for machines; what JSON cannot hold (dtypes, functions) becomes its name."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=2, default=str) + "\n", encoding="utf-8")
