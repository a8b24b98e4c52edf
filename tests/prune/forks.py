"""launch/prune.py in a process of its own, forked: as a user starts it, with the imports paid once."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import torch

from tests.prune.test_launch import script


def die() -> NoReturn:
    """As a killed process does: at once, without a last word."""
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("unreachable")


def run(log: Path, argv: list[object], before: Callable[[], None] | None = None) -> tuple[int, str]:
    """(exit status, output) of the script; `before` is called in the child first."""
    import deepspeed  # noqa: F401 (paid for in the parent)
    import transformers  # noqa: F401

    process = multiprocessing.get_context("fork").Process(target=_child, args=(log, argv, before))
    process.start()
    process.join(timeout=100)
    if process.exitcode is None:
        process.kill()
        raise TimeoutError(f"still running: {log.read_text()}")
    return process.exitcode, log.read_text()


def _child(log: Path, argv: list[object], before: Callable[[], None] | None) -> None:
    for stream in (1, 2):
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    sys.stdout, sys.stderr = open(1, "w", buffering=1), open(2, "w", buffering=1)  # noqa: SIM115
    torch.set_num_threads(1)  # a fork has none of its parent's threads to share work with
    os.environ["OMP_NUM_THREADS"] = "1"
    if before is not None:
        before()
    sys.argv = ["prune.py", *map(str, argv)]
    status = script.run(script.main)
    sys.stdout.flush()
    os._exit(status)
