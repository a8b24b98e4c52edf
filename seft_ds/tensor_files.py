"""Safetensors files as they are read: a model's tensors by name, from the headers alone.

Format: the README of the safetensors project, "Format".
"""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from seft_ds.json_file import printable, read_object, shown

WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
PICKLE_NAME = "pytorch_model.bin"
PICKLE_INDEX_NAME = "pytorch_model.bin.index.json"
# The names that the format gives to dtypes, and ours to read them back with.
DTYPE_CODES: dict[torch.dtype, str] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
DTYPE_OF_CODE = {code: dtype for dtype, code in DTYPE_CODES.items()}


@dataclass(frozen=True)
class TensorInfo:
    """What is known of a tensor before its values: `dtype` is the one it is written in."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def size_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def open_tensors(path: Path) -> Any:
    """A safetensors file, mapped: the library's reader, which has looked at the whole header.

    Raises:
        ValueError: naming the file: there is none, or it is damaged. A pipe is not waited for.
    """
    if not os.path.isfile(path):
        raise ValueError(f"{str(path)!r}: can't be read (no such file)")
    try:
        return safe_open(path, framework="pt")
    except (OSError, MemoryError, SafetensorError) as error:
        reason = printable(str(error), 200)
        raise ValueError(f"{path}: can't be read ({reason}); it is cut short or damaged") from None


def read_index(directory: Path, name: str = INDEX_NAME) -> dict[str, str]:
    """{tensor name: file name} of a model in several files.

    Raises:
        ValueError: a damaged index, or one that leads out of its directory.
    """
    path = directory / name
    listed = read_object(path).get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise ValueError(f"{path} has no weight_map; the file is damaged")
    for tensor, file_name in listed.items():
        # A plain file name: an index must not make us read outside its own directory.
        plain = isinstance(file_name, str) and re.fullmatch(
            r"[^/\\]+\.(safetensors|bin)", file_name
        )
        if not plain or not file_name.isprintable() or not is_name(tensor):
            raise ValueError(
                f"{name} puts {shown(tensor)} into {shown(file_name)}, which is no file name; "
                f"{path} is damaged"
            )
    return listed


def is_name(name: str) -> bool:
    return 0 < len(name) <= 1000 and name.isprintable()


@dataclass(frozen=True)
class Stored:
    """A tensor in a safetensors file, by the name that it has there."""

    path: Path
    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    def read(self) -> torch.Tensor:
        """The tensor, of memory of its own: the mapping of the file is let go, which would count as ours."""
        with open_tensors(self.path) as file:
            return file.get_tensor(self.key).clone()

    def read_flat(self, lo: int, hi: int) -> torch.Tensor:
        """The flat positions [lo, hi); only the rows that they lie in are read."""
        if not self.shape:
            return self.read().reshape(1)[lo:hi]
        columns = max(1, math.prod(self.shape[1:]))
        first, last = lo // columns, -(-hi // columns)
        with open_tensors(self.path) as file:
            rows = file.get_slice(self.key)[first:last]
            return rows.reshape(-1)[lo - first * columns : hi - first * columns].clone()


@dataclass(frozen=True)
class StoredInPickle(Stored):
    """A tensor in a pytorch_model.bin. Reading one goes through the whole table of its file."""

    def read(self) -> torch.Tensor:
        return _unpickled(self.path, "cpu")[self.key].clone()

    def read_flat(self, lo: int, hi: int) -> torch.Tensor:
        return _unpickled(self.path, "cpu")[self.key].reshape(-1)[lo:hi].clone()


def stored_tensors(folder: Path, pickles: bool = False) -> dict[str, Stored]:
    """All tensors of a model folder by the names in its files, from the headers alone.

    pickles: take a pytorch_model.bin where there are no safetensors.

    Raises:
        ValueError: no weights that can be read, a missing or damaged file, a damaged index, or a dtype that
            is not plain numbers.
    """
    if (folder / WEIGHTS_NAME).is_file():  # what transformers loads first
        return _in_safetensors(folder, {}, [WEIGHTS_NAME])
    if (folder / INDEX_NAME).is_file():
        names = read_index(folder)
        check_shards(folder, names, INDEX_NAME)
        return _in_safetensors(folder, names, sorted(set(names.values())))
    if pickles and (folder / PICKLE_NAME).is_file():
        return _in_pickles(folder, [PICKLE_NAME])
    if pickles and (folder / PICKLE_INDEX_NAME).is_file():
        names = read_index(folder, PICKLE_INDEX_NAME)
        check_shards(folder, names, PICKLE_INDEX_NAME)
        return _in_pickles(folder, sorted(set(names.values())))
    raise ValueError(f"{folder} has neither {WEIGHTS_NAME} nor {INDEX_NAME}{_instead(folder)}")


def check_shards(folder: Path, names: dict[str, str], index_name: str) -> None:
    """ValueError if a file that the index names is not there: a download or a copy was interrupted."""
    files = sorted(set(names.values()))
    absent = [name for name in files if not (folder / name).is_file()]
    if absent:
        raise ValueError(
            f"{folder}: {index_name} names {absent[0]}, which is not there ({len(absent)} of {len(files)} "
            "files are missing): the copy or download was interrupted; complete it"
        )


def _instead(folder: Path) -> str:
    """What a folder without weights of the usual names has, and what to do about it."""
    shards = sorted(path.name for path in folder.glob("model-*-of-*.safetensors"))
    if shards:
        return (
            f", but {shards[0]}: {INDEX_NAME} is missing, without which nobody knows whether all files are "
            "there; complete the copy or download"
        )
    if any(folder.glob("pytorch_model*.bin")):
        return (
            ", and a model is read straight from its safetensors; convert it once: "
            "AutoModelForCausalLM.from_pretrained(DIR, dtype='auto').save_pretrained(NEW_DIR), and the "
            "tokenizer likewise"
        )
    return "; give the folder of a whole model, as save_pretrained writes it"


def _in_safetensors(folder: Path, names: dict[str, str], files: list[str]) -> dict[str, Stored]:
    """names: the index, tensor name -> file name; empty where there is one file."""
    found: dict[str, Stored] = {}
    for file_name in files:
        with open_tensors(folder / file_name) as file:
            for key in file.keys():  # noqa: SIM118 (not a dict)
                if names and names.get(key) != file_name:
                    continue
                view = file.get_slice(key)
                dtype = DTYPE_OF_CODE.get(view.get_dtype())
                if dtype is None:
                    raise ValueError(
                        f"{key} in {folder / file_name} is {view.get_dtype()}: a quantised model, which "
                        "can't be read here; give the model in bf16 or fp32"
                    )
                found[key] = Stored(folder / file_name, key, tuple(view.get_shape()), dtype)
    absent = sorted(set(names) - set(found))
    if absent:
        raise ValueError(
            f"{folder}: {INDEX_NAME} names {absent[0]}, which is in no file; copy it anew"
        )
    return found


def _in_pickles(folder: Path, files: list[str]) -> dict[str, Stored]:
    found: dict[str, Stored] = {}
    for file_name in files:
        for key, value in _unpickled(folder / file_name, "meta").items():
            if isinstance(value, torch.Tensor):
                shape = tuple(value.shape)
                found[key] = StoredInPickle(folder / file_name, key, shape, value.dtype)
    return found


def _unpickled(path: Path, device: str) -> dict[str, Any]:
    """The table of a pytorch_model.bin; only tensors and plain containers are accepted (`weights_only`)."""
    try:
        table = torch.load(path, map_location=device, weights_only=True, mmap=device == "cpu")
    except Exception as error:  # torch, zip and pickle have errors of their own
        reason = printable((str(error).splitlines() or [type(error).__name__])[0], 200)
        raise ValueError(f"{path}: can't be read ({reason}); it is cut short or damaged") from None
    if not isinstance(table, dict):
        raise ValueError(f"{path} holds a {type(table).__name__}, wanted a table of tensors")
    return table
