"""Faults injected into runs of two ranks: is anything lost, does anything hang, does it say why it ended?

    python benchmarks/faults.py                              # all, about 20 minutes on 2 cores
    python benchmarks/faults.py --short                      # each kind once, under a minute
    python benchmarks/faults.py --table docs/reliability.md  # put the table there, between its markers

A try is a session that a fault strikes, then one that goes on (benchmarks/fault_session.py). The run has
recovered if
1. every rank of the first session ended by itself, with the right exit status and the right words: who died,
   what can't be written, from where the run goes on;
2. the second session started from the newest whole checkpoint, which is found here by other means, and it is
   no older than the last save that was finished before;
3. its final state (weights, masks, slots, deltas, moments, windows, counters) is bit-identical to that of a
   run to which nothing happened.
Everything else counts as lost. Exit status: 0, or 1 if anything was lost.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")

from benchmarks.fault_kinds import (
    DAMAGE, DAMAGES, EIO, ERROR, FULL, KILL, KILL_ALL, NAN, NAN_MANY, NAN_STOP, READ_ONLY, SETTINGS,
    TERM, TWICE, USR1, WEIGHTS, Fault, mend, place_for,
)  # fmt: skip
from benchmarks.fault_judge import judge_end, judge_resume, newest_whole
from benchmarks.fault_session import Ended, Job, prepare, run_session

STAGES = (0, 1, 2, 3)
BEGIN, END = "<!-- faults: begin -->", "<!-- faults: end -->"

# Kind, moment, the steps that ZeRO 0, 1, 2, 3 are struck at, and whether each rank has its turn. Events come
# after steps 5 to 10, saves after 3, 6, 9 and 12.
ANY, EVENTS, SAVES = (2, 5, 8, 11), (5, 7, 9, 10), (3, 6, 9, 12)
PLAN: list[tuple[str, str, tuple[int, ...], bool]] = [
    (KILL, "in backward", ANY, True),
    (KILL, "between two micro-batches", ANY, True),
    (KILL, "event, before the decision", EVENTS, True),
    (KILL, "event, one weight changed", EVENTS, True),
    (KILL, "save, before the first file", SAVES, True),
    (KILL, "save, inside a file", SAVES, True),
    (KILL, "save, files written", SAVES, True),
    (KILL, "save, before the seal", SAVES, True),
    (KILL, "save, before the rename", SAVES, True),
    (KILL, "save, before `latest`", SAVES, True),
    (KILL, "loading a checkpoint", (0, 0, 0, 0), True),
    (KILL_ALL, "event, one weight changed", EVENTS, False),
    (KILL_ALL, "save, inside a file", SAVES, False),
    (KILL_ALL, "save, before the rename", SAVES, False),
    (KILL_ALL, "save, before `latest`", SAVES, False),
    (TERM, "in backward", ANY, True),
    (TERM, "event, one weight changed", EVENTS, True),
    (TERM, "save, inside a file", SAVES, True),
    (USR1, "in backward", ANY, True),
    (USR1, "event, one weight changed", EVENTS, True),
    (USR1, "save, inside a file", SAVES, True),
    (TWICE, "in backward", ANY, True),
    (ERROR, "between two micro-batches", ANY, True),
    (ERROR, "event, before the decision", EVENTS, True),
    (EIO, "save, inside a file", SAVES, True),
    (FULL, "save, no room", (6, 9, 12, 9), False),
    (FULL, "save, room for half of it", (9, 12, 9, 6), False),
    (READ_ONLY, "save, no room", SAVES, False),
    *((DAMAGE, damage, (8, 10, 5, 7), False) for damage in DAMAGES),
    (NAN, "in a window", (5, 8, 5, 8), True),
    (NAN_STOP, "in a window", (8, 5, 8, 5), False),
    (NAN_MANY, "in a window", (7, 7, 7, 7), False),
    (SETTINGS, "at the start", (0, 0, 0, 0), False),
    (SETTINGS, "at a resume", (0, 0, 0, 0), False),
    (WEIGHTS, "at the start", (0, 0, 0, 0), False),
    (WEIGHTS, "at a resume", (0, 0, 0, 0), False),
]


def all_faults() -> list[Fault]:
    """The whole plan: four tries of each row, eight where each rank has its turn; half of them in bf16."""
    return [
        Fault(kind, moment, stage, (row + stage + rank) % 2 == 1, rank, steps[stage])
        for row, (kind, moment, steps, both) in enumerate(PLAN)
        for stage in STAGES
        for rank in ((0, 1) if both else ((row + stage) // 2 % 2,))
    ]


def few_faults() -> list[Fault]:
    """Each kind once, in few combinations of stage and dtype, because each needs a run to compare with."""
    rows = {kind: row for row, (kind, *_) in enumerate(PLAN)}  # the last of each kind
    rows |= {KILL: 7, DAMAGE: rows[DAMAGE] - 2}
    return [
        Fault(PLAN[row][0], PLAN[row][1], stage, stage % 2 == 1, n // 2 % 2, PLAN[row][2][stage])
        for n, row in enumerate(rows.values())
        for stage in [n % 4]
    ]


# One try.


@dataclass
class Outcome:
    """What came of one fault."""

    fault: Fault
    problems: list[str]  # empty: recovered
    ended_after_s: float | None = None  # from the fault until all others had ended; None: they did not
    not_tried: str = ""  # why


class References:
    """Final states of runs to which nothing happened, made when they are first asked for."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self._found: dict[tuple, Ended] = {}

    def of(self, fault: Fault) -> Ended:
        """With the fault's stage and dtype; if its step was skipped, without that step."""
        left_out = fault.step if fault.kind in (NAN, NAN_STOP) else 0
        key = (fault.stage, fault.bf16, left_out)
        if key not in self._found:
            name = "-".join(map(str, key))
            run_dir = self.home / f"run-{name}"
            run_dir.mkdir(parents=True)
            job = Job(self.home / name, run_dir, fault.stage, fault.bf16, (), left_out)
            ended = run_session(job)
            assert ended.status == [0, 0] and ended.final is not None, "\n".join(ended.said)
            self._found[key] = ended
        return self._found[key]


def attempt(fault: Fault, home: Path, references: References) -> Outcome:
    """Let one fault strike a run, and go on with that run. Logs and checkpoints stay in `home`."""
    run_dir = home / "run"
    try:
        with place_for(fault, run_dir):
            return _attempt(fault, home, run_dir, references)
    except OSError as error:
        if run_dir.is_dir() and any(run_dir.iterdir()):
            raise
        return Outcome(fault, [], not_tried=f"no disk of its own can be mounted here ({error})")


def _attempt(fault: Fault, home: Path, run_dir: Path, references: References) -> Outcome:
    def session(name: str, *faults: Fault) -> Ended:
        return run_session(Job(home / name, run_dir, fault.stage, fault.bf16, faults))

    problems: list[str] = []
    reference = references.of(fault)
    stop = Fault(TERM, "in backward", fault.stage, fault.bf16, fault.rank, fault.step or 8)
    if fault.on_resume:  # it needs a run that was stopped
        stopped = session("stopped", stop)
        problems += judge_end(stop, stopped, run_dir)
    if fault.kind == DAMAGE:
        DAMAGES[fault.moment](run_dir / stopped.saved[-1])
        struck = stopped
    elif fault.kind == NAN_STOP:
        nan = Fault(NAN, *(getattr(fault, n) for n in ("moment", "stage", "bf16", "rank", "step")))
