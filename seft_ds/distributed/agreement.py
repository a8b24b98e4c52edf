"""Before any time is spent: that all ranks were given the same, and that one rank's mistake ends them all.

A rank that reads another config or other files than its peers trains another model without a word; one that
stops alone leaves its peers waiting in their next collective until that times out.
"""

from __future__ import annotations

import hashlib
import json
import socket
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from seft_ds.distributed.collectives import Ranks

T = TypeVar("T")

_SHOWN = 3  # differing keys, and values of one key, that an error spells out
_VALUE_LENGTH = 80  # characters of a value in an error


def agree(ranks: Ranks, facts: dict[str, Any], what: str) -> None:
    """Check that all ranks hold the same `facts`. A collective.

    Args:
        facts: plain values, nested as they come. They are compared as JSON, so a tuple is a list and 1 is
            not 1.0; what JSON doesn't know is compared by its `str`, which has to be the same in every
            process (an object that prints its address never agrees).
        what: the facts in words, such as "the settings".

    Raises:
        ValueError: some facts differ. The same on every rank: which ranks hold which values, since nobody
            knows which of them is right.
    """
    flat = _flatten(facts)
    digest = hashlib.sha256(json.dumps(flat, sort_keys=True).encode()).hexdigest()
    if len(set(ranks.gather_object(digest))) == 1:
        return
    differing = disagreements(ranks.gather_object(flat))
    raise ValueError(
        f"the ranks disagree on {what}: {first_few(differing)}; start all ranks with the same command "
        "and files"
    )


def all_or_none(ranks: Ranks, work: Callable[[], T]) -> T:
    """`work()`, unless it failed on some rank: then every rank raises. A collective.

    Args:
        work: what this rank does alone. No collectives in it: a peer that has failed doesn't take part.

    Raises:
        ValueError: with the text of the lowest rank that failed. Mistakes of the user, ValueError and
            OSError, are told as they are; of any other error, which passes through where it happened, the
            peers tell the type as well.
    """
    done: list[T] = []
    error: BaseException | None = None
    try:
        done.append(work())
    except (Exception, SystemExit) as caught:  # argparse exits when it dislikes a flag
        error = caught
    failure = None if error is None else (socket.gethostname(), _text(error))
    everyone = ranks.gather_object(failure)
    if not any(everyone):
        return done[0]
    if error is not None and not isinstance(error, (ValueError, OSError)):
        raise error
    raise ValueError(_verdict(everyone)) from error


def folder_facts(folder: Path, blocks: int = 64, block_bytes: int = 65536) -> dict[str, str]:
    """Size and digest of each file of a model folder by its name; hidden files and subfolders are left out.

    Of a file larger than blocks · block_bytes (4 MiB) the digest covers a sample only: the first and the
    last block, and blocks evenly spread between. It finds another model, another training run, a truncated
    copy; it can miss a few changed weights. What was loaded is compared in full by `zero.fingerprint`.

    Raises:
        ValueError: there is no such folder.
    """
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}; every machine needs the model's files")
    paths = sorted(p for p in folder.iterdir() if p.is_file() and not p.name.startswith("."))
    return {p.name: _size_and_digest(p, blocks, block_bytes) for p in paths}


def file_facts(path: Path, blocks: int = 64, block_bytes: int = 65536) -> dict[str, str]:
    """Size and digest of one data file by its name; of a large one a sample, as in `folder_facts`.

    Raises:
        ValueError: there is no such file.
    """
    if not path.is_file():
        raise ValueError(f"there is no file {path}; every machine needs the data")
    return {path.name: _size_and_digest(path, blocks, block_bytes)}


def disagreements(everyone: list[dict[str, str]]) -> list[str]:
    """For each key that the ranks' dicts don't agree on, which ranks hold which values.

    Args:
        everyone: the values as text, one dict a rank.
    """
    keys = dict.fromkeys(key for facts in everyone for key in facts)
    sentences = []
    for key in keys:
        holders: dict[str, list[int]] = {}
        for rank, facts in enumerate(everyone):
            value = _shorten(facts[key]) if key in facts else "missing"
            holders.setdefault(value, []).append(rank)
        if len(holders) > 1:
            sentences.append(f"{key} is {_who_holds_what(holders)}")
    return sentences


def first_few(sentences: list[str]) -> str:
    """Some of the sentences, and how many more there are."""
    more = len(sentences) - _SHOWN
    return "; ".join(sentences[:_SHOWN] + ([f"and {more} more"] if more > 0 else []))


def _who_holds_what(holders: dict[str, list[int]]) -> str:
    """ "20 on rank 0 and 30 on ranks 2, 3". Every rank is in it, however many values there are."""
    groups = list(holders.items())
    parts = [f"{value} on {name_ranks(ranks)}" for value, ranks in groups[:_SHOWN]]
    others = sorted(rank for _, ranks in groups[_SHOWN:] for rank in ranks)
    if others:
        parts.append(f"something else on {name_ranks(others)}")
    return ", ".join(parts[:-1]) + f" and {parts[-1]}"


def name_ranks(ranks: list[int]) -> str:
    """ "rank 0", "ranks 2, 3", "ranks 0-6, 9" of ascending ranks."""
    parts = []
    for _, run in groupby(enumerate(ranks), key=lambda pair: pair[1] - pair[0]):
        row = [rank for _, rank in run]
        parts += [f"{row[0]}-{row[-1]}"] if len(row) > 2 else [str(rank) for rank in row]
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(parts)}"


def _shorten(text: str) -> str:
    """Long values end in their digest, for they may differ behind the cut."""
    if len(text) <= _VALUE_LENGTH:
        return text
    return f"{text[: _VALUE_LENGTH - 20]}... (sha256 {_short_digest(text.encode())})"


def _flatten(facts: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """{"seft.interval": "20"}: the leaves of nested dicts as JSON, by their path."""
    flat: dict[str, str] = {}
    for key, value in facts.items():
        if isinstance(value, dict) and value:
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = json.dumps(_plain(value), sort_keys=True)
    return flat


def _plain(value: Any) -> Any:
    """`value` as JSON can write it, the same text in every process: sets have no order of their own."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, (set, frozenset)):
        return sorted(str(v) for v in value)
    return value if value is None or isinstance(value, (str, int, float)) else str(value)


def _text(error: BaseException) -> str:
    """What the peers are told: for a mistake of the user its text, else the type too."""
    name, text = type(error).__name__, str(error)
    if isinstance(error, (ValueError, OSError)):
        return text or name
    return f"{name}: {text}" if text else name


def _verdict(everyone: list[tuple[str, str] | None]) -> str:
    """The lowest failed rank's text; which rank it was, unless it happened to all alike."""
    rank, host, text = next((r, *f) for r, f in enumerate(everyone) if f is not None)
    alike = all(f is not None and f[1] == text for f in everyone)
    return text if alike else f"on rank {rank} ({host}): {text}"


def _size_and_digest(path: Path, blocks: int, block_bytes: int) -> str:
    assert blocks >= 2
    size = path.stat().st_size
    starts = [i * (size - block_bytes) // (blocks - 1) for i in range(blocks)]
    with path.open("rb") as file:
        if size <= blocks * block_bytes:
            return f"{size} bytes, sha256 {_short_digest(file.read())}"
        digest = hashlib.sha256()
        for start in starts:
            file.seek(start)
            digest.update(file.read(block_bytes))
    return f"{size} bytes, sha256 of a sample {digest.hexdigest()[:16]}"


def _short_digest(data: bytes) -> str:
    """64 bits: enough against accidents, and still readable in an error."""
    return hashlib.sha256(data).hexdigest()[:16]
