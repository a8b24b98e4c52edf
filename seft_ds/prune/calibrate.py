"""Calibration sequences: text in, N sequences of L tokens out.

Texts are taken in an order that the seed shuffles, tokenized, written one after the other and cut, until
there are enough tokens; so a large data set costs no more than what is used of it, and the same seed
gives the same sequences on every rank. Each sequence begins with what the tokenizer puts before a text
(seft_ds/beginning.py); between the texts of a sequence it is left out.
"""

from __future__ import annotations

import codecs
import gzip
import io
import json
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from seft_ds.beginning import beginning_of, cut, without

_TEXTS_AT_ONCE = 64  # tokenizers are faster on batches; at most this many texts too many are read
_SUFFIXES = (".txt", ".json", ".jsonl")


def read_texts(path: str | Path) -> list[str]:
    """The texts of a file: .txt (one a line), .json (a list) or .jsonl, all also with .gz.

    JSON rows are objects with a "text" field. Empty texts are left out.

    Raises:
        ValueError: no such file, another kind of file, a row without text, or no text at all.
    """
    path = Path(path)
    check_text_file(path)
    text = whole_text(path)
    if text_kind(path) == ".txt":
        texts = [line.strip() for line in io.StringIO(text)]
    elif text_kind(path) == ".jsonl":
        lines = (line for line in io.StringIO(text) if line.strip())
        texts = [_text_of(_parsed(line, path, i), path, i) for i, line in enumerate(lines)]
    else:
        rows = _parsed(text, path, 0)
        rows = rows if isinstance(rows, list) else [rows]
        texts = [_text_of(row, path, i) for i, row in enumerate(rows)]
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise ValueError(f"{path} holds no text; give a file with at least one non-empty row")
    return texts


def check_text_file(path: str | Path) -> None:
    """Refuse a path that `read_texts` cannot read, without reading it.

    Raises:
        ValueError: no such file, or another kind of file.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"there is no file {path}; give a .txt, .json or .jsonl file, also .gz")
    if text_kind(path) not in _SUFFIXES:
        raise ValueError(
            f"{path} is of no known kind; wanted {', '.join(_SUFFIXES)}, also with .gz"
        )


def text_kind(path: Path) -> str:
    """The suffix of a file name, that of the content where it is gzipped: ".txt" of "a.txt.gz"."""
    return path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix


def whole_text(path: Path) -> str:
    """What a file holds, unzipped where it is gzipped, without a byte order mark.

    Raises:
        ValueError: it can't be read, or is not text in UTF-8.
    """
    opener: Any = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rb") as file:
            check_encoding(file.read(4), path)
        with opener(path, "rt", encoding="utf-8-sig") as file:
            return file.read()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text in UTF-8 ({error})") from None
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"can't read {path}: {error}") from None


def check_encoding(head: bytes, path: str | Path) -> None:
    """ValueError if the first bytes of a file are the mark of UTF-16 or UTF-32, naming the encoding."""
    marks = {codecs.BOM_UTF32_LE: 32, codecs.BOM_UTF32_BE: 32}
    marks |= {codecs.BOM_UTF16_LE: 16, codecs.BOM_UTF16_BE: 16}
    bits = next((bits for mark, bits in marks.items() if head.startswith(mark)), None)
    if bits is not None:
        raise ValueError(
            f"{path} is text in UTF-{bits}, as its first bytes say; wanted UTF-8: "
            f"iconv -f UTF-{bits} -t UTF-8 {path} > NEW"
        )


def _parsed(text: str, path: Path, row: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"row {row} of {path} is not JSON ({error}); correct it") from error


def _text_of(row: Any, path: Path, index: int) -> str:
    if not isinstance(row, dict) or not isinstance(row.get("text"), str):
        got = sorted(row) if isinstance(row, dict) else type(row).__name__
        raise ValueError(
            f'row {index} of {path} has no "text" string (got {got}); wanted {{"text": "..."}}'
        )
    return row["text"]


def default_texts() -> list[str]:
    """Paragraphs of the Python language's own manual, which every Python brings along.

    A stand-in: English, and technical. Text like what the model is for is better.
    """
    from pydoc_data.topics import topics

    paragraphs = (p for text in topics.values() for p in text.split("\n\n"))
    flat = (" ".join(paragraph.split()) for paragraph in paragraphs)
    return [text for text in flat if text]


def dataset_texts(name: str) -> Sequence[str]:
    """The "text" column of a data set's training split; `name` is NAME or NAME:CONFIG.

    Raises:
        ValueError: the data set cannot be had, or has no such column.
    """
    import datasets

    name, _, config = name.partition(":")
    try:
        rows = datasets.load_dataset(name, config or None, split="train")
    except Exception as error:  # each builder has errors of its own; all mean the same to the user
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"could not load data set {name!r} ({reason}); check the name, or pass a file with "
            "--calibration_file"
        ) from error
    if "text" not in rows.column_names:
        raise ValueError(
            f'data set {name!r} has columns {rows.column_names}; wanted one named "text"'
        )
    return rows["text"]


def sequences(
    tokenizer: Any,
    texts: Sequence[str],
    count: int,
    length_tokens: int,
    seed: int,
    *,
    fewer: bool = False,
    add_bos_token: bool = True,
) -> torch.Tensor:
    """int64 (count, length_tokens): token sequences cut from the texts in the order of `seed`.

    fewer: take as many as there are, at least one, where the text is too short for `count`.
    add_bos_token: begin each sequence with what the tokenizer puts before a text, if it puts something.

    Raises:
        ValueError: a count or length under 1, or fewer tokens than wanted.
    """
    added = beginning_of(tokenizer)
    begins = added if add_bos_token else []
    if count < 1 or length_tokens < 2 or length_tokens <= len(begins):
        raise ValueError(
            f"got {count} calibration sequences of {length_tokens} tokens; wanted at least 1 of "
            f"{max(2, len(begins) + 1)}"
        )
    own_tokens = length_tokens - len(begins)
    wanted = count * own_tokens
    tokens: list[int] = []
    for batch in _shuffled(texts, seed):
        for ids in tokenizer(batch, verbose=False)["input_ids"]:
            tokens.extend(without(added, ids))
        if len(tokens) >= wanted:
            return cut(tokens[:wanted], begins, length_tokens)
    if fewer and len(tokens) >= own_tokens:
        return cut(tokens, begins, length_tokens)
    raise ValueError(
        f"the calibration texts hold {len(tokens)} tokens; {count} sequences of {length_tokens} need "
        f"{wanted}: give more text, or lower --calibration_samples or --max_length"
    )


def _shuffled(texts: Sequence[str], seed: int) -> Iterator[list[str]]:
    """Batches of the texts in the seed's order, each with a paragraph break at its end."""
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed)).tolist()
    for lo in range(0, len(order), _TEXTS_AT_ONCE):
        yield [texts[i] + "\n\n" for i in order[lo : lo + _TEXTS_AT_ONCE]]
