"""Launch scripts in forks of the test process: as users start them, but with the imports paid once.

`python launch/finetune.py` spends 10 s on imports before it does anything. A fork has its own memory, exit
status, signals, working directory and environment as a process of its own has; what it can't show are
mistakes in importing itself, for which some tests start the scripts as users do.
"""

from __future__ import annotations

import gc
import importlib
import os
import signal
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


class Forked:
    """Like subprocess.Popen, as far as the tests need it."""

    def __init__(self, pid: int, logs: tuple[Path, Path]):
        self.pid, self._logs = pid, logs
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None:
            found, status = os.waitpid(self.pid, os.WNOHANG)
            if found:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout: float) -> int:
        """Its exit status; killed, and TimeoutError, if it takes longer."""
        deadline = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > deadline:
                os.kill(self.pid, signal.SIGKILL)
                raise TimeoutError(f"pid {self.pid} still ran after {timeout} s: {self.said()}")
            time.sleep(0.02)
        assert self.returncode is not None
        return self.returncode

    def said(self) -> str:
        return self._logs[0].read_text() + self._logs[1].read_text()

    def finish(self, timeout: float) -> subprocess.CompletedProcess:
        status = self.wait(timeout)
        return subprocess.CompletedProcess(
            [], status, self._logs[0].read_text(), self._logs[1].read_text()
        )


def start(
    script: str,
    argv: list[str],
    cwd: Path,
    env: dict[str, str],
    before: Callable[[], None] | None = None,
    folder: str = "launch",
) -> Forked:
    """Run `FOLDER/SCRIPT.py ARGV` in `cwd`, with `env` on top of this process's environment.

    before: called in the child first. What it writes goes to hidden files in `cwd`.
    """
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    module = importlib.import_module(f"{folder}.{script}")
    importlib.import_module("seft_ds.train.run")  # what the scripts import late
    return fork(module, script, argv, cwd, env, before)


def fork(
    module: Any,
    script: str,
    argv: list[str],
    cwd: Path,
    env: dict[str, str],
    before: Callable[[], None] | None = None,
) -> Forked:
    """Run `module.main` as `start` does; `module` may be whatever has one, and a `run` for it."""
    number = f"{os.getpid()}-{time.monotonic_ns()}"
    logs = (cwd / f".stdout-{number}", cwd / f".stderr-{number}")
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        _child(module, script, argv, cwd, env, logs, before)
    return Forked(pid, logs)


def _child(
    module: object,
    script: str,
    argv: list[str],
    cwd: Path,
    env: dict[str, str],
    logs: tuple[Path, Path],
    before: Callable[[], None] | None,
) -> None:
    """Never returns: the parent's test runner must not go on here."""
    status = 1
    gc.freeze()  # or each collection walks over, and copies, all that the parent has imported
    try:
        for fd, log in zip((1, 2), logs, strict=True):
            os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), fd)
        sys.stdout = open(1, "w", buffering=1)  # noqa: SIM115
        sys.stderr = open(2, "w", buffering=1)  # noqa: SIM115
        importlib.reload(warnings)  # pytest records warnings, which are to be seen here
        os.chdir(cwd)
        os.environ.update(env)
        if before is not None:
            before()
        sys.argv = [f"{script}.py", *argv]
        run = getattr(module, "run", None)  # of the launch scripts
        status = run(module.main) if run else (module.main() or 0)  # type: ignore[attr-defined]
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
