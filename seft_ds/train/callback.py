"""SEFT in transformers' Trainer, and in what is built on it (TRL): one callback.

    seft_ds.init_ranks()     # before the arguments: transformers looks for the ranks then
    callback = SeftCallback("ds_configs/zero3.json")        # a DeepSpeed config with a "seft" block
    trainer = Trainer(model, args=TrainingArguments(deepspeed="ds_configs/zero3.json", ...),
                      callbacks=[callback], ...)
    trainer.train()
    callback.save_model("REPAIRED")

`callback.trainer = trainer` before training adds sparsity, churn and memory to TensorBoard, W&B and whatever
else the Trainer reports to; `callback.each_weight = True` those of each weight too.

The callback attaches the slots when the trainer has been built (unless `seft_ds.attach` was called on the
model), fixes the schedule when the number of steps is known, and keeps the journal.
"""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import TrainerControl, TrainerState, TrainingArguments

from seft_ds.api import attach
from seft_ds.checkpoint.export import versions
from seft_ds.checkpoint.manifest import MANIFEST_NAME, entries_below, seal
from seft_ds.checkpoint.model import save_model
from seft_ds.checkpoint.tokenizer_files import Changes, save_changes
from seft_ds.config import SeftConfig
from seft_ds.distributed.agreement import all_or_none
from seft_ds.errors import RunError
from seft_ds.json_file import read_object
from seft_ds.signals import active_request, watch_signals
from seft_ds.train.closing import describe_targets, finish
from seft_ds.train.journaling import JournaledRun
from seft_ds.train.measuring import MemoryMeter, describe_unreached, write_measurements
from seft_ds.train.progress import Topology
from seft_ds.train.reproduce import command_line, machine
from seft_ds.train.template import changes_from
from seft_ds.zero.engine import SparseEvolution
from seft_ds.zero.initialize import find_attached


class SeftCallback(JournaledRun):
    """Runs SEFT inside a Trainer that uses DeepSpeed.

    Args:
        config: a DeepSpeed config (dict or file) with a "seft" block, or a SeftConfig; default: the
            config that the Trainer's `deepspeed` argument names.
        journal_dir: where `journal.jsonl` goes; default: the Trainer's output_dir.
        about: facts for the journal's first line.
        handle_signals: on Ctrl-C, SIGTERM or SIGUSR1 finish the step, write a checkpoint, and end training.
    """

    def __init__(
        self,
        config: dict | str | Path | SeftConfig | None = None,
        journal_dir: str | Path | None = None,
        about: dict[str, Any] | None = None,
        handle_signals: bool = True,
    ):
        super().__init__(journal_dir, about)
        self.config = config
        self.handle_signals = handle_signals
        self.hold_signals = False  # whoever sets it calls close_signals() later
        self.stopped_by: str | None = None  # the signal that ended training, on any rank
        self.model: Any = None
        self.tokenizer: Any = None
        self.tells = True  # what trains, on rank 0
        self.memory = MemoryMeter()  # whoever has a plan of memory sets its `plan`

    @property
    def engine(self) -> Any:
        """The DeepSpeed engine. ValueError before training has started."""
        attached = find_attached(self.model) if self.model is not None else None
        if attached is None or attached.engine is None:
            raise ValueError("there is no DeepSpeed engine yet: call trainer.train() first")
        return attached.engine

    @property
    def seft(self) -> SparseEvolution:
        return self.engine.seft

    @property
    def last_checkpoint(self) -> Path | None:
        """The newest checkpoint that is whole."""
        attached = find_attached(self.model) if self.model is not None else None
        engine = attached.engine if attached is not None else None
        return engine.seft.last_checkpoint if engine is not None else None

    def save_model(self, output_dir: str | Path) -> dict[str, Any]:
        """Write the repaired sparse model, its card and the run's report; returns its sparsity record. Every
        rank calls it.

        Raises:
            RunError: a signal stopped the training, so that the model is half trained.
        """
        if self.stopped_by:
            raise RunError(
                f"training was stopped by {self.stopped_by}; resume from {self.last_checkpoint} instead of "
                "saving a half-trained model (launch/export.py makes one of a checkpoint)"
            )
        source = find_attached(self.model).source_dir  # type: ignore[union-attr]
        record = save_model(self.engine, source, output_dir, tokenizer=self._tokenizer_changes())
        if self.journal is not None:  # on rank 0
            finish(Path(output_dir), record, self.journal.path.parent)
        return record

    def _tokenizer_changes(self) -> Changes:
        if self.tokenizer is None or self.seft.ranks.rank:
            return {}
        return changes_from(find_attached(self.model).source_dir, self.tokenizer)  # type: ignore[union-attr]

    # What Trainer calls.

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not args.deepspeed:
            raise ValueError(
                "SeftCallback needs a Trainer that uses DeepSpeed: pass deepspeed=... (a config with a "
                '"zero_optimization" section) in TrainingArguments'
            )
        self.model = kwargs["model"]
        self.tokenizer = kwargs.get("processing_class")
        hide_seft_block(args)
        if find_attached(self.model) is None:
            attach(self.model, self.config if self.config is not None else args.deepspeed)
        check_vocabulary(self.model, find_attached(self.model).source_dir)  # type: ignore[union-attr]

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._check_engine()
        self.seft.begin(state.max_steps)
        if self.handle_signals and threading.current_thread() is threading.main_thread():
            self.seft.stop_request = active_request() or watch_signals()
        live = self.seft.live_counts()
        self.start_clock()
        # A Trainer that goes on from the checkpoint of its last step takes one more.
        self.seft.over = state.global_step >= state.max_steps
        if self.seft.over and state.is_world_process_zero:
            tqdm.write(f"all {state.max_steps} steps are taken: nothing is left to train")
        if state.is_world_process_zero:
            if self.tells:
                print(describe_targets([s.target for s in self.seft.states]), flush=True)
            self.open_journal(args)
            self.write("run", **self._run_record(args))
            names = [s.target.name for s in self.seft.states]
            numel = [s.target.numel for s in self.seft.states]
            self.topology = Topology(dict(zip(names, numel)), dict(zip(names, live)))
            self.seft.listeners += [self._journal_record, self.topology.note]

    def _check_engine(self) -> None:
        """ValueError if the Trainer trains without DeepSpeed, whatever its arguments say."""
        attached = find_attached(self.model)
        if attached is None or attached.engine is None:
            cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
            why = " (accelerate launch --cpu trains without it)" if cpu else ""
            raise ValueError(
                f"the Trainer has made no DeepSpeed engine{why}: start the script with python, deepspeed, "
                "torchrun, or accelerate launch --use_deepspeed, and call seft_ds.init_ranks() before "
                "TrainingArguments"
            )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.journal is not None:
            self.memory.look(self.engine)
        if self.seft.stopping and state.global_step < state.max_steps:
            # One rank may have had the signal; all agreed on it in this step.
            mine = self.seft.stop_request.name if self.seft.stop_request else None
            names = [name for name in self.seft.ranks.gather_object(mine) if name]
            self.stopped_by = f"{names[0]} after step {state.global_step} of {state.max_steps}"
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False  # there may be seconds left

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.stopped_by:  # the checkpoint of this step is written
            control.should_save = control.should_evaluate = False

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Seal the checkpoint of a plain Trainer, which writes in place, with a manifest."""
        seft = self.seft
        folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"

        def seal_once() -> None:
            if seft.ranks.rank == 0 and not (folder / MANIFEST_NAME).is_file():
                save_changes(folder, self._tokenizer_changes())
                seal(folder, entries_below(folder, {}))

        seft.ranks.barrier()  # every rank has written its files
        all_or_none(seft.ranks, seal_once)
        seft.last_checkpoint = folder

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not self.hold_signals:
            self.close_signals()
        self.seft.check()
        if self.stopped_by:
            if self.journal is not None:
                where = str(self.last_checkpoint)
                self.write("stop", step=state.global_step, why=self.stopped_by, checkpoint=where)
            return
        unreached = self._tell_unreached()
        write_measurements(self.seft, self.memory, None if self.journal is None else self.write)
        live, changed = sum(self.seft.live_counts()), sum(self.seft.changed_positions())
        if self.journal is not None:
            self.write(
                "end",
                step=state.global_step,
                seconds=self.seconds,
                live=live,
                target_live=sum(s.target.target_live for s in self.seft.states),
                changed_positions=changed,
                **({"unreached": unreached} if unreached else {}),
            )

    def _tell_unreached(self) -> str | None:
        """Name the weights that no gradient reached, on the first rank. A collective."""
        targets = [s.target for s in self.seft.states]
        line = describe_unreached(targets, self.seft.unreached()) if self.seft.step else None
        if line is not None and self.seft.ranks.rank == 0:
            tqdm.write(line)  # a bar may be open
        return line

    def close_signals(self) -> None:
        """Give the signals back, if they were taken."""
        attached = find_attached(self.model) if self.model is not None else None
        engine = attached.engine if attached is not None else None
        if engine is not None and engine.seft.stop_request is not None:
            engine.seft.stop_request.close()
            engine.seft.stop_request = None

    def _journal_record(self, record: dict[str, Any]) -> None:
        self.write(**record)

    def _run_record(self, args: TrainingArguments) -> dict[str, Any]:
        seft = self.seft
        assert seft.schedule is not None
        return {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "command": command_line(),
            "machine": machine(),
            "model": find_attached(self.model).source_dir,  # type: ignore[union-attr]
            "ranks": seft.ranks.size,
            "zero_stage": self.engine.zero_optimization_stage(),
            "dtype": str(seft.states[0].weight.dtype).removeprefix("torch."),
            "config": {"seft": seft.config.model_dump(), "interval": seft.schedule.interval},
            "targets": [
                {
                    "name": s.target.name,
                    "shape": s.target.shape,
                    "live": s.target.target_live,
                    "slots": s.target.n_slots,
                }
                for s in seft.states
            ],
            "versions": versions(),
        } | self.about


def check_vocabulary(model: Any, source_dir: str) -> None:
    """Has the model as many token embeddings as the folder that its config and tokenizer are saved from?

    Raises:
        ValueError: tokens were added to it in memory, as TRL's chat_template_path does.
    """
    path = Path(source_dir) / "config.json"
    if not path.is_file():
        return
    stored = read_object(path)
    stored = stored if "vocab_size" in stored else stored.get("text_config") or {}
    now = getattr(model.config.get_text_config(), "vocab_size", None)
    if isinstance(stored.get("vocab_size"), int) and now not in (None, stored["vocab_size"]):
        raise ValueError(
            f"the model has {now} token embeddings, and {path} says {stored['vocab_size']}: save the model "
            "with its new tokens first, and repair that one (chat_template_path of a .jinja file adds none)"
        )


def hide_seft_block(args: TrainingArguments) -> None:
    """Take our block out of the copy that accelerate resolves: it takes every "auto" for its own."""
    plugin = getattr(args, "deepspeed_plugin", None)
    if plugin is not None:
        plugin.hf_ds_config.config.pop("seft", None)
