"""The chat template that a run writes its messages with, and what it makes of a row."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from transformers import AutoTokenizer
from trl.chat_template_utils import get_training_chat_template, has_generation_markers

from seft_ds.train.chats import Empty

_MARK = "\ufeff"  # a byte order mark, once it is text
_NAMES = re.compile(r"""["']([A-Za-z_][\w.-]{0,40})["']""")
_REASON = 300


@dataclass(frozen=True)
class Template:
    """A tokenizer with the template that training uses."""

    tokenizer: Any
    text: str  # all of it; a tokenizer may have several
    named: frozenset[str]  # the words in quotes, among them the roles that it knows
    chosen: str | None  # instead of the tokenizer's own
    marks: bool  # whether the answers have to be marked in it (assistant_only_loss)

    @property
    def writes_tools(self) -> bool:
        return "tools" in self.text

    @property
    def writes_calls(self) -> bool:
        return "tool_calls" in self.text

    def check(self, row: dict[str, Any]) -> None:
        """ValueError for a row that the template refuses, or of which it marks no answer."""
        more = row.get("chat_template_kwargs") or {}
        more = {"chat_template": self.chosen, "tools": row.get("tools"), **more}
        messages = row["messages"] if "messages" in row else [*row["prompt"], *row["completion"]]
        try:
            if "prompt" in row:
                self._write(row["prompt"], add_generation_prompt=True, **more)
            self._write(messages, **more)
        except Exception as error:  # a template is a program, and may fail in any way
            reason = " ".join(str(error).split())[:_REASON]
            kind = "" if isinstance(error, jinja2.TemplateError) else f"{type(error).__name__}: "
            roles = ", ".join(str(message["role"]) for message in messages[:12])
            raise ValueError(
                f"the chat template refuses it ({kind}{reason}); its roles are {roles}"
            ) from None
        if self.marks:
            self._check_marks(messages, more)

    def _write(self, messages: list[dict[str, Any]], **more: Any) -> Any:
        return self.tokenizer.apply_chat_template(messages, tokenize=False, **more)

    def _check_marks(self, messages: list[dict[str, Any]], more: dict[str, Any]) -> None:
        written = self.tokenizer.apply_chat_template(
            messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, **more
        )
        if 1 not in written["assistant_masks"]:
            raise Empty("the chat template marks no answer in them (--assistant_only_loss)")


def load_tokenizer(folder: Path) -> Any:
    """The model's tokenizer, its template without the byte order mark that some editors write."""
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    if isinstance(tokenizer.chat_template, str):
        tokenizer.chat_template = tokenizer.chat_template.removeprefix(_MARK)
    return tokenizer


def template_of(tokenizer: Any, assistant_only_loss: bool) -> Template | None:
    """The template that TRL will write messages with; None if the tokenizer has none.

    Raises:
        ValueError: one that can't mark the answers, and has to.
    """
    own, chosen = tokenizer.chat_template, None
    if own is None:
        return None
    if assistant_only_loss and not has_generation_markers(own):
        try:
            chosen = own = get_training_chat_template(tokenizer)
        except ValueError:
            raise ValueError(
                "--assistant_only_loss: the chat template doesn't mark the answers, and TRL knows no "
                "template like it that does; put {% generation %} and {% endgeneration %} around "
                "them in a file for --chat_template_path"
            ) from None
    text = "\n".join(own.values()) if isinstance(own, dict) else str(own)
    named = frozenset(_NAMES.findall(text))
    return Template(tokenizer, text, named, chosen, assistant_only_loss)
