"""TRL's trainer, with checkpoints that become visible whole or not at all."""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers.trainer_utils import SaveStrategy
from trl import SFTTrainer
from trl.trainer.sft_trainer import global_then_local_main_first

from seft_ds.beginning import beginning_of
from seft_ds.checkpoint.manifest import FileEntry, checkpoints_in, entries_below, hash_file
from seft_ds.checkpoint.model import save_model
from seft_ds.checkpoint.together import write_together
from seft_ds.checkpoint.tokenizer_files import Changes, save_changes
from seft_ds.distributed.agreement import all_or_none
from seft_ds.distributed.collectives import ProcessRanks
from seft_ds.prune.limits import check_ids, embedding_rows
from seft_ds.train.distill import token_losses
from seft_ds.train.evaluating import Measurement
from seft_ds.train.forms import Say
from seft_ds.train.prepared import Cut, looked_at
from seft_ds.train.rows import cut_rows, cuts
from seft_ds.train.same_run import NAME as FACTS_NAME
from seft_ds.zero.shards import forget_order

LOSS_NAME = "loss_since_log_{}.json"  # of each rank
_COMPARED_TOKENS = 64
# Relative; the two losses are rounded differently, by much less.
_LOSS_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.02}


class SparseSFTTrainer(SFTTrainer):
    """A checkpoint is written aside by all ranks, sealed with a manifest, and renamed into place; only then
    are older ones deleted (`save_total_limit`). It holds SEFT's state instead of a second copy of the model.
    """

    seft_source = ""
    tokenizer_changes: Changes = {}  # what the run changed of the source's tokenizer
    measurement: Measurement | None = None  # beside the loss, at each evaluation
    control: Any
    teacher: Any = None  # the dense model, for distillation
    distill_weight = 0.0
    write_facts: Callable[[Path], None] | None = None  # what the run trains with, into a file
    _aside: Path | None = None  # where a checkpoint is being written
    _loss_is_compared = False

    def __init__(self, *args: Any, say: Say = lambda line: None, **kwargs: Any):
        """say: told which rows are left out and cut short."""
        self._say, self._embedded = say, kwargs["model"]  # TRL may resize its embedding
        super().__init__(*args, **kwargs)
        if self._pads():
            check_ids(
                [self._tokenizer.pad_token_id],
                embedding_rows(self._embedded),
                self._tokenizer,
                "padding of rows",
                "give another --pad_token",
            )

    def _pads(self) -> bool:
        """Whether rows of a batch are filled up to the length of the longest."""
        sizes = [self.args.per_device_train_batch_size]
        if self.eval_dataset is not None:
            sizes.append(self.args.per_device_eval_batch_size)
        return not self.padding_free and (max(sizes) > 1 or bool(self.args.pad_to_multiple_of))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the sparse model. Inside a checkpoint the weights are in the engine's own files."""
        if not _internal_call:
            save_model(
                self.model_wrapped,
                self.seft_source,
                output_dir or str(self.args.output_dir),
                tokenizer=self.tokenizer_changes,
            )

    def create_model_card(self, *args: Any, **settings: Any) -> None:
        """Leave out TRL's card, which it writes at each checkpoint: ours comes with the model."""

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """TRL's loss, or its mixture with the distance from the teacher; an evaluation is without teacher."""
        if self.teacher is None or not self.model.training or return_outputs:
            if not self._loss_is_compared:
                self._loss_is_compared = True
                own, trls = self._both_losses(model, inputs["input_ids"])
                all_or_none(ProcessRanks(), lambda: self._compare_losses(own, trls))
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        fed = {k: v for k, v in inputs.items() if k != "labels"} | {"use_cache": False}
        with torch.no_grad():
            teacher_logits = self.teacher(**fed).logits
        nll, kl, counted = token_losses(model(**fed).logits, teacher_logits, inputs["labels"])
        wanted = counted if num_items_in_batch is None else num_items_in_batch
        loss = (1 - self.distill_weight) * nll + self.distill_weight * kl
        loss = loss / torch.as_tensor(wanted).clamp(min=1)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            # As TRL does: the number counts the tokens of all ranks, and gradients are averaged over them.
            loss = loss * self.accelerator.num_processes
        self._note_distilled(inputs, nll, kl, counted)
        return loss

    def _both_losses(self, model: Any, ids: torch.Tensor) -> tuple[float, float]:
        """The model's own loss on a few tokens, and what TRL takes for it. A collective under ZeRO-3.

        Raises:
            ValueError: TRL can't compute it, the same on every rank.
        """
        ids, was_training = ids[:1, :_COMPARED_TOKENS], model.training
        if ids.shape[1] == 1:
            ids = ids.repeat(1, 2)
        model.eval()  # no dropout, which would also use up random numbers
        forget_order(self.model_wrapped)
        with torch.no_grad():
            try:
                logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
                own = torch.nn.functional.cross_entropy(logits, ids[0, 1:])
            except (AttributeError, IndexError, KeyError, TypeError) as error:
                what = f"{type(self.model).__name__} here ({type(error).__name__}: {error})"
                raise ValueError(
                    f"transformers can't run {what}; try another version of it, or another ZeRO stage"
                ) from error
            forget_order(self.model_wrapped)
            try:
                fused = model(input_ids=ids, labels=ids, use_cache=False, fused_lm_head=True)
            except (AttributeError, IndexError, KeyError, TypeError) as error:
                kind = type(self.model).__name__
                advice = "this family can't be trained"
                if (
                    self.aux_loss_enabled
                ):  # of all losses this is the one that TRL words for few families
                    advice = "leave out the one of its routers with --router_aux_loss_coef 0"
                raise ValueError(
                    f"TRL can't compute the loss of {kind} ({error}); {advice}"
                ) from error
        forget_order(self.model_wrapped)
        found = fused.log_probs
        model.train(was_training)
        return float(own), -float(found.float().sum()) / (ids.shape[1] - 1)

    def _compare_losses(self, own: float, trls: float) -> None:
        """Check that TRL trains the model that is there.

        TRL multiplies the last hidden states by the output head itself, which is another function than the
        model's where a family does something else in between.

        Raises:
            ValueError: the losses differ by more than rounding.
        """
        if abs(own - trls) > _LOSS_TOLERANCE.get(self.model.dtype, 0.02) * max(own, 1.0):
            raise ValueError(
                f"TRL takes the loss of {type(self.model).__name__} for {trls:.4f} where the model's own is "
                f"{own:.4f}: it leaves out what this family does between its last block and its output, so "
                "that it would train another model; this family can't be trained"
            )

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """The loss on the held-out rows, if there are some, and what else is to be measured."""
        metrics: dict[str, float] = {}
        if eval_dataset is not None or self.eval_dataset is not None:
            metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        if self.measurement is None or metric_key_prefix != "eval":
            return metrics
        engine = self.model_wrapped
        found = self.measurement.run(
            engine.module, self.processing_class, ProcessRanks(), self.args.device,
            sharded=engine.zero_optimization_stage() == 3,
        )  # fmt: skip
        more = {f"{metric_key_prefix}_{name}": value for name, value in found.items()}
        self.model.eval()  # or TRL takes this for a log of training, and its averages start anew
        self.log(more)
        if not metrics:  # otherwise the callbacks were called when the loss was known
            self.callback_handler.on_evaluate(self.args, self.state, self.control, more)
        return metrics | more

    def _prepare_dataset(
        self, dataset: Any, processing_class: Any, args: Any, packing: bool, *rest: Any
    ) -> Any:
        """Rows of tokens as TRL makes them, in two steps: whole, of which some are left out with a word; then
        cut and packed, those from the middle of a text beginning as their text did.
        """
        if args.completion_only_loss is None:  # TRL asks the training rows only
            self.completion_only_loss = {"prompt", "completion"} <= set(next(iter(dataset)))
        whole = copy.copy(args)
        whole.max_length, whole.shuffle_dataset = None, False
        rows = super()._prepare_dataset(dataset, processing_class, whole, False, *rest)
        asked = copy.copy(args)
        asked.packing = packing  # evaluation rows may be packed otherwise than training rows
        beginning = beginning_of(processing_class) if args.add_bos_token and cuts(asked) else []
        known, cut = embedding_rows(self._embedded), Cut.of(asked, len(beginning))
        what = "training" if rest[-1] == "train" else "evaluation"
        rows = looked_at(rows, cut, known, self._tokenizer, what, self._say)
        rows = rows.select_columns(["input_ids", "labels"])
        if not beginning:
            return super()._prepare_dataset(rows, processing_class, args, packing, *rest)
        with global_then_local_main_first():  # the first rank cuts, the others find its cache
            settings = {"num_proc": args.dataset_num_proc} if hasattr(rows, "num_rows") else {}
            return cut_rows(rows, asked, beginning, settings)

    def _note_distilled(
        self, inputs: dict[str, Any], nll: torch.Tensor, kl: torch.Tensor, counted: torch.Tensor
    ) -> None:
        """Keep TRL's count of tokens, and both parts of the loss for the log. One collective, one sync."""
        tokens = inputs["attention_mask"].sum() if "attention_mask" in inputs else None
        if tokens is None:  # packed without padding
            tokens = torch.tensor(inputs["input_ids"].numel(), device=nll.device)
        parts = torch.stack(
            [tokens.double(), nll.detach().double(), kl.detach().double(), counted.double()]
        )
        sums = self.accelerator.gather(parts.unsqueeze(0)).sum(dim=0).tolist()
        self._total_train_tokens += int(sums[0])
        metrics = self._metrics["train"]
        metrics["num_tokens"] = [self._total_train_tokens]
        metrics["nll"].append(sums[1] / max(sums[3], 1.0))
        metrics["kl"].append(sums[2] / max(sums[3], 1.0))

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Take no step from a checkpoint of the last one. Trainer counts only after a step."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

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
            if seft.ranks.rank == 0:
                save_changes(aside / target.name, self.tokenizer_changes)
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
            json.dumps({"sum": float(self._tr_loss), "since": self._globalstep_last_logged}),
            encoding="utf-8",
        )
        if rank == 0 and self.write_facts is not None:
            self.write_facts(aside / folder / FACTS_NAME)
        random = "rng_state.pth" if world <= 1 else f"rng_state_{rank}.pth"
        paths = [loss, aside / folder / random]
        return {f"{folder}/{path.name}": hash_file(path) for path in paths}

    def resume_loss(self, checkpoint: Path) -> None:
        """Go on with the sum of losses since the last log line, so that the next one is the same."""
        path = checkpoint / LOSS_NAME.format(self.args.process_index)
        if path.is_file():  # there is none for a rank more than the run had
            saved = json.loads(path.read_text(encoding="utf-8"))
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
