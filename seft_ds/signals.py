"""Signals as the wish to stop: Ctrl-C, and SIGTERM or SIGUSR1, as schedulers send before they kill.

While a run trains it stops after the step (`watch_signals`). Before that, and in scripts that don't train, a
signal ends the process with one line (`guard_process`).

A Python handler runs between two bytecodes of the main thread, so never while that thread waits in a
collective for a peer that is gone. The interpreter's own handler in C runs at once, whatever the main
thread does, and writes the signal's number to the "wakeup" file descriptor: a thread that reads it there
can still end the process.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from types import FrameType
from typing import Any

from seft_ds.launching import known_place

# One wish to stop can arrive as several signals, so more of them count only after this time.
# A terminal's Ctrl-C reaches the ranks and DeepSpeed's launch.py, which then sends them SIGTERM. DeepSpeed
# 0.19.8: runner.py, on a SIGTERM to a run over pdsh, sends SIGINT and 0.1 s later SIGTERM down to
# launch.py, which passes on each of them as SIGTERM (and a pkill of the script's name follows). srun
# signals launch.py and the ranks, and launch.py then signals the ranks again.
BURST_S = 2.0
# A main thread that is in C code has this time to come back and clear up.
GRACE_S = 3.0

QUIET = "SEFT_SAYS_NOTHING_OF_SIGNALS"  # set to 1 by a script that stops others and says so itself

USUAL = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class Stopped(KeyboardInterrupt):
    """A signal ends this process. What clears up after a KeyboardInterrupt does it here too."""

    def __init__(self, number: int, line: str) -> None:
        super().__init__(line)
        self.status = 128 + number


class _Listener:
    """Takes signals over; a thread gets their numbers whatever the main thread does."""

    def __init__(self, signals: Iterable[int]) -> None:
        # A shell starts background jobs with SIGINT ignored: it is meant for the program in front.
        ignored = signal.getsignal(signal.SIGINT) == signal.SIG_IGN
        self._signals = tuple(n for n in signals if not (n == signal.SIGINT and ignored))
        self._former: dict[int, Any] = {}
        self._former_fd = -1
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)  # the handler in C must never wait
        self._closed = False

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
        _listeners.append(self)
        for number in self._signals:
            self._former[number] = signal.signal(number, self._handle)

    def _restore(self) -> None:
        self._closed = True
        if self in _listeners:
            _listeners.remove(self)
        for number, handler in self._former.items():
            # None: it was not Python's, and Python can't put it back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        signal.set_wakeup_fd(self._former_fd)

    def _listen(self) -> None:
        with self._reader:
            while numbers := self._reader.recv(64):
                for number in sorted(numbers):  # of a burst SIGINT is the cause
                    if number in self._signals:  # the pipe gets every signal that Python handles
                        self._arrived(number)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        """In the main thread; there so that the signal doesn't kill and its number reaches the pipe."""

    def _arrived(self, number: int) -> None:
        """In the listening thread."""


_listeners: list[_Listener] = []  # the last one has the signals


class StopRequest(_Listener):
    """Whether a stop was asked for. Each rank has its own: before acting on it the ranks have to agree,
    because launch.py signals a machine's next rank only when the one before has ended."""

    def __init__(self, signals: Iterable[int]) -> None:
        super().__init__(signals)
        self.signum: int | None = None
        self._first_s = 0.0

    @property
    def requested(self) -> bool:
        return self.signum is not None

    @property
    def name(self) -> str | None:
        """The first signal's name, such as "SIGTERM"; None before it."""
        return None if self.signum is None else signal.Signals(self.signum).name

    def _restore(self) -> None:
        global _active
        _active = None
        super()._restore()

    def _arrived(self, number: int) -> None:
        now, name = time.monotonic(), signal.Signals(number).name
        if self.signum is None:
            self._first_s, self.signum = now, number
            if known_place().rank == 0 or number != signal.SIGINT:  # Ctrl-C reaches all of them
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


class Guard(_Listener):
    """Ends the process at the first signal, in one line, where no run is there to be stopped in order.

    While the script's own imports run that is at once; then (`clear_up`) by an exception in the main
    thread, so that what was begun is undone.
    """

    def __init__(self, signals: Iterable[int]) -> None:
        super().__init__(signals)
        self.outcome: str | Callable[[], str] = "stopped"
        self.clears_up = False
        self.finished = False  # nothing is left to stop
        self.abandon: Callable[[], None] = lambda: None  # before the second signal ends all at once
        self._number: int | None = None
        self._first_s = 0.0
        self._raised = False

    @property
    def pending(self) -> Stopped | None:
        """The end that a signal asked for, if the main thread has met another error first."""
        if self._number is None or self.finished:
            return None
        return Stopped(self._number, self.line(self._number))

    def line(self, number: int) -> str:
        """The signal's name and what became of the script's work."""
        became = self.outcome if isinstance(self.outcome, str) else self.outcome()
        return f"{signal.Signals(number).name}: {became}"

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.clears_up and not self.finished and not self._raised:
            self._raised = True
            raise Stopped(number, self.line(number))

    def _arrived(self, number: int) -> None:
        now = time.monotonic()
        if self._number is None:
            self._first_s, self._number = now, number
            if self.finished:
                return
            if self.clears_up:
                timer = threading.Timer(GRACE_S, self._end_stuck, (number,))
                timer.daemon = True
                timer.start()
            else:
                self._end(number)
        elif now - self._first_s > BURST_S:
            self.abandon()
            os._exit(128 + number)

    def _end_stuck(self, number: int) -> None:
        if not self._raised:  # the main thread is still in C code
            self._end(number)

    def _end(self, number: int) -> None:
        say_stopped(self.line(number))
        os._exit(128 + number)


_guard: Guard | None = None


def guard_process(outcome: str | None = None) -> Guard | None:
    """Have signals end this process in one line; None outside the main thread, which alone may do that.

    Args:
        outcome: what the line says became of the work.
    """
    global _guard
    if _guard is None or _guard._closed:
        if threading.current_thread() is not threading.main_thread():
            return None
        _guard = Guard(USUAL)
        _guard._open()
    if outcome is not None:
        _guard.outcome = outcome
    return _guard


def guarded() -> bool:
    """Whether signals end this process in one line."""
    return _guard is not None and not _guard._closed


def set_outcome(outcome: str | Callable[[], str]) -> None:
    """What the line says if a signal ends this process from now on."""
    if _guard is not None:
        _guard.outcome = outcome


def nothing_left() -> None:
    """From now on the first signal is too late to stop anything."""
    if _guard is not None:
        _guard.finished = True


def say_stopped(line: str) -> None:
    """On the first rank of each machine: which ranks have got the signal nobody knows."""
    place = known_place()
    if os.environ.get(QUIET) != "1" and (place.rank == 0 or place.local_rank == 0):
        with suppress(OSError):
            bar = "\n" if sys.stderr is not None and sys.stderr.isatty() else ""
            who = "" if place.rank == 0 else f"rank {place.rank}: "
            os.write(2, f"{bar}{who}{line}\n".encode())


def _say(line: str) -> None:
    """Past sys.stderr, whose lock the stuck main thread may hold; below a progress bar."""
    with suppress(OSError):
        os.write(2, f"\n{line}\n".encode())


# A forked child (a data loader's worker) would ignore SIGTERM, and write the signals that it gets into the
# pipe that it shares with the parent, who would take them for its own. So the child gives everything
# back, and the signals of the time between have to wait. SIGINT it ignores: Ctrl-C reaches it too, and its
# parent ends it when the time has come. A child that is started as a program has none of this: exec resets
# the handlers and closes the pipe.
_masks = threading.local()


def _hold_signals() -> None:
    if _listeners:
        _masks.former = signal.pthread_sigmask(signal.SIG_BLOCK, _listeners[-1]._signals)


def _release_signals() -> None:
    former = _masks.__dict__.pop("former", None)
    if former is not None:
        signal.pthread_sigmask(signal.SIG_SETMASK, former)


def _forget_in_child() -> None:
    taken = list(reversed(_listeners))
    for listener in taken:
        reader, writer = listener._reader, listener._writer
        listener._former_fd = -1  # what was there before belongs to the parent as well
        listener._restore()
        reader.close()
        writer.close()
    if any(signal.SIGINT in listener._signals for listener in taken):
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    _release_signals()


os.register_at_fork(
    before=_hold_signals, after_in_parent=_release_signals, after_in_child=_forget_in_child
)
