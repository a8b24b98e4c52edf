"""One repair run from checked arguments to a sparse model, top to bottom."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from seft_ds.api import attach
from seft_ds.baselines.methods import find_method
from seft_ds.checkpoint.from_checkpoint import export_checkpoint
from seft_ds.checkpoint.model import save_model
from seft_ds.checkpoint.verify import RECORD_NAME
from seft_ds.distributed.agreement import all_or_none
from seft_ds.distributed.collectives import ProcessRanks
from seft_ds.distributed.liveness import current_watch
from seft_ds.memory import Plan
from seft_ds.signals import nothing_left
from seft_ds.targets import Target
from seft_ds.train.adapters import train_adapters
from seft_ds.train.callback import SeftCallback
from seft_ds.train.closing import describe_targets, finish
from seft_ds.train.job import (
    Job,
    accept,
    check_loaded,
    load_model,
    make_trainer,
    read_data,
)
from seft_ds.train.opening import record_facts, run_facts
from seft_ds.train.planning import plan_of_run, table
from seft_ds.train.progress import hide_bars
from seft_ds.train.resume import steps_of
from seft_ds.zero.initialize import find_attached


def repair(argv: list[str], ranks: ProcessRanks) -> None:
    """Load, train, save, report. Every rank calls it. What can be refused is refused before training."""
    hide_bars(ranks)
    job = accept(argv, ranks)
    if all_or_none(ranks, lambda: is_finished(job.output, job.checkpoint)):
        all_or_none(ranks, lambda: close_finished(job))
        return
    adapts = find_method(job.arguments.method.method).adapter is not None
    (train_adapters if adapts else train_slots)(job)


def train_slots(job: Job) -> None:
    """A run of the SEFT engine: the method itself, and those that are settings of it."""
    data = read_data(job)
    model = load_model(job)
    attach(model, job.arguments.deepspeed)
    targets = [t.target for t in find_attached(model).targets]  # type: ignore[union-attr]
    check_loaded(targets, job.files)
    planned = plan_memory(job, model, targets)
    if job.arguments.run.dry_run and planned is not None:
        job.say(describe_plan(job, planned))
    callback = SeftCallback(
        journal_dir=job.output, about=run_facts(job.arguments, data.begins_with)
    )
    callback.memory.plan, callback.tells = planned, False  # the job does
    trainer = make_trainer(job, model, data, callback, describe_targets(targets))
    if trainer is None:
        return
    current_watch().hint = lambda: how_to_go_on(callback, job.output)
    callback.hold_signals = True  # a signal during the final save must not end it
    try:
        checkpoint = None if job.checkpoint is None else str(job.checkpoint)
        trainer.train(resume_from_checkpoint=checkpoint)
        if callback.stopped_by:
            job.say(f"stopped by {callback.stopped_by}: {how_to_go_on(callback, job.output)}")
            return
        about = record_facts(job.arguments, data.begins_with)
        record = save_model(
            trainer.model_wrapped,
            job.folder,
            job.output,
            about,
            trainer.tokenizer_changes,
            job.files,
        )
        if job.ranks.rank == 0:
            finish(job.output, record)
    finally:
        callback.close_signals()
        nothing_left()


def plan_memory(job: Job, model: Any, targets: list[Target]) -> Plan | None:
    """Bytes of each part on a rank, predicted; None where that can't be said.

    Raises:
        ValueError, AttributeError: in a dry run only. A real one does without, and what the engine refuses is
            told by the engine.
    """
    run = job.arguments.run
    try:
        return plan_of_run(model, targets, run, job.arguments.deepspeed, job.dtype)
    except (ValueError, AttributeError):
        if run.dry_run:
            raise
        return None


def describe_plan(job: Job, planned: Plan) -> str:
    """The plan as a table."""
    ranks = job.arguments.run.world_size
    here = int(os.environ.get("LOCAL_WORLD_SIZE") or ranks)
    return f"memory of a rank during training, on {ranks} ranks\n{table(planned, here)}"


def how_to_go_on(callback: SeftCallback, output: Path) -> str:
    """For the line that a run ends with before its time."""
    last = callback.last_checkpoint
    if last is None:
        return "no checkpoint has been written, so the run starts anew (--save_strategy steps writes some)"
    own = last.resolve().is_relative_to(output.resolve())
    return f"the same command with --resume {'auto' if own else last} goes on from {last}"


def is_finished(output: Path, checkpoint: Path | None) -> bool:
    """Whether the run in `output` has taken its last step, so that only the model may be missing."""
    if checkpoint is None or not checkpoint.resolve().is_relative_to(output.resolve()):
        return False
    step, of = steps_of(checkpoint)
    return step >= of


def close_finished(job: Job) -> None:
    """On rank 0: say that there is nothing to do, or write the model that a killed run did not come to."""
    if job.ranks.rank:
        return
    output = job.output
    if (output / RECORD_NAME).is_file():
        print(f"the run in {output} is finished: {RECORD_NAME} and the model are there", flush=True)
        return
    for part in output.glob("*.safetensors*"):  # of a model whose record was never written
        part.unlink()
    assert job.checkpoint is not None
    finish(output, export_checkpoint(job.checkpoint, output, str(job.folder)))
