"""Locks of dead makers go, those of live ones and young ones stay."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from seft_ds.distributed.extension_lock import STALE_S, clear_stale_locks
from tests.ranks import run_processes


def test_only_a_dead_makers_lock_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    locks = [tmp_path / name / "lock" for name in ("dead", "live", "young", "py311_cpu/deep")]
    for lock in locks:
        lock.parent.mkdir(parents=True)
        lock.touch()
        old = time.time() - STALE_S - 10
        if lock.parent.name != "young":
            os.utime(lock, (old, old))
    other = tmp_path / "dead" / "module.so"
    other.touch()
    young = locks.pop(2)
    young.rename(tmp_path / "young-lock")
    with open(tmp_path / "live" / "lock"):
        assert sorted(clear_stale_locks()) == sorted([locks[0], locks[2]])
    assert [lock.exists() for lock in locks] == [False, True, False]
    assert other.exists()
    locks[1].unlink()
    (tmp_path / "young-lock").rename(young)
    begin = time.monotonic()
    young.touch()
    assert clear_stale_locks(stale_s=2.0) == [young]  # waited for
    assert time.monotonic() - begin > 1.5


def joined(folder: str) -> tuple[list[str], object]:
    os.environ["TORCH_EXTENSIONS_DIR"] = folder
    from seft_ds.distributed.collectives import init_ranks

    init_ranks()
    from deepspeed import comm

    return os.listdir(folder), comm.comm.cdb.shm_comm_op


def test_joining_a_run_compiles_nothing(tmp_path: Path) -> None:
    for files, operation in run_processes(2, joined, str(tmp_path)):
        assert files == [] and operation is None
