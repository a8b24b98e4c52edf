"""A short run of benchmarks/bad_inputs.py, and whether its judge can find what it is there for."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from random import Random

import pytest

from benchmarks.hostile.runner import MARKER, Outcome, Source, try_all

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.timeout(300)
def test_a_hundred_and_fifty_bad_inputs_are_refused_or_do_no_harm() -> None:
    """In a process of its own: the benchmark sets the environment for what it imports and forks."""
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks/bad_inputs.py", "--count", "150", "--seed", "0"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    name, _, tried, refused, harmless, wrong = [
        cell.strip() for cell in done.stdout.split("**all**")[1].split("\n")[0].split("|")
    ][:6]
    assert (int(tried), int(wrong)) == (150, 0) and int(refused) > int(harmless) > 0, done.stdout


def nothing(rng: Random, place: Path) -> None:
    (place / "file").write_text(str(rng.random()))


def refuse(rng: Random, place: Path) -> None:
    raise ValueError(f"{place / 'file'} is damaged")


def refuse_a_setting(rng: Random, place: Path) -> None:
    raise ValueError("density is 5")


def name_nothing(rng: Random, place: Path) -> None:
    raise ValueError("it is wrong")


def say_nothing(rng: Random, place: Path) -> None:
    raise ValueError


def say_too_much(rng: Random, place: Path) -> None:
    raise ValueError(str(place) + "x" * 10_000)


def other_error(rng: Random, place: Path) -> None:
    raise KeyError(str(place))


def exit_without_a_word(rng: Random, place: Path) -> None:
    raise SystemExit(2)


def exit_with_usage(rng: Random, place: Path) -> None:
    print("prog: error: argument --x", file=sys.stderr)
    raise SystemExit(2)


def take_damage(rng: Random, place: Path) -> str:
    return "damage that was not found"


def hang(rng: Random, place: Path) -> None:
    os.mkfifo(place / "pipe")
    (place / "pipe").read_text()


def die(rng: Random, place: Path) -> None:
    os._exit(3)


def take_memory(rng: Random, place: Path) -> None:
    held = bytearray(b"x") * (600 << 20)
    raise ValueError(f"{place}: {len(held)}")


def take_more_than_there_is(rng: Random, place: Path) -> None:
    bytearray(8 << 30)


def run_code(rng: Random, place: Path) -> None:
    (place.parent / MARKER).touch()
    raise ValueError(str(place))


FINE = {"refused": [refuse, refuse_a_setting, exit_with_usage], "harmless": [nothing]}
WRONG = [
    name_nothing, say_nothing, say_too_much, other_error, exit_without_a_word, take_damage, hang, die,
    take_memory, take_more_than_there_is, run_code,
]  # fmt: skip


def test_the_judge_finds_every_way_to_go_wrong(tmp_path: Path) -> None:
    cases = [(f, verdict) for verdict, functions in FINE.items() for f in functions]
    cases += [(f, "wrong") for f in WRONG]
    sources = [
        Source("test", f.__name__, f, names=("density",), seconds=2 if f is hang else 60)
        for f, _ in cases
    ]
    outcomes: list[Outcome] = []
    start = time.monotonic()
    try_all(sources, [(i, "0") for i in range(len(sources))], tmp_path, 2, outcomes.append)
    assert time.monotonic() - start < 60
    found = {cases[o.source][0].__name__: o.verdict for o in outcomes}
    assert found == {f.__name__: verdict for f, verdict in cases}, outcomes
    assert not list(tmp_path.glob("trials/*/*")), "an attempt left its folder"
