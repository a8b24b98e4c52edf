"""Several ranks write one directory, and it becomes visible whole or not at all.

1. rank 0 makes a hidden directory beside the target; 2. every rank writes its files into it, synced;
3. rank 0 checks that it sees them all, seals them with a manifest and renames the directory.
After each phase the ranks tell each other how it went: an error on one rank (a full disk, say) ends the
save on all, removes what was written, and leaves earlier checkpoints as they are.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from seft_ds.checkpoint.manifest import (
    FileEntry,
    aside_of,
    find_problems,
    publish,
    seal,
)
from seft_ds.distributed.collectives import Ranks
from seft_ds.errors import RunError

T = TypeVar("T")
_VISIBLE_S = 30.0  # network file systems may show a file to another machine seconds later


def write_together(
    ranks: Ranks,
    target: Path,
    write: Callable[[Path], dict[str, FileEntry]],
    complete: Callable[[Path, dict[str, FileEntry]], dict[str, FileEntry]] | None = None,
    last_good: Path | None = None,
    then: Callable[[], None] | None = None,
) -> None:
    """Make the directory `target` out of what each rank's `write(directory)` puts there. A collective.

    complete: on rank 0, from the entries of all ranks to those of the whole manifest (for files that
        others wrote into the directory).
    last_good: the checkpoint to name if this one can't be written.
    then: done by rank 0 once the directory is visible.

    Raises:
        RunError: on every rank, if it failed on any. ValueError passes through (a mistake of the caller).
    """
    aside = aside_of(target)

    def phase(work: Callable[[], T]) -> list[T]:
        return _on_all(ranks, work, target, aside, last_good)

    phase(lambda: _make_empty(aside) if ranks.rank == 0 else None)
    written = phase(lambda: write(aside))
    entries = {name: entry for per_rank in written for name, entry in per_rank.items()}
    phase(lambda: _finish(aside, target, entries, complete, then) if ranks.rank == 0 else None)


def check_together(ranks: Ranks, directory: Path) -> None:
    """Are the files those that its manifest covers? Each rank reads its share. A collective.

    Raises:
        ValueError: on every rank, naming what is damaged.
    """
    mine = find_problems(directory, share=(ranks.rank, ranks.size))
    problems = sorted({p for per_rank in ranks.gather_object(mine) for p in per_rank})
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise ValueError(f"the checkpoint {directory} is damaged: {'; '.join(problems[:3])}{more}")


def _on_all(
    ranks: Ranks,
    work: Callable[[], T],
    target: Path,
    aside: Path,
    last_good: Path | None,
) -> list[T]:
    """Every rank's result, or the first error on every rank, with what was written taken away."""
    result, failure, said = None, None, ""
    try:
        result = work()
    except Exception as error:  # whatever it is, the others must not wait
        failure = error
        said = f"{type(error).__name__}: {error}" if not isinstance(error, OSError) else str(error)
        said = said.replace(str(aside), str(target))  # the hidden folder is gone by then
    outcomes = ranks.gather_object((said, result if failure is None else None))
    failed = [(r, text) for r, (text, _) in enumerate(outcomes) if text]
    if not failed:
        return [value for _, value in outcomes]
    if ranks.rank == 0:
        shutil.rmtree(aside, ignore_errors=True)
    if isinstance(failure, (ValueError, RunError)) and len(failed) == ranks.size:
        raise failure
    rank, text = failed[0]
    good = f"the last good checkpoint is {last_good}" if last_good else "there is none before it"
    raise RunError(
        f"the checkpoint {target} could not be written: rank {rank}: {text}; {good}"
    ) from failure


def _make_empty(directory: Path) -> None:
    if directory.exists():  # a save that was interrupted
        shutil.rmtree(directory)
    directory.mkdir(parents=True)


def _finish(
    aside: Path,
    target: Path,
    entries: dict[str, FileEntry],
    complete: Callable[[Path, dict[str, FileEntry]], dict[str, FileEntry]] | None,
    then: Callable[[], None] | None,
) -> None:
    _wait_until_visible(aside, entries)
    if complete is not None:
        entries = complete(aside, entries)
    seal(aside, entries)
    publish(aside, target)
    if then is not None:
        then()


def _wait_until_visible(directory: Path, entries: dict[str, FileEntry]) -> None:
    """See every rank's files at their sizes. OSError where the directory is not shared by all machines."""
    deadline = time.monotonic() + _VISIBLE_S
    for name, entry in entries.items():
        path = directory / name
        while not (path.is_file() and path.stat().st_size == entry.bytes):
            if time.monotonic() > deadline:
                raise OSError(
                    f"{path} was written by another rank, but this machine doesn't see it: checkpoints need "
                    "a directory that all machines share"
                )
            time.sleep(0.2)
