"""Which checkpoint a run goes on from: the newest that is whole, whatever happened to the others."""

from __future__ import annotations

import sys
from pathlib import Path

from seft_ds.checkpoint.layout import find_tag, read_meta
from seft_ds.checkpoint.manifest import checkpoints_in
from seft_ds.checkpoint.together import check_together
from seft_ds.distributed.collectives import Ranks
from seft_ds.json_file import read_object, shown


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
        beside = _as_rank_0_sees(given.parent, ranks)
        others = [p for p in beside if p.resolve() != given.resolve()]
        good = _first_good(others, ranks)[0]
        hint = f"; {good} is whole: --resume {good}" if good else ""
        raise ValueError(f"{error}{hint}") from None
    return given


def _newest_good(output: Path, ranks: Ranks) -> Path | None:
    good, damaged = _first_good(_as_rank_0_sees(output, ranks), ranks)
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


def _as_rank_0_sees(folder: Path, ranks: Ranks) -> list[Path]:
    """The checkpoints in a folder: one list for all ranks, whatever each machine's file system says."""
    names = [p.name for p in checkpoints_in(folder)] if ranks.rank == 0 else []
    return [folder / name for name in ranks.gather_object(names)[0]]


def check_batch(checkpoint: Path, rows: int) -> None:
    """The data position counts in steps, so a step has to be as many rows as before.

    Raises:
        ValueError: `rows` a step over all ranks, where the checkpoint's run took another number.
    """
    before = read_meta(find_tag(checkpoint)).train_batch_size
    if before != rows:
        raise ValueError(
            f"the run that wrote {checkpoint} took {before} rows a step, this one would take {rows}, so that "
            "it would repeat or skip data; change --per_device_train_batch_size or "
            "--gradient_accumulation_steps: their product, times the number of ranks, has to be "
            f"{before}"
        )


def steps_of(checkpoint: Path) -> tuple[int, int]:
    """(steps taken, steps of the whole run) of a Trainer's checkpoint. ValueError if it doesn't say."""
    path = checkpoint / "trainer_state.json"
    try:
        state = read_object(path)
    except ValueError as error:
        raise ValueError(f"{checkpoint} is no checkpoint of launch/finetune.py: {error}") from None
    steps, of = state.get("global_step"), state.get("max_steps")
    if type(steps) is not int or type(of) is not int or not 0 <= steps <= of < 1 << 53:
        raise ValueError(
            f"{path} says step {shown(steps)} of {shown(of)}; the checkpoint is damaged"
        )
    return steps, of


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
