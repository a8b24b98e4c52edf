"""What the model gets to see: a row of the training data as tokens, and which of them count in the loss."""

from __future__ import annotations

from itertools import groupby
from typing import Any

from seft_ds.train.forms import CHATS, Rows
from seft_ds.train.rows import describe_beginning

OPEN, CLOSE = "⟦", "⟧"
_SHOWN = 240  # characters of a stretch that counts, or doesn't


def check_template(rows: Rows, tokenizer: Any, run: Any) -> None:
    """ValueError for messages that no chat template writes as text, before the model is loaded."""
    row = next(iter(rows))
    chats = [name for name, value in row.items() if name in CHATS and isinstance(value, list)]
    if chats and not tokenizer.chat_template:
        raise ValueError(
            f"the rows have {' and '.join(chats)} of messages, and the model's tokenizer has no chat "
            "template: give --chat_template_path (a .jinja file, or the folder of a model that has one), or "
            "data with prompt and completion"
        )
    if run.chat_template_path and not chats:
        raise ValueError(
            f"--chat_template_path is for messages, and the rows have {' and '.join(row)}; leave it out"
        )
    if run.assistant_only_loss and not chats:
        raise ValueError(
            f"--assistant_only_loss is of messages, and the rows have {' and '.join(row)}; leave it out (of "
            "prompt and completion only the completion counts anyway)"
        )


def check_packing(run: Any, attention: str) -> str:
    """How texts share a row, in words for the user.

    `bfd` and `bfd_split` keep the texts of a row apart: TRL gives each its own positions, from which
    the masks (eager, sdpa, flex_attention) and flash attention with variable lengths tell where a
    text starts. `wrapped` cuts one stream of texts into rows, as in pretraining: a text sees those before it.

    Raises:
        ValueError: texts would see each other without anybody having asked for it.
    """
    if not (run.packing or run.padding_free):
        return "one text a row"
    if run.packing and run.packing_strategy == "wrapped":
        return "texts one after the other, cut into rows: a text sees the end of the one before it"
    kept_apart = ("eager", "sdpa", "flex_attention")
    if attention not in kept_apart and "flash" not in attention:
        raise ValueError(
            f"--packing with attention {attention!r}: the texts of a row would see each other, as far as is "
            f"known here; give --attn_implementation, one of {', '.join(kept_apart)}, flash_attention_2, or "
            "leave --packing out"
        )
    return "several texts a row, none sees another"


def describe_sample(trainer: Any) -> str:
    """The first training row as the model gets it, with what counts in the loss marked.

    Raises:
        ValueError: there is no row with a token that counts.
    """
    row = next(iter(trainer.train_dataset), None)
    if row is None:
        raise ValueError(
            f"no row is left to train on: in the first {trainer.args.max_length} tokens of each "
            "(--max_length) nothing counts in the loss"
        )
    batch = trainer.data_collator([row])
    ids, labels = batch["input_ids"][0].tolist(), batch["labels"][0].tolist()
    counted = sum(label != -100 for label in labels)
    how = check_packing(trainer.args, trainer.model.config._attn_implementation)
    how += describe_beginning(trainer.args, trainer.processing_class)
    return (
        f"first row ({how}): {len(ids)} tokens, {counted} in the loss, between {OPEN} and {CLOSE}\n"
        f"{marked(ids, labels, trainer.processing_class)}"
    )


def marked(ids: list[int], labels: list[int], tokenizer: Any) -> str:
    """The tokens as text, each stretch that counts between marks, long stretches cut in the middle."""
    text = ""
    pairs = zip(ids, labels, strict=True)
    for counts, stretch in groupby(pairs, key=lambda pair: pair[1] != -100):
        part = _cut(tokenizer.decode([token for token, _ in stretch]))
        text += f"{OPEN}{part}{CLOSE}" if counts else part
    return text


def _cut(text: str) -> str:
    half = _SHOWN // 2
    return text if len(text) <= _SHOWN else f"{text[:half]} ... {text[-half:]}"
