"""One repair run from checked arguments to a sparse model, top to bottom."""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from seft_ds.api import attach
from seft_ds.checkpoint.export import versions
from seft_ds.checkpoint.from_checkpoint import export_checkpoint
from seft_ds.checkpoint.manifest import checkpoints_in, remove_leftovers
from seft_ds.checkpoint.model import save_model
from seft_ds.config import check_batch_sizes
from seft_ds.console import model_folder
from seft_ds.distributed.agreement import agree, all_or_none, file_facts, folder_facts
from seft_ds.distributed.collectives import ProcessRanks
from seft_ds.distributed.liveness import current_watch
from seft_ds.report.card import write_model_card
from seft_ds.report.facts import facts_of
from seft_ds.report.journal import JOURNAL_NAME, read_journal
from seft_ds.report.page import write_report
from seft_ds.targets import Target
from seft_ds.train.arguments import Arguments, model_dtype, parse
from seft_ds.train.callback import SeftCallback
from seft_ds.train.data import describe_sample, load_rows
from seft_ds.train.resume import check_batch, find_checkpoint, steps_of
from seft_ds.train.run_dir import LOCK_NAME, RunLock, set_aside
from seft_ds.train.trainer import SparseSFTTrainer
from seft_ds.zero.initialize import find_attached

CONFIG_NAME = "resolved_config.yaml"
RECORD_NAME = "sparsity.json"


def repair(argv: list[str], ranks: ProcessRanks) -> None:
    """Load, train, save, report. Every rank calls it. What can be refused is refused before training."""
    arguments = all_or_none(ranks, lambda: parse(argv))
    run = arguments.run
    output = Path(str(run.output_dir))
    folder = all_or_none(ranks, lambda: model_folder(arguments.model.model_name_or_path))
    check_agreement(arguments, folder, ranks)
    check_batch_sizes(arguments.deepspeed, ranks.size)
    lock = RunLock()
    all_or_none(ranks, lambda: take_own(output, arguments, lock, ranks))
    checkpoint = find_checkpoint(run.resume, output, ranks)
    all_or_none(ranks, lambda: check_output(output, arguments, folder, checkpoint))
    if checkpoint is not None:
        rows = run.per_device_train_batch_size * run.gradient_accumulation_steps * ranks.size
        all_or_none(ranks, lambda: check_batch(checkpoint, rows))
        if all_or_none(ranks, lambda: is_finished(output, checkpoint)):
            all_or_none(ranks, lambda: close_finished(output, checkpoint, folder, ranks))
            return
    train_rows, eval_rows = read_data(arguments)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    dtype = model_dtype(str(folder), arguments.model.dtype)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, trust_remote_code=False)
    model.config.use_cache = False
    attach(model, arguments.deepspeed)
    targets = [t.target for t in find_attached(model).targets]  # type: ignore[union-attr]
    check_loaded(targets, folder)
    if run.dry_run:
        run.output_dir = tempfile.mkdtemp()  # Trainer insists on a folder
    continued = goes_on(output, checkpoint, run.resume)
    opening = OpenRun(output, arguments, continued, ranks, checkpoint, lock)
    callback = SeftCallback(journal_dir=output, about=run_facts(arguments))
    trainer = SparseSFTTrainer(
        model=model,
        args=run,
        train_dataset=train_rows,
        eval_dataset=eval_rows,
        processing_class=tokenizer,
        callbacks=[opening, callback],
    )
    trainer.seft_source = str(folder)
    opening.trainer = trainer
    if ranks.rank == 0:
        print(describe_targets(targets), describe_sample(trainer, tokenizer), sep="\n", flush=True)
    if run.dry_run:
        shutil.rmtree(str(run.output_dir), ignore_errors=True)
        return
    current_watch().hint = lambda: how_to_go_on(callback, output)
    callback.hold_signals = True  # a signal during the final save must not end it
    try:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        if callback.stopped_by:
            if ranks.rank == 0:
                hint = how_to_go_on(callback, output)
                print(f"stopped by {callback.stopped_by}: {hint}", flush=True)
            return
        about = {"command": " ".join(sys.argv)}
        record = save_model(trainer.model_wrapped, folder, output, about)
        if ranks.rank == 0:
            finish(output, record)
    finally:
        callback.close_signals()


def how_to_go_on(callback: SeftCallback, output: Path) -> str:
    """For the line that a run ends with before its time."""
    last = callback.last_checkpoint
    if last is None:
        return "no checkpoint has been written, so the run starts anew (--save_strategy steps writes some)"
    own = last.resolve().is_relative_to(output.resolve())
    return f"the same command with --resume {'auto' if own else last} goes on from {last}"


def take_own(output: Path, arguments: Arguments, lock: RunLock, ranks: ProcessRanks) -> None:
    """On rank 0, before a run of ours is read: nobody else writes to it, and what interrupted saves left is
    gone (or back, where one was replacing a checkpoint).
    """
    if ranks.rank == 0 and (output / CONFIG_NAME).is_file() and not arguments.run.dry_run:
        check_writable(output)
        lock.take(output)
        remove_leftovers(output)


def is_finished(output: Path, checkpoint: Path) -> bool:
    """Whether the run in `output` has taken its last step, so that only the model may be missing."""
    if not checkpoint.resolve().is_relative_to(output.resolve()):
        return False
    step, of = steps_of(checkpoint)
    return step >= of


def close_finished(output: Path, checkpoint: Path, folder: Path, ranks: ProcessRanks) -> None:
    """On rank 0: say that there is nothing to do, or write the model that a killed run did not come to."""
    if ranks.rank:
        return
    if (output / RECORD_NAME).is_file():
        print(f"the run in {output} is finished: {RECORD_NAME} and the model are there", flush=True)
        return
    for part in output.glob("*.safetensors*"):  # of a model whose record was never written
        part.unlink()
    finish(output, export_checkpoint(checkpoint, output, str(folder)))


def check_agreement(arguments: Arguments, folder: Path, ranks: ProcessRanks) -> None:
    """Were all ranks started with the same command, versions, model and data?

    Raises:
        ValueError: on every rank, naming what differs and on which ranks.
    """
    settings = resolved(arguments)
    for name in ("local_rank", "logging_dir", "run_name", "use_cpu", "dataloader_pin_memory"):
        settings["run"].pop(name, None)  # of one process or machine
    agree(ranks, settings | {"versions": versions()}, "the settings")
    agree(ranks, all_or_none(ranks, lambda: folder_facts(folder)), f"the files of {folder}")
    data = arguments.data
    for file in (data.train_file, data.validation_file):
        if file:
            agree(ranks, all_or_none(ranks, partial(file_facts, Path(file))), f"the data {file}")


def read_data(arguments: Arguments) -> tuple[Dataset, Dataset | None]:
    """Training and evaluation rows; rank 0 of each machine reads first, the others find its cache."""
    data = arguments.data
    with arguments.run.main_process_first(desc="reading the data"):
        rows = load_rows(data.train_file, data.dataset_name, data.dataset_config, "train")
        if data.max_train_samples:
            rows = rows.select(range(min(data.max_train_samples, len(rows))))
        held_out = None
        if data.validation_file:
            held_out = load_rows(data.validation_file, None, None, "train")
    return rows, held_out


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
    if all(path.name == LOCK_NAME for path in output.iterdir()):
        return
    if goes_on(output, checkpoint, run.resume):
        return
    if not run.overwrite:
        found = "no checkpoint there to resume from" if run.resume == "auto" else "a run or files"
        raise ValueError(
            f"--output_dir {output} is not empty ({found}); continue a run that has checkpoints with "
            "--resume auto, replace it with --overwrite, or give another folder"
        )
    used = [model, Path.cwd(), *(Path(f) for f in (data.train_file, data.validation_file) if f)]
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
        (self.output / CONFIG_NAME).write_text(text)


def resolved(arguments: Arguments) -> dict[str, Any]:
    """Everything that was set, as plain data."""
    run = json.loads(arguments.run.to_json_string())
    run.pop("deepspeed", None)
    return {
        "model": vars(arguments.model),
        "data": vars(arguments.data),
        "run": run,
        "deepspeed": arguments.deepspeed,
    }


def run_facts(arguments: Arguments) -> dict[str, Any]:
    """What the journal says of the run beside what the callback knows."""
    run = arguments.run
    return {
        "arguments": {
            "train": arguments.data.train_file or arguments.data.dataset_name,
            "max_steps": run.max_steps,
            "per_device_train_batch_size": run.per_device_train_batch_size,
            "gradient_accumulation_steps": run.gradient_accumulation_steps,
            "max_length": run.max_length,
            "learning_rate": run.learning_rate,
            "lr_scheduler_type": str(run.lr_scheduler_type),
            "optim": str(run.optim),
            "seed": run.seed,
        },
        "hardware": hardware(),
    }


def hardware() -> str:
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    return f"{os.cpu_count()} CPU cores"


def check_loaded(targets: list[Target], folder: Path) -> None:
    """Compare what was loaded with the model's own record, where it has one.

    Raises:
        ValueError: the live counts differ: the files were changed, or loading under ZeRO-3 went wrong.
    """
    path = folder / RECORD_NAME
    if not path.is_file():
        return
    recorded = json.loads(path.read_text())["targets"]
    for target in targets:
        entry = recorded.get(f"{target.name}.weight")
        if entry is not None and entry["live"] != target.target_live:
            raise ValueError(
                f"{target.name}: {target.target_live} nonzero weights were loaded, but {path} says "
                f"{entry['live']}; check the files with launch/verify.py {folder}"
            )


def describe_targets(targets: list[Target]) -> str:
    live, total = sum(t.target_live for t in targets), sum(t.numel for t in targets)
    slots = sum(t.n_slots for t in targets)
    patterns = sorted({f"{p[0]}:{p[1]}" for t in targets if (p := t.pattern)}) or ["unstructured"]
    return (
        f"{len(targets)} sparse weights, {', '.join(patterns)}: {live:,} of {total:,} live "
        f"({1 - live / total:.2%} sparse); {slots:,} slots train ({slots / total:.2%})"
    )


def finish(output: Path, record: dict[str, Any]) -> None:
    """Report and model card, and where everything is."""
    report = write_report(output)
    write_model_card(output, record, facts_of(read_journal(output / JOURNAL_NAME)))
    print(
        f"{record['live']:,} of {record['total']:,} target weights are live, "
        f"{record['sparsity']:.4%} sparse, recounted from the files\n"
        f"model:   {output}\nreport:  {report}\njournal: {output / JOURNAL_NAME}",
        flush=True,
    )
