"""Perplexity against a plain loop, over any number of ranks."""

from __future__ import annotations

import gzip
import json
import math

import pytest
import torch

from seft_ds.evaluate import perplexity
from seft_ds.evaluate.perplexity import measure, nll_sum, read_text, windows_of
from tests.prune.models import KINDS, WORDS, tiny_model, tiny_tokenizer, tokens
from tests.ranks import run_threads


def slow_perplexity(model, windows) -> float:
    """exp of the mean of -log p(next token), one prediction at a time."""
    losses = []
    for window in windows:
        for end in range(1, len(window)):
            with torch.no_grad():
                logits = model(input_ids=window[None, :end]).logits[0, -1].double()
            losses.append(-float(logits.log_softmax(0)[window[end]]))
    return math.exp(sum(losses) / len(losses))


@pytest.mark.parametrize("kind", KINDS)
def test_against_a_plain_loop(kind):
    model, windows = tiny_model(kind), tokens(3, 10)
    (got,) = run_threads(1, lambda ranks: measure(model, windows, ranks))
    assert got.perplexity == pytest.approx(slow_perplexity(model, windows), rel=1e-5)
    assert (got.predictions, got.windows, got.window_tokens) == (27, 3, 10)
    assert got.nll == pytest.approx(math.log(got.perplexity))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [2, 3, 8])
def test_any_number_of_ranks_gives_the_same_figure(dtype, size):
    model, windows = tiny_model(dtype=dtype), tokens(7, 12)
    (alone,) = run_threads(1, lambda ranks: measure(model, windows, ranks))
    for one in run_threads(size, lambda ranks: measure(model, windows, ranks)):
        assert one.perplexity == pytest.approx(alone.perplexity, rel=1e-12)
        assert one.predictions == 7 * 11


def test_every_window_counts():
    model, windows = tiny_model(), tokens(4, 12)
    changed = windows.clone()
    changed[3, -1] = (changed[3, -1] + 1) % 64
    one, other = (
        run_threads(2, lambda ranks, w=w: measure(model, w, ranks))[0] for w in (windows, changed)
    )
    assert one.perplexity != other.perplexity


def test_an_indifferent_model_has_the_vocabulary_as_perplexity():
    model = tiny_model()
    torch.nn.init.zeros_(model.lm_head.weight)
    (got,) = run_threads(1, lambda ranks: measure(model, tokens(2, 9), ranks))
    assert got.perplexity == pytest.approx(64, rel=1e-6)


def test_training_mode_comes_back():
    model = tiny_model().train()
    run_threads(1, lambda ranks: measure(model, tokens(1, 4), ranks))
    assert model.training


def test_the_loss_in_row_blocks_is_the_loss_at_once(monkeypatch):
    logits, ids = torch.randn(11, 64), tokens(1, 11)[0]
    expected = torch.nn.functional.cross_entropy(logits[:-1].double(), ids[1:], reduction="sum")
    for rows in (1, 3, 10, 100):
        monkeypatch.setattr(perplexity, "_ROWS", rows)
        assert float(nll_sum(logits, ids)) == pytest.approx(float(expected), rel=1e-6)


def test_outputs_that_are_not_finite_are_told():
    model = tiny_model()
    torch.nn.init.constant_(model.lm_head.weight, float("nan"))
    with pytest.raises(ValueError, match="not finite.*float32"):
        run_threads(1, lambda ranks: measure(model, tokens(1, 4), ranks))


def test_a_ruined_model_has_infinite_perplexity():
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight.mul_(1e6)
    (got,) = run_threads(1, lambda ranks: measure(model, tokens(2, 8), ranks))
    assert got.perplexity == math.inf and math.isfinite(got.nll)


def test_windows_drop_the_remainder():
    text, tokenizer = " ".join(WORDS[:23]), tiny_tokenizer()
    windows = windows_of(tokenizer, text, 5)
    assert windows.tolist() == [list(range(lo + 2, lo + 7)) for lo in range(0, 20, 5)]
    assert torch.equal(windows_of(tokenizer, text, 5, max_windows=2), windows[:2])
    assert len(windows_of(tokenizer, text, 5, max_windows=99)) == 4


@pytest.mark.parametrize(
    "settings, message",
    [((24,), "has 23 tokens, fewer"), ((1,), "at least 2"), ((5, 0), "max_windows 0")],
)
def test_windows_that_cannot_be_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        windows_of(tiny_tokenizer(), " ".join(WORDS[:23]), *settings)


def test_text_is_read_whole(tmp_path):
    raw = "\n = Title = \n\n w1 w2 \n"
    (tmp_path / "a.txt").write_text(raw)
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(raw.encode()))
    rows = [{"text": "w1\nw2"}, {"text": "w3"}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert read_text(tmp_path / "a.txt") == raw == read_text(tmp_path / "a.txt.gz")
    assert read_text(tmp_path / "a.jsonl") == "w1\nw2\n\nw3"
    (tmp_path / "b.txt").write_text(" \n")
    with pytest.raises(ValueError, match="holds no text"):
        read_text(tmp_path / "b.txt")
