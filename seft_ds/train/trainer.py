"""TRL's trainer, with checkpoints that become visible whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from transformers.trainer_utils import SaveStrategy
from trl import SFTTrainer

from seft_ds.checkpoint.manifest import FileEntry, checkpoints_in, entries_below, hash_file
from seft_ds.checkpoint.model import save_model
from seft_ds.checkpoint.together import write_together

LOSS_NAME = "loss_since_log_{}.json"  # of each rank


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
        best = self._best(target)

        def write(aside: Path) -> dict[str, FileEntry]:
            self._aside = aside
            try:
                super(SparseSFTTrainer, self)._save_checkpoint(model, trial)
            finally:
                self._aside = None
                seft.last_checkpoint = before
            self._put_best(best, aside / target.name)
            return self._own_files(aside, target.name)

        def complete(aside: Path, entries: dict[str, FileEntry]) -> dict[str, FileEntry]:
            # Trainer put everything into a folder of the checkpoint's name.
            inner = aside / target.name
            for path in inner.iterdir():
                os.replace(path, aside / path.name)
            inner.rmdir()
            return entries_below(aside, {})

        def rotate() -> None:
            keep_last(run_dir, self.args.save_total_limit, target, best)

        write_together(seft.ranks, target, write, complete, before, rotate)
        seft.last_checkpoint = target

    def _own_files(self, aside: Path, folder: str) -> dict[str, FileEntry]:
        """What this rank wrote beside the engine's files, so that rank 0 waits until it sees it."""
        rank, world = self.args.process_index, self.args.world_size
        loss = aside / folder / LOSS_NAME.format(rank)
        loss.write_text(
            json.dumps({"sum": float(self._tr_loss), "since": self._globalstep_last_logged})
        )
        random = "rng_state.pth" if world <= 1 else f"rng_state_{rank}.pth"
        paths = [loss, aside / folder / random]
        return {f"{folder}/{path.name}": hash_file(path) for path in paths}

    def resume_loss(self, checkpoint: Path) -> None:
        """Go on with the sum of losses since the last log line, so that the next one is the same."""
        path = checkpoint / LOSS_NAME.format(self.args.process_index)
        if path.is_file():  # there is none for a rank more than the run had
            saved = json.loads(path.read_text())
            self._tr_loss += saved["sum"]
            self._globalstep_last_logged = saved["since"]

    def _put_best(self, best: str | None, folder: Path) -> None:
        """Trainer may have recorded the hidden place that this checkpoint is first written to."""
        if self.state.best_model_checkpoint != best:
            self.state.best_model_checkpoint = best
            if self.args.should_save:
                self.state.save_to_json(str(folder / "trainer_state.json"))

    def _best(self, target: Path) -> str | None:
        """The best checkpoint, this one included."""
        saves_best = self.args.save_strategy in (
            SaveStrategy.STEPS,
            SaveStrategy.EPOCH,
            SaveStrategy.BEST,
        )
        if saves_best and self.state.best_global_step == self.state.global_step:
            return str(target)
        return self.state.best_model_checkpoint


def keep_last(run_dir: Path, limit: int | None, newest: Path, best: str | None) -> None:
    """Delete the oldest checkpoints beyond `limit`; never the newest one nor the best."""
    if not limit or limit < 1:
        return
    protected = {newest.resolve()} | ({Path(best).resolve()} if best else set())
    kept = checkpoints_in(run_dir)  # newest first
    for old in reversed(kept[max(limit, len(protected)) :]):
        if old.resolve() not in protected:
            shutil.rmtree(old, ignore_errors=True)
