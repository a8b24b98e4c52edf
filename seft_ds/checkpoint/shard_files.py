"""Sharded safetensors written one tensor at a time.

A safetensors file is 8 bytes of header length (little-endian), a JSON header that gives every
tensor's dtype, shape and byte range, and then the bytes. As names, shapes and dtypes are known before
any value is, all headers can be written first; each tensor then goes straight to its own place. So
the order in which tensors arrive does not matter, and one tensor is the most that memory ever holds.
Format: the README of the safetensors project, "Format".
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import BinaryIO

import torch

from seft_ds.tensor_files import DTYPE_CODES, TensorInfo


def plan_shards(layout: list[TensorInfo], max_shard_bytes: int) -> dict[str, list[TensorInfo]]:
    """Which file holds which tensors: {file name: tensors}, filled in the order of `layout`.

    A tensor larger than `max_shard_bytes` gets a shard of its own, which is then larger too.
    One shard is called model.safetensors, several model-0000i-of-0000n.safetensors.
    """
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes is {max_shard_bytes}; give a positive number of bytes")
    groups: list[list[TensorInfo]] = [[]]
    used_bytes = 0
    for info in layout:
        if groups[-1] and used_bytes + info.size_bytes > max_shard_bytes:
            groups.append([])
            used_bytes = 0
        groups[-1].append(info)
        used_bytes += info.size_bytes
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    n = len(groups)
    return {f"model-{i:05d}-of-{n:05d}.safetensors": g for i, g in enumerate(groups, start=1)}


def index_of(shards: dict[str, list[TensorInfo]]) -> dict:
    """The content of model.safetensors.index.json for shards as `plan_shards` returns them."""
    total_bytes = sum(info.size_bytes for infos in shards.values() for info in infos)
    weight_map = {info.name: file for file, infos in shards.items() for info in infos}
    return {"metadata": {"format": "pt", "total_size": total_bytes}, "weight_map": weight_map}


def file_header(infos: list[TensorInfo]) -> tuple[bytes, dict[str, int]]:
    """The file's leading bytes, and where in the file each tensor starts (bytes from 0)."""
    # Widest dtypes first: with the header padded to 8 bytes, every tensor is then aligned to its own
    # item size, which readers that map the file into memory need.
    ordered = sorted(infos, key=lambda info: -info.dtype.itemsize)
    entries: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    end = 0
    for info in ordered:
        start, end = end, end + info.size_bytes
        entries[info.name] = {
            "dtype": DTYPE_CODES[info.dtype],
            "shape": list(info.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    head = len(text).to_bytes(8, "little") + text
    starts = {i.name: len(head) + entries[i.name]["data_offsets"][0] for i in ordered}
    return head, starts


class ShardWriter:
    """Open shard files that take their tensors in any order. Use it in a `with` block."""

    def __init__(self, directory: Path, shards: dict[str, list[TensorInfo]]) -> None:
        self._files: list[BinaryIO] = []
        self._place: dict[str, tuple[BinaryIO, int, TensorInfo]] = {}
        for file_name, infos in shards.items():
            head, starts = file_header(infos)
            file = open(directory / file_name, "wb")  # noqa: SIM115 (closed in __exit__)
            self._files.append(file)
            file.write(head)
            file.truncate(len(head) + sum(info.size_bytes for info in infos))
            self._place.update({i.name: (file, starts[i.name], i) for i in infos})
        self.missing = set(self._place)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files:
            file.close()

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write one CPU tensor whose shape and dtype are the planned ones."""
        file, start, info = self._place[name]
        assert tensor.shape == info.shape and tensor.dtype == info.dtype, name
        self.missing.discard(name)
        file.seek(start)
        if tensor.numel():
            file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
