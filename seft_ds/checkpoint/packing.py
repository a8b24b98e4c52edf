"""A sparse model folder for transport: a bit for every weight and a value for every live one.

A weight of n entries at sparsity s takes n · (b · (1 − s) + 1) bits, b being the bits of its dtype: 7.4 a
weight in bf16 at 60 %. Everything else is carried as it is, so that what is unpacked is the folder that was
packed, byte for byte. The packed folder holds

    NAME.seftpack    in the place of NAME.safetensors
    side/            config, tokenizer, record, card and every other file of the folder
    manifest.json    sizes and sha256 of these files, of the files that were packed, and of every tensor
    README.md        how to unpack it

There is no config.json and no weights file on its top level, so that no loader can take it for a model.

A .seftpack is 8 bytes that mark it, the head of the safetensors file, and its tensors in the order of their
bytes: as they are, or, where `sparsity.json` names them, in blocks of 2²² entries, each a packed mask (lowest
bit first, as in `seft_ds.sparse.mask`) and its live values. Live here is every entry with any bit set, -0.0
too: nothing is lost. Both ways work block by block, whatever the size of the model.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from seft_ds.checkpoint.manifest import (
    MANIFEST_NAME,
    FileEntry,
    aside_of,
    entries_below,
    find_problems,
    publish,
    read_manifest,
    seal,
    write_bytes,
    write_pieces,
)
from seft_ds.checkpoint.packed_file import (
    CountingReader,
    head_of,
    packed_pieces,
    plain_pieces,
    unpacked_pieces,
)
from seft_ds.checkpoint.verify import read_record
from seft_ds.json_file import shown
from seft_ds.tensor_files import open_tensors

FORMAT = "seft_ds-packed-1"
SUFFIX = ".seftpack"
SIDE = "side"
README = """# A packed sparse model

This is no model folder but its transport form: a bit for every weight and a value for every live one.
Unpack it with seft-ds, byte for byte and with every checksum looked at:

```
python launch/pack.py unpack PACKED MODEL
```
"""


@dataclass
class Packing:
    """What was packed or unpacked."""

    model_bytes: int = 0
    packed_bytes: int = 0
    target_weights: int = 0
    target_bits: int = 0  # that the targets take when packed
    left_out: list[str] = field(default_factory=list)  # folders, links to folders, hidden files

    @property
    def bits_a_weight(self) -> float:
        return self.target_bits / max(self.target_weights, 1)


def pack(model_dir: str | Path, packed_dir: str | Path) -> Packing:
    """Write the packed form of a sparse model folder; what is there already is not touched.

    Raises:
        ValueError: no sparse model, damaged files, or a `packed_dir` that holds something.
    """
    source, target = Path(model_dir), Path(packed_dir)
    weights, sides, left_out = _files_of(source)
    sparse = set(read_record(source)["targets"])
    done = Packing(left_out=left_out)
    with _written_aside(target) as aside:
        known: dict[str, FileEntry] = {}
        about: dict[str, Any] = {"packed": FORMAT, "files": {}}
        for name in weights:
            packed_name = _packed_name(name)
            known[packed_name], about["files"][name] = _pack_file(
                source / name, aside / packed_name, sparse, done
            )
        absent = sorted(sparse - {t for f in about["files"].values() for t in f["tensors"]})
        if absent:
            raise ValueError(
                f"{source}: sparsity.json names {absent[0]}, which is in no file; run launch/verify.py on it"
            )
        (aside / SIDE).mkdir()
        for name in sides:
            with CountingReader(source / name) as reader:
                entry = write_pieces(aside / SIDE / name, plain_pieces(reader, reader.size))
            known[f"{SIDE}/{name}"] = entry
            done.model_bytes += entry.bytes
        known["README.md"] = write_bytes(aside / "README.md", README.encode())
        seal(aside, entries_below(aside, known), about)
        done.packed_bytes = sum(entry.bytes for entry in known.values())
        publish(aside, target)
    return done


def unpack(packed_dir: str | Path, model_dir: str | Path) -> Packing:
    """Write the model folder that was packed, byte for byte; it appears only when all of it is right.

    Raises:
        ValueError: `model_dir` holds something, or the packed form is damaged: the file or tensor is named.
    """
    source, target = Path(packed_dir), Path(model_dir)
    entries, files = _contents_of(source)
    done = Packing(packed_bytes=sum(entry.bytes for entry in entries.values()))
    with _written_aside(target) as aside:
        for name, about in files.items():
            done.model_bytes += _unpack_file(source / _packed_name(name), aside / name, about, done)
        for name, entry in entries.items():
            if not name.startswith(f"{SIDE}/"):
                continue
            with CountingReader(source / name) as reader:
                found = write_pieces(
                    aside / name.removeprefix(f"{SIDE}/"), plain_pieces(reader, entry.bytes)
                )
            if found != entry:
                raise ValueError(
                    f"{source / name}: sha256 differs; the file is damaged, fetch it anew"
                )
            done.model_bytes += entry.bytes
        if target.is_dir():
            target.rmdir()  # empty, as was checked
        os.replace(aside, target)
    return done


def is_packed(folder: Path) -> bool:
    """Whether a folder looks like a packed model, whole or not."""
    return (folder / MANIFEST_NAME).is_file() and any(folder.glob(f"*{SUFFIX}"))


def packed_problems(folder: Path) -> list[str]:
    """What does not hold of a packed folder: sizes and checksums of all files. ValueError if it is none."""
    _contents_of(folder)
    return find_problems(folder)


# Parts of packing


def _files_of(folder: Path) -> tuple[list[str], list[str], list[str]]:
    """Weights files, other files, and what is left out of a model folder."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a directory; give the folder of a sparse model")
    weights: list[str] = []
    sides: list[str] = []
    left_out: list[str] = []
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or not path.is_file():
            left_out.append(path.name)
        elif path.name == MANIFEST_NAME:
            raise ValueError(
                f"{path} is of a checkpoint or a packed model; give the folder of a model"
            )
        else:
            (weights if path.suffix == ".safetensors" else sides).append(path.name)
    if not weights:
        raise ValueError(f"{folder} has no *.safetensors; give the folder of a sparse model")
    return weights, sides, left_out


def _packed_name(name: str) -> str:
    return name.removesuffix(".safetensors") + SUFFIX


def _pack_file(
    path: Path, output: Path, sparse: set[str], done: Packing
) -> tuple[FileEntry, dict[str, Any]]:
    """Pack one weights file; its entry in the manifest, and what the manifest says of the file itself."""
    with open_tensors(path):  # the library looks at the whole header
        pass
    sums: dict[str, str] = {}
    bits: dict[str, tuple[int, int]] = {}
    with CountingReader(path) as reader:
        head = head_of(reader)
        entry = write_pieces(output, packed_pieces(reader, head, sparse, sums, bits))
        digest = reader.digest.hexdigest()
        done.model_bytes += reader.size
    done.target_weights += sum(entries for entries, _ in bits.values())
    done.target_bits += sum(8 * size_bytes for _, size_bytes in bits.values())
    head_sum = hashlib.sha256(head.raw).hexdigest()
    return entry, {"sha256": digest, "head": head_sum, "tensors": sums, "sparse": sorted(bits)}


# Parts of unpacking


def _contents_of(folder: Path) -> tuple[dict[str, FileEntry], dict[str, dict[str, Any]]]:
    """Entries of the manifest, and what it says of each file that was packed. ValueError if it is none."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a directory; give a packed model")
    entries, about = read_manifest(folder)
    files = about.get("files")
    if about.get("packed") != FORMAT or not isinstance(files, dict):
        raise ValueError(
            f"{folder} is no packed model of this version: its manifest says "
            f"{shown(about.get('packed'))}, wanted {FORMAT!r}"
        )
    for name, about_file in files.items():
        plain = re.fullmatch(r"[^/\\]+\.safetensors", name) and _packed_name(name) in entries
        if not plain or not _is_whole(about_file):
            raise ValueError(f"{folder / MANIFEST_NAME}: what it says of {shown(name)} is damaged")
    sides = {name.removeprefix(f"{SIDE}/") for name in entries if name.startswith(f"{SIDE}/")}
    if sides & set(files) or any("/" in name for name in sides):
        raise ValueError(
            f"{folder}: {SIDE}/ has folders or weights; launch/pack.py did not write it"
        )
    problems = find_problems(folder, contents=False)
    if problems:
        raise ValueError(f"{folder} is damaged: {'; '.join(problems[:3])}; fetch it anew")
    return entries, files


def _is_whole(about: Any) -> bool:
    if not isinstance(about, dict) or not isinstance(about.get("tensors"), dict):
        return False
    sums = [about.get("sha256"), about.get("head"), *about["tensors"].values()]
    names = about.get("sparse")
    return (
        all(isinstance(s, str) for s in sums)
        and isinstance(names, list)
        and all(isinstance(n, str) for n in names)
    )


def _unpack_file(path: Path, output: Path, about: dict[str, Any], done: Packing) -> int:
    """Write one weights file anew; its size in bytes. ValueError, naming the tensor, if it is damaged."""
    bits: dict[str, tuple[int, int]] = {}
    with CountingReader(path) as reader:
        entry = write_pieces(output, unpacked_pieces(reader, about, bits))
        if reader.left:
            raise ValueError(f"{path} has {reader.left} bytes after its last tensor; fetch it anew")
    done.target_weights += sum(entries for entries, _ in bits.values())
    done.target_bits += sum(8 * size_bytes for _, size_bytes in bits.values())
    if entry.sha256 != about["sha256"]:
        raise ValueError(f"{path}: what came out is not the file that was packed; fetch it anew")
    return entry.bytes


@contextlib.contextmanager
def _written_aside(target: Path) -> Iterator[Path]:
    """A hidden folder beside `target`, which has to be free; gone if anything fails."""
    if os.path.lexists(target) and not (target.is_dir() and not any(target.iterdir())):
        raise ValueError(f"{target} is there already; give a folder that is new or empty")
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = aside_of(target)
    shutil.rmtree(aside, ignore_errors=True)  # of a run that was cut off
    aside.mkdir()
    try:
        yield aside
    finally:
        shutil.rmtree(aside, ignore_errors=True)
