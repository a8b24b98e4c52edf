"""A run directory belongs to one run at a time."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
from pathlib import Path
from typing import IO

LOCK_NAME = ".lock"  # "HOST PID" of rank 0; locked while it lives
_NO_LOCKS = (errno.ENOTSUP, errno.ENOSYS, errno.ENOLCK, errno.EINVAL)


class RunLock:
    """Held by rank 0 from before anything is read until the process ends, however it ends.

    Two starts of one job would write the same checkpoints, and the second would delete what the first is
    writing. On file systems without locks nothing is checked.
    """

    def __init__(self) -> None:
        self._file: IO[str] | None = None

    def take(self, output: Path) -> None:
        """Lock `output`, if it exists.

        Raises:
            ValueError: another run holds it.
        """
        if self._file is not None or not output.is_dir():
            return
        file = open(output / LOCK_NAME, "a+", encoding="utf-8")  # noqa: SIM115 (held until the process ends)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read(256).split() or ["?", "?"]
            file.close()
            raise ValueError(
                f"a run is writing to --output_dir {output} (rank 0 is pid {holder[-1]} on {holder[0]}); "
                "wait for it, stop it, or give another folder"
            ) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                file.close()
                raise
        file.truncate(0)
        file.write(f"{socket.gethostname()} {os.getpid()}\n")
        file.flush()
        self._file = file

    def release(self) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()
            self._file = None


def set_aside(checkpoints: list[Path], step: int) -> list[Path]:
    """Rename the checkpoints after `step`, from which the run goes on: they belong to another course of it
    (or are damaged), and must neither be resumed from nor counted among the last N. Returns the new names.
    """
    renamed = []
    for path in checkpoints:
        if int(path.name.removeprefix("checkpoint-")) > step:
            new = path.with_name(f"abandoned-{path.name}")
            number = 1
            while new.exists():
                number += 1
                new = path.with_name(f"abandoned-{number}-{path.name}")
            os.rename(path, new)
            renamed.append(new)
    return renamed
