"""console.run: what ends a launch script, in how many lines, with which status."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from seft_ds import console
from seft_ds.console import frozen_imports
from seft_ds.errors import RunError


def in_fork(folder: Path, work: Callable[[], int], **environment: str) -> tuple[int, str]:
    """Exit status of `work` in a forked process, and what it wrote to stderr."""
    path = folder / "stderr"
    child = os.fork()
    if child == 0:
        os.environ.update(environment)
        os.dup2(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC), 2)
        sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
        status = 70
        try:
            status = work()
        except BaseException:
            sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
            status = 1
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status), path.read_text()


def failing(error: BaseException, *hooks: Callable[[BaseException], str | None]):
    """A script that raises `error`, run with `hooks`."""

    def main() -> None:
        raise error

    def work() -> int:
        console.on_failure[:] = hooks
        return console.run(main)

    return work


@pytest.mark.parametrize(
    "error, status",
    [(ValueError("give\n another  folder"), 2), (RunError("give\n another  folder"), 1)],
)
@pytest.mark.parametrize(
    "rank, local, line",
    [
        ("0", "0", "error: give another folder\n"),
        ("2", "0", "error on rank 2: give another folder\n"),
        ("1", "1", ""),
    ],
)
def test_what_users_can_act_on_is_one_line_a_machine(tmp_path, error, status, rank, local, line):
    assert in_fork(tmp_path, failing(error), RANK=rank, LOCAL_RANK=local) == (status, line)


def test_the_peers_hear_of_an_error_first(tmp_path):
    def hook(error: BaseException) -> None:
        print(f"told: {error}", file=sys.stderr)

    status, text = in_fork(tmp_path, failing(ValueError("no file"), hook), RANK="0")
    assert (status, text) == (2, "told: no file\nerror: no file\n")


def test_an_error_of_our_own_keeps_its_traceback(tmp_path):
    status, text = in_fork(tmp_path, failing(KeyError("slot"), lambda error: None), RANK="0")
    assert status == 1 and "Traceback" in text and text.endswith("KeyError: 'slot'\n")


def test_the_loss_of_a_peer_is_one_line_without_traceback(tmp_path):
    work = failing(
        RuntimeError("Connection closed"), lambda _: None, lambda _: "rank 1 died; resume"
    )
    assert in_fork(tmp_path, work, RANK="3") == (1, "\nerror on rank 3: rank 1 died; resume\n")


def test_a_script_that_works_returns_0_and_leaves_the_signals_as_they_were():
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    assert console.run(lambda: None) == 0
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before
    assert console.run(lambda: 3) == 3


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_no_character_ends_the_run(tmp_path, encoding):
    path = tmp_path / "stdout"

    def main() -> None:
        print("first row: \u27e6caf\u00e9\u27e7")
        print("warning: \u27e6", file=sys.stderr)

    def work() -> int:
        os.dup2(os.open(path, os.O_CREAT | os.O_WRONLY), 1)
        sys.stdout, sys.stderr = (open(fd, "w", encoding=encoding, closefd=False) for fd in (1, 2))  # noqa: SIM115
        status = console.run(main)
        sys.stdout.flush()
        sys.stderr.flush()
        return status

    assert in_fork(tmp_path, work) == (0, "warning: \\u27e6\n")
    shown = "caf\u00e9".encode(encoding, "backslashreplace")
    assert path.read_bytes() == b"first row: \\u27e6" + shown + b"\\u27e7\n"


def test_imports_go_without_the_collector_and_what_follows_has_it_again(tmp_path: Path) -> None:
    def work() -> int:
        with suppress(KeyError), frozen_imports():
            assert not gc.isenabled()
            raise KeyError("no such module")
        assert gc.isenabled() and gc.get_freeze_count() > 0
        return 7

    assert in_fork(tmp_path, work) == (7, "")


def test_what_was_frozen_is_freed_at_the_end_without_a_word() -> None:
    """Triton's bindings report objects that are left when the interpreter ends."""
    pytest.importorskip("triton")
    script = (
        f"import sys; sys.path.insert(0, {str(Path(console.__file__).parent.parent)!r})\n"
        "from seft_ds.console import frozen_imports\n"
        "with frozen_imports():\n"
        "    import triton._C.libtriton\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
