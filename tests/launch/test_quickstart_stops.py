"""The quickstart's steps when a signal comes, on stand-ins for its commands."""

from __future__ import annotations

import importlib
import os
import signal
import sys
import time
import types
from pathlib import Path

import pytest

from tests import forked

ROOT = Path(__file__).resolve().parents[2]
quickstart = importlib.import_module("launch.quickstart")

# Stands for `deepspeed`: a process that starts a rank and waits for it, and would say a lot on Ctrl-C.
LAUNCHER = """
import subprocess, sys
subprocess.run([sys.executable, sys.argv[1], "--local_rank=0", *sys.argv[2:]])
"""
# Stands for a script: takes steps, stops in order at the first signal and then goes on where it was.
RANK = """
import sys, time
from pathlib import Path
sys.path.insert(0, {root!r})
from seft_ds.signals import watch_signals
home, stop = Path(sys.argv[2]), watch_signals()
at = home / "step"
step = int(at.read_text()) if at.exists() else 0
while step < 8 and not stop.requested:
    step += 1
    at.write_text(str(step))
    time.sleep(0.1)
if not stop.requested:
    (home / "result").write_text(str(step))
print("rank ends at", step, flush=True)
"""


@pytest.fixture
def home(tmp_path: Path) -> Path:
    (tmp_path / "launcher.py").write_text(LAUNCHER)
    (tmp_path / "rank.py").write_text(RANK.replace("{root!r}", repr(str(ROOT))))
    return tmp_path


def started(home: Path) -> forked.Forked:
    """The steps, in a fork at the head of a group of its own, as a terminal's shell starts it."""

    def main() -> int:
        launcher = [sys.executable, home / "launcher.py", home / "rank.py", home]
        after = [sys.executable, "-c", "print('the next step')"]
        return quickstart.take([("repair", home / "result", launcher), ("measure", None, after)])

    def before() -> None:
        os.setsid()
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have had it ignored

    script = types.SimpleNamespace(main=main, run=quickstart.run)
    return forked.fork(script, "quickstart", [], home, {}, before)


def wait_for(path: Path) -> None:
    until = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < until
        time.sleep(0.02)


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_step_is_gone_on_with(home: Path, number: int, status: int) -> None:
    running = started(home)
    wait_for(home / "step")
    os.killpg(running.pid, number)  # as a terminal does
    done = running.finish(60)
    out, err = done.stdout, done.stderr
    assert done.returncode == status, err
    # The rank's word that it stops, and one line of the quickstart's.
    name = signal.Signals(number).name
    said = [line for line in err.splitlines() if line]
    assert said[-1] == f"{name}: stopped in step 1 of 2; the same command goes on from there"
    assert len(said) == 2 and "SIGINT: stopping after this step" in said[0]
    assert "rank ends at" in out and "the next step" not in out and not (home / "result").exists()
    reached = int((home / "step").read_text())
    assert 0 < reached < 8
    done = started(home).finish(60)
    assert "rank ends at 8" in done.stdout and "the next step" in done.stdout and done.stderr == ""


def test_a_rank_that_was_signalled_by_somebody_else_stops_the_steps(home: Path) -> None:
    """It ends with status 0, so that only the missing result tells."""
    import psutil

    running = started(home)
    wait_for(home / "step")
    [rank] = quickstart.ranks_below(psutil.Process(running.pid))
    rank.send_signal(signal.SIGUSR1)
    done = running.finish(60)
    assert done.returncode == 130 and "the next step" not in done.stdout
    assert (
        done.stderr.splitlines()[-1]
        == "stopped in step 1 of 2; the same command goes on from there"
    )


def test_the_repair_goes_on_instead_of_beginning_anew(tmp_path: Path) -> None:
    def repair() -> list[str]:
        steps = quickstart.commands(quickstart.SMOKE, tmp_path / "inputs", tmp_path, 2)
        return [str(part) for part in steps[4][2]]

    assert repair()[-2:] == ["--resume", "auto"] and "--overwrite" not in repair()
    (tmp_path / "repaired").mkdir()
    (tmp_path / "repaired/sparsity.json").touch()
    assert repair()[1:] == ["launch/card.py", str(tmp_path / "repaired")]


def test_one_rank_a_gpu_and_two_at_most() -> None:
    assert [quickstart.usual_ranks(gpus) for gpus in (0, 1, 2, 8)] == [2, 1, 2, 2]
