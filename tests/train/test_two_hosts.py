"""Two hosts on one machine: `launch/finetune.py` under ZeRO-3 over TCP between two network namespaces.

Each has an address of its own and shares nothing with the other but the file system. The link is cut in a
step: no packet says so, as when a switch dies. Needs root and iproute2.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from seft_ds.checkpoint.manifest import checkpoints_in
from seft_ds.distributed.liveness import LINK_TIMEOUT_S
from tests import forked
from tests.ranks import free_port
from tests.train.test_finetune import make_models
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


def start(hosts: list[str], home: Path, output: str) -> list[forked.Forked]:
    """`launch/finetune.py`, one rank on each host."""
    port = str(free_port())
    started = []
    for rank, host in enumerate(hosts):
        env = {
            "RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_SIZE": "1",
            "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": ADDRESSES[0], "MASTER_PORT": port,
            "GLOO_SOCKET_IFNAME": host, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        flags = [*FLAGS, "--output_dir", output, "--resume", "auto"]
        started.append(forked.start("finetune", flags, home, env, partial(enter, host)))
    return started


def enter(host: str) -> None:
    """Move this process into a host's network, as `ip netns exec` does."""
    namespace = os.open(f"/run/netns/{host}", os.O_RDONLY)
    if ctypes.CDLL(None, use_errno=True).setns(namespace, CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "setns")


def finish(started: list[forked.Forked], limit_s: float) -> list[tuple[int, str, float]]:
    """(exit status, what was said, seconds until the end) of each rank."""
    begin = time.monotonic()
    return [(r.wait(limit_s), r.said(), time.monotonic() - begin) for r in started]


def reaches_step(run: Path, step: int, limit_s: float = 120) -> bool:
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        if (run / "journal.jsonl").is_file() and any(n >= step for n, _ in steps_of(run)):
            return True
        time.sleep(0.01)
    return False


@pytest.mark.timeout(600)
def test_a_cut_link_ends_both_sides_and_the_run_goes_on(hosts: list[str], tmp_path: Path) -> None:
    make_models(tmp_path)
    for status, said, _ in finish(start(hosts, tmp_path, "unbroken"), 200):
        assert status == 0, said
    unbroken = tmp_path / "unbroken"

    cut = start(hosts, tmp_path, "cut")
    assert reaches_step(tmp_path / "cut", 6), [r.said() for r in cut]
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
