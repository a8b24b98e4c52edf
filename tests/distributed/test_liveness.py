"""seft_ds/distributed/liveness.py: processes as ranks that are killed, leave, fail, or lose their link."""

from __future__ import annotations

import ctypes
import json
import multiprocessing
import os
import pickle
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from seft_ds import console
from seft_ds.distributed import liveness
from seft_ds.distributed.liveness import Lost, Watch, current_watch, watch_peers
from tests.ranks import free_port

HOST = socket.gethostname()
GRACE_S = 0.5


class FileRanks:
    """`gather_object` over a folder, so that nothing but the watch connects the processes."""

    def __init__(self, rank: int, size: int, folder: Path) -> None:
        self.rank, self.size, self._folder, self._round = rank, size, folder, 0

    def gather_object(self, value: Any) -> list[Any]:
        self._round += 1
        draft = self._folder / f"draft.{self.rank}"
        draft.write_bytes(pickle.dumps(value))
        draft.rename(self._folder / f"{self._round}.{self.rank}")
        return [
            pickle.loads(wait_for(self._folder / f"{self._round}.{r}")) for r in range(self.size)
        ]


def wait_for(path: Path, timeout_s: float = 20) -> bytes:
    until = time.monotonic() + timeout_s
    while not path.exists():
        assert time.monotonic() < until, f"no {path.name}"
        time.sleep(0.005)
    return path.read_bytes()


class Run:
    """Ranks at work: forked processes, each with a file for its stderr."""

    def __init__(self, folder: Path, size: int, work: Callable[[FileRanks, Path], None]) -> None:
        self.folder = folder
        context = multiprocessing.get_context("fork")
        self.ranks = [
            context.Process(target=self._main, args=(r, size, work), daemon=True)
            for r in range(size)
        ]
        for process in self.ranks:
            process.start()

    def _main(self, rank: int, size: int, work: Callable[[FileRanks, Path], None]) -> None:
        os.dup2(os.open(self.folder / f"stderr.{rank}", os.O_CREAT | os.O_WRONLY), 2)
        sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1")
        status = 0
        try:
            work(FileRanks(rank, size, self.folder), self.folder)  # type: ignore[arg-type]
        except BaseException:
            sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
            status = 1
        os._exit(status)

    def ready(self) -> None:
        for rank in range(len(self.ranks)):
            wait_for(self.folder / f"ready.{rank}")

    def kill(self, rank: int) -> float:
        self.ranks[rank].kill()
        return time.time()

    def end(self, timeout_s: float) -> list[int | None]:
        """Exit statuses, None for a rank that is still there after the time (and is killed)."""
        until = time.monotonic() + timeout_s
        for process in self.ranks:
            process.join(max(0, until - time.monotonic()))
        statuses = [p.exitcode for p in self.ranks]
        self.clear()
        return statuses

    def clear(self) -> None:
        for process in self.ranks:
            process.kill()
            process.join()

    def said(self, rank: int) -> str:
        return (self.folder / f"stderr.{rank}").read_text()

    def name(self, rank: int) -> str:
        return f"rank {rank} (pid {self.ranks[rank].pid} on {HOST})"

    def noticed_s(self, rank: int) -> float:
        return float((self.folder / f"noticed.{rank}").read_text())


@pytest.fixture
def start(tmp_path):
    """Starts ranks in tmp_path; none of them outlives the test."""
    runs: list[Run] = []

    def begin(size: int, work: Callable[[FileRanks, Path], None]) -> Run:
        runs.append(Run(tmp_path, size, work))
        return runs[-1]

    yield begin
    for run in runs:
        run.clear()


def write(path: Path, text: str) -> None:
    """Whoever sees the file sees all of it."""
    draft = path.with_suffix(".draft" + path.suffix)
    draft.write_text(text)
    draft.rename(path)


def watched(ranks: Any, folder: Path, grace_s: float = GRACE_S) -> Watch:
    """A watch over `ranks` that writes down when it notices a loss."""
    watch = watch_peers(ranks, grace_s)

    def note() -> None:
        watch._noticed.wait()
        write(folder / f"noticed.{ranks.rank}", str(time.time()))

    threading.Thread(target=note, daemon=True).start()
    (folder / f"ready.{ranks.rank}").touch()
    return watch


def hang(ranks: FileRanks, folder: Path) -> None:
    """A main thread that never learns of anything, as one in a collective of NCCL."""
    watch = watched(ranks, folder)
    watch.hint = (lambda: "resume with --resume auto") if ranks.rank else "resume"
    while True:
        time.sleep(0.05)


@pytest.mark.parametrize("victim", [0, 1, 2])
def test_a_killed_rank_ends_the_others_in_time_and_by_name(start, victim):
    run = start(3, hang)
    run.ready()
    killed = run.kill(victim)
    statuses = run.end(GRACE_S + 2)
    assert statuses == [-signal.SIGKILL if r == victim else 1 for r in range(3)]
    for rank in {0, 1, 2} - {victim}:
        hint = "resume with --resume auto" if rank else "resume"
        loss = f"{run.name(victim)} died: its connection closed; {hint}"
        assert run.said(rank) == f"\nerror on rank {rank}: {loss}\n"
        print(f"rank {rank} noticed after {1000 * (run.noticed_s(rank) - killed):.1f} ms")
        assert run.noticed_s(rank) - killed < 1


def test_of_several_losses_everybody_names_the_same(start):
    run = start(4, hang)
    run.ready()
    run.kill(1)
    run.kill(2)
    assert run.end(GRACE_S + 2) == [1, -signal.SIGKILL, -signal.SIGKILL, 1]
    first, last = (run.said(r).removeprefix(f"\nerror on rank {r}: ").split(";")[0] for r in (0, 3))
    assert first == last and first in {f"{run.name(r)} died: its connection closed" for r in (1, 2)}


def test_a_stopped_rank_is_not_taken_for_dead(start):
    run = start(2, hang)
    run.ready()
    os.kill(run.ranks[1].pid, signal.SIGSTOP)  # type: ignore[arg-type]
    assert run.end(GRACE_S + 1) == [None, None]
    assert run.said(0) == ""


def with_child(ranks: FileRanks, folder: Path) -> None:
    watched(ranks, folder)
    (folder / f"ready.{ranks.rank}").unlink()
    child = os.fork()
    if child == 0:  # a data loader's worker, which may outlive the rank
        time.sleep(20)
        os._exit(0)
    write(folder / f"child.{ranks.rank}", str(child))
    (folder / f"ready.{ranks.rank}").touch()
    while True:
        time.sleep(0.05)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_child_of_a_dead_rank_does_not_keep_its_connection(tmp_path, start, victim):
    run = start(2, with_child)
    children = [int(wait_for(tmp_path / f"child.{r}")) for r in range(2)]
    run.ready()
    time.sleep(0.2)  # the children have run what Python runs after a fork
    run.kill(victim)
    statuses = run.end(GRACE_S + 2)
    for child in children:
        os.kill(child, signal.SIGKILL)
    assert statuses[1 - victim] == 1 and f"{run.name(victim)} died" in run.said(1 - victim)


def leave_early(ranks: FileRanks, folder: Path) -> None:
    watch = watched(ranks, folder)
    if ranks.rank < 2:
        time.sleep(0.1 * (1 + ranks.rank))  # rank 0, which the others are connected to, goes first
    else:
        time.sleep(GRACE_S + 1)
    assert watch.lost is None
    watch.close()
    watch.close()
    assert watch.wait_lost(20) is None and not console.on_failure


def test_who_leaves_in_order_ends_nobody(start):
    run = start(3, leave_early)
    assert run.end(GRACE_S + 8) == [0, 0, 0]
    assert [run.said(r) for r in range(3)] == [""] * 3


def one_leaves_one_hangs(ranks: FileRanks, folder: Path) -> None:
    watch = watched(ranks, folder)
    if ranks.rank == 1:
        watch.close()
        (folder / "left").touch()
        return
    while True:
        time.sleep(0.05)


def test_those_who_stay_are_still_watched(tmp_path, start):
    run = start(3, one_leaves_one_hangs)
    run.ready()
    wait_for(tmp_path / "left")
    run.kill(2)
    assert run.end(GRACE_S + 2) == [1, 0, -signal.SIGKILL]
    assert run.name(2) in run.said(0)


def one_fails(ranks: FileRanks, folder: Path) -> None:
    watch = watched(ranks, folder)
    if ranks.rank == int((folder / "who").read_text()):
        watch.failed("the disk is full: \N{SNOWMAN}" + "!" * 9999)
        return
    lost = watch.wait_lost(10)
    print(lost, file=sys.stderr)
    time.sleep(20)


@pytest.mark.parametrize("who", [0, 2])
def test_an_error_of_ones_own_is_passed_on(tmp_path, start, who):
    (tmp_path / "who").write_text(str(who))
    run = start(3, one_fails)
    run.ready()
    assert run.end(GRACE_S + 3) == [0 if r == who else 1 for r in range(3)]
    assert run.said(who) == ""
    for rank in {0, 1, 2} - {who}:
        seen, _, last = run.said(rank).splitlines()
        assert seen.startswith(f"{run.name(who)} stopped: the disk is full: \N{SNOWMAN}!!!")
        assert last == f"error on rank {rank}: {seen}" and len(seen) < 600


def unreachable(ranks: FileRanks, folder: Path) -> None:
    if ranks.rank == 1:
        liveness._dial = refuse
    watch = watch_peers(ranks, 0.1)
    time.sleep(0.5)
    assert watch.lost is None and not console.on_failure


def refuse(*_: Any) -> Any:
    raise ConnectionRefusedError(111, "Connection refused")


def test_ranks_that_cannot_connect_go_on_unwatched_and_say_so(start):
    run = start(3, unreachable)
    assert run.end(15) == [0, 0, 0]
    assert "the ranks can't watch each other (rank 1 got no answer from rank 0" in run.said(0)
    assert "[Errno 111] Connection refused" in run.said(0)
    assert run.said(1) == run.said(2) == ""


def test_one_rank_has_nothing_to_watch():
    ranks: Any = type("One", (), {"rank": 0, "size": 1})()
    threads = threading.active_count()
    watch = watch_peers(ranks)
    assert watch is current_watch() and watch.lost is None
    start = time.monotonic()
    assert watch.wait_lost(10) is None and watch.explain(RuntimeError("x")) is None
    watch.failed("x")
    watch.close()
    assert time.monotonic() - start < 1 and threading.active_count() <= threads
    assert console.on_failure == []


# Rank 0's end in this process, and whoever connects to it.


class TwoRanks:
    """Rank 0 of two, the other of which is this test."""

    rank, size = 0, 2

    def gather_object(self, value: Any) -> list[Any]:
        return [value, liveness._Place("elsewhere", 77, 0, "")]


@pytest.fixture
def hub():
    """Rank 0's watch, how to reach it, the token, and what was said at its end."""
    ends: list[str] = []
    files = len(os.listdir("/proc/self/fd"))
    ranks: Any = TwoRanks()
    watch, trouble = liveness.join(ranks, 0.1, ends.append)
    assert trouble == ""
    yield watch, watch._places[0], ends
    watch.close()
    assert watch._thread is not None and not watch._thread.is_alive()
    assert len(os.listdir("/proc/self/fd")) == files, "sockets are left open"


def connect(place: Any, data: bytes = b"") -> socket.socket:
    sock = socket.create_connection(("127.0.0.1", place.port), timeout=5)
    sock.sendall(data)
    return sock


def dropped(sock: socket.socket) -> bool:
    """Whether the other side closes without a word."""
    with sock:
        try:
            return sock.recv(100) == b""
        except ConnectionResetError:
            return True


def hello(place: Any, **changes: Any) -> bytes:
    usual = {"hello": 1, "token": place.token, "host": "elsewhere", "pid": 77}
    return json.dumps(usual | changes).encode() + b"\n"


def test_junk_on_the_port_breaks_nothing(hub):
    watch, place, ends = hub
    junk = [
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        random.Random(0).randbytes(3 * liveness.MAX_LINE_BYTES),
        b"[" * 8000 + b"\n",
        b"9" * 8000 + b"\n",
        b"\n",
        b"null\n",
        b'{"bye": true}\n',
        b'{"lost": 1}\n',
        b'{"hello": 1}\n',
        hello(place, token="0" * 32),
        hello(place, token="\udc80"),
        hello(place, token=None),
        hello(place, pid=78),
        hello(place, extra=1),
        *(hello(place, hello=wrong) for wrong in (True, 0, 2, -1, 1.0, "1", [1], {}, None)),
    ]
    for data in junk:
        assert dropped(connect(place, data)), data[:40]
    with connect(place, b"x" * (2 * liveness.MAX_LINE_BYTES)) as endless:
        assert dropped(endless)
    connect(place).close()
    silent = [connect(place) for _ in range(liveness.MAX_STRANGERS + 20)]
    assert all(dropped(sock) for sock in silent[:10])
    with connect(place, hello(place)[:20]) as rank:
        time.sleep(0.05)
        rank.sendall(hello(place)[20:] + b"junk of a rank\n[]\n")
        assert json.loads(rank.recv(100)) == {"welcome": True}
        with pytest.raises(OSError):
            for _ in range(20):  # all are there: nobody can come any more
                connect(place).close()
                time.sleep(0.05)
        assert watch.lost is None
    assert watch.wait_lost(5) == Lost(1, "elsewhere", 77, "died: its connection closed")
    until = time.monotonic() + 5
    while not ends and time.monotonic() < until:
        time.sleep(0.01)
    assert ends == ["error on rank 0: rank 1 (pid 77 on elsewhere) died: its connection closed"]
    for sock in silent:
        sock.close()


def test_who_connects_and_is_silent_is_dropped(monkeypatch, hub):
    monkeypatch.setattr(liveness, "HELLO_S", 0.2)
    _, place, _ = hub
    start = time.monotonic()
    assert dropped(connect(place)) and time.monotonic() - start < 1


def test_a_rank_that_dies_before_its_hello_is_named(monkeypatch):
    monkeypatch.setattr(liveness, "MEET_S", 0.2)
    ends: list[str] = []
    ranks: Any = TwoRanks()
    watch, _ = liveness.join(ranks, 0.1, ends.append)
    connect(watch._places[0]).close()
    assert str(watch.wait_lost(5)).startswith("rank 1 (pid 77 on elsewhere) can't be reached")
    watch._thread.join(5)  # type: ignore[union-attr]
    assert len(ends) == 1


def test_a_hint_that_hangs_or_fails_does_not_keep_the_process(hub):
    watch, _, _ = hub
    lost = Lost(1, "elsewhere", 77, "died")
    watch.hint = lambda: str(1 // 0)
    assert watch._line(lost) == str(lost)
    over = threading.Event()
    watch.hint = lambda: str(over.wait(20))
    start = time.monotonic()
    assert watch._line(lost) == str(lost) and time.monotonic() - start < 3
    over.set()


# With torch's process group, in a launch script.


def all_reduce_for_ever(ranks: FileRanks, folder: Path) -> None:
    """A launch script; rank 1 raises an error of its own if the test asks for it."""
    import torch
    import torch.distributed as dist

    from seft_ds.distributed.collectives import ProcessRanks

    def main() -> None:
        torch.set_num_threads(1)
        port, grace_s = (folder / "settings").read_text().split()
        place = f"tcp://127.0.0.1:{port}"
        dist.init_process_group("gloo", init_method=place, rank=ranks.rank, world_size=ranks.size)
        mine = ProcessRanks()
        watched(mine, folder, float(grace_s))
        while True:
            mine.sum_(torch.ones(10))
            if mine.rank == 1 and (folder / "fail").exists():
                raise KeyError("a bug")

    os._exit(console.run(main))


def test_in_a_script_gloo_fails_at_once_and_the_cause_is_told(tmp_path, start):
    (tmp_path / "settings").write_text(f"{free_port()} 60")
    run = start(3, all_reduce_for_ever)
    run.ready()
    killed = run.kill(1)
    assert run.end(5) == [1, -signal.SIGKILL, 1]
    print(f"all ended after {time.time() - killed:.2f} s")
    for rank in (0, 2):
        loss = f"{run.name(1)} died: its connection closed"
        assert run.said(rank).splitlines()[-1] == f"error on rank {rank}: {loss}"
        assert "Traceback" not in run.said(rank)


def test_in_a_script_an_error_is_told_to_the_others(tmp_path, start):
    (tmp_path / "settings").write_text(f"{free_port()} {GRACE_S}")
    run = start(3, all_reduce_for_ever)
    run.ready()
    (tmp_path / "fail").touch()
    assert run.end(GRACE_S + 3) == [1, 1, 1]
    assert "KeyError: 'a bug'" in run.said(1) and "Traceback" in run.said(1)
    for rank in (0, 2):
        loss = f"{run.name(1)} stopped: KeyError: 'a bug'"
        assert run.said(rank).splitlines()[-1] == f"error on rank {rank}: {loss}"


# A cut link, between two network namespaces.


def ip(command: str) -> subprocess.CompletedProcess:
    return subprocess.run(["ip", *command.split()], capture_output=True, text=True)


@pytest.fixture
def two_hosts():
    """Names of two network namespaces that a cable joins; 10.99.7.1 is the first one's address."""
    if shutil.which("ip") is None:
        pytest.skip("no ip command here")
    a, b = (f"seft{os.getpid()}{side}" for side in "ab")
    try:
        for command in (
            f"netns add {a}",
            f"netns add {b}",
            f"-n {a} link add cable type veth peer name cable netns {b}",
            f"-n {a} addr add 10.99.7.1/24 dev cable",
            f"-n {b} addr add 10.99.7.2/24 dev cable",
            *(f"-n {host} link set {device} up" for host in (a, b) for device in ("lo", "cable")),
        ):
            done = ip(command)
            if done.returncode != 0:
                pytest.skip(f"no network namespaces here: {done.stderr.strip()}")
        yield a, b
    finally:
        ip(f"netns del {a}")
        ip(f"netns del {b}")


def on_two_hosts(ranks: FileRanks, folder: Path) -> None:
    """Ranks 0 and 2 on the first host, rank 1 on the second."""
    name = (folder / "hosts").read_text().split()[ranks.rank % 2]
    space = os.open(f"/var/run/netns/{name}", os.O_RDONLY)
    assert ctypes.CDLL(None, use_errno=True).setns(space, 0) == 0, os.strerror(ctypes.get_errno())
    os.environ["MASTER_ADDR"] = "10.99.7.1"
    hang(ranks, folder)


def test_a_cut_link_is_noticed_in_time(tmp_path, start, two_hosts):
    (tmp_path / "hosts").write_text(" ".join(two_hosts))
    run = start(3, on_two_hosts)
    run.ready()
    time.sleep(2)  # not right after the hello: the kernel counts from the last word
    assert ip(f"-n {two_hosts[1]} link set cable down").returncode == 0
    cut = time.time()
    assert run.end(liveness.LINK_TIMEOUT_S + GRACE_S + 1) == [1, 1, 1]
    for rank, victim in ((0, 1), (2, 1), (1, 0)):
        noticed = run.noticed_s(rank) - cut
        print(f"rank {rank} noticed after {noticed:.1f} s")
        assert noticed < liveness.LINK_TIMEOUT_S
        loss = f"{run.name(victim)} can't be reached: no answer for {liveness.SILENCE_S} s"
        assert run.said(rank).startswith(f"\nerror on rank {rank}: {loss}")
