"""Checkpoints that somebody has changed and made the checksums right again.

Each lie is in the file of one rank only: every rank has to be told, none may wait for the others, and the
engine has to be what it was.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.hostile import damage
from seft_ds.checkpoint.from_checkpoint import export_checkpoint
from seft_ds.checkpoint.manifest import entries_below, read_manifest, seal
from tests.checkpoint.saved import differences, whole_state
from tests.checkpoint.test_checkpoint import make_source, start, train
from tests.ranks import run_processes

Parts = dict[str, tuple[str, list[int], bytes]]
FLOATS = {"nan": b"\x00\x00\xc0\x7f", "one": b"\x00\x00\x80\x3f", "minus": b"\x00\x00\x80\xbf"}


def put(parts: Parts, name: str, start: int, data: bytes) -> None:
    code, shape, old = parts[name]
    parts[name] = (code, shape, old[:start] + data + old[start + len(data) :])


def first_dead(parts: Parts, i: int) -> int:
    bits = parts[f"{i}.live_bits"][2]
    return next(n for n in range(8 * len(bits) - 8) if not bits[n // 8] >> n % 8 & 1)


def flip(parts: Parts, name: str, bit: int) -> None:
    put(parts, name, bit // 8, bytes([parts[name][2][bit // 8] ^ 1 << bit % 8]))


def position(parts: Parts, row: int) -> bytes:
    return parts["3.slots.position"][2][4 * row : 4 * row + 4]


def one_more_live(p: Parts) -> None:
    flip(p, "3.live_bits", first_dead(p, 3))


def a_slot_on_a_dead_position(p: Parts) -> None:
    """The count stays right: another position lives instead."""
    dead = first_dead(p, 3)
    flip(p, "3.live_bits", first_slot(p))
    flip(p, "3.live_bits", dead)


def first_slot(p: Parts) -> int:
    """Where the first slot is within the file of rank 1, which holds the second half of 24 · 24 positions."""
    return int.from_bytes(position(p, 0), "little") - 24 * 24 // 2


# What is changed in the file of rank 1, and what is said of it.
LIES: dict[str, tuple[Callable[[Parts], None], str]] = {
    "live count": (one_more_live, "positions are live, wanted"),
    "slot on a dead position": (a_slot_on_a_dead_position, "a slot sits on a dead position"),
    "slot out of range": (lambda p: put(p, "3.slots.position", 0, b"\xff\xff\xff\x7f"), "where they can be"),
    "slot below zero": (lambda p: put(p, "3.slots.position", 0, b"\xff\xff\xff\xff"), "where they can be"),
    "positions twice": (lambda p: put(p, "3.slots.position", 4, position(p, 0)), "not where they can be"),
    "one slot twice": (lambda p: put(p, "3.slots.slot", 0, p["3.slots.slot"][2][4:8]), "slots once"),
    "the last bit": (lambda p: flip(p, "5.live_bits", 8 * len(p["5.live_bits"][2]) - 1), "live"),
    "dead and not zero": (
        lambda p: put(p, "3.weight", 4 * first_dead(p, 3), FLOATS["one"]), "don't fit its mask"
    ),
    "weight that is no number": (
        lambda p: put(p, "3.weight", 4 * first_slot(p), FLOATS["nan"]), "don't fit its mask"
    ),
    "delta that is no number": (lambda p: put(p, "3.delta", 0, FLOATS["nan"]), "not what a run computes"),
    "negative square": (
        lambda p: put(p, "3.moment.square", 0, FLOATS["minus"]), "not what a run computes"
    ),
    "missing": (lambda p: p.pop("3.delta"), "3.delta is missing"),
    "other dtype": (lambda p: p.update({"3.delta": ("I32", *p["3.delta"][1:])}), "3.delta is I32"),
    "other shape": (
        lambda p: p.update({"3.delta": ("F32", [1, *p["3.delta"][1]], p["3.delta"][2])}), "3.delta is F32"
    ),
}  # fmt: skip


def reseal(tag: Path) -> None:
    (tag / "manifest.json").unlink()
    seal(tag, entries_below(tag, {}))


def edit_engine(tag: Path, change: Callable[[dict], Any]) -> None:
    state = torch.load(tag / "engine.pt", weights_only=True)
    change(state)
    torch.save(state, tag / "engine.pt")


def edit_meta(tag: Path, change: Callable[[dict], Any]) -> None:
    meta = json.loads((tag / "seft.json").read_text())
    change(meta)
    (tag / "seft.json").write_text(json.dumps(meta))


def group(state: dict) -> dict:
    return state["hyperparameters"][0]


# What is changed in the files of rank 0, and what is said of it.
OTHER_LIES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "learning rate": (lambda t: edit_engine(t, lambda s: group(s).update(lr=float("nan"))), "no 'lr'"),
    "betas": (lambda t: edit_engine(t, lambda s: group(s).update(betas=(0.9, 1.5))), "no 'betas'"),
    "no parameters": (lambda t: edit_engine(t, lambda s: group(s).update(params=[])), "no 'params'"),
    "counter": (lambda t: edit_engine(t, lambda s: s["counters"].update(global_steps=-1)), "engine's state"),
    "a huge other": (
        lambda t: edit_meta(t, lambda m: m["others"][0].update(shape=[1 << 40, 1 << 40])), "shape"
    ),
    "an other less": (lambda t: edit_meta(t, lambda m: m["others"].pop()), "among the fingerprints"),
    "no number of steps": (
        lambda t: edit_meta(t, lambda m: m.update(optimizer_steps=float("inf"))), "optimizer_steps"
    ),
    "a setting": (lambda t: edit_meta(t, lambda m: m["config"].update(window=-1)), "window = -1"),
}  # fmt: skip


def forge(tag: Path, name: str) -> str:
    """Tell one lie in a copy of a checkpoint; returns what is said of it."""
    if name == "unlisted":
        entries, about = read_manifest(tag)
        entries.pop("rank-00001-of-00002.safetensors")
        (tag / "manifest.json").unlink()
        seal(tag, entries, about)
        return "does not list rank-00001"
    if name in LIES:
        change, said = LIES[name]
        path = tag / "rank-00001-of-00002.safetensors"
        parts = damage.read_parts(path)
        change(parts)
        damage.write_parts(path, parts)
    else:
        other_change, said = OTHER_LIES[name]
        other_change(tag)
    reseal(tag)
    return said


NAMES = [*LIES, *OTHER_LIES, "unlisted"]


def save_and_load_forged(folder: str) -> list[tuple[str, str, str, list[str]]]:
    """(lie, what should be said, what was said, what changed in the engine) for each."""
    engine = start(folder, False, checkpoint_base="copy")
    train(engine, 0, 12)
    engine.save_checkpoint(f"{folder}/run", "good")
    before = {n: t.clone() for n, t in whole_state(engine).items()}
    results = []
    for n, name in enumerate(NAMES):
        tag = Path(folder) / f"run/{n}"
        wanted = None
        if engine.seft.ranks.rank == 0:
            shutil.copytree(Path(folder) / "run/good", tag)
            wanted = forge(tag, name)
        wanted = engine.seft.ranks.gather_object(wanted)[0]
        try:
            engine.load_checkpoint(f"{folder}/run", str(n))
            said = "no error"
        except ValueError as error:
            said = str(error)
        results.append((name, wanted, said, differences(before, whole_state(engine))))
    engine.load_checkpoint(f"{folder}/run", "good")
    results.append(("", "", "", differences(before, whole_state(engine))))
    return results


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("forged")
    make_source(folder)
    return folder


@pytest.mark.timeout(300)
def test_every_rank_refuses_and_nothing_changes(home: Path) -> None:
    everyone = run_processes(2, save_and_load_forged, str(home))
    for mine in everyone:
        for name, wanted, said, changed in mine:
            assert wanted in said and not changed, (name, wanted, said, changed)
    assert [r[2] for r in everyone[0]] == [r[2] for r in everyone[1]]
    for n, name in enumerate(NAMES):
        if name not in ("learning rate", "betas", "no parameters", "counter"):  # of the engine only
            with pytest.raises(ValueError, match="."):
                export_checkpoint(home / f"run/{n}", home / "out")
    export_checkpoint(home / "run/good", home / "out")


def forged_scales(folder: str) -> list[tuple[str, str, list[str]]]:
    """A lie in the scales of rank 1's 8-bit moments; what each rank says, and what changed."""
    from tests.checkpoint.test_resume import start as start_resumable
    from tests.checkpoint.test_resume import steps

    engine = start_resumable(3, False, "8bit")
    steps(engine, 0, 4)
    engine.save_checkpoint(f"{folder}/eight", "good")
    before = {n: t.clone() for n, t in whole_state(engine).items()}
    results = []
    for name in ("minus", "nan", "short"):
        tag = Path(folder) / f"eight/{name}"
        if engine.seft.ranks.rank == 0:
            shutil.copytree(Path(folder) / "eight/good", tag)
            path = tag / "rank-00001-of-00002.safetensors"
            parts = damage.read_parts(path)
            if name == "short":
                code, shape, data = parts["flat.0.absmax.mean"]
                parts["flat.0.absmax.mean"] = (code, [shape[0] - 1], data[:-4])
            else:
                put(parts, "flat.0.absmax.mean", 0, FLOATS[name])
            damage.write_parts(path, parts)
            reseal(tag)
        engine.seft.ranks.barrier()
        try:
            engine.load_checkpoint(f"{folder}/eight", name)
            said = "no error"
        except ValueError as error:
            said = str(error)
        results.append((name, said, differences(before, whole_state(engine))))
    engine.load_checkpoint(f"{folder}/eight", "good")
    results.append(("good", "flat.0.absmax.mean", differences(before, whole_state(engine))))
    return results


@pytest.mark.timeout(300)
def test_scales_of_8bit_moments_are_looked_at_on_every_rank(tmp_path: Path) -> None:
    for mine in run_processes(2, forged_scales, str(tmp_path)):
        for name, said, changed in mine:
            assert "flat.0.absmax.mean" in said and not changed, (name, said, changed)
