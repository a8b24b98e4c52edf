"""What a run changed of its model's tokenizer: the chat template, the tokens that end and pad a text.

A model's tokenizer is copied file by file from the model that the run started from. These few changes are
written into the copy, and into each checkpoint, so that a model made of one has them too.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from seft_ds.json_file import read_object

CHANGES_NAME = "tokenizer_changes.json"  # in a checkpoint
TEMPLATE_NAME = "chat_template.jinja"
TOKENS = ("eos_token", "pad_token")

# {"chat_template": TEXT, "eos_token": [TEXT, ID], "pad_token": [TEXT, ID]}, each where it changed.
Changes = dict[str, Any]


def changes_between(before: Any, after: Any) -> Changes:
    """What differs between the tokenizer of a model's folder and the one that a run trained with.

    A padding token that was missing is no change: training takes the end of a text for it, and leaves it out
    of the loss.
    """
    found: Changes = {}
    if after.chat_template and after.chat_template != before.chat_template:
        found["chat_template"] = after.chat_template
    for name in TOKENS:
        old, new = getattr(before, name), getattr(after, name)
        if (
            new is not None
            and new != old
            and not (name == "pad_token" and old is None and new == after.eos_token)
        ):
            found[name] = [str(new), int(after.convert_tokens_to_ids(new))]
    return found


def put_changes(folder: Path, changes: Changes) -> None:
    """Write the changes into the files of a model's folder."""
    template = changes.get("chat_template")
    if isinstance(template, str):
        (folder / TEMPLATE_NAME).write_text(template, encoding="utf-8")
    tokens = {name: changes[name] for name in TOKENS if name in changes}
    texts = {name: text for name, (text, _) in tokens.items()}
    # Older readers look for the template here.
    if template is not None:
        _update(folder / "tokenizer_config.json", {"chat_template": template}, only_known=True)
    _update(folder / "tokenizer_config.json", texts)
    _update(folder / "special_tokens_map.json", texts)
    ids = {f"{name}_id": number for name, (_, number) in tokens.items()}
    _update(folder / "config.json", ids)
    _update_generation(folder / "generation_config.json", ids)


def save_changes(folder: Path, changes: Changes) -> None:
    """Keep the changes in a checkpoint, if there are any."""
    if changes:
        (folder / CHANGES_NAME).write_text(json.dumps(changes, indent=2) + "\n", encoding="utf-8")


def read_changes(checkpoint: Path) -> Changes:
    """The changes that a checkpoint keeps. ValueError if the file is damaged."""
    path = checkpoint / CHANGES_NAME
    if not path.is_file():
        return {}
    found = read_object(path)
    template = found.get("chat_template")
    pairs = [found[name] for name in TOKENS if name in found]
    ok = template is None or isinstance(template, str)
    if not ok or not all(_is_token(pair) for pair in pairs):
        raise ValueError(f"{path} doesn't hold a template and tokens; it is damaged")
    return found


def _is_token(pair: Any) -> bool:
    return isinstance(pair, list) and [type(part) for part in pair] == [str, int]


def _update(path: Path, entries: dict[str, Any], only_known: bool = False) -> None:
    """Set entries of a JSON file that is there, those of a nested text_config too."""
    if not entries or not path.is_file():
        return
    config = read_object(path)
    for holder in (config, config.get("text_config")):
        if isinstance(holder, dict) and (holder is config or entries.keys() & holder.keys()):
            holder.update({k: v for k, v in entries.items() if not only_known or k in holder})
    _write(path, config)


def _update_generation(path: Path, ids: dict[str, int]) -> None:
    """Generation ends at any of several tokens, so a new one goes before those that were there."""
    if not ids or not path.is_file():
        return
    config = read_object(path)
    for name, number in ids.items():
        old = config.get(name)
        ends = [old] if isinstance(old, int) else list(old or [])
        several = name == "eos_token_id" and ends
        config[name] = [number, *(end for end in ends if end != number)] if several else number
    _write(path, config)


def _write(path: Path, config: dict[str, Any]) -> None:
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
