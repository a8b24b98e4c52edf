"""One repair run from checked arguments to a sparse model, top to bottom."""

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
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint
from trl import SFTTrainer

from seft_ds.api import attach
from seft_ds.checkpoint.model import save_model
from seft_ds.config import check_batch_sizes
from seft_ds.console import model_folder
from seft_ds.distributed.collectives import ProcessRanks
from seft_ds.report.card import write_model_card
from seft_ds.report.facts import facts_of
from seft_ds.report.journal import JOURNAL_NAME, read_journal
from seft_ds.report.page import write_report
from seft_ds.targets import Target
from seft_ds.train.arguments import Arguments, model_dtype
from seft_ds.train.callback import SeftCallback
from seft_ds.train.data import describe_sample, load_rows
from seft_ds.zero.initialize import find_attached

CONFIG_NAME = "resolved_config.yaml"
RECORD_NAME = "sparsity.json"


class SparseSFTTrainer(SFTTrainer):
    """TRL's trainer, whose checkpoints hold SEFT's state instead of a second copy of the model."""

    seft_source = ""

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the sparse model. Inside a checkpoint the weights are in the engine's own files."""
        if not _internal_call:
            save_model(
                self.model_wrapped, self.seft_source, output_dir or str(self.args.output_dir)
            )


def repair(arguments: Arguments, ranks: ProcessRanks) -> None:
    """Load, train, save, report. Every rank calls it. What can be refused is refused before training."""
    run = arguments.run
    check_batch_sizes(arguments.deepspeed, ranks.size)
    output = Path(str(run.output_dir))
    folder = model_folder(arguments.model.model_name_or_path)
    checkpoint = find_checkpoint(run.resume, output)
    check_output(output, arguments, folder, checkpoint)
    train_rows, eval_rows = read_data(arguments)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    dtype = model_dtype(str(folder), arguments.model.dtype)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    model.config.use_cache = False
    attach(model, arguments.deepspeed)
    targets = [t.target for t in find_attached(model).targets]  # type: ignore[union-attr]
    check_loaded(targets, folder)
    if run.dry_run:
        run.output_dir = tempfile.mkdtemp()  # Trainer insists on a folder
    opening = OpenRun(output, arguments, continues(output, checkpoint), ranks)
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
    if ranks.rank == 0:
        print(describe_targets(targets), describe_sample(trainer, tokenizer), sep="\n", flush=True)
    if run.dry_run:
        shutil.rmtree(str(run.output_dir), ignore_errors=True)
        return
    trainer.train(resume_from_checkpoint=checkpoint)
    record = save_model(trainer.model_wrapped, folder, output, {"command": " ".join(sys.argv)})
    if ranks.rank == 0:
        finish(output, record)


def find_checkpoint(resume: str, output: Path) -> str | None:
    """The checkpoint that --resume means; None: start from the pruned model."""
    if resume == "never":
        return None
    if resume == "auto":
        return get_last_checkpoint(str(output)) if output.is_dir() else None
    if not Path(resume).is_dir():
        raise ValueError(f"--resume {resume}: wanted auto, never, or the folder of a checkpoint")
    return resume


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


def continues(output: Path, checkpoint: str | None) -> bool:
    """Whether the run in `output` itself goes on."""
    return checkpoint is not None and Path(checkpoint).resolve().is_relative_to(output.resolve())


def check_output(output: Path, arguments: Arguments, model: Path, checkpoint: str | None) -> None:
    """Refuse to write over what is there, before any time is spent.

    Raises:
        ValueError: output_dir holds something, and neither a resume from a checkpoint in it nor an
            --overwrite of a run explains it; or it holds what this run reads.
    """
    run, data = arguments.run, arguments.data
    if run.dry_run or not output.is_dir() or not any(output.iterdir()):
        return
    if continues(output, checkpoint):
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


class OpenRun(TrainerCallback):
    """Makes the run directory ready when training begins: the engine and the checkpoint are accepted by
    then, so that nothing old is deleted for a run that is refused."""

    def __init__(self, output: Path, arguments: Arguments, goes_on: bool, ranks: ProcessRanks):
        self.output, self.arguments, self.ranks = output, arguments, ranks
        self.old: list[Path] = []
        if output.is_dir():
            # Of a run that goes on only the model, which is made anew; of one that is replaced, all.
            model = [*output.glob("*.safetensors*"), output / RECORD_NAME]
            self.old = model if goes_on else list(output.iterdir())

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.ranks.rank == 0:
            for old in self.old:
                shutil.rmtree(old) if old.is_dir() else old.unlink(missing_ok=True)
            self.output.mkdir(parents=True, exist_ok=True)
            text = yaml.safe_dump(resolved(self.arguments), sort_keys=False)
            (self.output / CONFIG_NAME).write_text(text)
        self.ranks.barrier()


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
