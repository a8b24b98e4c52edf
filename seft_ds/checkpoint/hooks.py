"""Have the engine's own `save_checkpoint` and `load_checkpoint` carry SEFT's state along."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from seft_ds.checkpoint.state import find_tag, load_state, read_meta, save_state
from seft_ds.zero.engine import SparseEvolution


def carry_state(engine: Any, source_dir: str) -> None:
    """Extend both methods of one engine, in place; whoever calls them (Trainer, a loop) gets SEFT too.

    source_dir: the pruned model that the run started from; recorded for `launch/export.py`.
    """
    seft: SparseEvolution = engine.seft
    save, load = engine.save_checkpoint, engine.load_checkpoint

    # `exclude_frozen_parameters` must stay in the signature: Trainer looks for it.
    def save_checkpoint(
        save_dir: str,
        tag: str | None = None,
        client_state: dict | None = None,
        save_latest: bool = True,
        exclude_frozen_parameters: bool = False,
    ) -> Any:
        tag = tag or f"global_step{engine.global_steps}"
        result = save(save_dir, tag, client_state or {}, save_latest, exclude_frozen_parameters)
        save_state(seft, Path(save_dir) / str(tag), source_dir)
        return result

    def load_checkpoint(
        load_dir: str,
        tag: str | None = None,
        load_module_strict: bool = True,
        load_optimizer_states: bool = True,
        load_lr_scheduler_states: bool = True,
        load_module_only: bool = False,
        **kwargs: Any,
    ) -> Any:
        if load_module_only or not load_optimizer_states:
            raise ValueError(
                "a SEFT checkpoint is loaded whole: its weights contain the deltas, whose master values "
                "are in the optimizer's states; leave out load_module_only and load_optimizer_states"
            )
        directory = find_tag(Path(load_dir)) if tag is None else Path(load_dir) / str(tag)
        read_meta(directory)  # complains before DeepSpeed changes anything
        result = load(
            load_dir, tag, load_module_strict, True, load_lr_scheduler_states, False, **kwargs
        )
        load_state(seft, directory)
        return result

    engine.save_checkpoint = save_checkpoint
    engine.load_checkpoint = load_checkpoint
