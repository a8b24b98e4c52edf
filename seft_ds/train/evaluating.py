"""What is measured beside the loss while a model trains: lm-eval tasks and perplexity, on the model as it is.

Under ZeRO-3 the weights stay partitioned: each forward pass gathers them layer by layer, as in training.
"""

from __future__ import annotations

import os
import sys
import time
from dataclasses import dataclass
from typing import Any

import torch

from seft_ds.beginning import beginning_of, described
from seft_ds.distributed.agreement import all_or_none
from seft_ds.distributed.collectives import Ranks
from seft_ds.evaluate import perplexity
from seft_ds.prune.calibrate import check_text_file
from seft_ds.prune.limits import check_ids, embedding_rows

_SOURCES = (
    "validation_file", "dataset_test_split", "val_set_size", "eval_tasks", "eval_text_file",
)  # fmt: skip


def check_evaluation(values: dict[str, Any]) -> None:
    """Check the evaluation's arguments, and settle when it takes place: ten times a run, if nothing was said.

    Raises:
        ValueError: missing files, settings without an effect.
    """
    given = [name for name in _SOURCES if values[name]]
    if values["eval_strategy"] == "auto":
        values["eval_strategy"] = "steps" if given else "no"
        if given and values["eval_steps"] is None:
            values["eval_steps"] = 0.1  # of all steps
    elif values["eval_strategy"] != "no" and not given:
        raise ValueError(
            f"--eval_strategy {values['eval_strategy']} has nothing to evaluate: give one of "
            f"{', '.join('--' + name for name in _SOURCES)}"
        )
    if values["do_eval"] and values["eval_strategy"] == "no":
        raise ValueError(
            "--do_eval true, but nothing is evaluated: give one of "
            f"{', '.join('--' + name for name in _SOURCES)}, and an --eval_strategy other than no"
        )
    if values["eval_text_file"]:
        check_text_file(values["eval_text_file"])
    if values["eval_include_path"] and not os.path.isdir(values["eval_include_path"]):
        raise ValueError(
            f"--eval_include_path {values['eval_include_path']}: no such folder; give one with YAML files"
        )
    limit = values["eval_limit"]
    if limit is not None and (limit <= 0 or (limit > 1 and limit != int(limit))):
        raise ValueError(
            f"--eval_limit {limit}: wanted a whole number of documents, or a share below 1"
        )
    for name in ("eval_include_path", "eval_limit"):
        if values[name] and not values["eval_tasks"]:
            raise ValueError(f"--{name} is of --eval_tasks, and there are none; leave it out")
    if (values["max_length"] or 0) < 2 and (values["eval_tasks"] or values["eval_text_file"]):
        raise ValueError(
            f"--max_length {values['max_length']}: an evaluation needs 2 tokens or more"
        )


@dataclass
class Measurement:
    """Tasks and a text, made ready before training: a mistake in them is told before time is spent."""

    tasks: list[str]
    manager: Any  # lm-eval's index of tasks
    windows: torch.Tensor | None  # (windows, tokens) int64 of the text
    limit: float | None
    batch_size: int  # rows of a forward pass on each rank, for the tasks
    max_length_tokens: int
    add_bos_token: bool = True
    begin_tokens: int = 0  # what each window begins with, before its text
    begins: str = ""  # the same in words

    def check_ids(self, model: torch.nn.Module, tokenizer: Any) -> None:
        """ValueError for a token of the text that the model has no embedding for."""
        if self.windows is not None:
            ids, rows = self.windows.unique().tolist(), embedding_rows(model)
            check_ids(ids, rows, tokenizer, "--eval_text_file")

    def describe(self) -> str:
        parts = []
        if self.tasks:
            names = ", ".join(self.tasks)
            parts.append(f"lm-eval {names}, batch size {self.batch_size} on each rank")
        if self.windows is not None:
            parts.append(f"perplexity on {len(self.windows)} windows, batch size 1")
        most = f"at most {self.max_length_tokens} tokens{self.begins}"
        return f"at each evaluation: {'; '.join(parts)}; {most}"

    def run(
        self,
        model: torch.nn.Module,
        tokenizer: Any,
        ranks: Ranks,
        device: torch.device,
        sharded: bool,
    ) -> dict[str, float]:
        """The figures by name, the same on every rank. A collective."""
        found: dict[str, float] = {}
        started = time.perf_counter()
        if self.windows is not None:
            measured = perplexity.measure(
                model, self.windows, ranks, begin_tokens=self.begin_tokens, sharded=sharded,
                device=device,
            )  # fmt: skip
            found["perplexity"] = measured.perplexity
        if self.tasks:
            from seft_ds.evaluate import harness

            results = harness.evaluate_tasks(
                model, tokenizer, self.tasks, ranks, manager=self.manager,
                batch_size=self.batch_size, limit=self.limit,
                max_length_tokens=self.max_length_tokens, add_bos_token=self.add_bos_token,
                sharded=sharded, device=device,
            )  # fmt: skip
            found |= harness.figures(results)
            for name, why in results.get("failed", {}).items() if ranks.rank == 0 else ():
                print(f"warning: task {name} failed: {why}", file=sys.stderr)
        found["measurement_runtime"] = ranks.gather_object(time.perf_counter() - started)[0]
        return found


def prepare_measurement(
    evaluation: Any, run: Any, tokenizer: Any, ranks: Ranks
) -> Measurement | None:
    """What the arguments ask for beside the loss; None if that is nothing. A collective.

    Raises:
        ValueError: a task that lm-eval doesn't know, a text that fills no window, a
            `metric_for_best_model` that no task measures.
    """
    tasks = [t.strip() for t in (evaluation.eval_tasks or "").split(",") if t.strip()]
    if not tasks and not evaluation.eval_text_file:
        return None

    def look() -> tuple[Any, torch.Tensor | None]:
        manager = windows = None
        if tasks:
            from seft_ds.evaluate import harness

            manager = harness.task_manager(tasks, evaluation.eval_include_path)
            loaded = harness.load_tasks(tasks, manager)
            best = (run.metric_for_best_model or "").removeprefix("eval_")
            if best and best not in ("loss", "perplexity"):  # those are checked with the arguments
                harness.check_figure(best, loaded)
        if evaluation.eval_text_file:
            text = perplexity.read_text(evaluation.eval_text_file)
            windows = perplexity.windows_of(
                tokenizer, text, run.max_length, evaluation.eval_max_windows,
                add_bos_token=run.add_bos_token,
            )  # fmt: skip
        return manager, windows

    manager, windows = all_or_none(ranks, look)
    limit = evaluation.eval_limit
    limit = int(limit) if limit is not None and limit >= 1 else limit
    return Measurement(
        tasks, manager, windows, limit, run.per_device_eval_batch_size, run.max_length,
        add_bos_token=run.add_bos_token,
        begin_tokens=len(beginning_of(tokenizer)) if run.add_bos_token else 0,
        begins=described(tokenizer, run.add_bos_token, "window or request"),
    )  # fmt: skip
