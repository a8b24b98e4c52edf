"""A rank that dies ends the run: the others learn of it, name it, and end within a stated time.

By itself a collective waits for a rank that is gone until the backend's timeout, half an hour or for ever.
Here every rank holds one TCP connection to rank 0, over which nothing is said while all is well. The
kernel does the watching: it closes the connections of a process that ends, however it ends, and finds a
link or a host that is gone by keepalive probes. So no rank is taken for dead because it is busy, stopped
in a debugger, or holds the interpreter's lock for a minute.

A rank notices within milliseconds that a process died, and within LINK_TIMEOUT_S that a link to or from
rank 0 is cut (one between two other ranks is left to the backend). Then its main thread has `grace_s`
to fail by itself, as gloo lets it within milliseconds; after that the watching thread ends the process.

Messages are lines of JSON. To rank 0: {"hello": rank, "token", "host", "pid"}, answered by
{"welcome": true}. Both ways: {"bye": true} at an orderly end, {"failed": text} before an end by an error of
one's own. From rank 0: {"lost": rank, "host", "pid", "how"}.
"""

from __future__ import annotations

import hmac
import json
import os
import secrets
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from seft_ds.console import on_failure
from seft_ds.errors import RunError

if TYPE_CHECKING:
    from seft_ds.distributed.collectives import Ranks

# A silent peer is asked after 5 s, then each 5 s; with four questions unanswered, 25 s after its last
# word, the connection is given up. The kernel's timers may be late, and a question may just have been
# answered when the link is cut: never more than one more interval.
KEEP_IDLE_S, KEEP_INTERVAL_S, KEEP_COUNT = 5, 5, 4
SILENCE_S = KEEP_IDLE_S + KEEP_COUNT * KEEP_INTERVAL_S
LINK_TIMEOUT_S = SILENCE_S + KEEP_INTERVAL_S
# Limits what is sent but not acknowledged, and (in Linux) overrules KEEP_COUNT; it is compared when a
# question is due, so it has to be a little under that moment.
USER_TIMEOUT_MS = 1000 * (SILENCE_S - 1)

HELLO_S = 10.0  # who connects has to say hello within this
CONNECT_S, WELCOME_S = 5.0, 10.0  # per address of rank 0; for its answer
MEET_S = 40.0  # all ranks have joined or given up by then, or one of them is dead
SETTLE_S = 10.0  # a GPU's driver may keep a dead process's connections open for seconds
TICK_S = 0.1  # while something has to happen at a certain time
MAX_LINE_BYTES = 8192
MAX_TEXT_CHARS = 500  # at most 12 bytes each in JSON
MAX_STRANGERS = 64  # connections that have not said hello

DIED = "died: its connection closed"
SILENT = f"can't be reached: no answer for {SILENCE_S} s"
ABSENT = f"can't be reached: it didn't join within {MEET_S:.0f} s"

End = Callable[[str], None]
T = TypeVar("T")


@dataclass(frozen=True)
class Lost:
    """A rank that the run has lost, and how."""

    rank: int
    host: str
    pid: int
    how: str

    def __str__(self) -> str:
        return f"rank {self.rank} (pid {self.pid} on {self.host}) {self.how}"


class _Place(NamedTuple):
    """Where a rank runs; for rank 0 also how to reach its listener."""

    host: str
    pid: int
    port: int
    token: str


class _Link:
    """One connection and the lines that come over it."""

    def __init__(self, sock: socket.socket, rank: int | None) -> None:
        sock.setblocking(False)
        _keep_alive(sock)
        self.sock, self.rank = sock, rank  # rank None: a stranger
        self.since_s = time.monotonic()
        self._rest = b""

    def send(self, message: dict[str, Any]) -> None:
        """A line is small and the buffer empty, so it goes at once or, to a dead peer, not at all."""
        with suppress(OSError):
            self.sock.send(json.dumps(message).encode() + b"\n")

    def receive(self) -> tuple[list[bytes], str | None]:
        """The lines that have come, and how the connection ended (None: it has not)."""
        try:
            data = self.sock.recv(MAX_LINE_BYTES)
        except BlockingIOError:
            return [], None
        except (ConnectionResetError, BrokenPipeError):
            return [], DIED
        except OSError:  # timed out, no route
            return [], SILENT
        *lines, self._rest = (self._rest + data).split(b"\n")
        junk = len(self._rest) > MAX_LINE_BYTES
        return lines, DIED if not data or junk else None


class Watch:
    """This rank's end of the watch over all ranks. `watch_peers` makes it."""

    hint: str | Callable[[], str] = ""
    """What to do after a loss, such as "resume with --resume auto"; told at the end of the line."""

    def __init__(self, rank: int, places: list[_Place], grace_s: float, end: End) -> None:
        self.rank = rank
        self._places, self._grace_s, self._end = places, grace_s, end
        self._missing = set(range(1, len(places))) if rank == 0 else {0}
        self._links: list[_Link] = []
        self._listener: socket.socket | None = None
        self._joined, self._noticed = threading.Event(), threading.Event()
        self._lost: Lost | None = None
        self._meet_by = self._end_at = 0.0
        self._farewell: dict[str, Any] | None = None
        self._thread: threading.Thread | None = None  # None: one rank, nothing to watch

    @property
    def lost(self) -> Lost | None:
        """The first rank that was lost."""
        return self._lost

    def wait_lost(self, timeout_s: float) -> Lost | None:
        """The lost rank, waited for: an error of the communication may be noticed before its cause."""
        if self._thread is not None and self._farewell is None:
            self._noticed.wait(timeout_s)
        return self._lost

    def failed(self, text: str) -> None:
        """Tell the peers that this rank ends by an error of its own, and stop watching."""
        self._leave({"failed": text[:MAX_TEXT_CHARS]})

    def close(self) -> None:
        """Leave in order, so that the peers don't take it for a death. More than once is fine."""
        self._leave({"bye": True})

    def explain(self, error: BaseException) -> str | None:
        """What to tell instead of the traceback when `error` comes from the loss of a peer.

        For any other error None, and the peers have been told.
        """
        if not isinstance(error, (ValueError, RunError, KeyboardInterrupt, SystemExit)):
            # gloo and NCCL raise these; no need to wait for the cause of, say, a KeyError.
            distant = isinstance(error, (RuntimeError, OSError))
            lost = self.wait_lost(SETTLE_S if distant else 0)
            if lost is not None:
                return self._line(lost)
        self.failed(_in_one_line(error))
        return None

    def _line(self, lost: Lost) -> str:
        hint = self.hint
        told = hint if isinstance(hint, str) else _within(2.0, hint)  # it may read a dead disk
        return f"{lost}; {told}" if told else str(lost)

    # From here on the watching thread, which alone touches the connections once it runs.

    def _start(self, listener: socket.socket | None, link: _Link | None) -> None:
        self._selector = selectors.DefaultSelector()
        self._waker, self._woken = socket.socketpair()
        self._selector.register(self._woken, selectors.EVENT_READ, lambda: None)
        if listener is not None:
            self._listener = listener
            self._selector.register(listener, selectors.EVENT_READ, self._accept)
        if link is not None:
            self._add(link)
        self._meet_by = time.monotonic() + MEET_S
        self._thread = threading.Thread(target=self._run, name="seft-liveness", daemon=True)
        self._thread.start()

    def _leave(self, farewell: dict[str, Any]) -> None:
        """Have the thread say it and close everything."""
        if self._thread is None or self._farewell is not None:
            return
        self._farewell = farewell
        with suppress(ValueError):
            on_failure.remove(self.explain)
        with suppress(OSError):  # it has ended and closed its end
            self._waker.send(b".")
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout=5)

    def _run(self) -> None:
        try:
            while self._farewell is None and not self._time_is_up():
                timed = self._missing or self._lost or any(k.rank is None for k in self._links)
                for key, _ in self._selector.select(TICK_S if timed else None):
                    key.data()
            if self._farewell:
                self._tell(self._farewell)
        finally:
            self._close_all()

    def _close_all(self) -> None:
        self._selector.close()
        for link in self._links:
            link.sock.close()
        if self._listener is not None:
            self._listener.close()
        self._waker.close()
        self._woken.close()

    def _time_is_up(self) -> bool:
        """Do what is due by now; whether it was the end."""
        now = time.monotonic()
        for link in [k for k in self._links if k.rank is None and now > k.since_s + HELLO_S]:
            self._drop(link)
        if self._missing and now > self._meet_by:
            self._lose(self._named(min(self._missing), ABSENT))
        if self._lost is None or now < self._end_at:
            return False
        line = f"error on rank {self.rank}: {self._line(self._lost)}"
        if self._farewell is None:  # else the main thread has come to an end of its own meanwhile
            self._end(line)
        return True

    def _accept(self) -> None:
        assert self._listener is not None
        with suppress(OSError):  # gone again
            self._add(_Link(self._listener.accept()[0], None))
        strangers = [k for k in self._links if k.rank is None]
        if len(strangers) > MAX_STRANGERS:
            self._drop(strangers[0])  # a rank says hello at once, so the oldest is none

    def _add(self, link: _Link) -> None:
        self._links.append(link)
        self._selector.register(link.sock, selectors.EVENT_READ, lambda: self._read(link))

    def _drop(self, link: _Link) -> None:
        if link in self._links:
            self._links.remove(link)
            self._selector.unregister(link.sock)
            link.sock.close()

    def _read(self, link: _Link) -> None:
        if link not in self._links:  # dropped for another event of the same moment
            return
        lines, ending = link.receive()
        for line in lines:
            if link in self._links:
                self._hear(link, _parse(line))
        if ending is not None and link in self._links:
            self._drop(link)
            if link.rank is not None and link.rank not in self._missing:
                self._lose(self._named(link.rank, ending))

    def _hear(self, link: _Link, message: dict[str, Any]) -> None:
        if link.rank is None:
            self._greet(link, message)
        elif "welcome" in message:
            self._missing.clear()
            self._joined.set()
        elif "bye" in message:
            self._drop(link)
        elif "failed" in message:
            self._lose(self._named(link.rank, f"stopped: {message['failed']}"))
        elif "lost" in message:
            self._lose(Lost(message["lost"], message["host"], message["pid"], message["how"]))

    def _greet(self, link: _Link, message: dict[str, Any]) -> None:
        """Take the stranger as a rank, or drop it for anything but the hello of one that is missing."""
        rank = message.get("hello")
        if (
            type(rank) is not int  # JSON's true would do as 1, and a list can't be looked up
            or rank not in self._missing
            or not _same(message, _hello(rank, self._places))
        ):
            self._drop(link)
            return
        link.rank = rank
        self._missing.discard(rank)
        link.send({"welcome": True})
        if not self._missing and self._listener is not None:
            self._selector.unregister(self._listener)
            self._listener.close()  # nobody else is expected

    def _lose(self, lost: Lost) -> None:
        """Note the first loss, and pass it on before this rank can end because of it."""
        if self._lost is not None:
            return
        if self.rank == 0:
            told = asdict(lost)
            self._tell({"lost": told.pop("rank"), **told}, but=lost.rank)
        self._end_at = time.monotonic() + self._grace_s
        self._lost = lost
        self._noticed.set()

    def _tell(self, message: dict[str, Any], but: int | None = None) -> None:
        for link in self._links:
            if link.rank is not None and link.rank != but:
                link.send(message)

    def _named(self, rank: int, how: str) -> Lost:
        return Lost(rank, self._places[rank].host, self._places[rank].pid, how)

    def _forget(self) -> None:
        """In a forked child, such as a data loader's worker: it would keep a dead rank's connections open.

        Nothing is said or unregistered, because those connections and their selector are the parent's.
        """
        if self._thread is not None and self._farewell is None:
            self._farewell = {}
            self._close_all()


def end_process(line: str) -> None:
    """Say `line` and end at once: exit handlers and destructors may wait for the lost peer."""
    # Past sys.stderr, whose lock may be held, and on a line of its own below a progress bar.
    _within(1.0, lambda: os.write(2, f"\n{line}\n".encode()))
    _within(1.0, sys.stdout.flush)
    os._exit(1)


_current = Watch(0, [], 0.0, end_process)


def current_watch() -> Watch:
    """The watch that `watch_peers` made last; before that, one that watches nothing."""
    return _current


def watch_peers(ranks: Ranks, grace_s: float = 5.0, end: End = end_process) -> Watch:
    """Watch over all ranks from now on, and let `console.run` know; a collective.

    When a rank is lost, the others' main threads have `grace_s` to fail by themselves; then `end` gets the
    line to say and has to end the process.
    """
    global _current
    _current.close()
    if ranks.size == 1:
        _current = Watch(0, [], grace_s, end)
        return _current
    watch, trouble = join(ranks, grace_s, end)
    _current = watch
    on_failure.append(watch.explain)
    troubles = [t for t in ranks.gather_object(trouble) if t]
    if troubles:  # the run itself may be fine: ports are often closed between machines
        watch.close()
        if ranks.rank == 0:
            print(
                f"the ranks can't watch each other ({troubles[0]}): when one dies, the others wait for "
                "the backend's timeout",
                file=sys.stderr,
            )
    return watch


def join(ranks: Ranks, grace_s: float, end: End) -> tuple[Watch, str]:
    """This rank's end of a new watch, at work; and what kept the rank from joining the others, or ""."""
    listener = _listen(ranks.size) if ranks.rank == 0 else None
    port, token = (listener.getsockname()[1], secrets.token_hex(16)) if listener else (0, "")
    places = ranks.gather_object(_Place(socket.gethostname(), os.getpid(), port, token))
    watch = Watch(ranks.rank, places, grace_s, end)
    if listener is not None:
        watch._start(listener, None)
        return watch, ""
    host = os.environ.get("MASTER_ADDR") or "127.0.0.1"
    where = f"rank {ranks.rank} got no answer from rank 0 at {host}, port {places[0].port}"
    try:
        link = _dial(host, ranks.rank, places)
    except OSError as error:
        watch._start(None, None)  # which still notices that rank 0 has died, if that is the reason
        return watch, f"{where}: {error}"
    watch._start(None, link)
    return watch, "" if watch._joined.wait(WELCOME_S) else where


def _listen(size: int) -> socket.socket:
    """On a free port of all interfaces: by which one the others come is not known here."""
    backlog = size + MAX_STRANGERS
    try:
        listener = socket.create_server(
            ("", 0), family=socket.AF_INET6, backlog=backlog, dualstack_ipv6=True
        )
    except (OSError, ValueError):  # no IPv6 here
        listener = socket.create_server(("", 0), backlog=backlog)
    listener.setblocking(False)
    return listener


def _dial(host: str, rank: int, places: list[_Place]) -> _Link:
    sock = socket.create_connection((host, places[0].port), timeout=CONNECT_S)
    link = _Link(sock, 0)
    link.send(_hello(rank, places))
    return link


def _hello(rank: int, places: list[_Place]) -> dict[str, Any]:
    """The token keeps out whoever connects by mistake; it is no secret to who listens on the network."""
    place = places[rank]
    return {"hello": rank, "token": places[0].token, "host": place.host, "pid": place.pid}


def _same(message: dict[str, Any], wanted: dict[str, Any]) -> bool:
    came, due = (json.dumps(m, sort_keys=True).encode() for m in (message, wanted))
    return hmac.compare_digest(came, due)


def _parse(line: bytes) -> dict[str, Any]:
    """The message in a line; an empty one for whatever is none."""
    try:
        message = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return message if isinstance(message, dict) else {}


def _keep_alive(sock: socket.socket) -> None:
    """Have the kernel look after the connection; not every platform has all of the options."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (
        ("TCP_NODELAY", 1),
        ("TCP_KEEPIDLE", KEEP_IDLE_S),
        ("TCP_KEEPINTVL", KEEP_INTERVAL_S),
        ("TCP_KEEPCNT", KEEP_COUNT),
        ("TCP_USER_TIMEOUT", USER_TIMEOUT_MS),
    ):
        option = getattr(socket, name, None)
        if option is not None:
            sock.setsockopt(socket.IPPROTO_TCP, option, value)


def _in_one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    if isinstance(error, (ValueError, RunError)) or (isinstance(error, KeyboardInterrupt) and text):
        return text
    return f"{type(error).__name__}: {text}".removesuffix(": ")


def _within(seconds: float, work: Callable[[], T]) -> T | None:
    """What `work` returns, or None if it fails or takes longer: a full pipe or a dead disk may hold it."""
    results: list[T] = []

    def body() -> None:
        with suppress(Exception):
            results.append(work())

    thread = threading.Thread(target=body, daemon=True)
    with suppress(RuntimeError):  # no new thread at the interpreter's end
        thread.start()
        thread.join(seconds)
    return results[0] if results else None


os.register_at_fork(after_in_child=lambda: _current._forget())
