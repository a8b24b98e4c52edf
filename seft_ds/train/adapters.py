"""A run that trains adapters beside frozen weights and merges them when it ends: plain DeepSpeed.

Its checkpoints would be DeepSpeed's own, which no rank count but theirs can load and no check of ours covers,
so there are none: `parse` refuses `--save_strategy` and `--resume` for these methods.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from transformers import TrainerControl, TrainerState, TrainingArguments

from seft_ds.baselines.adapters import Adapters, attach_adapters
from seft_ds.baselines.again import input_square_sums
from seft_ds.baselines.merge import save_merged
from seft_ds.baselines.methods import find_method
from seft_ds.checkpoint.export import versions
from seft_ds.config import parse_seft
from seft_ds.signals import set_outcome
from seft_ds.train.callback import hide_seft_block
from seft_ds.train.closing import finish, sparsity_line
from seft_ds.train.job import (
    Job,
    check_loaded,
    load_model,
    make_trainer,
    read_data,
)
from seft_ds.train.journaling import JournaledRun
from seft_ds.train.opening import record_facts, run_facts
from seft_ds.train.reproduce import command_line, machine
from seft_ds.zero.initialize import bitsandbytes_class


class AdapterCallback(JournaledRun):
    """The journal of a run without slots."""

    def __init__(self, job: Job, adapters: Adapters, begins_with: str | None):
        super().__init__(job.output, run_facts(job.arguments, begins_with))
        self.job, self.adapters = job, adapters
        self.train_seconds = 0.0

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        hide_seft_block(args)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.start_clock()
        if not state.is_world_process_zero:
            return
        self.open_journal(args)
        block = self.job.arguments.deepspeed["seft"]
        record = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "command": command_line(),
            "machine": machine(),
            "model": str(self.job.folder.resolve()),
            "ranks": self.job.ranks.size,
            "zero_stage": self.job.arguments.deepspeed["zero_optimization"].get("stage", 0),
            "dtype": str(self.adapters.layers[0].module.weight.dtype).removeprefix("torch."),
            "config": {"seft": block},
            "targets": [
                {"name": t.name, "shape": t.shape, "live": t.target_live, "slots": t.n_slots}
                for t in self.adapters.targets
            ],
            "versions": versions(),
        }
        self.write("run", **(record | self.about))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.train_seconds = self.seconds


def train_adapters(job: Job) -> None:
    """Load, train, merge, save, report. Every rank calls it."""
    arguments, method = job.arguments, find_method(job.arguments.method.method)
    if bitsandbytes_class(arguments.deepspeed) is not None:
        raise ValueError(
            f"--method {arguments.method.method} takes an optimizer of bitsandbytes by flag only: take "
            '"optimizer" out of the DeepSpeed config and give --optim adamw_bnb_8bit'
        )
    data = read_data(job)
    model = load_model(job)
    adapters = attach_adapters(
        model,
        arguments.method.method,
        parse_seft(arguments.deepspeed["seft"]),
        job.ranks,
        alpha=arguments.method.lora_alpha,
        dropout=arguments.method.lora_dropout or 0.0,
    )
    check_loaded(adapters.targets, job.files)
    callback = AdapterCallback(job, adapters, data.begins_with)
    trainer = make_trainer(job, model, data, callback, describe_adapters(adapters))
    if trainer is None:
        return
    set_outcome(
        f"stopped; --method {arguments.method.method} has no checkpoints, so --overwrite true begins anew"
    )
    trainer.train()
    sums = None
    if method.prunes_again:
        sequences = calibration(trainer.train_dataset, arguments.method.calibration_rows)
        engine = trainer.model_wrapped
        sums = input_square_sums(engine, adapters.layers, sequences, job.ranks)
    about = record_facts(arguments, data.begins_with) | {"steps": trainer.state.global_step}
    record = save_merged(
        trainer.model_wrapped, adapters, job.ranks, job.folder, job.output, about, sums,
        trainer.tokenizer_changes, job.files,
    )  # fmt: skip
    if job.ranks.rank == 0:
        callback.write(
            "end",
            step=trainer.state.global_step,
            seconds=callback.train_seconds,
            live=record["live"],
            target_live=sum(t.target_live for t in adapters.targets),
            changed_positions=sum(t["changed_positions"] for t in record["targets"].values()),
        )
        finish(job.output, record)


def calibration(rows: Any, wanted: int) -> list[torch.Tensor]:
    """The first `wanted` training sequences, int64 (tokens,) each: all there are, if there are fewer."""
    count = min(wanted, len(rows))
    return [torch.tensor(rows[i]["input_ids"], dtype=torch.int64) for i in range(count)]


def describe_adapters(adapters: Adapters) -> str:
    total = sum(t.numel for t in adapters.targets)
    return (
        f"{sparsity_line(adapters.targets)}; {adapters.method} trains {adapters.n_trainable:,} weights "
        f"({adapters.n_trainable / total:.2%})"
    )
