"""Try bad inputs in forked workers and judge how each attempt ended.

Each attempt has a folder of its own, a time limit and a limit of memory. A worker that hangs or dies is
replaced, and what it was trying counts as wrong.
"""

from __future__ import annotations

import io
import multiprocessing as mp
import os
import resource
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from random import Random
from typing import Any

from seft_ds.errors import RunError
from tests.ranks import free_port

SECONDS = 20.0  # for one input in a worker
ADDRESS_BYTES = 4 << 30  # that a worker may map beyond what it starts with
GROWN_BYTES = 512 << 20  # that one input may add to a worker's peak of memory in use
FILE_BYTES = 1 << 30  # that a worker may write into one file: a hole that is copied fills a disk
MESSAGE_LENGTH = 2000
NOTE = "what-is-wrong"
MARKER = "code-ran"  # what hostile files would make in their folder


@dataclass(frozen=True)
class Source:
    """One kind of bad input for one entry point.

    attempt: makes the input in a folder and gives it to the entry point. Raises what that raises, and
        returns None if the input was taken and that is right, or else in words why it is wrong.
    names: what a clear message may name, beside the path of the input.
    """

    entry: str
    kind: str
    attempt: Callable[[Random, Path], str | None]
    names: tuple[str, ...] = ()
    seconds: float = SECONDS


@dataclass(frozen=True)
class Outcome:
    """How one attempt ended: "refused", "harmless" or "wrong"."""

    source: int
    seed: str
    verdict: str
    text: str
    seconds: float = 0.0
    what: str = ""  # what was wrong with the input


def judge(sources: list[Source], index: int, seed: str, place: Path) -> Outcome:
    """Make one attempt in this process, in the folder `place`, which is empty before and gone after."""
    source = sources[index]
    place.mkdir(parents=True)
    (place / "in").mkdir()
    environment, peak, start = dict(os.environ), _peak_bytes(), time.monotonic()
    printed = io.StringIO()
    try:
        with redirect_stdout(printed), redirect_stderr(printed):
            wrong = source.attempt(Random(seed), place / "in")
        verdict, text = ("wrong", wrong) if wrong else ("harmless", "")
    except (ValueError, RunError) as error:
        text = str(error)
        problem = _unclear(error, text, (*source.names, str(place)))
        verdict, text = ("wrong", f"{problem}: {_origin(error)}") if problem else ("refused", text)
    except SystemExit as error:
        text = printed.getvalue()
        good = error.code == 2 and "error:" in text and "Traceback" not in text
        verdict, text = (
            ("refused", text) if good else ("wrong", f"exit {error.code}: {text[-500:]}")
        )
    except BaseException as error:
        verdict, text = "wrong", _origin(error)
    if (place / MARKER).exists() or (place / "in" / MARKER).exists():
        verdict, text = "wrong", "code of the input ran"
    grown = _peak_bytes() - peak
    if grown > GROWN_BYTES:
        verdict, text = "wrong", f"{grown >> 20} MiB of memory for it; {text}"
    os.environ.clear()
    os.environ.update(environment)
    noted = place / "in" / NOTE
    what = noted.read_text() if noted.is_file() else ""
    _delete(place)
    return Outcome(index, seed, verdict, text[:MESSAGE_LENGTH], time.monotonic() - start, what)


def note(place: Path, what: str) -> None:
    """Leave in words what is wrong with the input, for the report."""
    (place / NOTE).write_text(what[:500], errors="replace")


def _unclear(error: BaseException, text: str, names: tuple[str, ...]) -> str | None:
    """What a user can't do with the message, or None."""
    if not text.strip():
        return "a message without text"
    if len(text) > MESSAGE_LENGTH:
        return f"a message of {len(text)} characters"
    if not any(name in text for name in names):
        return "a message that names nothing"
    return None


def _origin(error: BaseException) -> str:
    """The error and where it came from, innermost last, without what lies in the harness."""
    frames = [
        f"{Path(f.filename).name}:{f.lineno}"
        for f in traceback.extract_tb(error.__traceback__)
        if "hostile" not in f.filename
    ]
    return f"{type(error).__name__}: {str(error)[:300]} [{' > '.join(frames[-6:])}]"


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _delete(place: Path) -> None:
    for folder, _, _ in os.walk(place):
        os.chmod(folder, 0o700)
    shutil.rmtree(place, ignore_errors=True)


# Workers.


@dataclass
class _Worker:
    process: Any
    pipe: Connection
    number: int
    task: tuple[int, str] | None = None
    since: float = 0.0


def try_all(
    sources: list[Source],
    tasks: list[tuple[int, str]],
    home: Path,
    n_workers: int,
    report: Callable[[Outcome], None],
) -> None:
    """Try all (source, seed) pairs; `report` gets every outcome as it comes."""
    waiting = list(reversed(tasks))
    numbers = iter(range(1, 1_000_000))
    workers = [_start(sources, home, next(numbers)) for _ in range(min(n_workers, len(tasks)))]
    try:
        while workers:
            for worker in workers:
                if worker.task is None and waiting:
                    worker.task, worker.since = waiting.pop(), time.monotonic()
                    worker.pipe.send(worker.task)
            workers = [w for w in workers if w.task is not None or _dismiss(w)]
            ready = wait([w.pipe for w in workers], timeout=0.5)
            for i, worker in enumerate(workers):
                assert worker.task is not None
                outcome = _outcome_of(worker, sources, worker.pipe in ready)
                if outcome is None:
                    continue
                report(outcome)
                worker.task = None
                if not worker.process.is_alive():
                    _delete(home / "trials" / str(worker.number))
                    workers[i] = _start(sources, home, next(numbers))
    finally:
        for worker in workers:
            worker.process.kill()


def _outcome_of(worker: _Worker, sources: list[Source], ready: bool) -> Outcome | None:
    assert worker.task is not None
    index, seed = worker.task
    passed = time.monotonic() - worker.since
    if ready:
        try:
            return worker.pipe.recv()
        except EOFError:
            worker.process.join()
            return Outcome(index, seed, "wrong", f"died ({worker.process.exitcode})", passed)
    if passed > sources[index].seconds:
        worker.process.kill()
        worker.process.join()
        return Outcome(index, seed, "wrong", f"hangs: no end after {passed:.0f} s", passed)
    return None


def _start(sources: list[Source], home: Path, number: int) -> _Worker:
    context = mp.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(
        target=_serve, args=(sources, home / "trials" / str(number), theirs, ours), daemon=False
    )
    process.start()
    theirs.close()
    return _Worker(process, ours, number)


def _dismiss(worker: _Worker) -> bool:
    """Let a worker end; False, for the filter that calls it."""
    worker.pipe.send(None)
    worker.process.join(timeout=10)
    worker.process.kill()
    return False


def _serve(sources: list[Source], folder: Path, pipe: Connection, parents: Connection) -> None:
    """A worker's life: attempts, one after the other. Never returns into the caller's program."""
    parents.close()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _limit_memory()
    _announce_one_rank()
    quiet = open(os.devnull, "w")  # noqa: SIM115 (until the process ends)
    os.dup2(quiet.fileno(), 1)
    os.dup2(quiet.fileno(), 2)
    sys.stdout = sys.stderr = quiet
    tried = 0
    try:
        while (task := pipe.recv()) is not None:
            tried += 1
            pipe.send(judge(sources, *task, folder / str(tried)))
    finally:
        os._exit(0)  # without the exit handlers of the program that was forked


def _announce_one_rank() -> None:
    """For the engines of this worker: a run of one rank."""
    os.environ.update(
        RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_WORLD_SIZE="1",
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()),
    )  # fmt: skip


def _limit_memory() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_BYTES, resource.RLIM_INFINITY))
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + ADDRESS_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
