"""What every run goes through before and while it trains, whatever trains: checks, data, model, Trainer."""

from __future__ import annotations

import shutil
import tempfile
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import IntervalStrategy

from seft_ds.beginning import in_words
from seft_ds.checkpoint.export import versions
from seft_ds.checkpoint.load import load_causal_lm
from seft_ds.checkpoint.model_files import ModelFiles, open_model_files
from seft_ds.checkpoint.verify import RECORD_NAME, read_record
from seft_ds.config import check_batch_sizes
from seft_ds.console import model_folder
from seft_ds.distributed.agreement import agree, all_or_none, file_facts, folder_facts
from seft_ds.distributed.collectives import ProcessRanks
from seft_ds.prune.limits import check_positions
from seft_ds.sparse.layers import has_routers
from seft_ds.targets import Target
from seft_ds.train.arguments import Arguments, model_dtype, parse
from seft_ds.train.chat_template import load_tokenizer, template_of
from seft_ds.train.distill import check_teacher, load_teacher
from seft_ds.train.evaluating import Measurement, prepare_measurement
from seft_ds.train.forms import Rows
from seft_ds.train.journaling import JournaledRun
from seft_ds.train.opening import OpenRun, check_output, goes_on, resolved, take_own
from seft_ds.train.progress import Progress
from seft_ds.train.resume import check_batch, find_checkpoint
from seft_ds.train.rows import check_length
from seft_ds.train.run_dir import RunLock
from seft_ds.train.same_run import RunFacts, check_data, check_settings, settings_of
from seft_ds.train.sample import check_template, describe_sample
from seft_ds.train.sources import read_sources
from seft_ds.train.template import changes_from, use_template
from seft_ds.train.trainer import SparseSFTTrainer


@dataclass
class Job:
    """One run, accepted as far as can be told without loading its model."""

    arguments: Arguments
    ranks: ProcessRanks
    folder: Path  # of the model that is repaired
    files: ModelFiles  # that it has, compared with the model
    output: Path
    checkpoint: Path | None  # that it goes on from
    lock: RunLock
    teacher: ModelFiles | None = None  # of the dense model, for distillation
    settings: dict[str, Any] = field(default_factory=dict)  # that decide about its steps

    @property
    def dtype(self) -> torch.dtype:
        """The dtype to train in."""
        return model_dtype(self.folder, self.arguments.model.dtype)

    def say(self, *lines: str) -> None:
        """Print on rank 0."""
        if self.ranks.rank == 0:
            print(*lines, sep="\n", flush=True)


@dataclass
class Data:
    """The rows of a run, who writes them as tokens, and what is measured beside the loss."""

    rows: Rows
    held_out: Rows | None
    tokenizer: Any
    measurement: Measurement | None
    begins_with: str | None  # each window, and each row cut from a text


def accept(argv: list[str], ranks: ProcessRanks) -> Job:
    """Refuse what can be refused before time is spent. A collective.

    Raises:
        ValueError: on every rank.
    """
    arguments = all_or_none(ranks, lambda: parse(argv))
    run, method = arguments.run, arguments.method
    output = Path(str(run.output_dir))
    folder = all_or_none(ranks, lambda: model_folder(arguments.model.model_name_or_path))
    teacher = None
    if method.distill:
        teacher = all_or_none(ranks, partial(model_folder, method.distill))
        all_or_none(ranks, partial(check_teacher, teacher, folder))
    dense = (arguments.deepspeed.get("seft") or {}).get("dense_model")
    if dense is not None:
        dense = all_or_none(ranks, partial(dense_folder, dense))
    for name in filter(None, (folder, teacher)):
        all_or_none(ranks, partial(check_model_length, run.max_length, name))
    check_agreement(arguments, [f for f in (folder, teacher, dense) if f is not None], ranks)
    files = all_or_none(ranks, partial(open_model_files, folder))
    of_teacher = None
    if teacher is not None:
        of_teacher = all_or_none(ranks, partial(open_model_files, teacher))
    check_batch_sizes(arguments.deepspeed, ranks.size)
    lock = RunLock()
    all_or_none(ranks, lambda: take_own(output, arguments, lock, ranks))
    checkpoint = find_checkpoint(run.resume, output, ranks)
    all_or_none(ranks, lambda: check_output(output, arguments, folder, checkpoint))
    settings = settings_of(resolved(arguments), teacher)
    if checkpoint is not None:
        rows = run.per_device_train_batch_size * run.gradient_accumulation_steps * ranks.size
        all_or_none(ranks, lambda: check_batch(checkpoint, rows))
        all_or_none(ranks, lambda: check_settings(checkpoint, settings))
    job = Job(arguments, ranks, folder, files, output, checkpoint, lock, of_teacher, settings)
    notes = [f"warning: {line}" for f in (files, of_teacher) if f is not None for line in f.notes()]
    if notes:
        job.say(*notes)
    return job


def dense_folder(name: str) -> Path:
    """The folder that `dense_model` names; what is in it is looked at when the targets are known.

    Raises:
        ValueError: it is no folder of a whole model. A hub's name is not looked up.
    """
    if not Path(name).is_dir():
        raise ValueError(
            f"--seft.dense_model {name}: no such folder; give the folder of the model before it was pruned"
        )
    return model_folder(name)


def check_model_length(length_tokens: int | None, folder: Path) -> None:
    """ValueError if the model in a folder can't take rows of --max_length tokens."""
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception:  # what is wrong with it is told when the model is loaded
        return
    check_positions(length_tokens, config, str(folder))


def check_agreement(arguments: Arguments, folders: list[Path], ranks: ProcessRanks) -> None:
    """Were all ranks started with the same command, versions, models and data?

    Raises:
        ValueError: on every rank, naming what differs and on which ranks.
    """
    settings = resolved(arguments)
    for name in ("local_rank", "run_name", "use_cpu", "dataloader_pin_memory", "disable_tqdm"):
        settings["run"].pop(name, None)  # of one process or machine
    agree(ranks, settings | {"versions": versions()}, "the settings")
    for folder in folders:
        agree(ranks, all_or_none(ranks, partial(folder_facts, folder)), f"the files of {folder}")
    data = arguments.data
    template = arguments.run.chat_template_path
    for file in (*(data.train_file or []), data.validation_file, template):
        if file and not Path(file).is_dir() and (file != template or Path(file).exists()):
            agree(ranks, all_or_none(ranks, partial(file_facts, Path(file))), f"the data {file}")


def load_model(job: Job) -> Any:
    """The pruned model as its files have it; under ZeRO-3 partitioned while it loads. A collective.

    Raises:
        ValueError: see `load_causal_lm`.
    """
    attention = job.arguments.model.attn_implementation
    model = load_causal_lm(job.files, job.dtype, job.ranks, attention)
    model.config.use_cache = False
    return model


def check_loaded(targets: list[Target], files: ModelFiles) -> None:
    """Compare what was loaded with the model's own record, where it has one.

    Raises:
        ValueError: the live counts differ: the files were changed, or loading under ZeRO-3 went wrong.
    """
    path = files.folder / RECORD_NAME
    if not path.is_file():
        return
    recorded = read_record(files.folder)["targets"]
    naming = files.naming
    for target in targets:
        names = naming.part_names(target.name, target.experts) if target.experts else []
        for name, live in zip(names or [target.weight_name], target.live_by_part, strict=True):
            entry = recorded.get(naming.in_files(name))
            if entry is not None and entry["live"] != live:
                raise ValueError(
                    f"{name}: {live} nonzero weights were loaded, but {path} says {entry['live']}; check "
                    f"the files with launch/verify.py {files.folder}"
                )


def read_data(job: Job) -> Data:
    """Training and evaluation rows; the first rank of each machine reads first, the others find its cache.

    Raises:
        ValueError: a source can't be read or has no rows of a known form, or the tokenizer can't write them.
    """
    arguments, run = job.arguments, job.arguments.run
    tokenizer = all_or_none(job.ranks, lambda: load_tokenizer(job.folder))
    all_or_none(job.ranks, lambda: use_template(tokenizer, run))
    template = all_or_none(job.ranks, lambda: template_of(tokenizer, run.assistant_only_loss))
    check_length(run, tokenizer)

    lines: list[str] = []

    def read() -> tuple[Rows, Rows | None]:
        lines.clear()
        rows, held_out = read_sources(arguments.data, run.seed, template, lines.append)
        check_template(rows, tokenizer, run)
        return rows, held_out

    def read_early() -> tuple[Rows, Rows | None] | None:
        with suppress(ValueError):  # all ranks will meet it below
            return read()
        return None

    here_first = run.local_process_index == 0
    early = all_or_none(job.ranks, lambda: read_early() if here_first else None)
    try:
        rows, held_out = all_or_none(job.ranks, lambda: early or read())
    finally:
        if lines:
            job.say(*lines)
    measurement = prepare_measurement(arguments.evaluation, arguments.run, tokenizer, job.ranks)
    begins_with = in_words(tokenizer, arguments.run.add_bos_token)
    return Data(rows, held_out, tokenizer, measurement, begins_with)


def make_trainer(
    job: Job,
    model: Any,
    data: Data,
    callback: JournaledRun,
    about: str,
) -> SparseSFTTrainer | None:
    """The Trainer, with everything told that a user wants to see first; None after a dry run.

    Args:
        model: with what trains in it.
        callback: the method's own.
        about: what trains, in a line.
    """
    run, method = job.arguments.run, job.arguments.method
    fit_to_family(run, model)
    if run.dry_run:
        run.output_dir = tempfile.mkdtemp()  # Trainer insists on a folder
    continued = goes_on(job.output, job.checkpoint, run.resume)
    opening = OpenRun(job.output, job.arguments, continued, job.ranks, job.checkpoint, job.lock)
    # Trainer wants rows for any evaluation; a measurement needs none. The tokenizer has its template.
    strategy, template = run.eval_strategy, run.chat_template_path
    run.chat_template_path = None
    if data.held_out is None:
        run.eval_strategy = IntervalStrategy.NO
    trainer = SparseSFTTrainer(
        model=model,
        args=run,
        train_dataset=data.rows,
        eval_dataset=data.held_out,
        processing_class=data.tokenizer,
        callbacks=[opening, callback],
        say=job.say,
    )
    run.eval_strategy, run.chat_template_path = strategy, template
    trainer.tokenizer_changes = changes_from(job.folder, data.tokenizer)
    callback.trainer, callback.each_weight = trainer, run.report_each_weight
    for shown in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(shown)
    trainer.add_callback(Progress(callback))
    trainer.seft_source = str(job.folder)
    trainer.measurement = data.measurement
    opening.trainer = trainer
    facts = RunFacts(job.settings, trainer.train_dataset, job.arguments.data)
    if job.checkpoint is not None:
        found = partial(check_data, job.checkpoint, facts)
        all_or_none(job.ranks, lambda: found() if job.ranks.rank == 0 else None)
    trainer.write_facts = facts.write
    job.say(about, all_or_none(job.ranks, lambda: describe_sample(trainer)))
    if data.measurement is not None:
        data.measurement.check_ids(trainer.model, data.tokenizer)
        job.say(data.measurement.describe())
    if run.dry_run:
        shutil.rmtree(str(run.output_dir), ignore_errors=True)
        return None
    if job.teacher is not None:
        trainer.teacher = load_teacher(job.teacher, job.dtype, trainer.accelerator, job.ranks)
        trainer.distill_weight = method.distill_weight
    return trainer


# Families that come out wrong in training (benchmarks/families.py), and why.
_NOT_TRAINED = {
    "ctrl": "multiplies its embeddings in place, which gives other values under ZeRO-3 and fails under ZeRO-1"
}


def fit_to_family(run: Any, model: Any) -> None:
    """Leave out of the settings what a model's family has no use for.

    Raises:
        ValueError: gradient checkpointing, which is on by default, of a family that has none; a family that
            can't be trained.
    """
    kind = type(model).__name__
    if model.config.model_type in _NOT_TRAINED:
        raise ValueError(
            f"{kind} {_NOT_TRAINED[model.config.model_type]}; this family can't be trained"
        )
    if run.gradient_checkpointing and not model.supports_gradient_checkpointing:
        raise ValueError(
            f"{kind} has no gradient checkpointing, which is on unless you say otherwise; add "
            "--gradient_checkpointing false"
        )
    # Some dense models have the coefficient in their config, and TRL then looks for routers.
    if run.router_aux_loss_coef is None and not has_routers(model):
        run.router_aux_loss_coef = 0.0
