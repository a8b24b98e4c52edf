"""Windows, calibration sequences and their figures begin as the tokenizer begins a text."""

from __future__ import annotations

import math

import pytest
import torch

from seft_ds.beginning import beginning_of, described, in_words
from seft_ds.evaluate.perplexity import measure, windows_of
from seft_ds.prune.calibrate import sequences
from tests.prune.models import WORDS, tiny_model, tiny_tokenizer
from tests.ranks import run_threads

BOS, SOP, EOS = 62, 63, 1
TEXT = " ".join(WORDS[:8])  # tokens 2 ... 9
TEXTS = ["w1 w2 w3", "w4 w5", "w6 w7 w8 w9", "w10"]


@pytest.mark.parametrize(
    "template, beginning, words",
    [
        ("$A", [], None),
        ("<bos> $A", [BOS], "<bos>"),
        ("<bos> <sop> $A", [BOS, SOP], "<bos> <sop>"),
        ("$A </s>", [], None),
        ("<bos> $A </s>", [BOS], "<bos>"),
    ],
)
def test_what_stands_before_a_text(template, beginning, words):
    tokenizer = tiny_tokenizer(template)
    assert beginning_of(tokenizer) == beginning
    assert in_words(tokenizer, True) == words and in_words(tokenizer, False) is None
    if words is None:
        assert described(tokenizer, True) == described(tokenizer, False) == ""
    else:
        assert described(tokenizer, True) == f", each window begins with {words}"
        assert described(tokenizer, False).endswith("(--add_bos_token false)")


def test_a_tokenizer_without_a_token_for_the_probe():
    class Odd:
        bos_token_id = 7

        def __call__(self, text, add_special_tokens=True, verbose=True):
            return {"input_ids": [7] if add_special_tokens else []}

    assert beginning_of(Odd()) == [7]


@pytest.mark.parametrize(
    "template, on, off",
    [
        ("<bos> $A", [[BOS, 2, 3, 4], [BOS, 5, 6, 7]], [[2, 3, 4, 5], [6, 7, 8, 9]]),
        (
            "<bos> <sop> $A",
            [[BOS, SOP, 2, 3], [BOS, SOP, 4, 5], [BOS, SOP, 6, 7], [BOS, SOP, 8, 9]],
            [[2, 3, 4, 5], [6, 7, 8, 9]],
        ),
        ("<bos> $A </s>", [[BOS, 2, 3, 4], [BOS, 5, 6, 7], [BOS, 8, 9, EOS]], None),
    ],
)
def test_each_window_begins_as_a_text_does(template, on, off):
    tokenizer = tiny_tokenizer(template)
    assert windows_of(tokenizer, TEXT, 4).tolist() == on
    assert windows_of(tokenizer, TEXT, 4, 1).tolist() == on[:1]
    without = windows_of(tokenizer, TEXT, 4, add_bos_token=False)
    assert without.tolist() == (off or [[2, 3, 4, 5], [6, 7, 8, 9]])
    # A text that was written with its beginning has it once.
    assert windows_of(tokenizer, "<bos> " + TEXT, 4)[:, 1].tolist()[:1] == [on[0][1]]


def test_a_window_holds_a_token_of_the_text():
    tokenizer = tiny_tokenizer("<bos> <sop> $A")
    assert windows_of(tokenizer, "w0", 3).tolist() == [[BOS, SOP, 2]]
    with pytest.raises(ValueError, match="--max_length 2; a window needs at least 3"):
        windows_of(tokenizer, TEXT, 2)
    with pytest.raises(ValueError, match="wanted at least 1 of 3"):
        sequences(tokenizer, TEXTS, 1, 2, seed=0)
    with pytest.raises(ValueError, match="has 1 tokens, fewer than one window of 4"):
        windows_of(tokenizer, "w0", 4)


def test_without_a_beginning_everything_is_as_it_was():
    """Windows and sequences as they were cut before there were beginnings, written out here."""
    for tokenizer in (tiny_tokenizer(), tiny_tokenizer("$A </s>")):
        tokens = torch.tensor(tokenizer(TEXT)["input_ids"])
        order = torch.randperm(4, generator=torch.Generator().manual_seed(3)).tolist()
        stream = [i for t in order for i in tokenizer(TEXTS[t] + "\n\n")["input_ids"]]
        for added in (True, False):
            got = windows_of(tokenizer, TEXT, 3, add_bos_token=added)
            assert got.dtype == torch.int64
            assert torch.equal(got, tokens[: len(tokens) // 3 * 3].view(-1, 3))
            got = sequences(tokenizer, TEXTS, 2, 4, seed=3, add_bos_token=added)
            assert got.tolist() == [stream[:4], stream[4:8]]


def test_each_calibration_sequence_begins_as_a_text_does():
    plain, tokenizer = tiny_tokenizer(), tiny_tokenizer("<bos> $A")
    order = torch.randperm(4, generator=torch.Generator().manual_seed(3)).tolist()
    stream = [i for t in order for i in plain(TEXTS[t])["input_ids"]]
    got = sequences(tokenizer, TEXTS, 2, 4, seed=3)
    assert got.tolist() == [[BOS, *stream[:3]], [BOS, *stream[3:6]]]
    got = sequences(tokenizer, TEXTS, 2, 4, seed=3, add_bos_token=False)
    assert got.tolist() == [stream[:4], stream[4:8]]
    got = sequences(tokenizer, TEXTS, 99, 5, seed=3, fewer=True)
    assert got.tolist() == [[BOS, *stream[:4]], [BOS, *stream[4:8]]]
    with pytest.raises(ValueError, match="hold 10 tokens; 4 sequences of 4 need 12"):
        sequences(tokenizer, TEXTS, 4, 4, seed=3)


@pytest.mark.parametrize("template, begins", [("<bos> $A", 1), ("<bos> <sop> $A", 2)])
def test_only_tokens_of_the_text_are_predicted(template, begins):
    model, windows = tiny_model(), windows_of(tiny_tokenizer(template), TEXT, 4)
    losses = []
    for window in windows:
        with torch.no_grad():
            logits = model(input_ids=window[None]).logits[0].double().log_softmax(1)
        losses += [-float(logits[i - 1, window[i]]) for i in range(begins, 4)]
    (got,) = run_threads(1, lambda ranks: measure(model, windows, ranks, begin_tokens=begins))
    assert got.predictions == len(losses) == len(windows) * (4 - begins)
    assert got.perplexity == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-5)
