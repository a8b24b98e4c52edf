"""JSON objects from files that nobody vouches for: damaged, hostile, or simply not what was meant."""

from __future__ import annotations

import json
import os
import reprlib
from pathlib import Path
from typing import Any

_LIMIT_BYTES = 64 << 20  # the index of a model with a million tensors has about that
_LEVELS = (
    100  # of nesting; Python's own limit is a recursion limit, which other code would meet later
)


def read_object(
    path: Path, limit_bytes: int = _LIMIT_BYTES, strict: bool = False
) -> dict[str, Any]:
    """The JSON object that a file holds.

    strict: refuse what Python's reader takes silently: a key twice (the last one wins), NaN and Infinity.

    Raises:
        ValueError: naming the file: it is missing, no plain file, too large, unreadable, or no JSON object.
    """
    text = read_text(path, limit_bytes)
    try:
        value = json.loads(text, **_STRICT if strict else {})
    except (ValueError, RecursionError) as error:  # ValueError: also a number of 5,000 digits
        raise ValueError(f"{path} is not JSON ({error}); correct or replace it") from None
    if "\\ud" in text.lower() and not _encodes(value):
        raise ValueError(
            f"{path} has half a character in it, which no text file can hold; replace it"
        )
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}, wanted a JSON object; replace it")
    if _too_deep(value):
        raise ValueError(f"{path} is nested more than {_LEVELS} levels deep; it is damaged")
    return value


def read_text(path: Path, limit_bytes: int = _LIMIT_BYTES) -> str:
    """A small text file in UTF-8, without its byte order mark.

    Raises:
        ValueError: naming it: it is anything else, a pipe or a device say.
    """
    if not os.path.isfile(
        path
    ):  # unlike Path.is_file, also False for names too long for the system
        raise ValueError(f"{str(path)!r:.300}: no such file")
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size > limit_bytes:
                raise ValueError(f"{path} has {size} bytes: more than {limit_bytes} can't be meant")
            return file.read(limit_bytes).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text in UTF-8 ({error})") from None
    except OSError as error:
        raise ValueError(f"{path} can't be read ({error})") from None


_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxlist, _SHORT.maxdict = 2, 8, 4
_SHORT.maxstring = _SHORT.maxother = 80


def shown(value: object) -> str:
    """A value for a message: short, printable, and however it is nested."""
    return _SHORT.repr(value)


def printable(text: str, length: int) -> str:
    """Text from a file for a message: cut, and with escapes for what would move a terminal's cursor."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text[:length])


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice!r:.80} is there twice in one object")
    return found


def _encodes(value: Any) -> bool:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except (UnicodeEncodeError, RecursionError):
        return False
    return True


def _no_number(text: str) -> None:
    raise ValueError(f"{text} is no number")


_STRICT: dict[str, Any] = {"object_pairs_hook": _unique, "parse_constant": _no_number}


def _too_deep(value: Any) -> bool:
    """Level by level, without recursion."""
    level = [value]
    for _ in range(_LEVELS):
        level = [
            item
            for holder in level
            for item in (holder.values() if isinstance(holder, dict) else holder)
            if isinstance(item, (dict, list))
        ]
    return bool(level)
