"""seft_ds/signals.py: processes that get real signals, one of them stuck in C for good."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from seft_ds.signals import BURST_S, watch_signals

ROOT = Path(__file__).resolve().parents[1]
FIRST = "stopping after this step; once more exits at once"
# A mutex that its own thread locks twice: the wait in C goes on after every signal, as a collective's does.
STUCK = """
import ctypes
lock, mutex = ctypes.CDLL(None).pthread_mutex_lock, ctypes.create_string_buffer(64)
lock(mutex)
print("ready", flush=True)
lock(mutex)
"""
STEPS = """
import time
print("ready", flush=True)
while not stop.requested:
    time.sleep(0.01)
time.sleep(0.5)
print(stop.name, stop.signum, flush=True)
"""
WATCH = "from seft_ds.signals import watch_signals\nstop = watch_signals()\n"


# Interrupting is Python's own again: a shell may have started the tests with SIGINT ignored.
LISTENING = "import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"


def started(script: str, listening: str = LISTENING) -> subprocess.Popen:
    """A process that runs `script` and has come to its "ready"."""
    command = [sys.executable, "-c", listening + script]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(command, cwd=ROOT, text=True, **pipes)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_the_first_signal_asks_and_a_burst_is_one_wish(number):
    process = started(WATCH + STEPS)
    for _ in range(3):  # as DeepSpeed's launcher and Slurm do it
        process.send_signal(number)
        time.sleep(0.05)
    out, err = process.communicate(timeout=10)
    assert process.returncode == 0, err
    assert out == f"{number.name} {int(number)}\n"
    assert err == f"\n{number.name}: {FIRST}\n"


def test_ctrl_c_under_deepspeed_is_one_wish():
    """The terminal sends SIGINT to all, launch.py passes it on as SIGTERM."""
    process = started(WATCH + STEPS)
    process.send_signal(signal.SIGINT)
    time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=10)
    assert (process.returncode, out, err) == (0, "SIGINT 2\n", f"\nSIGINT: {FIRST}\n")


def test_a_background_job_keeps_ignoring_ctrl_c():
    ignoring = "import signal\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\n"
    process = started(WATCH + STEPS, ignoring)
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=10)
    assert out == "SIGTERM 15\n"


GUARD = "from seft_ds.signals import guard_process\nguard = guard_process('nothing was written')\n"
CLEARS_UP = """
import sys, time
guard.clears_up = True
try:
    print("ready", flush=True)
    time.sleep(30)
except KeyboardInterrupt as stop:  # as libraries catch it
    print("cleared up")
    sys.exit(stop.status)
"""


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_during_the_imports_is_one_line(number, status):
    process = started(GUARD + "import time\nprint('ready', flush=True)\ntime.sleep(30)\n")
    process.send_signal(number)
    _, err = process.communicate(timeout=10)
    assert (process.returncode, err) == (status, f"{number.name}: nothing was written\n")


def test_what_was_begun_is_cleared_up():
    process = started(GUARD + CLEARS_UP)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=10)
    assert (process.returncode, out, err) == (143, "cleared up\n", "")


def test_a_main_thread_that_does_not_come_back_is_not_waited_for():
    shorter = "import seft_ds.signals\nseft_ds.signals.GRACE_S = 0.7\nguard.clears_up = True\n"
    process = started(GUARD + shorter + STUCK)
    time.sleep(0.5)  # it has said so, but may not be stuck yet
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    assert process.poll() is None
    _, err = process.communicate(timeout=20)
    assert (process.returncode, err) == (130, "SIGINT: nothing was written\n")


def test_the_guard_has_the_signals_again_after_training():
    script = """
from seft_ds.signals import nothing_left, watch_signals
watch_signals().close()
"""
    process = started(GUARD + script + CLEARS_UP)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=10)
    assert (process.returncode, out) == (130, "cleared up\n")
    late = "nothing_left()\nprint('ready', flush=True)\nimport time\ntime.sleep(1)\n"
    process = started(GUARD + script + late)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=10)[1] == "" and process.returncode == 0


def test_the_second_signal_ends_a_process_that_is_stuck_in_c():
    process = started(WATCH + STUCK)
    process.send_signal(signal.SIGUSR1)
    time.sleep(BURST_S + 0.3)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    sent = time.monotonic()
    _, err = process.communicate(timeout=10)
    assert time.monotonic() - sent < 1
    assert process.returncode == 128 + signal.SIGTERM
    assert err == f"\nSIGUSR1: {FIRST}\n\nSIGTERM again: exiting at once\n"


def test_a_python_handler_would_not_end_it():
    """The test above is worth something: the stuck thread never comes to its handlers."""
    handler = "import os, signal\nsignal.signal(signal.SIGTERM, lambda *_: os._exit(7))\n"
    process = started(handler + STUCK)
    time.sleep(1)  # it has said so, but may not be stuck yet
    process.send_signal(signal.SIGTERM)
    with pytest.raises(subprocess.TimeoutExpired):
        process.communicate(timeout=1)
    process.kill()
    process.communicate()


def test_close_gives_the_signals_back():
    came: list[int] = []
    former = signal.signal(signal.SIGUSR1, lambda number, _: came.append(number))
    threads, files = threading.active_count(), len(os.listdir("/proc/self/fd"))
    try:
        handlers = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGUSR1)]
        stop = watch_signals()
        with pytest.raises(ValueError, match="watched already"):
            watch_signals()
        assert not stop.requested and stop.name is None
        stop.close()
        stop.close()
        assert handlers == [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGUSR1)]
        assert signal.set_wakeup_fd(-1) == -1
        os.kill(os.getpid(), signal.SIGUSR1)
        assert came == [signal.SIGUSR1] and not stop.requested
    finally:
        signal.signal(signal.SIGUSR1, former)
    until = time.monotonic() + 5
    while threading.active_count() > threads and time.monotonic() < until:
        time.sleep(0.01)
    assert len(os.listdir("/proc/self/fd")) == files


def test_only_the_main_thread_may_watch():
    errors: list[Exception] = []

    def body() -> None:
        try:
            watch_signals()
        except ValueError as error:
            errors.append(error)

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert "main thread" in str(errors[0])


def test_a_worker_leaves_ctrl_c_to_its_parent():
    """A data loader that ends by it would break the step after which the run is to stop."""
    script = """
import os, signal, time
child = os.fork()
if child == 0:
    time.sleep(0.5)
    os._exit(7)
os.kill(child, signal.SIGINT)
print("ready", flush=True)
_, status = os.waitpid(child, 0)
print(os.waitstatus_to_exitcode(status), stop.requested)
"""
    out, err = started(WATCH + script).communicate(timeout=10)
    assert (out, err) == ("7 False\n", "")


def test_a_forked_child_dies_of_its_signal_and_the_parent_hears_nothing():
    script = """
import os, signal, time
print("ready", flush=True)
child = os.fork()
if child == 0:
    time.sleep(30)
    os._exit(0)
os.kill(child, signal.SIGTERM)
_, status = os.waitpid(child, 0)
time.sleep(0.2)
print(os.WTERMSIG(status), stop.requested)
"""
    process = started(WATCH + script)  # the child gets its signal before it runs any Python
    out, err = process.communicate(timeout=10)
    assert (out, err) == (f"{int(signal.SIGTERM)} False\n", "")
