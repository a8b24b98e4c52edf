"""The launch scripts as a user starts them, on some of the inputs of the other modules."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from random import Random

from benchmarks.hostile import checkpoints, damage, forgeries, models
from benchmarks.hostile.made import NEWEST, RUNS, copy
from benchmarks.hostile.runner import Source, note

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 90.0  # a new interpreter on a busy machine


def sources(home: Path) -> list[Source]:
    return [
        Source("python launch/export.py", "checkpoints", _export(home), checkpoints.NAMES, SECONDS),
        Source("python launch/export.py", "base models", _export_on(home), models.NAMES, SECONDS),
        Source("python launch/verify.py", "model folders", _verify(home), models.NAMES, SECONDS),
    ]


def run(script: str, *arguments: str) -> tuple[int, str, str]:
    done = subprocess.run(
        [sys.executable, str(ROOT / "launch" / script), *arguments],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
        timeout=SECONDS - 5,
    )
    return done.returncode, done.stdout, done.stderr


def verdict(status: int, out: str, err: str, none_wrong: str | None) -> str | None:
    """Raises ValueError for a good refusal, as the entry points in this process do."""
    if "Traceback" in out + err:
        return f"a traceback: {err[-500:]}"
    if status == 2:
        errors = [line for line in err.splitlines() if line.startswith("error: ")]
        if len(errors) != 1 or not err.rstrip().endswith(errors[0]) or not errors[0].isprintable():
            return f"status 2 and not one line: {err[-500:]!r}"
        raise ValueError(errors[0])
    return none_wrong if status == 0 else f"status {status}: {err[-300:]}"


def _export(home: Path):
    def attempt(rng: Random, place: Path) -> str | None:
        name = rng.choice(RUNS)[0]
        checkpoint = copy(home / name, place / "run") / NEWEST
        forge = rng.choice(
            [forgeries.forge_meta, forgeries.forge_tensors, forgeries.forge_manifest, forgeries.forge_header,
             forgeries.forge_latest, checkpoints.damaged("truncated"), checkpoints.damaged("bits flipped"),
             checkpoints.damaged("no plain file")]
        )  # fmt: skip
        note(place, forge(rng, checkpoint))
        result = run(
            "export.py", "--checkpoint", str(checkpoint), "--output_dir", str(place / "out")
        )
        holds = models.verify(place / "out").ok if result[0] == 0 else True
        return verdict(*result, None if holds else "a model that does not hold")

    return attempt


def _export_on(home: Path):
    def attempt(rng: Random, place: Path) -> str | None:
        folder = copy(home / rng.choice(["pruned-llama", "sharded-llama"]), place / "model")
        ways = [
            models.hostile_header,
            models.hostile_config,
            lambda r, f: damage.spoil(r, "no plain file", f),
        ]
        note(place, rng.choice(ways)(rng, folder))
        result = run(
            "export.py", "--checkpoint", str(home / "reference" / NEWEST), "--output_dir",
            str(place / "out"), "--model_name_or_path", str(folder),
        )  # fmt: skip
        holds = models.verify(place / "out").ok if result[0] == 0 else True
        return verdict(*result, None if holds else "a model that does not hold")

    return attempt


def _verify(home: Path):
    def attempt(rng: Random, place: Path) -> str | None:
        folder = copy(home / rng.choice(models.FOLDERS), place / "model")
        ways = [models.hostile_record, models.hostile_record, models.hostile_header,
                lambda r, f: damage.spoil(r, "no plain file", f)]  # fmt: skip
        note(place, rng.choice(ways)(rng, folder))
        status, out, err = run("verify.py", str(folder))
        if status == 1 and "wrong: " in out and "Traceback" not in out + err:
            raise ValueError(out[:1000])
        return verdict(status, out, err, models.wrongly_held(folder) if status == 0 else None)

    return attempt
