"""Progress for people and for log files: a bar on a terminal, a plain line now and then anywhere else."""

from __future__ import annotations

import io
import re
import sys
import time
from collections.abc import Collection, Iterator
from typing import Any, TypeVar

from tqdm import tqdm

SECONDS = 30.0  # between two lines in a file
Item = TypeVar("Item")


def with_progress(items: Collection[Item], what: str, unit: str, shown: bool) -> Iterator[Item]:
    """The items one by one, with a bar or lines. shown: False on other ranks than the first."""
    if not shown:
        yield from items
        return
    if sys.stderr.isatty():
        yield from tqdm(items, desc=what, unit=unit)
        return
    started = last = time.monotonic()
    for done, item in enumerate(items):
        now = time.monotonic()
        if done and now - last >= SECONDS:
            left = (now - started) / done * (len(items) - done)
            print(f"{what}: {unit} {done} of {len(items)}, {duration(left)} left", flush=True)
            last = now
        yield item


def duration(seconds: float) -> str:
    """As a clock shows it: 4:05, 1:02:09."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class BarsAsLines(io.TextIOBase):
    """A stream that turns the progress bars of libraries into plain lines, and passes on everything else.

    seconds: between two lines; None: no lines at all.
    """

    def __init__(self, stream: Any, seconds: float | None = SECONDS) -> None:
        self._stream, self._seconds = stream, seconds
        self._last = time.monotonic()

    def write(self, text: str) -> int:
        if not text.startswith("\r"):
            if text != "\n":  # with which a bar ends
                self._stream.write(text)
            return len(text)
        bar = re.sub(r"\|.*\|", " ", text).strip()
        if bar and self._seconds is not None and time.monotonic() - self._last >= self._seconds:
            self._stream.write(f"{bar}\n")
            self._last = time.monotonic()
        return len(text)

    def flush(self) -> None:
        self._stream.flush()
