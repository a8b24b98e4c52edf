"""The faults of benchmarks/faults.py: what is done, to which rank, at which moment.

A rank wraps the function during which it is to happen, so that a moment is exact and the same each time:
"between the seal and the rename" is the call of `publish`.
"""

from __future__ import annotations

import errno
import functools
import importlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, NoReturn

from seft_ds.checkpoint.manifest import MANIFEST_NAME, aside_of
from seft_ds.signals import BURST_S


class Kind(Enum):
    """What is done, in the words of the table."""

    KILL = "SIGKILL of one rank"
    KILL_ALL = "SIGKILL of both ranks"
    KILL_BUSY = "SIGKILL of one rank while its peer is busy for 30 s"
    TERM = "SIGTERM to one rank"
    USR1 = "SIGUSR1 to one rank"
    TWICE = "SIGTERM twice to a rank that waits for a slow peer"
    RUNTIME_ERROR = "RuntimeError on one rank"
    KEY_ERROR = "KeyError on one rank"
    EIO = "write error on one rank"
    FULL = "disk full"
    READ_ONLY = "output turns read-only"
    DAMAGE = "newest checkpoint damaged"
    NAN = "NaN loss on one rank"
    NAN_STOP = "NaN loss on one rank, SIGTERM in the next step"
    NAN_MANY = "NaN loss in more steps than allowed"
    SETTINGS = 'one rank has another "seft" setting'
    WEIGHTS = "one rank has another weight"


FROM_ITS_PEER = (Kind.KILL_BUSY, Kind.TWICE)  # the peer is slow at the moment, and strikes then
NEEDS_MOUNT = (Kind.FULL, Kind.READ_ONLY)

LAST_WORDS = "row 7 of the data can't be read"  # of a rank that ends by an exception
ALLOWED_NAN = 2  # max_skipped_steps of all sessions


@dataclass(frozen=True)
class Moment:
    """A call of a function, by the name that its caller uses: "module:name" or "module:Class.name"."""

    place: str
    call: int = 1  # the first, second ... of a step
    returns: bool = False  # when it comes back, not when it is called
    on_rank_0: bool = False  # only rank 0 comes by, and hurts the other from there


MOMENTS = {
    "in backward": Moment("seft_ds.sparse.linear:slot_gradient", call=5),
    "between two micro-batches": Moment("benchmarks.fault_session:next_batch", call=2),
    "event, before the decision": Moment("seft_ds.zero.engine:plan"),
    "event, one weight changed": Moment("seft_ds.zero.weight_state:WeightState.apply", call=2),
    "save, before the first file": Moment("seft_ds.checkpoint.saving:write_tensors"),
    "save, inside a file": Moment("seft_ds.checkpoint.manifest:_bytes_of", call=5),
    "save, files written": Moment("seft_ds.checkpoint.saving:write_tensors", returns=True),
    "save, before the seal": Moment("seft_ds.checkpoint.together:seal", on_rank_0=True),
    "save, before the rename": Moment("seft_ds.checkpoint.together:publish", on_rank_0=True),
    "save, before `latest`": Moment("seft_ds.checkpoint.hooks:_point_to", on_rank_0=True),
    "before a save": Moment("benchmarks.fault_session:save", on_rank_0=True),
    "before a save, no room": Moment("benchmarks.fault_session:save", on_rank_0=True),
    "before a save, room for half": Moment("benchmarks.fault_session:save", on_rank_0=True),
    # 1: the manifest; 2: the older one steps aside; 3: the new one takes its place.
    "save over an older one, between the renames": Moment(
        "seft_ds.checkpoint.manifest:os.replace", call=3, on_rank_0=True
    ),
    "loading a checkpoint": Moment("seft_ds.checkpoint.hooks:load_state"),
    "in a window": Moment("benchmarks.fault_session:loss_of", call=2, returns=True),
    "at the start": Moment("benchmarks.fault_session:start"),
    "at a resume": Moment("benchmarks.fault_session:start"),
}


@dataclass(frozen=True)
class Fault:
    """One fault. It strikes at the first call of its moment in or after its step."""

    kind: Kind
    moment: str  # of MOMENTS, or of DAMAGES
    stage: int  # ZeRO
    bf16: bool
    rank: int = 0  # the one that is hurt
    step: int = 0  # 0: before the first

    def __str__(self) -> str:
        where = f"ZeRO-{self.stage}, {'bf16' if self.bf16 else 'fp32'}"
        return f"{self.kind.value}, {self.moment} (rank {self.rank}, step {self.step}, {where})"

    @property
    def on_resume(self) -> bool:
        """Whether a session that was stopped has to come before it."""
        waits = ("loading a checkpoint", "at a resume")
        return self.kind == Kind.DAMAGE or self.moment in waits or self.saves_again

    @property
    def saves_again(self) -> bool:
        """Whether it strikes a run that went back, and comes to write a checkpoint that is there."""
        return self.moment == "save over an older one, between the renames"


# In a rank.


class Injector:
    """Has one fault happen to one session. Each rank has one, and one of them strikes."""

    def __init__(self, fault: Fault, home: Path, run_dir: Path, rank: int) -> None:
        self.fault, self.home, self.run_dir, self.rank = fault, home, run_dir, rank
        self.moment = MOMENTS[fault.moment]
        self.times = ALLOWED_NAN + 1 if fault.kind == Kind.NAN_MANY else 1
        self._step = self._calls = 0
        striker = 1 - fault.rank if fault.kind in FROM_ITS_PEER else fault.rank
        if rank == (0 if self.moment.on_rank_0 else striker):
            _wrap(self.moment.place, self._wrapped)

    def begin_step(self, step: int) -> None:
        self._step, self._calls = step, 0

    def _wrapped(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def come_by(*args: Any, **kwargs: Any) -> Any:
            self._calls += 1
            due = self._calls == self.moment.call and self._step >= self.fault.step
            if not due or not self.times:
                return function(*args, **kwargs)
            self.times -= 1
            result = function(*args, **kwargs) if self.moment.returns else None
            print(f"\nstruck at {time.monotonic()}", flush=True)
            if self.fault.kind in (Kind.NAN, Kind.NAN_MANY):
                return result * float("nan")
            STRIKES[self.fault.kind](self)
            return result if self.moment.returns else function(*args, **kwargs)

        return come_by

    def send(self, rank: int, number: int) -> None:
        os.kill(int((self.home / f"pid-{rank}").read_text()), number)


def _kill_all(injector: Injector) -> None:
    injector.send(1 - injector.rank, signal.SIGKILL)
    injector.send(injector.rank, signal.SIGKILL)


def _kill_and_be_busy(injector: Injector) -> None:
    injector.send(injector.fault.rank, signal.SIGKILL)
    time.sleep(30)


def _send_twice(injector: Injector) -> None:
    injector.send(injector.fault.rank, signal.SIGTERM)
    time.sleep(BURST_S + 0.3)
    print(f"\nstruck at {time.monotonic()}", flush=True)
    injector.send(injector.fault.rank, signal.SIGTERM)


def _fail(error: type[Exception]) -> NoReturn:
    raise error(LAST_WORDS)


def _fail_to_write(injector: Injector) -> None:
    raise OSError(errno.EIO, os.strerror(errno.EIO), "a file of the checkpoint")


def _fill(injector: Injector) -> None:
    """Take all room, and give back as much as half of the newest checkpoint takes if that was asked for."""
    newest = max(injector.run_dir.glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1]))
    room = sum(p.stat().st_size for p in newest.iterdir()) // 2
    filler = injector.run_dir / "filler"
    with open(filler, "wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(4096))
    if injector.fault.moment == "before a save, room for half":
        os.truncate(filler, filler.stat().st_size - room)


def _turn_read_only(injector: Injector) -> None:
    """By a second mount over the first, which has files open for writing and so can't be changed."""
    mount("--bind", str(injector.run_dir), str(injector.run_dir))
    mount("-o", "remount,bind,ro", str(injector.run_dir))


STRIKES: dict[Kind, Callable[[Injector], None]] = {
    Kind.KILL: lambda i: i.send(i.fault.rank, signal.SIGKILL),
    Kind.KILL_ALL: _kill_all,
    Kind.KILL_BUSY: _kill_and_be_busy,
    Kind.TERM: lambda i: i.send(i.fault.rank, signal.SIGTERM),
    Kind.USR1: lambda i: i.send(i.fault.rank, signal.SIGUSR1),
    Kind.TWICE: _send_twice,
    Kind.RUNTIME_ERROR: lambda i: _fail(RuntimeError),
    Kind.KEY_ERROR: lambda i: _fail(KeyError),
    Kind.EIO: _fail_to_write,
    Kind.FULL: _fill,
    Kind.READ_ONLY: _turn_read_only,
    Kind.SETTINGS: lambda i: None,  # `fault_session.start` does it
    Kind.WEIGHTS: lambda i: None,
}


def _wrap(place: str, wrapped: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    module, _, path = place.partition(":")
    *owners, name = path.split(".")
    owner = functools.reduce(getattr, owners, importlib.import_module(module))
    setattr(owner, name, wrapped(getattr(owner, name)))


# Outside the ranks.


def _flip_a_bit(checkpoint: Path) -> None:
    path = _rank_file(checkpoint)
    data = bytearray(path.read_bytes())
    data[len(data) * 2 // 3] ^= 1 << 3
    path.write_bytes(data)


def _leave_half_a_save(checkpoint: Path) -> None:
    """As if the next save had been cut off: files that nobody has sealed."""
    step = int(checkpoint.name.split("-")[1])
    aside = aside_of(checkpoint.with_name(f"checkpoint-{step + 1}"))
    shutil.copytree(checkpoint, aside, ignore=shutil.ignore_patterns(MANIFEST_NAME))
    os.truncate(_rank_file(aside), 1000)


def _rank_file(checkpoint: Path) -> Path:
    return sorted(checkpoint.glob("rank-*.safetensors"))[-1]


DAMAGES: dict[str, Callable[[Path], None]] = {
    "a bit flipped": _flip_a_bit,
    "a file cut short": lambda c: os.truncate(_rank_file(c), _rank_file(c).stat().st_size - 8),
    "a file removed": lambda c: _rank_file(c).unlink(),
    "the manifest removed": lambda c: (c / MANIFEST_NAME).unlink(),
    "half of a later save": _leave_half_a_save,
}


class NoMount(Exception):
    """Mounting isn't allowed here."""


def mount(*arguments: str) -> None:
    if shutil.which("mount") is None:
        raise NoMount("no command mount")
    done = subprocess.run(["mount", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise NoMount(done.stderr.strip())


@contextmanager
def place_for(fault: Fault, run_dir: Path) -> Iterator[None]:
    """The run's folder; for faults of the disk a small disk of its own. NoMount where none can be had."""
    run_dir.mkdir(parents=True)
    if fault.kind not in NEEDS_MOUNT:
        yield
        return
    mount("-t", "tmpfs", "-o", "size=8m", "tmpfs", str(run_dir))
    try:
        yield
    finally:
        while run_dir.is_mount():
            subprocess.run(["umount", str(run_dir)], check=True)


def mend(fault: Fault, run_dir: Path) -> None:
    """What an administrator does before the run is started again."""
    if fault.kind == Kind.FULL:
        (run_dir / "filler").unlink()
    if fault.kind == Kind.READ_ONLY:
        subprocess.run(["umount", str(run_dir)], check=True)
