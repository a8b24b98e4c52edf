"""The journal of a Trainer's run: what every method writes, whether it trains slots or adapters."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations.integration_utils import (
    INTEGRATION_TO_CALLBACK,
    get_available_reporting_integrations,
)

from seft_ds.errors import RunError
from seft_ds.report.journal import JOURNAL_NAME, Journal
from seft_ds.train.progress import Topology, peak_gib

# What Trainer and TRL log of an evaluation beside its results.
_NOT_RESULTS = ("_runtime", "_per_second", "_num_tokens", "_entropy", "_mean_token_accuracy")


def check_reporters(names: list[str]) -> None:
    """ValueError for a place to report to that transformers doesn't know, or whose package isn't there."""
    if names in (["none"], ["all"], []):
        return
    there = get_available_reporting_integrations()
    for name in names:
        if name not in INTEGRATION_TO_CALLBACK:
            known = ", ".join(sorted(INTEGRATION_TO_CALLBACK))
            raise ValueError(f"--report_to {name:.40}: wanted none, or some of {known}")
        if name not in there:
            raise ValueError(
                f"--report_to {name}: its package is not installed (pip install {name}); install it, or "
                "leave the flag out"
            )


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
        self.tokens_per_second = 0.0  # between the last two logs, of all ranks
        self.topology: Topology | None = None  # on rank 0, of what evolves
        self.each_weight = False  # in `scalars` too
        self.scalars: dict[str, float] = {}  # the topology's figures at the last log
        self.trainer: Any = None  # whoever sets it has them in TensorBoard, W&B ... too

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
            self.tokens_per_second = (tokens - self._last_tokens) / max(now - self._last_log, 1e-9)
            self._last_log, self._last_tokens = now, tokens
            self._report(args, state, control)
        for name, value in self.results_in(logs).items():
            self.write("eval", step=state.global_step, name=name, value=value)
            self._last_log = now

    @staticmethod
    def results_in(logs: dict[str, Any]) -> dict[str, float]:
        """The results of an evaluation among what Trainer logs."""
        return {
            name: float(value)
            for name, value in logs.items()
            if name.startswith("eval_") and not name.endswith(_NOT_RESULTS)
        }

    def _report(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl
    ) -> None:
        """Sparsity, churn, speed and memory to what `report_to` names.

        Not by Trainer.log: it keeps what it logs in every checkpoint, and these may be two figures a weight.
        """
        if self.topology is not None:
            self.scalars = self.topology.scalars(self.each_weight)
        logs = self.scalars | {"memory_gib": peak_gib()}
        if self.tokens_per_second:
            logs["tokens_per_second"] = self.tokens_per_second
        for callback in self.trainer.callback_handler.callbacks if self.trainer else []:
            if type(callback) in INTEGRATION_TO_CALLBACK.values():
                callback.on_log(args, state, control, logs=dict(logs))

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
