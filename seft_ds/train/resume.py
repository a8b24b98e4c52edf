"""Which checkpoint a run goes on from: the newest that is whole, whatever happened to the others."""

from __future__ import annotations

import sys
from pathlib import Path

from seft_ds.checkpoint.manifest import checkpoints_in, remove_leftovers
from seft_ds.checkpoint.together import check_together
from seft_ds.distributed.collectives import Ranks


def find_checkpoint(resume: str, output: Path, ranks: Ranks) -> Path | None:
    """The checkpoint that --resume means; None: start from the pruned model. A collective.

    Every file is compared with its checksum, each rank a share of them, before the model is loaded.

    Raises:
        ValueError: a checkpoint that was named is damaged, or all those that `auto` could take are.
    """
    if resume == "never":
        return None
    if resume == "auto":
        return _newest_good(output, ranks)
    given = Path(resume)
    try:
        if not given.is_dir():
            raise ValueError(
                f"--resume {resume}: wanted auto, never, or the folder of a checkpoint"
            )
        check_together(ranks, given)
    except ValueError as error:
        others = [p for p in checkpoints_in(given.parent) if p.resolve() != given.resolve()]
        good = _first_good(others, ranks)[0]
        hint = f"; {good} is whole: --resume {good}" if good else ""
        raise ValueError(f"{error}{hint}") from None
    return given


def _newest_good(output: Path, ranks: Ranks) -> Path | None:
    if ranks.rank == 0 and output.is_dir():
        remove_leftovers(
            output
        )  # of saves that were interrupted; brings back what one was replacing
    ranks.barrier()
    good, damaged = _first_good(checkpoints_in(output), ranks)
    if damaged and ranks.rank == 0:
        for text in damaged:
            print(f"warning: {text}", file=sys.stderr)
        if good is not None:
            print(f"resuming from {good}, the newest whole checkpoint", file=sys.stderr)
    if damaged and good is None:
        raise ValueError(
            f"{damaged[0]}; no other checkpoint in {output} is whole: bring one back from a copy, or start "
            "anew with --resume never --overwrite true"
        )
    return good


def _first_good(candidates: list[Path], ranks: Ranks) -> tuple[Path | None, list[str]]:
    """The first that is whole, and what is wrong with those before it."""
    damaged = []
    for path in candidates:
        try:
            check_together(ranks, path)
        except ValueError as error:
            damaged.append(str(error))
        else:
            return path, damaged
    return None, damaged
