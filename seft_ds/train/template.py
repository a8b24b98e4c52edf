"""The chat template that a run is given, in place of the tokenizer's own."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from jinja2 import TemplateSyntaxError
from transformers import AutoTokenizer

from seft_ds.checkpoint.tokenizer_files import Changes, changes_between
from seft_ds.json_file import read_text

_MOST_BYTES = 1 << 20


def use_template(tokenizer: Any, run: Any) -> None:
    """Give the tokenizer the template that `run.chat_template_path` names, if it names one.

    From a folder comes the token that ends an answer too, unless the run names one (`run.eos_token`). TRL
    would add the other tokenizer's tokens and resize the model for them, which no pruned model survives.

    Raises:
        ValueError: no template there, one that is wrong, or one with tokens that the tokenizer doesn't have.
    """
    path = run.chat_template_path
    if path is None:
        return
    if os.path.isfile(path):
        tokenizer.chat_template = read_text(Path(path), _MOST_BYTES)
    else:
        other = _other_tokenizer(path)
        missing = missing_tokens(other, tokenizer)
        if missing:
            raise ValueError(
                f"--chat_template_path {path}: its template has {', '.join(missing)}, and the model's "
                "tokenizer has no such token; as a .jinja file it would be written as plain text"
            )
        tokenizer.chat_template = other.chat_template
        if run.eos_token is None and other.eos_token in tokenizer.get_vocab():
            run.eos_token = other.eos_token
    check_template_text(tokenizer, path)


def changes_from(source: str | Path, tokenizer: Any) -> Changes:
    """What a run changed of the tokenizer in the folder that it started from."""
    try:
        before = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError):  # a model need not have one
        return {}
    return changes_between(before, tokenizer)


def _other_tokenizer(path: str) -> Any:
    try:
        other = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # the hub's errors have no common base
        raise ValueError(
            f"--chat_template_path {path}: no such file, and no folder of a tokenizer "
            f"({type(error).__name__})"
        ) from None
    if not other.chat_template:
        raise ValueError(f"--chat_template_path {path}: this tokenizer has no chat template")
    other.chat_template = other.get_chat_template()  # of several, the one that is used by default
    return other


def missing_tokens(other: Any, tokenizer: Any) -> list[str]:
    """Tokens of the other tokenizer that its template writes and this tokenizer would cut into pieces."""
    known = tokenizer.get_vocab()
    tokens = [token.content for token in other.added_tokens_decoder.values()]
    return [token for token in tokens if token in other.chat_template and token not in known]


def check_template_text(tokenizer: Any, path: str) -> None:
    """ValueError for a template that is no Jinja. What it makes of the rows is seen when they are written."""
    conversation = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    try:
        tokenizer.apply_chat_template(conversation, tokenize=False)
    except TemplateSyntaxError as error:
        raise ValueError(f"--chat_template_path {path}, line {error.lineno}: {error}") from None
    except Exception:  # a template may refuse this conversation, and like the rows
        return
