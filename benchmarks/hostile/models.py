"""Bad model folders: damaged files, headers that lie, records and indices edited field by field."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from random import Random

import torch
from safetensors.torch import load_file

import launch.verify
from benchmarks.hostile import damage
from benchmarks.hostile.made import NEWEST, copy
from benchmarks.hostile.runner import Source, note
from seft_ds.checkpoint.from_checkpoint import export_checkpoint
from seft_ds.checkpoint.verify import verify
from seft_ds.tensor_files import stored_tensors

INDEX = "model.safetensors.index.json"
FOLDERS = ("pruned-llama", "sharded-llama", "pruned-llama24")
NAMES = ("sparsity.json", ".safetensors", "config.json", ".weight", "missing from the")


def sources(home: Path) -> list[Source]:
    found = []
    changes: dict[str, Callable[[Random, Path], str]] = {
        kind: lambda rng, folder, kind=kind: damage.spoil(rng, kind, folder)
        for kind in damage.DAMAGE
    }
    changes |= {
        "hostile sparsity.json": hostile_record,
        "hostile tensor header": hostile_header,
        "hostile index": hostile_index,
        "hostile config.json": hostile_config,
    }
    for kind, change in changes.items():
        for entry in (verified, verify_command, listed, exported_on):
            about_record = kind == "hostile sparsity.json"
            about_config = kind == "hostile config.json"
            if (about_record and entry in (listed, exported_on)) or (
                about_config and entry is not exported_on
            ):
                continue  # it doesn't read that file
            found.append(entry(home, kind, change))
    return found


def taken(
    rng: Random, home: Path, place: Path, change: Callable, kind: str, folders: tuple = FOLDERS
) -> tuple[str, Path]:
    name = rng.choice(folders) if kind != "hostile index" else "sharded-llama"
    folder = copy(home / name, place / "model")
    note(place, change(rng, folder))
    return name, folder


def verified(home: Path, kind: str, change: Callable) -> Source:
    def attempt(rng: Random, place: Path) -> str | None:
        _, folder = taken(rng, home, place, change, kind)
        result = verify(folder)
        if not result.ok:
            raise ValueError("; ".join(result.problems)[:1000])
        return wrongly_held(folder)

    return Source("verify", kind, attempt, NAMES)


def wrongly_held(folder: Path) -> str | None:
    """Recount without the code under test: live masks and their digests, slowly and obviously."""
    record = json.loads((folder / "sparsity.json").read_text())
    tensors: dict[str, torch.Tensor] = {}
    single = folder / "model.safetensors"
    for path in [single] if single.is_file() else sorted(folder.glob("model-*.safetensors")):
        tensors |= load_file(path)
    for name, entry in record["targets"].items():
        weight = tensors[name]
        live = (weight.flatten() != 0).tolist()
        live += [False] * (-len(live) % 8)
        packed = bytes(sum(1 << b for b in range(8) if live[i + b]) for i in range(0, len(live), 8))
        if list(weight.shape) != entry["shape"] or sum(live) != entry["live"]:
            return f"{name} was not recounted"
        if entry["mask_digest"] != "sha256:" + hashlib.sha256(packed).hexdigest():
            return f"{name}: another digest"
    return None if record["live"] == sum(e["live"] for e in record["targets"].values()) else "total"


def verify_command(home: Path, kind: str, change: Callable) -> Source:
    """`launch/verify.py` in this process: status 0, 1 with lines of what is wrong, or 2 with one line."""

    def attempt(rng: Random, place: Path) -> str | None:
        _, folder = taken(rng, home, place, change, kind)
        # Strict UTF-8, as a terminal or a file is: what can't be written there would be a traceback.
        out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True)
        err = io.StringIO()
        with redirect_stdout(out), redirect_stderr(err):
            status = launch.verify.main([str(folder), *(["--all"] if rng.random() < 0.5 else [])])
        printed = out.buffer.getvalue().decode()  # type: ignore[attr-defined]
        if status == 2:
            raise ValueError(one_line(err.getvalue()))
        if status == 1:
            lines = printed.splitlines()
            wrong = [line for line in lines if line.startswith("wrong: ")]
            if not wrong or "DOES NOT HOLD" not in lines[-1] or "\x1b" in printed:
                return f"status 1 without a reason: {printed[-300:]!r}"
            raise ValueError("; ".join(wrong)[:1000])
        return wrongly_held(folder) if status == 0 else f"status {status}"

    return Source("launch/verify.py main", kind, attempt, NAMES)


def one_line(text: str) -> str:
    """The text after "error: " of a message that is one line."""
    lines = text.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and lines[0].isprintable(), text
    return lines[0]


def listed(home: Path, kind: str, change: Callable) -> Source:
    def attempt(rng: Random, place: Path) -> str | None:
        if kind in damage.DAMAGE:
            _, folder = taken(rng, home, place, lambda r, f: spoil_weights(r, kind, f), kind)
        else:
            _, folder = taken(rng, home, place, change, kind)
        for name, path in ((n, t.path) for n, t in stored_tensors(folder).items()):
            if path.parent != folder or path.name in ("", ".", "..") or not isinstance(name, str):
                return f"{name} in {path}"
        return None

    return Source("stored_tensors", kind, attempt, NAMES)


def exported_on(home: Path, kind: str, change: Callable) -> Source:
    """Export of a checkpoint that needs its base model, on a bad base model."""

    def attempt(rng: Random, place: Path) -> str | None:
        _, folder = taken(rng, home, place, change, kind, FOLDERS[:2])
        out = place / "out"
        export_checkpoint(home / "reference" / NEWEST, out, str(folder))
        result = verify(out)
        if not result.ok:
            return f"a model that does not hold: {result.problems[:2]}"
        good = home / "exported"
        if not good.exists():  # once; another worker may win
            export_checkpoint(home / "reference" / NEWEST, place / "good")
            if not good.exists():
                (place / "good").rename(good)
        mine, wanted = (load_file(d / "model.safetensors") for d in (out, good))
        if not set(wanted) <= set(mine):
            return "tensors are missing"
        return None if all(torch.equal(mine[n], wanted[n]) for n in wanted) else "other weights"

    return Source("export, bad base model", kind, attempt, NAMES)


# Changes.


def spoil_weights(rng: Random, kind: str, folder: Path) -> str:
    """Damage of a file that says which tensors there are."""
    index = [folder / INDEX] * 2 if (folder / INDEX).exists() else []
    return damage.spoil(rng, kind, folder, [*sorted(folder.glob("*.safetensors")), *index])


def hostile_record(rng: Random, folder: Path) -> str:
    path = folder / "sparsity.json"
    way = rng.randrange(10)
    if way == 0:
        what, data = damage.strange_text(rng, path.read_text())
    elif way == 1:
        what, data = damage.duplicate_key(rng, path.read_text())
    else:
        record = json.loads(path.read_text())
        name = rng.choice(list(record["targets"]))
        entry = record["targets"][name]
        if way == 2:
            what = damage.add_field(rng, record)
        elif way == 3:
            new = rng.choice(["\x1b[2J", "a\nb", "", "x" * 100_000, "../x", "\x00"])
            record["targets"][new] = entry
            what = f"a target {new[:20]!r}"
        elif way == 4:
            record["targets"] = damage.Raw('{"\\ud800":' + json.dumps(entry) + "}")
            what = "a target with half a character"
        elif way == 5:
            what = damage.edit_field(rng, entry, rng.choice(damage.VALUES))
        elif way == 6:
            entry["shape"] = rng.choice(
                [[2**62, 2**62], [2**70], [10**1000] * 5, [-1, 4], [True, 24], [], [0, 0], [1] * 5000,
                 [1.5, 2]]
            )  # fmt: skip
            what = f"{name}: shape"
        elif way == 7:
            entry["pattern"] = rng.choice(
                ["2:4", "0:0", "4:2", "1:1" + "0" * 5000, "1:" + "9" * 1000, "²:4", "x", "", "2:4:8", "1:0"]
            )  # fmt: skip
            what = f"{name}: pattern"
        else:
            what = damage.edit_field(rng, record)
        data = damage.dumps(record).encode()
    path.write_bytes(data)
    return what


def hostile_header(rng: Random, folder: Path) -> str:
    return damage.spoil_header(rng, rng.choice(sorted(folder.glob("*.safetensors"))))


def hostile_index(rng: Random, folder: Path) -> str:
    path = folder / INDEX
    index = json.loads(path.read_text())
    where = index["weight_map"]
    name, files = rng.choice(list(where)), sorted(set(where.values()))
    way = rng.randrange(8)
    if way == 0:
        what, data = damage.strange_text(rng, path.read_text())
        path.write_bytes(data)
        return what
    if way == 1:
        what, data = damage.duplicate_key(rng, path.read_text())
        path.write_bytes(data)
        return what
    if way == 2:
        what = damage.edit_field(rng, index)
    elif way == 3:
        outside = folder.parent / "outside"
        outside.mkdir()
        (outside / where[name]).write_bytes((folder / where[name]).read_bytes())
        where[name] = rng.choice(
            ["../../etc/passwd", f"../outside/{where[name]}", f"{outside}/{where[name]}", "..", ".", "",
             "\x00",
             f"./{where[name]}", f"{where[name]}\x00", "a/../" + where[name], f"..\\outside\\{where[name]}",
             "x" * 300 + ".safetensors", damage.Raw('"\\ud800.safetensors"'), "\x1b[2J.safetensors"]
        )  # fmt: skip
        what = f"{name} in {where[name]!r:.60}"
    elif way == 4:
        where[name] = rng.choice(
            [*files, "model-00009-of-00002.safetensors", "sparsity.json", INDEX]
        )
        what = f"{name} in {where[name]}"
    elif way == 5:
        new = rng.choice(["x", "", "__metadata__", "\x1b[2J", damage.Raw("x")])
        where[str(new)] = rng.choice(files)
        what = f"another name {new!r}"
    elif way == 6:
        for n in list(where):
            where[n] = files[0]
        what = "all in one file"
    else:
        del where[name]
        what = f"{name} left out"
    path.write_text(damage.dumps(index))
    return what


def hostile_config(rng: Random, folder: Path) -> str:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    way = rng.randrange(4)
    if way == 0:
        what, data = damage.strange_text(rng, path.read_text())
        path.write_bytes(data)
        return what
    if way == 1:
        config["text_config"] = damage.Raw(
            '{"a_config":' * rng.choice([300, 900]) + "{}" + "}" * 900
        )
        if rng.random() < 0.5:
            config["text_config"] = {"dtype": rng.choice(damage.VALUES), "model_type": 5}
        what = "nested configs"
    else:
        what = damage.edit_field(rng, config)
    path.write_text(damage.dumps(config))
    return what
