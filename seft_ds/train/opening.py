"""The run directory before training: what may be written to, replaced or gone on with, and what a run says of
itself.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import TrainerCallback

from seft_ds.checkpoint.manifest import checkpoints_in, remove_leftovers
from seft_ds.checkpoint.verify import RECORD_NAME
from seft_ds.distributed.agreement import all_or_none
from seft_ds.distributed.collectives import ProcessRanks
from seft_ds.report.journal import JOURNAL_NAME, read_journal
from seft_ds.train.arguments import Arguments
from seft_ds.train.reproduce import command_line
from seft_ds.train.run_dir import LOCK_NAME, RunLock, set_aside
from seft_ds.train.trainer import SparseSFTTrainer

CONFIG_NAME = "resolved_config.yaml"
LOGS_NAME = "runs"  # of TensorBoard


def take_own(output: Path, arguments: Arguments, lock: RunLock, ranks: ProcessRanks) -> None:
    """On rank 0, before a run of ours is read: nobody else writes to it, and what interrupted saves left is
    gone (or back, where one was replacing a checkpoint).
    """
    if ranks.rank == 0 and (output / CONFIG_NAME).is_file() and not arguments.run.dry_run:
        check_writable(output)
        lock.take(output)
        remove_leftovers(output)


def goes_on(output: Path, checkpoint: Path | None, resume: str) -> bool:
    """Whether the run in `output` itself goes on: from a checkpoint of its own, or, if it ended before its
    first one and `--resume auto` was asked for, from the start.
    """
    if checkpoint is not None:
        return checkpoint.resolve().is_relative_to(output.resolve())
    unfinished = (output / CONFIG_NAME).is_file() and not (output / RECORD_NAME).is_file()
    return resume == "auto" and unfinished


def check_output(output: Path, arguments: Arguments, model: Path, checkpoint: Path | None) -> None:
    """Refuse to write over what is there, before any time is spent.

    Raises:
        ValueError: output_dir holds something, and neither a resume from a checkpoint in it nor an
            --overwrite of a run explains it; or it holds what this run reads.
    """
    run, data = arguments.run, arguments.data
    if not run.dry_run:
        check_writable(output)
    if run.dry_run or not output.is_dir():
        return
    if only_a_failed_start(output):
        return
    if goes_on(output, checkpoint, run.resume):
        return
    if not run.overwrite:
        found = "no checkpoint there to resume from" if run.resume == "auto" else "a run or files"
        raise ValueError(
            f"--output_dir {output} is not empty ({found}); continue a run that has checkpoints with "
            "--resume auto, replace it with --overwrite, or give another folder"
        )
    dense = (arguments.deepspeed.get("seft") or {}).get("dense_model")
    files = (*(data.train_file or []), data.validation_file, arguments.method.distill, dense)
    used = [model, Path.cwd(), *(Path(f) for f in files if f)]
    for path in used:
        if path.resolve().is_relative_to(output.resolve()):
            raise ValueError(
                f"--overwrite would delete {path}, which this run needs; give another folder"
            )
    if not any((output / name).is_file() for name in (CONFIG_NAME, JOURNAL_NAME)):
        raise ValueError(
            f"--overwrite replaces runs only, and {output} has neither {CONFIG_NAME} nor "
            f"{JOURNAL_NAME}; give another folder"
        )


def only_a_failed_start(output: Path) -> bool:
    """Whether the folder is as good as empty: a run that was started there ended before its first step."""
    names = {path.name for path in output.iterdir()}
    if not names <= {LOCK_NAME, CONFIG_NAME, JOURNAL_NAME, LOGS_NAME}:
        return False
    if LOGS_NAME in names and CONFIG_NAME not in names:
        return False  # of somebody else
    return JOURNAL_NAME not in names or not _has_steps(output / JOURNAL_NAME)


def _has_steps(journal: Path) -> bool:
    try:
        return any(record["kind"] != "run" for record in read_journal(journal))
    except (ValueError, OSError):
        return True  # damaged, so that nobody knows


def check_writable(output: Path) -> None:
    """ValueError where the run could not write, such as a read-only mount. Leaves nothing behind."""
    place = output
    while not place.exists():  # the folders on the way are made when training begins
        place = place.parent
    try:
        if not place.is_dir():
            raise NotADirectoryError(f"{place} is a file")
        with tempfile.TemporaryFile(dir=place) as file:
            file.write(b"x")
    except OSError as error:
        raise ValueError(
            f"--output_dir {output} can't be written to ({error}); give a folder on a file system that can"
        ) from None


class OpenRun(TrainerCallback):
    """Makes the run directory ready when training begins: the engine and the checkpoint are accepted by
    then, so that nothing old is deleted for a run that is refused."""

    trainer: SparseSFTTrainer  # set when it is there

    def __init__(
        self,
        output: Path,
        arguments: Arguments,
        goes_on: bool,
        ranks: ProcessRanks,
        checkpoint: Path | None,
        lock: RunLock,
    ):
        self.output, self.arguments, self.ranks = output, arguments, ranks
        self.goes_on, self.checkpoint, self.lock = goes_on, checkpoint, lock
        self.old: list[Path] = []
        if output.is_dir():
            # Of a run that goes on only the model, which is made anew; of one that is replaced, all.
            model = [*output.glob("*.safetensors*"), output / RECORD_NAME]
            everything = [p for p in output.iterdir() if p.name != LOCK_NAME]
            self.old = model if goes_on else everything

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        all_or_none(self.ranks, lambda: self._make_ready(state.global_step))
        if self.checkpoint is not None:
            self.trainer.resume_loss(self.checkpoint)
            # For messages: Trainer's folder, not the engine's in it.
            self.trainer.model_wrapped.seft.last_checkpoint = self.checkpoint

    def _make_ready(self, step: int) -> None:
        """On rank 0: what is old goes, what is needed is made. step: from which the run goes on."""
        if self.ranks.rank:
            return
        self.output.mkdir(parents=True, exist_ok=True)
        self.lock.take(self.output)
        for old in self.old:
            shutil.rmtree(old) if old.is_dir() else old.unlink(missing_ok=True)
        if self.goes_on:
            for path in set_aside(checkpoints_in(self.output), step):
                print(
                    f"warning: the run goes on from step {step}; kept aside: {path}",
                    file=sys.stderr,
                )
        text = yaml.safe_dump(resolved(self.arguments), sort_keys=False)
        (self.output / CONFIG_NAME).write_text(text, encoding="utf-8")


def resolved(arguments: Arguments) -> dict[str, Any]:
    """Everything that was set, as plain data."""
    run = json.loads(arguments.run.to_json_string())
    run.pop("deepspeed", None)
    return {
        "method": vars(arguments.method),
        "model": vars(arguments.model),
        "data": vars(arguments.data),
        "evaluation": vars(arguments.evaluation),
        "run": run,
        "deepspeed": arguments.deepspeed,
    }


def run_facts(arguments: Arguments, begins_with: str | None) -> dict[str, Any]:
    """What the journal says of the run beside what the callback knows."""
    run, data = arguments.run, arguments.data
    return {
        "method": arguments.method.method,
        "begins_with": begins_with,
        "arguments": {
            "train": ", ".join([*(data.train_file or []), *(data.dataset_name or [])]),
            "max_steps": run.max_steps,
            "per_device_train_batch_size": run.per_device_train_batch_size,
            "gradient_accumulation_steps": run.gradient_accumulation_steps,
            "max_length": run.max_length,
            "learning_rate": run.learning_rate,
            "lr_scheduler_type": plain(run.lr_scheduler_type),
            "optim": plain(run.optim),
            "seed": run.seed,
            **method_facts(arguments),
        },
        "resolved": resolved(arguments),
        "hardware": hardware(),
    }


def plain(value: Any) -> str:
    """The word that a user would write for one of transformers' choices."""
    return str(getattr(value, "value", value))


def method_facts(arguments: Arguments) -> dict[str, Any]:
    """Of the method's arguments those that were used."""
    method = arguments.method
    facts: dict[str, Any] = {}
    if method.distill:
        facts |= {"distilled_from": method.distill, "distill_weight": method.distill_weight}
    return facts


def record_facts(arguments: Arguments, begins_with: str | None) -> dict[str, Any]:
    """What `sparsity.json` says of the run beside what the engine knows."""
    return {
        "method": arguments.method.method,
        "base_model": arguments.model.model_name_or_path,  # by hub name, where it was given so
        "command": command_line(),
        "begins_with": begins_with,
        **method_facts(arguments),
    }


def hardware() -> str:
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    return f"{os.cpu_count()} CPU cores"
