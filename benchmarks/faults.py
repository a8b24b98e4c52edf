"""Faults injected into runs of two ranks: is anything lost, does anything hang, does it say why it ended?

    python benchmarks/faults.py                              # all, about 15 minutes on 2 quiet cores
    python benchmarks/faults.py --short                      # nearly each kind once, under a minute
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
import shlex
import shutil
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")

from benchmarks.blocks import put_block
from benchmarks.fault_judge import is_whole, judge_end, judge_final, judge_resume, newest_whole
from benchmarks.fault_kinds import DAMAGES, Fault, Kind, NoMount, mend, place_for
from benchmarks.fault_session import Ended, Job, prepare, run_session
from benchmarks.hardware import cpu_name

STAGES = (0, 1, 2, 3)

# Kind, moment, the steps that ZeRO 0, 1, 2, 3 are struck at, and whether each rank has its turn. Events come
# after steps 5 to 10, saves after 3, 6, 9 and 12.
ANY, EVENTS, SAVES = (2, 5, 8, 11), (5, 7, 9, 10), (3, 6, 9, 12)
PLAN: list[tuple[Kind, str, tuple[int, ...], bool]] = [
    (Kind.KILL, "in backward", ANY, True),
    (Kind.KILL, "between two micro-batches", ANY, True),
    (Kind.KILL, "event, before the decision", EVENTS, True),
    (Kind.KILL, "event, one weight changed", EVENTS, True),
    (Kind.KILL, "save, before the first file", SAVES, True),
    (Kind.KILL, "save, inside a file", SAVES, True),
    (Kind.KILL, "save, files written", SAVES, True),
    (Kind.KILL, "save, before the seal", SAVES, True),
    (Kind.KILL, "save, before the rename", SAVES, True),
    (Kind.KILL, "save, before `latest`", SAVES, True),
    (Kind.KILL, "save over an older one, between the renames", (9, 9, 9, 9), True),
    (Kind.KILL, "loading a checkpoint", (0, 0, 0, 0), True),
    (Kind.KILL_BUSY, "between two micro-batches", ANY, True),
    (Kind.KILL_BUSY, "save, inside a file", SAVES, False),
    (Kind.KILL_ALL, "event, one weight changed", EVENTS, False),
    (Kind.KILL_ALL, "save, inside a file", SAVES, False),
    (Kind.KILL_ALL, "save, before the rename", SAVES, False),
    (Kind.KILL_ALL, "save, before `latest`", SAVES, False),
    (Kind.KILL_ALL, "save over an older one, between the renames", (9, 9, 9, 9), False),
    (Kind.TERM, "in backward", ANY, True),
    (Kind.TERM, "event, one weight changed", EVENTS, True),
    (Kind.TERM, "save, inside a file", SAVES, True),
    (Kind.USR1, "in backward", ANY, True),
    (Kind.USR1, "event, one weight changed", EVENTS, True),
    (Kind.USR1, "save, inside a file", SAVES, True),
    (Kind.TWICE, "in backward", ANY, True),
    (Kind.TWICE, "save, inside a file", SAVES, False),
    (Kind.KEY_ERROR, "between two micro-batches", ANY, True),
    (Kind.KEY_ERROR, "event, before the decision", EVENTS, True),
    (Kind.RUNTIME_ERROR, "between two micro-batches", ANY, False),
    (Kind.EIO, "save, inside a file", SAVES, True),
    (Kind.FULL, "before a save, no room", (6, 9, 12, 9), False),
    (Kind.FULL, "before a save, room for half", (9, 12, 9, 6), False),
    (Kind.READ_ONLY, "before a save", SAVES, False),
    *((Kind.DAMAGE, damage, (8, 10, 5, 7), False) for damage in DAMAGES),
    (Kind.NAN, "in a window", (5, 8, 5, 8), True),
    (Kind.NAN_STOP, "in a window", (5, 8, 5, 8), False),
    (Kind.NAN_MANY, "in a window", (7, 7, 7, 7), False),
    (Kind.SETTINGS, "at the start", (0, 0, 0, 0), False),
    (Kind.SETTINGS, "at a resume", (0, 0, 0, 0), False),
    (Kind.WEIGHTS, "at the start", (0, 0, 0, 0), False),
    (Kind.WEIGHTS, "at a resume", (0, 0, 0, 0), False),
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
    """Each kind once, but for two that take long by intention: a rank waits 10 s after a RuntimeError, and
    5 s before it ends a main thread that is busy. Few combinations of stage and dtype, since each needs a
    run to compare with.
    """
    chosen = [
        (Kind.KILL, "in backward", 3, 0),
        (Kind.KILL, "save, before the seal", 1, 1),
        (Kind.KILL_ALL, "save, before the rename", 2, 0),
        (Kind.TERM, "in backward", 0, 1),
        (Kind.USR1, "save, inside a file", 1, 0),
        (Kind.TWICE, "in backward", 0, 0),
        (Kind.KEY_ERROR, "event, before the decision", 2, 1),
        (Kind.EIO, "save, inside a file", 1, 1),
        (Kind.FULL, "before a save, room for half", 0, 0),
        (Kind.READ_ONLY, "before a save", 2, 0),
        (Kind.DAMAGE, "a bit flipped", 0, 0),
        (Kind.NAN, "in a window", 1, 1),
        (Kind.NAN_STOP, "in a window", 1, 0),
        (Kind.NAN_MANY, "in a window", 0, 1),
        (Kind.SETTINGS, "at the start", 0, 1),
        (Kind.WEIGHTS, "at a resume", 1, 0),
    ]
    steps = {(kind, moment): steps for kind, moment, steps, _ in PLAN}
    return [
        Fault(kind, moment, stage, stage % 2 == 1, rank, steps[kind, moment][stage])
        for kind, moment, stage, rank in chosen
    ]


# One try.


@dataclass
class Outcome:
    """What came of one fault."""

    fault: Fault
    problems: list[str]  # empty: recovered
    ended_after_s: float | None = (
        None  # from the fault until all others had ended; None: they did not
    )
    not_tried: str = ""  # why


class References:
    """Final states of runs to which nothing happened, made when they are first asked for."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self._found: dict[tuple, Ended] = {}

    def of(self, fault: Fault) -> Ended:
        """With the fault's stage and dtype; if its step was skipped, without that step."""
        left_out = fault.step if fault.kind in (Kind.NAN, Kind.NAN_STOP) else 0
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
    except NoMount as error:
        return Outcome(fault, [], not_tried=f"no disk of its own can be mounted here ({error})")


def _attempt(fault: Fault, home: Path, run_dir: Path, references: References) -> Outcome:
    def session(name: str, *faults: Fault, resume: str = "auto") -> Ended:
        return run_session(
            Job(home / name, run_dir, fault.stage, fault.bf16, faults, resume=resume)
        )

    reference = references.of(fault)
    problems: list[str] = []
    finished: list[str] = []
    struck = None
    if fault.on_resume:  # a run that was stopped comes before
        stop = replace(fault, kind=Kind.TERM, moment="in backward", step=fault.step or 8)
        stopped = session("stopped", stop)
        problems += judge_end(stop, stopped, run_dir)
        finished += stopped.saved
    if fault.kind == Kind.DAMAGE:
        DAMAGES[fault.moment](run_dir / finished[-1])
        finished = [name for name in finished if is_whole(run_dir / name)]
    else:
        resume = str(run_dir / "checkpoint-6") if fault.saves_again else "auto"
        struck = session("struck", *strikes(fault), resume=resume)
        problems += judge_end(fault, struck, run_dir)
        finished += struck.saved
        mend(fault, run_dir)
    last = struck
    if fault.kind != Kind.NAN:  # which ends no session
        newest = newest_whole(run_dir)
        last = session("again")
        problems += judge_resume(fault, newest, finished, last, run_dir)
    assert last is not None
    problems += judge_final(last.final, reference.final)
    return Outcome(fault, problems, ended_after(fault, struck) if struck else None)


def strikes(fault: Fault) -> tuple[Fault, ...]:
    """What one session has to be struck by."""
    if fault.kind != Kind.NAN_STOP:
        return (fault,)
    stop = replace(fault, kind=Kind.TERM, moment="in backward", step=fault.step + 1)
    return replace(fault, kind=Kind.NAN), stop


def ended_after(fault: Fault, ended: Ended) -> float | None:
    """Seconds from the fault to the end of the last rank that was not itself killed by it."""
    if fault.kind in (Kind.NAN, Kind.KILL_ALL) or ended.struck_s is None:
        return None
    killed = fault.kind in (Kind.KILL, Kind.KILL_BUSY, Kind.TWICE)
    hurt = (fault.rank,) if killed else ()
    return max(s for r, s in enumerate(ended.ended_s) if r not in hurt) - ended.struck_s


def try_all(faults: list[Fault], home: Path) -> list[Outcome]:
    """One after the other; says how each went, and keeps the logs of those that were lost."""
    references, outcomes = References(home / "references"), []
    for n, fault in enumerate(faults, 1):
        began, place = time.monotonic(), home / f"try-{n:03d}"
        outcome = attempt(fault, place, references)
        outcomes.append(outcome)
        how = outcome.not_tried or "; ".join(outcome.problems) or "recovered"
        print(f"{n}/{len(faults)} {fault}: {how}, {time.monotonic() - began:.1f} s", flush=True)
        if outcome.problems:
            print(f"    its logs are in {place}", flush=True)
        else:
            shutil.rmtree(place, ignore_errors=True)
    return outcomes


# The table.


def table(outcomes: list[Outcome]) -> str:
    """A line a fault and moment."""
    rows: dict[tuple[Kind, str], list[Outcome]] = {}
    for outcome in outcomes:
        rows.setdefault((outcome.fault.kind, outcome.fault.moment), []).append(outcome)
    stages = [f"ZeRO-{stage}" for stage in STAGES]
    head = ["fault", "when", *stages, "tries", "recovered", "lost", "all ended after"]
    lines = [head, ["---"] * len(head)]
    lines += [[kind.value, moment, *_cells(found)] for (kind, moment), found in rows.items()]
    lines.append(["**all**", "", *(f"**{cell}**" for cell in _cells(outcomes)[:-1]), ""])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cells(outcomes: list[Outcome]) -> list[str]:
    """Tries that recovered of all, by stage; their sums; median and longest time to the end of all ranks."""
    tried = [o for o in outcomes if not o.not_tried]
    if not tried:
        return ["not tried"] * len(STAGES) + ["0", "0", "0", outcomes[0].not_tried]
    cells = []
    for stage in STAGES:
        mine = [o for o in tried if o.fault.stage == stage]
        cells.append(f"{sum(not o.problems for o in mine)}/{len(mine)}" if mine else "")
    good = sum(not o.problems for o in tried)
    cells += [str(len(tried)), str(good), str(len(tried) - good)]
    times = [o.ended_after_s for o in tried if o.ended_after_s is not None]
    cells.append(f"{statistics.median(times):.2f} s, at most {max(times):.2f} s" if times else "")
    return cells


def describe(command: str, seconds: float, outcomes: list[Outcome]) -> str:
    """The table and what a figure needs beside it."""
    versions = ", ".join(f"{n} {version(n)}" for n in ("torch", "deepspeed", "transformers"))
    cores = len(os.sched_getaffinity(0))
    return (
        f"{table(outcomes)}\n\n`{command}`, {seconds:.0f} seconds on {cores} cores of an {cpu_name()}, gloo, "
        f"Python {platform.python_version()}, {versions}, {time.strftime('%-d %B %Y')}."
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--short", action="store_true", help="nearly each kind, once")
    parser.add_argument("--only", default="", help="faults whose description contains this text")
    parser.add_argument("--table", type=Path, help="a Markdown file with the two marker lines")
    options = parser.parse_args()
    faults = [
        f for f in (few_faults() if options.short else all_faults()) if options.only in str(f)
    ]
    if options.table:
        put_block(options.table, "faults", "")  # before time is spent
    prepare()
    began = time.monotonic()
    home = Path(tempfile.mkdtemp(prefix="faults-"))
    outcomes = try_all(faults, home)
    command = shlex.join(["python", "benchmarks/faults.py", *sys.argv[1:]])
    text = describe(command, time.monotonic() - began, outcomes)
    print(f"\n{text}")
    if options.table:
        put_block(options.table, "faults", text)
    lost = [o for o in outcomes if o.problems]
    if not lost:
        shutil.rmtree(home)
    for outcome in lost:
        print(f"lost: {outcome.fault}: {'; '.join(outcome.problems)}", file=sys.stderr)
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())
