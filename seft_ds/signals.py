"""SIGTERM or SIGUSR1, as schedulers send before they kill, as the wish to stop after the step.

A Python handler runs between two bytecodes of the main thread, so never while that thread waits in a
collective for a peer that is gone. The interpreter's own handler in C runs at once, whatever the main
thread does, and writes the signal's number to the "wakeup" file descriptor: a thread that reads it there
can still end the process on the second signal.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from types import FrameType
from typing import Any

# One wish to stop can arrive as several signals, so more of them count only after this time.
# DeepSpeed 0.19.8: runner.py, on a SIGTERM to a run over pdsh, sends SIGINT and 0.1 s later SIGTERM down to
# launch.py, which passes on each of them as SIGTERM (and a pkill of the script's name follows). srun
# signals launch.py and the ranks, and launch.py then signals the ranks again.
BURST_S = 2.0

USUAL = (signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """Whether a stop was asked for. Each rank has its own: before acting on it the ranks have to agree,
    because launch.py signals a machine's next rank only when the one before has ended."""

    def __init__(self, signals: Iterable[int]) -> None:
        self.signum: int | None = None
        self._signals = tuple(signals)
        self._first_s = 0.0
        self._former: dict[int, Any] = {}
        self._former_fd = -1
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)  # the handler in C must never wait
        self._closed = False

    @property
    def requested(self) -> bool:
        return self.signum is not None

    @property
    def name(self) -> str | None:
        """The first signal's name, such as "SIGTERM"; None before it."""
        return None if self.signum is None else signal.Signals(self.signum).name

    def close(self) -> None:
        """Give the signals back to whom they belonged. In the main thread; more than once is fine."""
        if self._closed:
            return
        self._restore()
        self._writer.close()  # which ends the thread

    def _open(self) -> None:
        """The thread first, then the pipe, then the handlers: no signal falls between them."""
        threading.Thread(target=self._listen, name="seft-signals", daemon=True).start()
        self._former_fd = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        for number in self._signals:
            self._former[number] = signal.signal(number, _nothing)

    def _restore(self) -> None:
        global _active
        self._closed, _active = True, None
        for number, handler in self._former.items():
            # None: it was not Python's, and Python can't put it back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        signal.set_wakeup_fd(self._former_fd)

    def _listen(self) -> None:
        with self._reader:
            while numbers := self._reader.recv(64):
                for number in numbers:
                    if number in self._signals:  # the pipe gets every signal that Python handles
                        self._arrived(number)

    def _arrived(self, number: int) -> None:
        now, name = time.monotonic(), signal.Signals(number).name
        if self.signum is None:
            self._first_s, self.signum = now, number
            _say(f"{name}: stopping after this step; once more exits at once")
        elif now - self._first_s > BURST_S:
            _say(f"{name} again: exiting at once")
            os._exit(128 + number)


_active: StopRequest | None = None


def active_request() -> StopRequest | None:
    """The request that `watch_signals` made and nobody has closed."""
    return _active


def watch_signals(signals: Iterable[int] = USUAL) -> StopRequest:
    """Take the first of `signals` as a wish to stop, and one later than BURST_S after it as an order to exit.

    Raises:
        ValueError: called outside the main thread (only that one may set handlers), or a second time
            before the first was closed.
    """
    global _active
    if threading.current_thread() is not threading.main_thread():
        raise ValueError("watch_signals() was called in another thread; call it in the main thread")
    if _active is not None:
        raise ValueError("signals are watched already; close() the former StopRequest first")
    _active = StopRequest(signals)
    _active._open()
    return _active


def _nothing(number: int, frame: FrameType | None) -> None:
    """Only there so that the signal doesn't kill and its number reaches the pipe."""


def _say(line: str) -> None:
    """Past sys.stderr, whose lock the stuck main thread may hold; below a progress bar."""
    with suppress(OSError):
        os.write(2, f"\n{line}\n".encode())


# A forked child (a data loader's worker) would ignore SIGTERM, and write the signals that it gets into the
# pipe that it shares with the parent, who would take them for its own. So the child gives everything
# back, and the signals of the time between have to wait. A child that is started as a program has
# neither: exec resets the handlers and closes the pipe.
_masks = threading.local()


def _hold_signals() -> None:
    if _active is not None:
        _masks.former = signal.pthread_sigmask(signal.SIG_BLOCK, _active._signals)


def _release_signals() -> None:
    former = _masks.__dict__.pop("former", None)
    if former is not None:
        signal.pthread_sigmask(signal.SIG_SETMASK, former)


def _forget_in_child() -> None:
    if _active is not None:
        reader, writer = _active._reader, _active._writer
        _active._former_fd = -1  # what was there before belongs to the parent as well
        _active._restore()
        reader.close()
        writer.close()
    _release_signals()


os.register_at_fork(
    before=_hold_signals, after_in_parent=_release_signals, after_in_child=_forget_in_child
)
