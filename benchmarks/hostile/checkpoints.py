"""Bad checkpoints: damaged ones, and ones whose checksums somebody has made right again.

A consistent forgery can hold any weights; nobody can tell. What is wrong is one that is taken and then
breaks: a dead position that isn't zero, a live count that isn't kept, an error in a later step.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import torch

from benchmarks.hostile import damage
from benchmarks.hostile.forgeries import FORGERIES, forge_trainer_state
from benchmarks.hostile.made import NEWEST, RUNS, TAG, copy, make_engine, train_step
from benchmarks.hostile.runner import Source, note
from seft_ds.checkpoint.from_checkpoint import export_checkpoint
from seft_ds.checkpoint.layout import find_tag, read_meta
from seft_ds.checkpoint.manifest import find_problems, read_manifest
from seft_ds.checkpoint.verify import verify
from seft_ds.train.resume import find_checkpoint, steps_of
from tests.ranks import run_threads

NAMES = (
    *("rank-0", "seft.json", "engine.pt", "manifest.json", "latest", "global_step"),
    *('"seft"', "--model_name", "trainer_state", "model.", "pruned-"),
)


def sources(home: Path) -> list[Source]:
    found = []
    for kind in damage.DAMAGE:
        anywhere = damaged(kind)
        found += [
            manifest_of(home, kind, damaged(kind, f"{TAG}/manifest.json"), forged=False),
            tag_of(home, kind, damaged(kind, "latest"), forged=False),
            meta_of(home, kind, damaged(kind, f"{TAG}/seft.json"), forged=False),
            steps(home, kind, damaged(kind, "trainer_state.json"), forged=False),
        ]
        for entry in (problems, exported, loaded, resumed, named):
            found.append(entry(home, kind, anywhere, forged=False))
    for kind, forge in FORGERIES.items():
        found += [entry(home, kind, forge, forged=True) for entry in (exported, loaded)]
    return [
        *found,
        problems(home, "hostile manifest", FORGERIES["hostile manifest"], forged=True),
        manifest_of(home, "hostile manifest", FORGERIES["hostile manifest"], forged=True),
        tag_of(home, "hostile latest", FORGERIES["hostile latest"], forged=True),
        meta_of(home, "hostile seft.json", FORGERIES["hostile seft.json"], forged=True),
        steps(home, "hostile trainer_state.json", forge_trainer_state, forged=True),
    ]


# Entry points. Each returns a `Source` whose attempt copies a run, changes it and calls the entry point.


def taken(rng: Random, home: Path, place: Path, change: Callable) -> tuple[str, Path, Path]:
    """(name of the run, its copy, and the changed checkpoint in that)."""
    name = rng.choice(RUNS)[0]
    run = copy(home / name, place / "run")
    what = change(rng, run / NEWEST)
    note(place, what)
    return name, run, run / NEWEST


def damaged(kind: str, only: str = "") -> Callable[[Random, Path], str]:
    def change(rng: Random, checkpoint: Path) -> str:
        files = [checkpoint / only] if only else None
        return damage.spoil(rng, kind, checkpoint, files)

    return change


def untouched(home: Path, name: str, checkpoint: Path, part: str = "") -> bool:
    """Whether all files are what they were; of a manifest what it says, not how it is written."""
    good = home / name / NEWEST / part
    now, then = damage.snapshot(checkpoint / part), damage.snapshot(good)
    changed = [n for n in now.keys() | then.keys() if now.get(n) != then.get(n)]
    return all(
        n.endswith("manifest.json") and _same_json(checkpoint / part / n, good / n) for n in changed
    )


def _same_json(a: Path, b: Path) -> bool:
    try:
        return json.loads(a.read_text()) == json.loads(b.read_text())
    except (OSError, ValueError):
        return False


def problems(home: Path, kind: str, change: Callable, forged: bool) -> Source:
    def attempt(rng: Random, place: Path) -> str | None:
        name, _, checkpoint = taken(rng, home, place, change)
        found = find_problems(checkpoint)
        if found:
            raise ValueError("; ".join(found)[:1000])
        good = forged or untouched(home, name, checkpoint)
        return None if good else "damage that was not found"

    return Source("find_problems", kind, attempt, NAMES)


def manifest_of(home: Path, kind: str, change: Callable, forged: bool) -> Source:
    def attempt(rng: Random, place: Path) -> str | None:
        name, _, checkpoint = taken(rng, home, place, change)
        entries, _ = read_manifest(checkpoint / TAG)
        for entry in entries:
            inside = (checkpoint / TAG / entry).resolve().is_relative_to(checkpoint.resolve())
            if not inside or entry.startswith("/") or ".." in entry.split("/"):
                return f"a name that leaves the directory: {entry!r}"
        good = [read_manifest(home / name / NEWEST / part)[0] for part in (TAG, "")]  # if swapped
        return None if forged or entries in good else "a damaged manifest was taken"

    return Source("read_manifest", kind, attempt, NAMES)


def tag_of(home: Path, kind: str, change: Callable, forged: bool) -> Source:
    def attempt(rng: Random, place: Path) -> str | None:
        _, _, checkpoint = taken(rng, home, place, change)
        found = find_tag(checkpoint)
        return None if found in (checkpoint, checkpoint / TAG) else f"it found {found}"

    return Source("find_tag", kind, attempt, NAMES)


def meta_of(home: Path, kind: str, change: Callable, forged: bool) -> Source:
    def attempt(rng: Random, place: Path) -> str | None:
        name, _, checkpoint = taken(rng, home, place, change)
        meta = read_meta(checkpoint / TAG)
        again = type(meta).model_validate(
            json.loads(json.dumps(meta.model_dump(), allow_nan=False))
        )
        if again != meta or meta.problem():
            return "a description that isn't one"
        # A flipped bit in a name or a number is still a description: the checksum tells, not this.
        return None

    return Source("read_meta", kind, attempt, NAMES)


def exported(home: Path, kind: str, change: Callable, forged: bool) -> Source:
    def attempt(rng: Random, place: Path) -> str | None:
        name, _, checkpoint = taken(rng, home, place, change)
        out = place / "out"
        export_checkpoint(checkpoint, out)
        result = verify(out)
        if not result.ok:
            return f"a model that does not hold: {result.problems[:2]}"
        if not forged and not untouched(home, name, checkpoint, TAG):
            return "damage that was not found"
        return None

    return Source("export_checkpoint", kind, attempt, NAMES)


_engines: dict[str, Any] = {}  # of this worker
_good_states: dict[str, dict[str, torch.Tensor]] = {}


def loaded(home: Path, kind: str, change: Callable, forged: bool) -> Source:
    """`engine.load_checkpoint`; after a refusal a good checkpoint has to load as ever."""

    def attempt(rng: Random, place: Path) -> str | None:
        name, _, checkpoint = taken(rng, home, place, change)
        engine = _engine(name)
        try:
            engine.load_checkpoint(str(checkpoint))
        except BaseException:
            _good_load_works(home, name)
            raise
        _engines.pop(name)  # it is in somebody's state now
        if not forged and not untouched(home, name, checkpoint, TAG):
            return "damage that was not found"
        engine.seft.check()
        for step in range(3):  # with an event, and the optimizer's state in use
            train_step(engine, 11 + step)
        engine.seft.check()
        return None

    return Source("engine.load_checkpoint", kind, attempt, NAMES)


def _engine(name: str) -> Any:
    torch.set_num_threads(1)
    if name not in _engines:
        _, kind, bf16, base = next(run for run in RUNS if run[0] == name)
        _engines[name] = make_engine(kind, bf16, base)
    return _engines[name]


def _good_load_works(home: Path, name: str) -> None:
    from tests.checkpoint.saved import differences, whole_state

    engine = _engines[name]
    engine.load_checkpoint(str(home / name / NEWEST))
    if name not in _good_states:
        _engines.pop(name)
        fresh = _engine(name)
        fresh.load_checkpoint(str(home / name / NEWEST))
        _good_states[name] = {n: t.clone() for n, t in whole_state(fresh).items()}
    found = differences(_good_states[name], whole_state(engine))
    assert not found, f"after a refusal a good checkpoint loads otherwise: {found[:5]}"
    if name == "reference":
        _engines.pop(name)  # such a checkpoint can't be loaded into an engine that has one


def resumed(home: Path, kind: str, change: Callable, forged: bool) -> Source:
    """`find_checkpoint("auto")`: takes the older one and warns, which counts as refused."""

    def attempt(rng: Random, place: Path) -> str | None:
        name, run, checkpoint = taken(rng, home, place, change)
        found = run_threads(1, lambda ranks: find_checkpoint("auto", run, ranks))[0]
        if found == run / "checkpoint-5":
            raise ValueError(f"{checkpoint} was passed over")
        if found != checkpoint:
            return f"it goes on from {found}"
        return None if untouched(home, name, checkpoint) else "damage that was not found"

    return Source("find_checkpoint auto", kind, attempt, NAMES)


def named(home: Path, kind: str, change: Callable, forged: bool) -> Source:
    def attempt(rng: Random, place: Path) -> str | None:
        name, run, checkpoint = taken(rng, home, place, change)
        run_threads(1, lambda ranks: find_checkpoint(str(checkpoint), run, ranks))
        return None if untouched(home, name, checkpoint) else "damage that was not found"

    return Source("find_checkpoint named", kind, attempt, NAMES)


def steps(home: Path, kind: str, change: Callable, forged: bool) -> Source:
    """`steps_of`, which reads what transformers' Trainer has written."""

    def attempt(rng: Random, place: Path) -> str | None:
        _, _, checkpoint = taken(rng, home, place, change)
        found = steps_of(checkpoint)
        if not all(type(n) is int and 0 <= n <= 1 << 53 for n in found):
            return f"steps {found!r:.80}"
        return None  # without a checksum, which `find_checkpoint` compares, digits may be others

    return Source("steps_of", kind, attempt, NAMES)
