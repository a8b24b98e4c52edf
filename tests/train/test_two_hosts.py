"""Two hosts on one machine: `launch/finetune.py` under ZeRO-3 over TCP between two network namespaces.

Each has an address of its own and shares nothing with the other but the file system. The link is cut in a
step: no packet says so, as when a switch dies. Needs root and iproute2.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from seft_ds.checkpoint.manifest import checkpoints_in
from seft_ds.distributed.liveness import LINK_TIMEOUT_S
from tests.ranks import free_port
from tests.train.test_finetune import ROOT, make_models
from tests.train.test_interrupted import FLAGS, same, steps_of

GRACE_S = 5.0  # of liveness.watch_peers
CLONE_NEWNET = 0x40000000
ADDRESSES = ("10.213.7.1", "10.213.7.2")


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


@pytest.fixture(scope="module")
def hosts() -> Iterator[list[str]]:
    """Names of two namespaces; in each, the interface to the other is called as the namespace is."""
    names = [f"seft{os.getpid() % 100000}{side}" for side in "ab"]
    if shutil.which("ip") is None:
        pytest.skip("network namespaces can't be made here: there is no `ip` (iproute2)")
    try:
        for name in names:
            ip("netns", "add", name)
        ip(
            "link",
            "add",
            names[0],
            "netns",
            names[0],
            "type",
            "veth",
            "peer",
            names[1],
            "netns",
            names[1],
        )
        for name, address in zip(names, ADDRESSES, strict=True):
            ip("-n", name, "addr", "add", f"{address}/24", "dev", name)
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "link", "set", name, "up")
    except subprocess.CalledProcessError as error:
        remove(names)
        pytest.skip(f"network namespaces can't be made here: {error.stderr.strip()}")
    yield names
    remove(names)


def remove(names: list[str]) -> None:
    for name in names:
        subprocess.run(["ip", "netns", "del", name], capture_output=True)


def start(hosts: list[str], home: Path, output: str) -> list[tuple[int, Path]]:
    """One rank on each host, forked from this process (its imports are paid); [(pid, what it says)]."""
    import launch.finetune  # noqa: F401 (imported once, here)

    port = free_port()
    started = []
    for rank, host in enumerate(hosts):
        log = home / f"{output}-{rank}.log"
        pid = os.fork()
        if pid == 0:
            one_rank(rank, host, port, home, output, log)
        started.append((pid, log))
    return started


def one_rank(rank: int, host: str, port: int, home: Path, output: str, log: Path) -> None:
    """In the child: what `ip netns exec HOST python launch/finetune.py ...` would be. Doesn't return."""
    status = 1
    try:
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(out, 1)
        os.dup2(out, 2)
        sys.stdout, sys.stderr = open(1, "w", buffering=1), open(2, "w", buffering=1)  # noqa: SIM115
        namespace = os.open(f"/run/netns/{host}", os.O_RDONLY)
        if ctypes.CDLL(None, use_errno=True).setns(namespace, CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "setns")
        os.chdir(home)
        os.environ.update(
            RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK="0", LOCAL_SIZE="1", LOCAL_WORLD_SIZE="1",
            MASTER_ADDR=ADDRESSES[0], MASTER_PORT=str(port), GLOO_SOCKET_IFNAME=host,
            DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1",
        )  # fmt: skip
        sys.argv = ["finetune.py", *FLAGS, "--output_dir", output, "--resume", "auto"]
        from launch.finetune import main, run

        status = run(main)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def finish(started: list[tuple[int, Path]], limit_s: float) -> list[tuple[int, str, float]]:
    """(exit status, what was said, seconds until the end) of each rank. One that hangs is killed: -9."""
    begin = time.monotonic()
    ended: dict[int, tuple[int, float]] = {}
    while len(ended) < len(started):
        for pid, _ in started:
            if pid not in ended:
                found, status = os.waitpid(pid, os.WNOHANG)
                if found:
                    ended[pid] = (os.waitstatus_to_exitcode(status), time.monotonic() - begin)
                elif time.monotonic() - begin > limit_s:
                    os.kill(pid, 9)
        time.sleep(0.05)
    return [(ended[pid][0], log.read_text(), ended[pid][1]) for pid, log in started]


def reaches_step(run: Path, step: int, limit_s: float = 120) -> bool:
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        if (run / "journal.jsonl").is_file() and any(n >= step for n, _ in steps_of(run)):
            return True
        time.sleep(0.01)
    return False


@pytest.mark.timeout(600)
def test_a_cut_link_ends_both_sides_and_the_run_goes_on(hosts: list[str], tmp_path: Path) -> None:
    assert str(ROOT) in sys.path or sys.path.insert(0, str(ROOT)) is None
    make_models(tmp_path)
    for status, said, _ in finish(start(hosts, tmp_path, "unbroken"), 200):
        assert status == 0, said
    unbroken = tmp_path / "unbroken"

    cut = start(hosts, tmp_path, "cut")
    assert reaches_step(tmp_path / "cut", 6), [log.read_text() for _, log in cut]
    ip("-n", hosts[1], "link", "set", hosts[1], "down")
    for (status, said, seconds), other in zip(finish(cut, 120), (1, 0), strict=True):
        assert status == 1 and "Traceback" not in said, said
        assert f"rank {other} (" in said and "can't be reached" in said, said
        newest = checkpoints_in(tmp_path / "cut")[0].name
        assert f"--resume auto goes on from cut/{newest}" in said
        assert seconds < LINK_TIMEOUT_S + GRACE_S + 5, seconds
    assert not (tmp_path / "cut/model.safetensors").exists()

    ip("-n", hosts[1], "link", "set", hosts[1], "up")
    for status, said, _ in finish(start(hosts, tmp_path, "cut"), 200):
        assert status == 0, said
    assert same(tmp_path / "cut", unbroken)
    assert steps_of(tmp_path / "cut") == steps_of(unbroken)
