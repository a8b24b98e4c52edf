"""What has to be true of a try of benchmarks/faults.py; each function returns what is not."""

from __future__ import annotations

import hashlib
import json
import re
import signal
from pathlib import Path

import torch

from benchmarks.fault_kinds import ALLOWED_NAN, LAST_WORDS, Fault, Kind
from benchmarks.fault_session import RANKS, STEPS, Ended

RAISED = {Kind.RUNTIME_ERROR: "RuntimeError", Kind.KEY_ERROR: "KeyError"}
CANT_WRITE = {
    Kind.EIO: "Input/output error",
    Kind.FULL: "No space left",
    Kind.READ_ONLY: "Read-only file system",
}


def judge_end(fault: Fault, ended: Ended, run_dir: Path) -> list[str]:
    """Did every rank of the session that was struck end as it should, and say what it should?"""
    problems = []
    if ended.struck_s is None:
        problems.append("the fault did not strike")
    for rank, (status, patterns) in enumerate(_expected(fault, ended)):
        said = ended.said[rank]
        if ended.status[rank] is None:
            problems.append(f"rank {rank} hung")
        elif ended.status[rank] != status:
            problems.append(f"rank {rank} ended with {ended.status[rank]}, wanted {status}")
        for pattern in patterns:
            if not re.search(pattern, said):
                problems.append(f"rank {rank} did not say {pattern!r}")
        if "Traceback" in said and not (fault.kind in RAISED and rank == fault.rank):
            problems.append(f"rank {rank} showed a traceback")
        problems += _false_hints(said, run_dir)
    return problems + _judge_place(fault, ended, run_dir)


def _expected(fault: Fault, ended: Ended) -> list[tuple[int, list[str]]]:
    """Of each rank: its exit status, and patterns of what it has to say."""
    kind, victim = fault.kind, fault.rank
    name = rf"rank {victim} \(pid {ended.pids[victim]} on [^)]+\)"
    hint = ".*; the same command goes on from "

    def of(hurt: tuple[int, list[str]], peer: tuple[int, list[str]]) -> list[tuple[int, list[str]]]:
        return [hurt, peer] if victim == 0 else [peer, hurt]

    if kind in (Kind.KILL, Kind.KILL_BUSY):
        return of((-signal.SIGKILL, []), (1, [f"error on rank {1 - victim}: {name} died{hint}"]))
    if kind == Kind.KILL_ALL:
        return [(-signal.SIGKILL, [])] * RANKS
    if kind == Kind.TWICE:
        words = ["SIGTERM: stopping after this step", "SIGTERM again: exiting at once"]
        return of((128 + signal.SIGTERM, words), (1, [f"{name} died{hint}"]))
    if kind in RAISED:
        words = f"{RAISED[kind]}: ['\"]*{LAST_WORDS}['\"]*"
        return of((1, ["Traceback", words]), (1, [f"{name} stopped: {words}{hint}"]))
    if kind in CANT_WRITE:
        which = rf"rank {victim}: .*" if kind == Kind.EIO else ""
        last = r"; (the last good checkpoint is /|there is none before it)"
        return [(1, [f"could not be written: {which}.*{CANT_WRITE[kind]}.*{last}"])] * RANKS
    if kind == Kind.NAN_MANY:
        step, in_a_row = fault.step + ALLOWED_NAN, ALLOWED_NAN + 1
        words = rf"at step {step}, {in_a_row} steps in a row .*micro-batch 1 of rank {victim}.*"
        return [(1, [f"{words}the last good checkpoint is /"])] * RANKS
    if kind in (Kind.SETTINGS, Kind.WEIGHTS):
        differs = {
            Kind.SETTINGS: r"ranks disagree on .*seft\.interval is ",
            Kind.WEIGHTS: r"weights differ between ranks: model\.norm\.weight is ",
        }
        return [(2, [f"{differs[kind]}.* on rank 0 and .* on rank 1"])] * RANKS
    return _of_signals_and_nan(fault)


def _of_signals_and_nan(fault: Fault) -> list[tuple[int, list[str]]]:
    """Of the sessions that end well: at the last step, or stopped."""
    words: list[list[str]] = [[], []]
    if fault.kind in (Kind.NAN, Kind.NAN_STOP):
        words[0].append(rf"skipped step {fault.step}\n")
    name = {Kind.TERM: "SIGTERM", Kind.USR1: "SIGUSR1", Kind.NAN_STOP: "SIGTERM"}.get(fault.kind)
    if name is not None:
        step = fault.step + 1 if fault.kind == Kind.NAN_STOP else fault.step
        # The stop is agreed before a step is taken: a signal after that counts for the next one.
        steps = f"({step}|{step + 1})"
        words[0].append(f"stopped by {name} after step {steps} of {STEPS}: .* goes on from /")
        words[fault.rank].append(f"{name}: stopping after this step")
    return [(0, w) for w in words]


def _judge_place(fault: Fault, ended: Ended, run_dir: Path) -> list[str]:
    """The folder, after the end of the session that was struck."""
    problems = []
    if fault.kind in CANT_WRITE and (left := list(run_dir.glob(".checkpoint*"))):
        problems.append(f"left {left}")
    if fault.kind in (Kind.SETTINGS, Kind.WEIGHTS) and ended.goes_on_from is not None:
        problems.append("training began")
    stopped = re.search(r"stopped by \w+ after step (\d+)", ended.said[0])
    if stopped and newest_whole(run_dir) != f"checkpoint-{stopped[1]}":
        problems.append(f"stopped after step {stopped[1]} without a checkpoint of it")
    return problems


def _false_hints(said: str, run_dir: Path) -> list[str]:
    """Checkpoints that were named as those to go on from, and are not."""
    named = re.findall(r"(?:goes on from|last good checkpoint is) (/\S+?)[.;]?(?:\s|$)", said)
    return [f"named {n}, which is not whole" for n in named if not is_whole(run_dir / Path(n).name)]


def judge_resume(
    fault: Fault, newest: str, finished: list[str], again: Ended, run_dir: Path
) -> list[str]:
    """Did the second session go on from the right place?

    Args:
        newest: the newest whole checkpoint before it, "" if there was none.
        finished: the checkpoints whose save was finished before, without one that was damaged.
    """
    problems = [f"rank {r} of the resume ended with {s}" for r, s in enumerate(again.status) if s]
    if again.status != [0] * RANKS:
        return problems or ["the resume hung"]
    if again.goes_on_from != newest:
        problems.append(f"resumed from {again.goes_on_from!r}, wanted {newest!r}")
    if finished and (not newest or _step(newest) < _step(finished[-1])):
        problems.append(f"{finished[-1]} was finished and is lost")
    if fault.kind == Kind.DAMAGE and fault.moment != "half of a later save":
        for pattern in (
            "warning: the checkpoint .* is damaged: ",
            f"resuming from .*/{newest}, the newest whole",
        ):
            if not re.search(pattern, again.said[0]):
                problems.append(f"the resume did not say {pattern!r}")
    if left := list(run_dir.glob(".checkpoint*")):
        problems.append(f"left {left}")
    return problems


def judge_final(
    final: dict[str, torch.Tensor] | None, wanted: dict[str, torch.Tensor] | None
) -> list[str]:
    """Is it bit for bit what it would have been?"""
    from tests.checkpoint.saved import differences

    assert wanted is not None
    if final is None:
        return ["it did not reach the last step"]
    differing = differences(final, wanted)
    return [f"the final state differs: {', '.join(differing[:5])}"] if differing else []


# By other means than the project's own.


def newest_whole(run_dir: Path) -> str:
    """The name of the newest whole checkpoint; "" if there is none.

    One that had stepped aside for a newer one of its name, which then did not come, is still there.
    """
    names = {p.name for p in run_dir.glob("checkpoint-*") if is_whole(p)}
    aside = [p for p in run_dir.glob(".checkpoint-*.replaced") if is_whole(p)]
    names |= {p.name[1:].removesuffix(".replaced") for p in aside}
    return max(names, key=_step, default="")


def is_whole(checkpoint: Path) -> bool:
    """Whether there are a manifest and all files that it lists, unchanged, every rank's among them."""
    try:
        listed = json.loads((checkpoint / "manifest.json").read_text())["files"]
        meta = json.loads((checkpoint / "seft.json").read_text())
        files = {name: (checkpoint / name).read_bytes() for name in listed}
    except (OSError, ValueError):
        return False
    ranks = sum(name.startswith("rank-") for name in files)
    return ranks == meta["ranks"] and all(
        hashlib.sha256(data).hexdigest() == listed[name]["sha256"] for name, data in files.items()
    )


def _step(name: str) -> int:
    return int(name.removeprefix("checkpoint-"))
