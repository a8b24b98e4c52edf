"""A run that was killed while it compiled or loaded an extension must not make every later run wait for ever.

torch guards the folder of a compiled extension (DeepSpeed has several, one for communication on CPUs) with a
file `lock` that only its maker removes, and waits for it without end (read in torch 2.13.0,
utils/file_baton.py). The maker holds the file open while it lives, which tells a live one from a dead.
"""

from __future__ import annotations

import os
import sys
import time
from contextlib import suppress
from pathlib import Path

# Compiling takes 30 to 80 s. The maker may sit on another machine or in another container, where we can't
# see it; by its age then.
STALE_S = 120.0


def clear_stale_locks(stale_s: float = STALE_S) -> list[Path]:
    """Remove locks that no process of this machine holds, once they are `stale_s` old; returns them.

    Waits that long for a young one: a job that was killed is often started again at once.
    """
    return [lock for lock in _locks() if _cleared(lock, stale_s)]


def _cleared(lock: Path, stale_s: float) -> bool:
    said = False
    with suppress(OSError):  # gone meanwhile, or not ours
        while not _held(lock):
            age_s = time.time() - lock.stat().st_mtime
            if age_s > stale_s:
                lock.unlink()
                print(f"warning: removed {lock}, which a killed process had left", file=sys.stderr)
                return True
            if not said:
                said = True
                print(f"{lock}: waiting up to {stale_s:.0f} s for its maker", file=sys.stderr)
            time.sleep(0.2)
    return False


def _locks() -> list[Path]:
    from torch.utils.cpp_extension import get_default_build_root

    given = os.environ.get("TORCH_EXTENSIONS_DIR")
    root = Path(given) if given else Path(get_default_build_root())
    return [*root.glob("*/lock"), *root.glob("*/*/lock")]


def _held(lock: Path) -> bool:
    """Whether a process that we may look at has the file open. Linux only; elsewhere age decides."""
    wanted = lock.stat()
    for fd in Path("/proc").glob("[0-9]*/fd/*"):
        with suppress(OSError):
            found = fd.stat()
            if (found.st_dev, found.st_ino) == (wanted.st_dev, wanted.st_ino):
                return True
    return False
