"""Forged checkpoints: changes by somebody who knows the format, after which every checksum is right.

Each function changes a checkpoint in place and returns in words what it did.
"""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import torch

from benchmarks.hostile import damage
from benchmarks.hostile.made import TAG, copy, reseal
from benchmarks.hostile.runner import MARKER
from seft_ds.checkpoint.manifest import _seal_of, read_manifest, seal


def forge_manifest(rng: Random, checkpoint: Path) -> str:
    """The manifest of the tag, edited; its own checksum is right again as often as not."""
    path = checkpoint / TAG / "manifest.json"
    document = json.loads(path.read_text())
    way = rng.randrange(5)
    if way == 0:
        what, data = damage.strange_text(rng, path.read_text())
    elif way == 1:
        what, data = damage.duplicate_key(rng, path.read_text())
    else:
        what = damage.edit_field(rng, document)
        if way == 2:
            name = rng.choice(
                ["../../../secret", "/etc/passwd", "..", ".", "", "a//b", "a/../../b", "\x00", "C:\\x",
                 "x" * 5000, "a/" * 300 + "b", "manifest.json", "engine.pt/x", "\x1b[2J", "\u202e"]
            )  # fmt: skip
            entry = {"bytes": 3, "sha256": "0" * 64}
            files = document.get("files")
            if isinstance(files, dict):
                files[name] = entry
            what = f"lists {name[:40]!r}"
        try:
            plain = json.loads(damage.dumps(document))
            plain["seal"] = _seal_of(plain)
            data = json.dumps(plain).encode()
        except (ValueError, RecursionError):
            data = damage.dumps(document).encode()
    path.write_bytes(data)
    return what


def forge_meta(rng: Random, checkpoint: Path) -> str:
    path = checkpoint / TAG / "seft.json"
    way = rng.randrange(10)
    if way == 0:
        what, data = damage.strange_text(rng, path.read_text())
    elif way == 1:
        what, data = damage.duplicate_key(rng, path.read_text())
    else:
        document = json.loads(path.read_text())
        if way == 2:
            what = damage.add_field(rng, document)
        elif way < 6:
            what = _bend(rng, document)
        else:
            what = damage.edit_field(rng, document)
        data = damage.dumps(document).encode()
    path.write_bytes(data)
    reseal(checkpoint)
    return what


def _bend(rng: Random, m: dict) -> str:
    """A description that says something of the right kind, but untrue."""
    i = rng.randrange(len(m["targets"]))
    target = m["targets"][i]
    ways: dict[str, Callable[[], Any]] = {
        "targets swapped": lambda: m["targets"].reverse(),
        "a target twice": lambda: m["targets"].append(dict(target)),
        "a target less": lambda: m["targets"].pop(),
        "two targets of one name": lambda: target.update(name=m["targets"][i - 1]["name"]),
        "a shape transposed": lambda: target.update(shape=target["shape"][::-1]),
        "a flat shape": lambda: target.update(shape=[1, target["shape"][0] * target["shape"][1]]),
        "a huge shape": lambda: target.update(shape=[2**31, 2**31]),
        "one live more": lambda: target.update(target_live=target["target_live"] + 1),
        "one slot more": lambda: target.update(n_slots=target["n_slots"] + 1),
        "a pattern": lambda: target.update(pattern=[1, 3]),
        "a pattern over everything": lambda: target.update(pattern=[1, 2**50]),
        "a name of an other": lambda: target.update(name="model.embed_tokens"),
        "other base": lambda: m.update(base="copy" if m["base"] == "reference" else "reference"),
        "more ranks": lambda: m.update(ranks=10**6),
        "3 ranks": lambda: m.update(ranks=3, slot_ranges=[*m["slot_ranges"], m["slot_ranges"][-1]]),
        "1 rank": lambda: m.update(ranks=1, slot_ranges=m["slot_ranges"][:1]),
        "other dtype": lambda: m.update(dtype=rng.choice(["float64", "int64", "bool", "float16"])),
        "other moments": lambda: m.update(
            moments=rng.choice([[], ["step"], ["mean"], ["mean"] * 2, ["mean", "square", "step"]])
        ),
        "no fingerprints": lambda: m.update(fingerprints={}),
        "steps negative": lambda: m.update(optimizer_steps=-1.0),
        "steps not a number": lambda: m.update(optimizer_steps=damage.Raw("NaN")),
        "window steps": lambda: m.update(
            window_steps=[rng.choice([None, -1, 0, 2**60, 3]) for _ in m["window_steps"]]
        ),
        "an embedding as a buffer": lambda: m["others"].append(
            {"name": "model.norm.weight", "shape": [24], "dtype": "float32", "buffer": True}
        ),
        "a huge other": lambda: m["others"].append(
            {"name": "x", "shape": [2**40], "dtype": "float32", "buffer": False}
        ),
        "an empty other": lambda: m["others"].append(
            {"name": "x", "shape": [0, 2**62], "dtype": "float32", "buffer": False}
        ),
        "others gone": lambda: m.update(others=[]),
        "another source": lambda: m.update(
            source_dir=rng.choice(
                ["/etc", "", "\x00", "../..", "x" * 5000, "https://example.com/x"]
            )
        ),
        "settings gone": lambda: m.update(config={}),
        "a setting": lambda: m["config"].update(
            {rng.choice(list(m["config"])): rng.choice(damage.VALUES)}
        ),
        "slot ranges": lambda: m["slot_ranges"][0].__setitem__(i, [0, rng.choice([0, 2**60, -5])]),
        "far steps": lambda: m.update(step=2**53, total_steps=rng.choice([2**53, None, -1, 20])),
    }
    name = rng.choice(list(ways))
    ways[name]()
    return name


def forge_tensors(rng: Random, checkpoint: Path) -> str:
    """Values, shapes and dtypes in a rank's file, with everything else as it was."""
    path = rng.choice(sorted((checkpoint / TAG).glob("rank-*")))
    parts = damage.read_parts(path)
    name = rng.choice(list(parts))
    code, shape, values = parts[name]
    way = rng.choice(
        ["shape", "dtype", "missing", "extra", "noise", "exchanged", "short", *["values"] * 9]
    )  # fmt: skip
    what = way
    if way == "shape":
        n = shape[0]
        parts[name] = (code, rng.choice([[n, 1], [1, n], [], [n // 2, 2], [0], [n, 0]]), values)
        if not _fits(parts[name]):
            parts[name] = (code, parts[name][1], b"\x00" * _bytes_of(parts[name]))
    elif way == "dtype":
        size = _SIZE[code]
        same = [c for c, s in _SIZE.items() if s == size and c != code]
        parts[name] = (rng.choice(same), shape, values)
    elif way == "missing":
        del parts[name]
    elif way == "extra":
        parts[rng.choice(["0.more", "other.x", "0.fresh_slots", "99.weight", "../x"])] = (
            "I64", [2], (7).to_bytes(8, "little") * 2
        )  # fmt: skip
    elif way == "short":
        keep = shape[0] // 2
        parts[name] = (code, [keep], values[: keep * _SIZE[code]])
    elif way == "exchanged":
        other = rng.choice([n for n in parts if parts[n][0] == code] or [name])
        parts[name], parts[other] = parts[other], parts[name]
        what += f" with {other}"
    elif way == "noise":
        parts[name] = (code, shape, rng.randbytes(len(values)))
    else:
        name, what = _forge_values(rng, parts)
    damage.write_parts(path, parts)
    reseal(checkpoint)
    return f"{path.name}: {name}: {what}"


_SIZE = {
    "F64": 8,
    "I64": 8,
    "F32": 4,
    "I32": 4,
    "F16": 2,
    "BF16": 2,
    "I16": 2,
    "U8": 1,
    "I8": 1,
    "BOOL": 1,
}


def _bytes_of(part: tuple[str, list[int], bytes]) -> int:
    n = _SIZE[part[0]]
    for size in part[1]:
        n *= size
    return n


def _fits(part: tuple[str, list[int], bytes]) -> bool:
    return _bytes_of(part) == len(part[2])


def _forge_values(rng: Random, parts: dict) -> tuple[str, str]:
    """A few values of one tensor that mean something: positions, slots, bits, floats."""
    wanted = rng.choice(
        ["slots.position", "slots.slot", "live_bits", "start_bits", "touched_bits", "slots.born_dead",
         "delta", "moment.mean", "moment.square", "weight", "window.G", "window.Q", "slots.base",
         "fresh_slots", "touched_values", "other"]
    )  # fmt: skip
    names = [n for n in parts if wanted in n and parts[n][2]] or [n for n in parts if parts[n][2]]
    name = rng.choice(names)
    code, shape, values = parts[name]
    size = _SIZE[code]
    data = bytearray(values)
    n = len(data) // size
    k = rng.randrange(n)
    if code in ("I32", "I64"):
        new = rng.choice([-1, 0, 1, 2**31 - 1, -(2**31), n, 10_000])
        data[k * size : (k + 1) * size] = new.to_bytes(size, "little", signed=True)
        what = f"[{k}] = {new}"
        if rng.random() < 0.3:
            other = rng.randrange(n)
            data[k * size : (k + 1) * size] = values[other * size : (other + 1) * size]
            what = f"[{k}] = [{other}]"
    elif code in ("F32", "BF16", "F16", "F64"):
        # The upper half of a float32 is the bfloat16 of the same number.
        special = {
            "nan": 0x7FC0,
            "inf": 0x7F80,
            "-1": 0xBF80,
            "1": 0x3F80,
            "-0": 0x8000,
            "1e38": 0x7E96,
        }
        which = rng.choice(list(special))
        high = special[which].to_bytes(2, "little")
        new_bytes = b"\x00" * (size - 2) + high if size > 2 else high
        for j in range(n) if rng.random() < 0.3 else [k]:
            data[j * size : (j + 1) * size] = new_bytes
        what = f"[{k}] = {which}"
    else:
        at = rng.choice([k, n - 1, 0])
        data[at] = rng.choice([0, 1, 2, 0xFF, data[at] ^ (1 << rng.randrange(8))])
        what = f"byte {at} = {data[at]}"
        if rng.random() < 0.2:
            data[:] = rng.choice([b"\x00", b"\xff", b"\x01"]) * n
            what = "all bytes alike"
    parts[name] = (code, shape, bytes(data))
    return name, what


def forge_header(rng: Random, checkpoint: Path) -> str:
    path = rng.choice(sorted((checkpoint / TAG).glob("rank-*")))
    what = damage.spoil_header(rng, path)
    reseal(checkpoint)
    return what


def forge_latest(rng: Random, checkpoint: Path) -> str:
    beside = copy(checkpoint / TAG, checkpoint.parent / "beside")  # what a wrong name could lead to
    name = rng.choice(
        [b"../beside", b"../../run/beside", str(beside).encode(), b"", b".", b"..", b"\x00",
         TAG.encode() + b"\x00",
         b"x" * (1 << 20), b"x" * 255, b"x" * 256, "é".encode() * 200, b"\xff\xfe", b"./" + TAG.encode(),
         TAG.encode() + b"/", TAG.encode() + b"/../../beside", b"\n\n" + TAG.encode() + b"\n", b"latest",
         b"manifest.json", TAG.encode() + b"\nsecond line", b"~", b"$HOME", b"*", b"glob*"]
    )  # fmt: skip
    (checkpoint / "latest").write_bytes(name)
    reseal(checkpoint)
    return repr(name[:40])


def forge_unlisted(rng: Random, checkpoint: Path) -> str:
    """Manifests that hold, but don't list the files that are read."""
    tag = checkpoint / TAG
    entries, about = read_manifest(tag)
    chosen = rng.choice(list(entries))
    what = damage.spoil(rng, rng.choice(list(damage.DAMAGE)), tag, [tag / chosen])
    rest = {n: e for n, e in entries.items() if n != chosen and rng.random() < 0.8}
    (tag / "manifest.json").unlink()
    seal(tag, rest, about)
    (checkpoint / "manifest.json").unlink()
    return f"unlisted: {what}"


def forge_engine(rng: Random, checkpoint: Path) -> str:
    path = checkpoint / TAG / "engine.pt"
    state = torch.load(path, weights_only=True)
    way = rng.randrange(12)
    if way == 0:
        what = _hostile_pickle(rng, path, checkpoint)
    elif way == 1:
        what, data = damage.strange_text(rng, "{}")
        path.write_bytes(data)
    elif way == 2:
        value = rng.choice([[], None, 5, "x", {}, torch.zeros(3), [state], {"counters": state}])
        what = f"holds {type(value).__name__}"
        torch.save(value, path)
    else:
        part = rng.choice(
            ["counters", "lr_scheduler", "hyperparameters", "hyperparameters", "client_state"]
        )
        what = _bend_engine(rng, state, part)
        torch.save(state, path, _use_new_zipfile_serialization=rng.random() < 0.8)
    reseal(checkpoint)
    return what


class _Harm:
    """Runs code when it is unpickled."""

    def __init__(self, marker: str, way: int):
        self.marker, self.way = marker, way

    def __reduce__(self) -> tuple:
        if self.way == 0:
            return os.system, (f"touch {self.marker}",)
        if self.way == 1:
            return eval, (f"open({self.marker!r}, 'w')",)
        return open, (self.marker, "w")


def _hostile_pickle(rng: Random, path: Path, checkpoint: Path) -> str:
    harm: Any = _Harm(str(checkpoint.parents[2] / MARKER), rng.randrange(3))
    way = rng.randrange(6)
    if way == 0:
        path.write_bytes(pickle.dumps(harm))
    elif way == 1:
        torch.save({"counters": harm}, path)
    elif way == 2:
        torch.save({"client_state": harm}, path, _use_new_zipfile_serialization=False)
    elif way == 3:  # much from little
        path.write_bytes(
            b"\x80\x02cbuiltins\nbytearray\n\x8a\x08" + (2**40).to_bytes(8, "little") + b"\x85R."
        )
    elif way == 4:
        path.write_bytes(b"\x80\x02" + b"(" * 100_000 + b".")
    else:
        path.write_bytes(b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".")
    return f"a pickle, way {way}"


_STRANGE: list[Any] = [
    None, True, -1, 0, 2**40, 2**70, 10**400, 0.5, float("nan"), float("inf"), "x", [], {}, (), [1, 2],
    (0.9,),
    (0.9, float("nan")), (0.9, 1.5), (0.9, "x"), torch.zeros(3), torch.tensor(float("nan")), {"a": 1},
    b"x", {1, 2},
]  # fmt: skip


def _bend_engine(rng: Random, state: dict, part: str) -> str:
    value = rng.choice(_STRANGE)
    if rng.random() < 0.15:
        if rng.random() < 0.5:
            del state[part]
            return f"{part} removed"
        state[part] = value
        return f"{part} = {_repr(value)}"
    holder: Any = state[part]
    if part == "hyperparameters":
        if rng.random() < 0.15:
            state[part] = rng.choice([[], holder * 100, [*holder, value], [value]])
            return "other groups"
        holder = holder[0]
    if holder is None:
        state[part] = value
        return f"{part} = {_repr(value)}"
    extra = [
        "params",
        "x",
        "optimizer",
        "step",
        "get_lr",
        "__class__",
        "state_dict",
        5,
        "lr_lambdas",
    ]
    names = [*holder, *holder, *holder, *extra] if part != "client_state" else extra
    name = rng.choice(names)
    if name in holder and rng.random() < 0.2:
        del holder[name]
        return f"{part}.{name} removed"
    holder[name] = value
    return f"{part}.{name} = {_repr(value)}"


def _repr(value: Any) -> str:
    return f"{type(value).__name__} {value!r:.40}"


def forge_trainer_state(rng: Random, checkpoint: Path) -> str:
    path = checkpoint / "trainer_state.json"
    way = rng.randrange(4)
    if way == 0:
        what, data = damage.strange_text(rng, path.read_text())
    elif way == 1:
        what, data = damage.duplicate_key(rng, path.read_text())
    else:
        document = json.loads(path.read_text())
        what = damage.edit_field(rng, document)
        data = damage.dumps(document).encode()
    path.write_bytes(data)
    reseal(checkpoint)
    return what


FORGERIES: dict[str, Callable[[Random, Path], str]] = {
    "hostile manifest": forge_manifest,
    "hostile seft.json": forge_meta,
    "forged tensors": forge_tensors,
    "hostile tensor header": forge_header,
    "hostile engine.pt": forge_engine,
    "hostile latest": forge_latest,
    "unlisted files": forge_unlisted,
}
