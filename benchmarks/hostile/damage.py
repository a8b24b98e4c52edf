"""What can happen to files: by accident (cut, flipped, swapped, gone), and on purpose.

Every function takes a `Random`, changes files in place, and returns in words what it did.
"""

from __future__ import annotations

import hashlib
import json
import os
import resource
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

HUGE_BYTES = 1 << 40  # of a file with a hole, which takes no room on the disk
NESTED = 100_000  # levels: far past what Python's JSON reader takes


class Raw(str):
    """Text that stands in a JSON document as it is: what `json.dumps` would never write."""


# Values for any field of a JSON document. What is a right value for one is wrong for most others.
VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 3, -(2**63), 2**31, 2**53 + 1, 2**60, 2**64, 10**30, Raw("1" * 5000),
    0.5, -0.5, 1e308, Raw("NaN"), Raw("Infinity"), Raw("-Infinity"), Raw("1e999"),
    "", " ", "0", "auto", "x", "../x", "/etc/passwd", "a\x00b", "\x1b[2J", "line\nline", Raw('"\\ud800"'),
    "x" * 300, "x" * 5_000_000, [], [[]], [None], [0, 0], [1, 2, 3], [2**60, 2**60], [-1, 4], {}, {"x": 1},
    {"": None}, ["x"] * 10, Raw("[" * NESTED + "]" * NESTED), Raw('{"a":' * 900 + "1" + "}" * 900),
]  # fmt: skip


def dumps(value: Any) -> str:
    """JSON in which `Raw` strings stand as they are."""
    if isinstance(value, Raw):
        return str(value)
    if isinstance(value, dict):
        return "{" + ",".join(f"{json.dumps(k)}:{dumps(v)}" for k, v in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(map(dumps, value)) + "]"
    return json.dumps(value)


def shown(value: Any) -> str:
    try:
        text = dumps(value)
    except TypeError:
        text = str(type(value))
    return text if len(text) < 60 else f"{text[:40]}... ({len(text)} characters)"


def leaves(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """The path of every value in a document, containers included; of long lists the first few."""
    if path:
        yield path
    if isinstance(value, dict):
        for key, item in value.items():
            yield from leaves(item, (*path, key))
    elif isinstance(value, list):
        for i, item in enumerate(value[:3]):
            yield from leaves(item, (*path, i))


def at(document: Any, path: tuple) -> Any:
    for key in path:
        document = document[key]
    return document


def edit_field(rng: Random, document: dict, value: Any = ...) -> str:
    """Give one field (top level first as often as deeper ones) another value, or take it away."""
    top = [(key,) for key in document]
    deep = [path for path in leaves(document) if len(path) > 1]
    path = rng.choice(deep if deep and rng.random() < 0.5 else top)
    holder, key = at(document, path[:-1]), path[-1]
    name = ".".join(map(str, path))
    if value is ... and rng.random() < 0.1:
        del holder[key]
        return f"{name} removed"
    if value is ...:
        value = rng.choice(VALUES)
    holder[key] = value
    return f"{name} = {shown(value)}"


def add_field(rng: Random, document: dict) -> str:
    name = rng.choice(["x", "", "__class__", "format", "\x00", "x" * 300])
    value = rng.choice(VALUES)
    document[name] = value
    return f"{name[:20]!r} added = {shown(value)}"


def strange_text(rng: Random, good: str) -> tuple[str, bytes]:
    """(what, bytes): a document that is no JSON object in UTF-8, or one that is odd."""
    ways: list[tuple[str, bytes]] = [
        ("a byte order mark", b"\xef\xbb\xbf" + good.encode()),
        ("UTF-16", good.encode("utf-16")),
        ("UTF-32", good.encode("utf-32")),
        ("Latin-1", b'{"\xe9": 1, ' + good.encode()[1:]),
        ("NUL at the end", good.encode() + b"\x00"),
        ("NUL inside", good.encode().replace(b":", b":\x00", 1)),
        ("two documents", good.encode() * 2),
        ("single quotes", good.replace('"', "'").encode()),
        ("a comment", b"// comment\n" + good.encode()),
        ("a trailing comma", good.rstrip()[:-1].encode() + b",}"),
        ("only opening brackets", b"[" * NESTED),
        ("nested lists", b"[" * NESTED + b"]" * NESTED),
        ("nested objects", b'{"a":' * NESTED + b"1" + b"}" * NESTED),
        ("nested up to the limit", b'{"x":' * 980 + b"1" + b"}" * 980),
        ("a list", b"[" + good.encode() + b"]"),
        ("a list of names", json.dumps(list(json.loads(good))).encode()),
        ("a number", b"5"),
        ("a string", b'"zero_optimization"'),
        ("null", b"null"),
        ("NaN", b"NaN"),
        ("an empty object", b"{}"),
        ("nothing", b""),
        ("blanks", b" \n" * 1000),
        ("many digits", b'{"a": ' + b"9" * 100_000 + b"}"),
        ("a pickle", b"\x80\x04\x95\x00\x00\x00\x00\x00\x00\x00\x00."),
        ("a million small objects", b"[" + b"{}," * 1_000_000 + b"{}]"),
    ]
    return rng.choice(ways)


def duplicate_key(rng: Random, good: str) -> tuple[str, bytes]:
    """One key of the top level twice, with another value first or last."""
    document = json.loads(good)
    key = rng.choice(list(document))
    again = f"{json.dumps(key)}:{dumps(rng.choice(VALUES[:40]))}"
    body = good.strip()[1:-1]
    text = f"{{{again},{body}}}" if rng.random() < 0.5 else f"{{{body},{again}}}"
    return f"{key} twice", text.encode()


# Files.


def files_of(root: Path) -> list[Path]:
    return sorted(p for p in root.rglob("*") if p.is_file() and not p.is_symlink())


def cut(rng: Random, path: Path, root: Path) -> str:
    size = path.stat().st_size
    places = [0, 1, 7, 8, 9, 64, size // 2, size - 8, size - 1, rng.randrange(size + 1)]
    length = max(0, min(rng.choice(places), size))
    os.truncate(path, length)
    return f"cut from {size} to {length} bytes"


def flip(rng: Random, path: Path, root: Path) -> str:
    data = bytearray(path.read_bytes())
    for _ in range(rng.choice([1, 1, 2, 8, 64])):
        if data:
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)
    return "bits flipped"


def overwrite(rng: Random, path: Path, root: Path) -> str:
    """A block of the file as a bad disk gives it: zeros, ones, noise, or another block of the same file."""
    data = bytearray(path.read_bytes())
    start = rng.randrange(len(data) + 1)
    n = rng.choice([1, 8, 512, 4096])
    block = rng.choice([b"\x00" * n, b"\xff" * n, rng.randbytes(n), bytes(data[:n])])
    data[start : start + n] = block
    path.write_bytes(data)
    return f"{n} bytes overwritten at {start}"


def lengthen(rng: Random, path: Path, root: Path) -> str:
    with path.open("ab") as file:
        file.write(rng.choice([b"\x00", b"\n", b"x", rng.randbytes(100), b"\x00" * 4096]))
    return "bytes added at the end"


def exchange(rng: Random, path: Path, root: Path) -> str:
    other = rng.choice(files_of(root))
    a, b = path.read_bytes(), other.read_bytes()
    path.write_bytes(b)
    other.write_bytes(a)
    return f"swapped with {other.name}"


def remove(rng: Random, path: Path, root: Path) -> str:
    path.unlink()
    return "removed"


def replace(rng: Random, path: Path, root: Path) -> str:
    """Something that is no file under the file's name."""
    kind = rng.choice(
        ["folder", "loop", "outside", "dangling", "null", "zero", "pipe", "socket", "unreadable"]
    )
    data = path.read_bytes()
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind == "loop":
        path.symlink_to(path.name)
    elif kind == "outside":  # the same bytes, but not in the directory
        beside = root.parent / f"{root.name}-outside"
        beside.mkdir(exist_ok=True)
        (beside / path.name).write_bytes(data)
        path.symlink_to(beside / path.name)
    elif kind == "dangling":
        path.symlink_to("nowhere")
    elif kind in ("null", "zero"):
        path.symlink_to(f"/dev/{kind}")
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        bind_socket(path)
    else:
        path.write_bytes(data)
        path.chmod(0)
    return f"replaced by: {kind}"


def bind_socket(path: Path) -> None:
    """A socket in the file system; bound by its short name, since paths of sockets may not be long."""
    here = os.getcwd()
    os.chdir(path.parent)
    try:
        with socket.socket(socket.AF_UNIX) as s:
            s.bind(path.name[:90])
    finally:
        os.chdir(here)


def empty(rng: Random, path: Path, root: Path) -> str:
    path.write_bytes(b"")
    return "emptied"


def stretch(rng: Random, path: Path, root: Path) -> str:
    """A terabyte with a hole: whoever reads the whole file has no memory for it."""
    keep = rng.random() < 0.5
    if not keep:
        path.write_bytes(b"")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limits[1], limits[1]))
    os.truncate(path, HUGE_BYTES)
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    return "a terabyte of zeros" + (" after the contents" if keep else "")


DAMAGE: dict[str, Callable[[Random, Path, Path], str]] = {
    "truncated": cut,
    "bits flipped": flip,
    "overwritten": overwrite,
    "longer": lengthen,
    "swapped": exchange,
    "removed": remove,
    "no plain file": replace,
    "empty": empty,
    "huge": stretch,
}


def spoil(rng: Random, kind: str, root: Path, files: list[Path] | None = None) -> str:
    """Damage one file below `root`, or one of `files`."""
    path = rng.choice(files if files is not None else files_of(root))
    return f"{path.relative_to(root)} {DAMAGE[kind](rng, path, root)}"


def snapshot(root: Path) -> dict[str, str]:
    """What is below a folder: {name: sha256 of a plain file, or what else it is}."""
    found = {}
    for path in sorted(root.rglob("*")):
        name = str(path.relative_to(root))
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            found[name] = "no plain file"
        elif path.is_file():
            size = path.stat().st_size
            found[name] = (
                hashlib.sha256(path.read_bytes()).hexdigest() if size < 1 << 30 else f"{size} bytes"
            )
    return found


# Safetensors, read and written without a library: hostile ones can't be written with it.


def read_raw(path: Path) -> tuple[dict[str, Any], bytes]:
    """(header, data)."""
    raw = path.read_bytes()
    n = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + n]), raw[8 + n :]


def write_raw(path: Path, header: Any, data: bytes, length: int | None = None) -> None:
    """length: what the first 8 bytes claim, if not the truth."""
    text = header if isinstance(header, bytes) else dumps(header).encode()
    text += b" " * (-len(text) % 8)
    claimed = len(text) if length is None else length
    path.write_bytes((claimed % (1 << 64)).to_bytes(8, "little") + text + data)


def read_parts(path: Path) -> dict[str, tuple[str, list[int], bytes]]:
    """{name: (dtype code, shape, bytes)}."""
    header, data = read_raw(path)
    return {
        n: (e["dtype"], e["shape"], data[slice(*e["data_offsets"])])
        for n, e in header.items()
        if n != "__metadata__"
    }


def write_parts(path: Path, parts: dict[str, tuple[str, list[int], bytes]]) -> None:
    header: dict[str, Any] = {}
    data, end = [], 0
    for name, (code, shape, values) in parts.items():
        header[name] = {
            "dtype": code,
            "shape": shape,
            "data_offsets": [end, end + len(values)],
        }
        end += len(values)
        data.append(values)
    write_raw(path, header, b"".join(data))


def spoil_header(rng: Random, path: Path) -> str:
    """A header that lies: sizes, offsets, dtypes, names, its own length."""
    header, data = read_raw(path)
    names = [n for n in header if n != "__metadata__"]
    name = rng.choice(names)
    entry = header[name]
    start, end = entry["data_offsets"]
    size = len(data)
    way = rng.randrange(14)
    if way == 0:
        length = rng.choice([0, 1, 2**62, 2**63, 2**64 - 1, 10**8, 10**8 + 1, size * 100, 2**31])
        write_raw(path, header, data, length)
        return f"header of {length} bytes claimed"
    if way == 1:
        entry["data_offsets"] = rng.choice(
            [[start, 2**62], [0, 2**64], [-1, end], [end, start], [start + 1, end + 1], [2**62, 2**62 + 4]]
        )  # fmt: skip
    elif way == 2:
        other = header[rng.choice(names)]
        entry["data_offsets"] = other["data_offsets"]  # two tensors in one place
    elif way == 3:
        entry["shape"] = rng.choice(
            [[2**62], [2**62, 4], [2**32, 2**32], [0], [-1], [], [1] * 100, [2**64], [1.5], "x", None, [True]]
        )  # fmt: skip
    elif way == 4:
        entry["dtype"] = rng.choice(
            ["F64", "F16", "I64", "U8", "F8_E4M3", "F4", "C64", "X", "", None, 5]
        )
    elif way == 5:
        entry[rng.choice(list(entry))] = rng.choice(VALUES)
    elif way == 6:
        del entry[rng.choice(list(entry))]
    elif way == 7:
        header[name] = rng.choice(VALUES)
    elif way == 8:
        header["__metadata__"] = rng.choice(VALUES)
    elif way == 9:
        what, text = strange_text(rng, dumps(header))
        write_raw(path, text, data)
        return f"header is {what}"
    elif way == 10:
        what, text = duplicate_key(rng, dumps(header))
        write_raw(path, text, data)
        return f"header has {what}"
    elif way == 11:
        header[rng.choice(["../x", "x" * 10_000, "\x1b[2J", "a\nb", ""])] = header.pop(name)
    elif way == 12:
        data = data[: rng.randrange(size)]
    else:
        data += b"\x00" * rng.choice([1, 8, 4096])
    write_raw(path, header, data)
    return f"header of {path.name}: {name} way {way}"
