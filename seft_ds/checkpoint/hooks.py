"""Have the engine's own `save_checkpoint` and `load_checkpoint` write and read SEFT's checkpoints."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from seft_ds.checkpoint.layout import check_listed, find_tag, read_meta
from seft_ds.checkpoint.loading import check_same_run, load_state
from seft_ds.checkpoint.manifest import FileEntry
from seft_ds.checkpoint.saving import save_state
from seft_ds.checkpoint.together import check_together, write_together
from seft_ds.zero.engine import SparseEvolution


def carry_state(engine: Any, source_dir: str) -> None:
    """Replace both methods of one engine, in place; whoever calls them (Trainer, a loop) gets SEFT's.

    source_dir: the pruned model that the run started from; recorded for `launch/export.py`.
    """
    seft: SparseEvolution = engine.seft

    # `exclude_frozen_parameters` must stay in the signature: Trainer looks for it.
    def save_checkpoint(
        save_dir: str,
        tag: str | None = None,
        client_state: dict | None = None,
        save_latest: bool = True,
        exclude_frozen_parameters: bool = False,
    ) -> bool:
        """As DeepSpeed's: every rank calls it. exclude_frozen_parameters: as checkpoint_base "reference"."""
        name = _plain_tag(tag if tag is not None else f"global_step{engine.global_steps}")
        if not at_boundary(engine):
            raise ValueError(
                "a checkpoint in the middle of gradient accumulation would lose the gradients so far; save "
                f"after {engine.gradient_accumulation_steps()} calls of engine.step()"
            )
        base = "reference" if exclude_frozen_parameters else seft.config.checkpoint_base
        target = Path(save_dir) / name

        def write(directory: Path) -> dict[str, FileEntry]:
            return save_state(seft, directory, source_dir, client_state or {}, base)

        write_together(
            seft.ranks,
            target,
            write,
            last_good=seft.last_checkpoint,
            then=(lambda: _point_to(Path(save_dir), name)) if save_latest else None,
        )
        seft.last_checkpoint = target
        return True

    def load_checkpoint(
        load_dir: str,
        tag: str | None = None,
        load_module_strict: bool = True,
        load_optimizer_states: bool = True,
        load_lr_scheduler_states: bool = True,
        load_module_only: bool = False,
        **kwargs: Any,
    ) -> tuple[str, dict]:
        """As DeepSpeed's, under any number of ranks and ZeRO stage: (path, client_state)."""
        if load_module_only or not load_optimizer_states or not load_lr_scheduler_states:
            raise ValueError(
                "a SEFT checkpoint is loaded whole: its weights contain the deltas, whose master values "
                "and moments belong to them; leave out load_module_only, load_optimizer_states and "
                "load_lr_scheduler_states"
            )
        directory = find_tag(Path(load_dir)) if tag is None else Path(load_dir) / str(tag)
        meta = read_meta(directory)
        check_listed(directory, meta)
        try:
            check_same_run(seft, meta)  # cheap, before all files are read
        except ValueError as error:
            raise ValueError(f"{directory}: {error}") from None
        check_together(seft.ranks, directory)
        client_state = load_state(seft, directory, meta)
        seft.last_checkpoint = directory
        seft.ranks.barrier()
        return str(directory), client_state

    engine.save_checkpoint = save_checkpoint
    engine.load_checkpoint = load_checkpoint


def at_boundary(engine: Any) -> bool:
    """Whether the gradients so far have been used: no step is half accumulated.

    A loop calls `engine.step()` for each micro-batch, and DeepSpeed counts; accelerate calls it at boundaries
    only, which it announces (read in deepspeed 0.19.8, accelerate 1.15.0).
    """
    told = engine._is_gradient_accumulation_boundary
    if told is not None:
        return bool(told)
    return engine.micro_steps % engine.gradient_accumulation_steps() == 0


def _plain_tag(tag: Any) -> str:
    name = str(tag)
    if Path(name).name != name or name.startswith("."):
        raise ValueError(f"checkpoint tag {name!r}: wanted a plain folder name")
    return name


def _point_to(save_dir: Path, tag: str) -> None:
    """DeepSpeed's `latest`, replaced in one step."""
    temporary = save_dir / ".latest.writing"
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(tag)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, save_dir / "latest")
