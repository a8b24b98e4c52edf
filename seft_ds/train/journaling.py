"""The journal of a Trainer's run: what every method writes, whether it trains slots or adapters."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from seft_ds.errors import RunError
from seft_ds.report.journal import JOURNAL_NAME, Journal


class JournaledRun(TrainerCallback):
    """Writes the `step` and `eval` lines. Whoever extends it opens the journal and writes the rest.

    Args:
        journal_dir: where `journal.jsonl` goes; default: the Trainer's output_dir.
        about: facts for the journal's first line.
    """

    def __init__(self, journal_dir: str | Path | None, about: dict[str, Any] | None):
        self.journal_dir = journal_dir
        self.about = about or {}
        self.journal: Journal | None = None
        self._started = self._last_log = 0.0
        self._last_tokens = 0

    @property
    def last_checkpoint(self) -> Path | None:
        """The newest checkpoint that is whole."""
        return None

    @property
    def seconds(self) -> float:
        """Since training began."""
        return time.perf_counter() - self._started

    def start_clock(self) -> None:
        self._started = self._last_log = time.perf_counter()

    def open_journal(self, args: TrainingArguments) -> None:
        """On rank 0, when the run directory is ready."""
        folder = Path(self.journal_dir or args.output_dir or ".")
        self.journal = Journal(folder / JOURNAL_NAME)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if self.journal is None or not logs:
            return
        now = time.perf_counter()
        if "loss" in logs:
            tokens = int(logs.get("num_tokens") or state.num_input_tokens_seen or 0)
            self.write(
                "step",
                step=state.global_step,
                loss=float(logs["loss"]),
                learning_rate=logs.get("learning_rate"),
                grad_norm=logs.get("grad_norm"),
                seconds=now - self._last_log,
                tokens=tokens - self._last_tokens,
            )
            self._last_log, self._last_tokens = now, tokens
        for name, value in logs.items():
            if name.startswith("eval_") and name.endswith("loss"):
                self.write("eval", step=state.global_step, name=name, value=float(value))
                self._last_log = now

    def write(self, kind: str, **fields: Any) -> None:
        """One line of the journal. RunError if it can't be written: a full disk, most likely."""
        assert self.journal is not None
        try:
            self.journal.write(kind, **fields)
        except OSError as error:
            raise RunError(
                f"{self.journal.path} can't be written ({error}); the last good checkpoint is "
                f"{self.last_checkpoint}"
            ) from error
