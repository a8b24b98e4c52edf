"""TRL's trainer, with checkpoints that become visible whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from transformers.trainer_utils import SaveStrategy, rotate_checkpoints
from trl import SFTTrainer

from seft_ds.checkpoint.manifest import FileEntry, entries_below
from seft_ds.checkpoint.model import save_model
from seft_ds.checkpoint.together import write_together


class SparseSFTTrainer(SFTTrainer):
    """A checkpoint is written aside by all ranks, sealed with a manifest, and renamed into place; only then
    are older ones deleted (`save_total_limit`). It holds SEFT's state instead of a second copy of the model.
    """

    seft_source = ""
    _aside: Path | None = None  # where a checkpoint is being written

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the sparse model. Inside a checkpoint the weights are in the engine's own files."""
        if not _internal_call:
            save_model(
                self.model_wrapped, self.seft_source, output_dir or str(self.args.output_dir)
            )

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._aside) if self._aside else super()._get_output_dir(trial=trial)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        run_dir = Path(super()._get_output_dir(trial=trial))
        target = run_dir / f"checkpoint-{self.state.global_step}"
        seft = self.model_wrapped.seft
        before = seft.last_checkpoint
        self._note_best(target)

        def write(aside: Path) -> dict[str, FileEntry]:
            self._aside = aside
            try:
                super(SparseSFTTrainer, self)._save_checkpoint(model, trial)
            finally:
                self._aside = None
                seft.last_checkpoint = before
            return {}

        def complete(aside: Path, entries: dict[str, FileEntry]) -> dict[str, FileEntry]:
            # Trainer put everything into a folder of the checkpoint's name.
            inner = aside / target.name
            for path in inner.iterdir():
                os.replace(path, aside / path.name)
            inner.rmdir()
            return entries_below(aside, {})

        write_together(seft.ranks, target, write, complete, before)
        seft.last_checkpoint = target
        if seft.ranks.rank == 0:
            rotate_checkpoints(
                str(run_dir), self.args.save_total_limit, self.state.best_model_checkpoint
            )
        seft.ranks.barrier()

    def _note_best(self, target: Path) -> None:
        """Trainer would record the place that this checkpoint is first written to."""
        saves_best = self.args.save_strategy in (
            SaveStrategy.STEPS,
            SaveStrategy.EPOCH,
            SaveStrategy.BEST,
        )
        if saves_best and self.state.best_global_step == self.state.global_step:
            self.state.best_model_checkpoint = str(target)
