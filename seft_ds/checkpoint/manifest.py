"""Directories that are whole, or recognised as not whole.

A save that is cut off (a crash, a full disk, a power failure) must not look like a finished one. So
everything is written to a hidden sibling first (`aside_of`), each file synced to the disk; then `seal`
adds a manifest with every file's size and sha256; then `publish` makes the directory visible by one
rename. What is visible was finished, and `find_problems` says whether it still is what was written.

Nothing here talks to other ranks. With several: all write into the same aside, one gathers their
entries and calls `entries_below`, `seal` and `publish`; each can check its share of the files.

A manifest lists files, not folders, and a file that it does not list is nobody's concern. A sub-folder
with a manifest of its own is listed by that manifest alone; the checks go on into it.
"""

from __future__ import annotations

import errno
import hashlib
import heapq
import itertools
import json
import os
import re
import shutil
import stat
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from seft_ds.checkpoint.shard_files import file_header
from seft_ds.tensor_files import DTYPE_CODES, TensorInfo

MANIFEST_NAME = "manifest.json"
FORMAT = "seft_ds-manifest-1"
_MAX_MANIFEST_BYTES = 64 * 2**20
_READ_BYTES = 4 * 2**20
_LEFTOVER = re.compile(r"\.(?P<name>.+)\.(?P<kind>writing|replaced)")
_CHECKPOINT = re.compile(r"checkpoint-(0|[1-9][0-9]*)")


@dataclass(frozen=True)
class FileEntry:
    """What a manifest says of one file."""

    bytes: int
    sha256: str


# Writing


def write_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> FileEntry:
    """Write a safetensors file and sync it; at most one tensor of a GPU is on the host at a time."""
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPE_CODES:
            known = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPE_CODES)
            raise ValueError(f"{path}: {name} is {tensor.dtype}; convert it to one of {known}")
    if "__metadata__" in tensors:
        raise ValueError(f"{path}: the format reserves the name '__metadata__'; rename that tensor")
    infos = [TensorInfo(name, tuple(t.shape), t.dtype) for name, t in tensors.items()]
    head, starts = file_header(infos)  # starts: in the order of the file
    return write_pieces(
        path, itertools.chain([head], (_bytes_of(tensors[name]) for name in starts))
    )


def write_bytes(path: Path, data: bytes) -> FileEntry:
    """Write a small file and sync it."""
    return write_pieces(path, [data])


def hash_file(path: Path) -> FileEntry:
    """Size and sha256 of a regular file. OSError for anything else, links included."""
    digest, size = hashlib.sha256(), 0
    with _open_regular(path) as file:
        while block := file.read(_READ_BYTES):
            digest.update(block)
            size += len(block)
    return FileEntry(size, digest.hexdigest())


def aside_of(target: Path) -> Path:
    """Where a directory is written before it is `target`: beside it, so that a rename is enough.

    An interrupted save may have left one; remove it before you write (see `remove_leftovers`).
    """
    return target.parent / f".{target.name}.writing"


def entries_below(directory: Path, known: dict[str, FileEntry]) -> dict[str, FileEntry]:
    """The entries of all files below a directory, for `seal`.

    Files in `known` were hashed and synced by those who wrote them; the others are synced and hashed
    here. OSError if a known file is not there as it was written; ValueError for what no manifest can
    list: links, pipes, odd names, and a sub-folder's manifest that is not one of ours.
    """
    found: dict[str, FileEntry] = {}
    for name, size in _files_below(directory):
        _check_name(name)
        entry = known.get(name)
        if entry is None:
            _sync(directory / name)
            entry = hash_file(directory / name)
        elif entry.bytes != size:
            raise OSError(f"{directory / name} has {size} bytes after {entry.bytes} were written")
        found[name] = entry
    for name in known:
        if name not in found and not (directory / name).is_file():
            raise OSError(f"{directory / name} was written and is not there")
    return found


def seal(
    directory: Path, entries: dict[str, FileEntry], about: dict[str, Any] | None = None
) -> None:
    """Write the manifest, whole or not at all. `about` is the caller's own JSON."""
    for name in entries:
        _check_name(name)
    document: dict[str, Any] = {
        "format": FORMAT,
        "files": {name: asdict(entry) for name, entry in entries.items()},
        "about": json.loads(json.dumps(about or {})),  # as it will be read: 1 as a key is "1"
    }
    document["seal"] = _seal_of(document)
    path = directory / MANIFEST_NAME
    write_bytes(aside_of(path), json.dumps(document, indent=1, sort_keys=True).encode() + b"\n")
    os.replace(aside_of(path), path)
    _sync(directory)


def publish(aside: Path, target: Path) -> None:
    """Make a sealed directory visible under its own name, in place of an older one if there is one.

    If it fails, `target` is what it was. A crash between the two renames leaves no target, but the old
    one whole beside it; `remove_leftovers` moves it back.
    """
    assert (aside / MANIFEST_NAME).is_file(), f"{aside} is not sealed"
    if os.path.lexists(target) and (target.is_symlink() or not target.is_dir()):
        raise ValueError(f"{target} is in the way and is no plain directory; move it elsewhere")
    for folder, _, _ in os.walk(aside, topdown=False, onerror=_raise):
        _sync(Path(folder))
    old = _replaced(target)
    try:
        if target.is_dir():
            if old.is_dir():  # of a publish that was cut off after its last rename
                shutil.rmtree(old)
            os.replace(target, old)
        os.replace(aside, target)
    except BaseException:
        if old.is_dir() and not os.path.lexists(target):
            os.replace(old, target)
        raise
    _sync(target.parent)  # before the old one goes
    # The save has succeeded: what can't be deleted now is a leftover like any other.
    shutil.rmtree(old, ignore_errors=True)


def remove_leftovers(parent: Path) -> list[Path]:
    """Clear away what interrupted saves left in `parent`; returns what was deleted.

    An old directory whose replacement never came is moved back instead. Only call this on a directory
    that no other process saves to: what is being written looks the same as what was left.
    """
    removed = []
    for path in sorted(parent.iterdir()):
        match = _LEFTOVER.fullmatch(path.name)
        if match is None or path.is_symlink() or not path.is_dir():
            continue
        target = parent / match["name"]
        if match["kind"] == "replaced" and not os.path.lexists(target):
            os.replace(path, target)
        else:
            shutil.rmtree(path)
            removed.append(path)
    return removed


# Reading


def read_manifest(directory: Path) -> tuple[dict[str, FileEntry], dict[str, Any]]:
    """The files that a directory's manifest lists, and its `about`. ValueError if it is not intact.

    No name in it leads out of the directory by itself; a link in the directory still may.
    OSError where the disk can't say.
    """
    path = directory / MANIFEST_NAME
    try:
        data = _manifest_bytes(path)
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(
            f"{directory} has no {MANIFEST_NAME}: it was not finished, or isn't a checkpoint; "
            "give another one"
        ) from None
    try:
        document = json.loads(data.decode("utf-8"))
        sealed = isinstance(document, dict) and document.get("seal") == _seal_of(document)
    except (ValueError, RecursionError) as error:  # ValueError: not JSON, or not UTF-8
        raise _damaged(path, f"can't be read as JSON ({error})") from None
    if not isinstance(document, dict):
        raise _damaged(path, f"holds {_shown(document)}, not an object")
    if document.get("format") != FORMAT:
        came = _shown(document.get("format"))
        raise ValueError(f"{path} has format {came}; this version reads {FORMAT!r}")
    for key in ("files", "about"):
        if not isinstance(document.get(key), dict):
            raise _damaged(path, f"has {_shown(document.get(key))} as {key!r}, not an object")
    entries = {name: _entry_of(path, name, raw) for name, raw in document["files"].items()}
    if not sealed:
        raise _damaged(path, "is not what was written (its own checksum differs)")
    return entries, document["about"]


def find_problems(
    directory: Path, share: tuple[int, int] = (0, 1), contents: bool = True
) -> list[str]:
    """What does not hold of a sealed directory, a line each; no damage raises an error.

    share: (rank, size); every rank checks the structure and all sizes, and hashes only its part of
    the files, so that the lists of all ranks together say everything. contents=False hashes none.
    """
    rank, size = share
    if not 0 <= rank < size:
        raise ValueError(f"share is {share}; give (rank, size) with 0 <= rank < size")
    listed, problems = _listed_below(directory)
    mine = _part_of(listed, rank, size) if contents else set()
    found = (_problem_of(directory, n, listed[n], n in mine) for n in sorted(listed))
    return problems + [problem for problem in found if problem]


def checkpoints_in(run_dir: Path) -> list[Path]:
    """The directories checkpoint-N of a run, the highest N first."""
    if not run_dir.is_dir():
        return []
    found = [(m, path) for path in run_dir.iterdir() if (m := _CHECKPOINT.fullmatch(path.name))]
    return [path for m, path in sorted(found, key=lambda f: -int(f[0][1])) if path.is_dir()]


# Parts of writing


def write_pieces(path: Path, pieces: Iterable[bytes | memoryview]) -> FileEntry:
    digest, size = hashlib.sha256(), 0
    with open(path, "wb") as file:
        for piece in pieces:
            file.write(piece)
            digest.update(piece)
            size += len(piece)
            del piece  # frees this tensor before the next one is fetched
        file.flush()
        os.fsync(file.fileno())
    return FileEntry(size, digest.hexdigest())


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    tensor = tensor.detach().cpu().resolve_neg().contiguous()
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def _sync(path: Path) -> None:
    """Have the disk hold a file, or the names in a directory, whoever wrote them."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems have no sync of directories; there is nothing more to do then.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def _files_below(directory: Path) -> Iterator[tuple[str, int]]:
    """(relative name, bytes) of each file that a manifest of `directory` has to list."""
    own = {MANIFEST_NAME, aside_of(directory / MANIFEST_NAME).name}
    for folder, folders, files in os.walk(directory, onerror=_raise):
        here = Path(folder)
        if here == directory:
            files = [name for name in files if name not in own]
        elif MANIFEST_NAME in files:
            read_manifest(here)  # it stands for all others, so it has to be one of ours
            files, folders[:] = [MANIFEST_NAME], []
        for path in (here / name for name in sorted(files + folders)):
            status = path.lstat()
            if stat.S_ISREG(status.st_mode):
                yield path.relative_to(directory).as_posix(), status.st_size
            elif not stat.S_ISDIR(status.st_mode):
                raise ValueError(
                    f"{path} is a link or a special file; a checkpoint holds files and folders: "
                    "put a copy there, or remove it"
                )


def _raise(error: OSError) -> None:
    raise error


def _replaced(target: Path) -> Path:
    """Where `target` stays while a newer one takes its place."""
    return target.parent / f".{target.name}.replaced"


# Parts of reading


def _open_regular(path: Path) -> BinaryIO:
    """Open for reading without following a link and without waiting for the other end of a pipe."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return open(descriptor, "rb", buffering=0)


def _manifest_bytes(path: Path) -> bytes:
    if not stat.S_ISREG(path.lstat().st_mode):
        raise _damaged(path, "is a link or a special file")
    with _open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > _MAX_MANIFEST_BYTES:
            raise _damaged(path, f"has {size} bytes and a manifest at most {_MAX_MANIFEST_BYTES}")
        return b"".join(iter(lambda: file.read(_READ_BYTES), b""))


def _seal_of(document: dict[str, Any]) -> str:
    """sha256 of a manifest's other members. A changed `about` would not show in any file."""
    rest = {key: value for key, value in document.items() if key != "seal"}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _check_name(name: str) -> None:
    """Refuse whatever is not a plain path inside the directory, on any system that may read it."""
    leaves = any(part in ("", ".", "..") for part in name.split("/"))  # "" if absolute, too
    odd = "\\" in name or not name.isprintable() or re.match("[A-Za-z]:", name)
    if leaves or odd or name == MANIFEST_NAME:
        raise ValueError(
            f"{name!r:.200} can't be listed in a manifest; a relative path of plain names inside the "
            f"directory, parted by '/' and other than {MANIFEST_NAME}, was wanted: rename the file"
        )


def _entry_of(path: Path, name: str, raw: Any) -> FileEntry:
    """One file's entry as the manifest at `path` has it."""
    try:
        _check_name(name)
    except ValueError as error:
        raise _damaged(path, f"lists a name that it can't have ({error})") from None
    size, sha256 = (raw.get("bytes"), raw.get("sha256")) if isinstance(raw, dict) else (None, None)
    if type(size) is not int or not 0 <= size < 2**63:  # bool is an int as well
        raise _damaged(path, f"says that {name} has {_shown(size)} bytes")
    if not isinstance(sha256, str) or not re.fullmatch("[0-9a-f]{64}", sha256):
        raise _damaged(path, f"has {_shown(sha256)} as the sha256 of {name}")
    return FileEntry(size, sha256)


def _shown(value: object) -> str:
    """A value from a damaged file, short, and without the recursion that nested ones would take."""
    plain = value is None or isinstance(value, (str, int, float))
    return f"{value!r:.80}" if plain else f"a {type(value).__name__}"


def _damaged(path: Path, what: str) -> ValueError:
    return ValueError(f"{path} {what}; the directory is damaged: give another one")


def _listed_below(directory: Path) -> tuple[dict[str, FileEntry], list[str]]:
    """All files that the manifest and those of sub-folders list, and what is wrong with manifests."""
    listed: dict[str, FileEntry] = {}
    problems: list[str] = []
    folders = [""]
    while folders:  # no recursion: how deep it goes is up to the files
        folder = folders.pop()
        if folder and _behind_link(directory, folder + MANIFEST_NAME):
            continue  # `_problem_of` says so
        try:
            entries, _ = read_manifest(directory / folder)
        except (ValueError, OSError) as error:
            problems.append(str(error))
            continue
        for name, entry in entries.items():
            name = folder + name
            if name in listed:  # by a manifest above too: don't go there twice
                if listed[name] != entry:
                    problems.append(f"{name}: two manifests list it, each with another content")
            elif name.endswith(f"/{MANIFEST_NAME}"):
                folders.append(name.removesuffix(MANIFEST_NAME))
            listed.setdefault(name, entry)
    return listed, problems


def _part_of(listed: dict[str, FileEntry], rank: int, size: int) -> set[str]:
    """The files that one of `size` ranks hashes: the largest first, each to who has least so far."""
    loads = [(0, r) for r in range(size)]
    mine = set()
    for name in sorted(listed, key=lambda name: (-listed[name].bytes, name)):
        load, taker = loads[0]
        heapq.heapreplace(loads, (load + listed[name].bytes + 1, taker))  # 1: empty files count too
        if taker == rank:
            mine.add(name)
    return mine


def _problem_of(directory: Path, name: str, entry: FileEntry, hashed: bool) -> str | None:
    """What is wrong with one listed file; its contents are read only if `hashed`."""
    path = directory / name
    try:
        if _behind_link(directory, name):
            return f"{name}: a symbolic link, or in a linked folder; expected a regular file"
        status = path.lstat()
        if not stat.S_ISREG(status.st_mode):
            return f"{name}: not a regular file; expected one of {entry.bytes} bytes"
        if status.st_size != entry.bytes:
            return f"{name}: {status.st_size} bytes, expected {entry.bytes}"
        if hashed and (found := hash_file(path)) != entry:
            return f"{name}: sha256 {found.sha256}, expected {entry.sha256}"
    except (FileNotFoundError, NotADirectoryError):
        return f"{name}: missing; expected {entry.bytes} bytes"
    except OSError as error:
        return f"{name}: can't be read ({error}); expected {entry.bytes} bytes"
    return None


def _behind_link(directory: Path, name: str) -> bool:
    """Is a file, or a folder on the way to it from the directory, a symbolic link?"""
    path = directory / name
    return any(os.path.islink(p) for p in (path, *path.parents[: name.count("/")]))
