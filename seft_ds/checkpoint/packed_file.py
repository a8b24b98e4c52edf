"""One weights file, packed and unpacked block by block: streams of pieces of bytes, both ways."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from seft_ds.json_file import shown
from seft_ds.tensor_files import DTYPE_OF_CODE

MAGIC = b"SEFTPK1\n"
BLOCK = 1 << 22  # entries of a tensor that are packed together; a multiple of 8
_PIECE_BYTES = 8 << 20
_HEAD_BYTES = 100 << 20  # what the safetensors library allows
Bits = dict[str, tuple[int, int]]  # tensor: (entries, bytes when packed)


class CountingReader:
    """A file that is read once from front to back, hashed, and known to end where it should."""

    def __init__(self, path: Path):
        self.path = path
        self.digest = hashlib.sha256()
        try:
            self._file = open(path, "rb")  # noqa: SIM115 (closed in __exit__)
        except OSError as error:
            raise ValueError(f"{path} can't be read ({error})") from None
        self.size = self.left = os.fstat(self._file.fileno()).st_size

    def __enter__(self) -> CountingReader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()

    def read(self, size_bytes: int, of: str) -> bytes:
        """Exactly so many bytes. ValueError, saying of what, where the file ends before."""
        data = self._file.read(size_bytes)
        if len(data) != size_bytes:
            raise ValueError(f"{self.path} ends within {of}; it is cut short: fetch it anew")
        self.digest.update(data)
        self.left -= size_bytes
        return data


@dataclass(frozen=True)
class Part:
    """A tensor in a safetensors file."""

    name: str
    bytes: int
    itemsize: int  # 0: of a dtype that is carried as it is

    @property
    def entries(self) -> int:
        return self.bytes // self.itemsize


@dataclass(frozen=True)
class Head:
    """The head of a safetensors file as it stands there, and its tensors in the order of their bytes."""

    raw: bytes
    parts: list[Part]


def head_of(reader: CountingReader) -> Head:
    """Read and check the head: tensors follow one another without a gap, up to the end of the file.

    Raises:
        ValueError: it is not the head of a safetensors file.
    """
    length = reader.read(8, "its head")
    size_bytes = int.from_bytes(length, "little")
    if size_bytes > min(_HEAD_BYTES, reader.left):
        raise _damaged(reader.path, f"a head of {size_bytes} bytes")
    text = reader.read(size_bytes, "its head")
    try:
        listed = json.loads(text)
        parts = _parts(listed)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise _damaged(reader.path, f"a head that can't be read ({type(error).__name__})") from None
    return Head(length + text, parts)


def _parts(listed: dict[str, Any]) -> list[Part]:
    """ValueError and the like for anything but what the format allows."""
    listed = {name: entry for name, entry in listed.items() if name != "__metadata__"}
    parts, end = [], 0
    for name, entry in sorted(listed.items(), key=lambda item: item[1]["data_offsets"]):
        start, stop = entry["data_offsets"]
        dtype = DTYPE_OF_CODE.get(entry["dtype"])
        itemsize = 0 if dtype is None else dtype.itemsize
        if start != end or type(stop) is not int or stop < start:
            raise ValueError(f"{name} is not where the tensor before it ends")
        if itemsize and stop - start != math.prod(entry["shape"]) * itemsize:
            raise ValueError(f"{name} has another size than its shape")
        parts.append(Part(name, stop - start, itemsize))
        end = stop
    return parts


def packed_pieces(
    reader: CountingReader, head: Head, sparse: set[str], sums: dict[str, str], bits: Bits
) -> Iterator[bytes]:
    """The packed form of a weights file, whose head is read already.

    sums: filled with the sha256 of each tensor as packed; bits: with the sizes of those in `sparse`.
    """
    yield MAGIC + head.raw
    for part in head.parts:
        digest, size_bytes = hashlib.sha256(), 0
        is_sparse = part.name in sparse and part.itemsize > 0
        pieces = (
            _pack_tensor(reader, part) if is_sparse else plain_pieces(reader, part.bytes, part.name)
        )
        for piece in pieces:
            digest.update(piece)
            size_bytes += len(piece)
            yield piece
        sums[part.name] = digest.hexdigest()
        if is_sparse:
            bits[part.name] = (part.entries, size_bytes)


def unpacked_pieces(reader: CountingReader, about: dict[str, Any], bits: Bits) -> Iterator[bytes]:
    """The weights file out of its packed form.

    about: sha256 of the head and of each tensor as packed, and the names of those that are sparse.

    Raises:
        ValueError: naming the tensor that is not what was packed.
    """
    if reader.read(len(MAGIC), "its first bytes") != MAGIC:
        raise _damaged(reader.path, "other first bytes than a packed file of this version")
    head = head_of(reader)
    if hashlib.sha256(head.raw).hexdigest() != about["head"]:
        raise _damaged(reader.path, "a head with another sha256 than was packed")
    if {part.name for part in head.parts} != set(about["tensors"]):
        raise _damaged(reader.path, "other tensors than its manifest names")
    yield head.raw
    sparse = set(about["sparse"])
    for part in head.parts:
        before, reader.digest = reader.left, hashlib.sha256()
        is_sparse = part.name in sparse and part.itemsize > 0
        yield from (
            _unpack_tensor(reader, part)
            if is_sparse
            else plain_pieces(reader, part.bytes, part.name)
        )
        if reader.digest.hexdigest() != about["tensors"][part.name]:
            raise _damaged(reader.path, f"{shown(part.name)} with another sha256 than was packed")
        if is_sparse:
            bits[part.name] = (part.entries, before - reader.left)


def plain_pieces(reader: CountingReader, size_bytes: int, of: str = "its bytes") -> Iterator[bytes]:
    """So many bytes as they are."""
    while size_bytes:
        piece = reader.read(min(size_bytes, _PIECE_BYTES), of)
        size_bytes -= len(piece)
        yield piece


def _pack_tensor(reader: CountingReader, part: Part) -> Iterator[bytes]:
    for count in _blocks(part.entries):
        values = np.frombuffer(reader.read(count * part.itemsize, part.name), f"<u{part.itemsize}")
        live = values != 0
        yield np.packbits(live, bitorder="little").tobytes()
        yield values[live].tobytes()


def _unpack_tensor(reader: CountingReader, part: Part) -> Iterator[bytes]:
    for count in _blocks(part.entries):
        packed = np.frombuffer(reader.read(-(-count // 8), part.name), np.uint8)
        live: np.ndarray = np.unpackbits(packed, bitorder="little", count=count).view(bool)
        values: np.ndarray = np.zeros(count, f"<u{part.itemsize}")
        kept = reader.read(int(live.sum()) * part.itemsize, part.name)
        values[live] = np.frombuffer(kept, values.dtype)
        yield values.tobytes()


def _blocks(entries: int) -> Iterator[int]:
    while entries > 0:
        yield min(BLOCK, entries)
        entries -= BLOCK


def _damaged(path: Path, what: str) -> ValueError:
    return ValueError(f"{path} has {what}; it is damaged: fetch it anew")
