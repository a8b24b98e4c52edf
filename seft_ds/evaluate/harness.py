"""lm-eval tasks on a model that is already in memory, on any number of ranks.

Every rank builds the same requests. Each call for likelihoods or generated text answers this rank's
share and exchanges the answers, so every rank then holds all of them and computes the same metrics.
lm-eval itself sees a single process: its own way of splitting a task gives a rank without documents
nothing to wait with, and needs the launcher of accelerate.
"""

from __future__ import annotations

import logging
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import make_table

from seft_ds.bars import SECONDS, BarsAsLines
from seft_ds.distributed.agreement import all_or_none
from seft_ds.distributed.collectives import Ranks
from seft_ds.evaluate.lockstep import Lockstep
from seft_ds.prune.limits import check_ids, embedding_rows

_SEED = 1234  # as lm-eval has it


def shares(contexts: Sequence[Any], size: int) -> list[list[int]]:
    """Which requests each of `size` ranks answers: indices, in ascending order.

    Requests with one context stay together (a model need read it only once for all its one-token
    continuations); contexts are dealt out in turn, in the order of their first appearance.
    """
    owner: dict[Any, int] = {}
    dealt: list[list[int]] = [[] for _ in range(size)]
    for index, context in enumerate(contexts):
        dealt[owner.setdefault(context, len(owner) % size)].append(index)
    return dealt


def answer_together(
    requests: Sequence[Any], answer: Callable[[list[Any]], list[Any]], ranks: Ranks
) -> list[Any]:
    """The answers to all `requests`, on every rank, each found by one of them. One collective.

    A request's first argument is its context, as lm-eval has it. A rank may get none to answer.
    """
    dealt = shares([request.args[0] for request in requests], ranks.size)
    mine = [requests[i] for i in dealt[ranks.rank]]
    answers: list[Any] = [None] * len(requests)
    for indices, found in zip(dealt, ranks.gather_object(answer(mine))):
        for index, value in zip(indices, found, strict=True):
            answers[index] = value
    return answers


class SharedModel(HFLM):
    """lm-eval's wrapper of a Hugging Face model, whose requests the ranks answer together.

    sharded: the model's weights are partitioned, so that a forward pass is a collective.
    """

    def __init__(
        self,
        ranks: Ranks,
        sharded: bool,
        device: torch.device | None,
        progress: bool,
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
        self.ranks, self.sharded, self.progress = ranks, sharded, progress
        if device is not None:  # of an offloaded model the parameters say where they wait
            self._device = device

    def tok_encode(self, string: Any, *args: Any, **settings: Any) -> Any:
        ids = super().tok_encode(string, *args, **settings)
        flat = ids if not ids or isinstance(ids[0], int) else [i for row in ids for i in row]
        self._check_ids(flat)
        return ids

    def tok_batch_encode(self, strings: list[str], *args: Any, **settings: Any) -> Any:
        ids, mask = super().tok_batch_encode(strings, *args, **settings)
        self._check_ids(ids.unique().tolist())
        return ids, mask

    def _check_ids(self, ids: list[int]) -> None:
        """On a GPU a token without an embedding would end the process without a word of which it was."""
        check_ids(ids, embedding_rows(self.model), self.tokenizer, "a request of a task")

    def loglikelihood(self, requests: list, disable_tqdm: bool = False) -> list:
        return self._together(super().loglikelihood, requests, disable_tqdm)

    def loglikelihood_rolling(self, requests: list, disable_tqdm: bool = False) -> list:
        return self._together(super().loglikelihood_rolling, requests, disable_tqdm)

    def generate_until(self, requests: list, disable_tqdm: bool = False) -> list:
        return self._together(super().generate_until, requests, disable_tqdm)

    def _together(self, method: Callable, requests: list, quiet: bool) -> list:
        quiet = quiet or self.ranks.rank != 0 or not self.progress

        def answer(part: list) -> list:
            with Lockstep(self.model, self.ranks, self.sharded, self.device):
                return method(part, disable_tqdm=quiet) if part else []

        def safely(part: list) -> list:
            """If one rank can't answer its share, every rank knows."""
            return all_or_none(self.ranks, lambda: answer(part))

        # In a sharded model a forward pass is a collective itself: a rank can't fail alone.
        return answer_together(requests, answer if self.sharded else safely, self.ranks)

    def _model_generate(self, context: Any, max_length: int, stop: Any, **settings: Any) -> Any:
        # transformers would keep the ranks together too, call by call of its own; Lockstep does it for all.
        settings["synced_gpus"] = False
        return super()._model_generate(context, max_length, stop, **settings)


def task_manager(tasks: Sequence[str], include_path: str | None) -> TaskManager:
    """lm-eval's index of tasks (some seconds), with those in the folder `include_path`.

    Raises:
        ValueError: no such folder, no task named, or a name that is in no index.
    """
    if include_path is not None and not Path(include_path).is_dir():
        raise ValueError(
            f"there is no folder {include_path}; --include_path takes one with YAML files"
        )
    if not tasks:
        raise ValueError("--tasks names no task; give some, separated by commas")
    manager = TaskManager(include_path=include_path)
    check_names(tasks, manager)
    return manager


def load_tasks(tasks: Sequence[str], manager: TaskManager) -> dict[str, Any]:
    """{name: the tasks that it stands for}, with their data.

    Raises:
        ValueError: naming each task that can't be loaded, and why.
    """
    loaded, failed = {}, []
    for name in dict.fromkeys(tasks):
        try:
            with quiet_library(progress=False):
                loaded[name] = manager.load([name])
        except Exception as error:  # whatever a YAML file, its functions and its data meet
            failed.append(f"task {name} can't be loaded: {reason(error)}")
    if failed:
        raise ValueError(
            f"{'; '.join(failed)}. Correct its YAML or data file, or leave it out of the tasks"
        )
    return loaded


def check_figure(name: str, loaded: dict[str, Any]) -> None:
    """Check that `figures` will have `name`, as far as it can be known before anything is measured.

    A task's metrics are known; what a filter or a group adds to their names isn't.

    loaded: what `load_tasks` returned.

    Raises:
        ValueError: no task or group of that name, or none of the task's metrics.
    """
    tasks: dict[str, Any] = {}
    groups: list[str] = []
    for found in loaded.values():
        tasks |= found["tasks"]
        groups += found.get("groups", {})
    if any(name.startswith(f"{group}_") for group in groups):
        return
    known = [f"{task}_{metric}" for task, what in tasks.items() for metric in what.aggregation()]
    known = [figure.replace(" ", "_") for figure in known]
    if not any(name == figure or name.startswith(f"{figure}_") for figure in known):
        raise ValueError(
            f"--metric_for_best_model {name:.60}: no figure of the tasks; they have {', '.join(known[:20])}"
            + (f" and {len(known) - 20} more" if len(known) > 20 else "")
        )


def reason(error: BaseException) -> str:
    """An error's type and first line."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"[:400]


def check_names(tasks: Sequence[str], manager: TaskManager) -> None:
    """Raises ValueError, naming them, if some of `tasks` are in no index."""
    unknown = [name for name in tasks if not manager.match_tasks([name])]
    if unknown:
        raise ValueError(
            f"lm-eval knows no task {', '.join(unknown)}; check the spelling, or give the folder of "
            "its YAML file with --include_path"
        )


def evaluate_tasks(
    model: torch.nn.Module,
    tokenizer: Any,
    tasks: Sequence[str],
    ranks: Ranks,
    *,
    manager: TaskManager,
    batch_size: int = 8,
    limit: float | None = None,
    max_length_tokens: int | None = None,
    add_bos_token: bool = True,
    sharded: bool = False,
    device: torch.device | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """lm-eval's results for `tasks`, on every rank; under "failed" why there are none of a task.

    `limit` is documents per task; below 1 a share of them. `add_bos_token`: requests begin as the tokenizer
    begins a text, which is lm-eval's default; False: with nothing before the text.
    Collectives: one per task, one or two per kind of its requests, and, with `sharded` (a model under
    ZeRO-3), one before each forward pass beside the model's own. The state of the random number generators is
    kept, and so is the model's mode.
    Without a network the tasks' data must be local (YAMLs with data files) or cached.
    """
    was_training = model.training
    results: dict[str, Any] = {}
    failed: dict[str, str] = {}
    with quiet_library(progress):
        shared = SharedModel(
            ranks,
            sharded,
            device,
            progress,
            pretrained=model,
            tokenizer=tokenizer,
            batch_size=batch_size,
            max_length=max_length_tokens,
            add_bos_token=None if add_bos_token else False,
        )
        for name in dict.fromkeys(tasks):
            found, problem = _evaluate_one(shared, name, manager, limit), None
            if isinstance(found, Exception):
                problem = reason(found)
            problems = ranks.gather_object(problem)  # a lost rank ends the evaluation here
            if any(problems):
                failed[name] = next(p for p in problems if p)
            else:
                _merge(results, found)  # type: ignore[arg-type]
    model.train(was_training)
    return results | ({"failed": failed} if failed else {})


def _evaluate_one(
    shared: SharedModel, name: str, manager: TaskManager, limit: float | None
) -> dict[str, Any] | Exception:
    """The results of one task or group, or what went wrong: the results of the others are not lost by it."""
    try:
        loaded = manager.load([name])
        for task in loaded["tasks"].values():
            if task.get_config("num_fewshot") is None:
                task.set_config(key="num_fewshot", value=0)
            task.set_fewshot_seed(seed=_SEED)
        # Not simple_evaluate, which only on some ranks has results, and asks git about the working directory.
        with kept_random_state():
            return evaluate(
                lm=shared, task_dict=loaded, limit=limit, log_samples=False, bootstrap_iters=1000
            )
    except Exception as error:
        return error


def _merge(results: dict[str, Any], found: dict[str, Any]) -> None:
    """Add one task's results to those of the others."""
    for key, value in found.items():
        if isinstance(value, dict):
            results.setdefault(key, {}).update(value)
        else:
            results[key] = value


@contextmanager
def kept_random_state() -> Iterator[None]:
    """The same random numbers in each evaluation; a training that it interrupts goes on with its own."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    on_gpu = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    random.seed(_SEED)
    np.random.seed(_SEED)
    torch.manual_seed(_SEED)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        if on_gpu is not None:
            torch.cuda.set_rng_state(on_gpu)


@contextmanager
def quiet_library(progress: bool) -> Iterator[None]:
    """Without what lm-eval says of every task; its bars where they are wanted, as lines in a file."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    bars = progress and sys.stderr.isatty()
    lines = BarsAsLines(sys.stderr, SECONDS if progress else None)
    try:
        with nullcontext() if bars else redirect_stderr(lines):
            yield
    finally:
        logger.setLevel(level)


def as_table(results: dict[str, Any]) -> str:
    """The results as a table for people, the groups' averages below the tasks."""
    if not results.get("results"):
        return "no task has results"
    tables = [make_table(results)]
    if results.get("groups"):
        tables.append(make_table(results, "groups"))
    return "\n".join(tables)


def as_json(results: dict[str, Any]) -> dict[str, Any]:
    """The parts of the results that a file should keep: metrics, averages, counts and versions."""
    kept = ("results", "groups", "n-samples", "n-shot", "versions", "higher_is_better", "failed")
    return {key: results[key] for key in kept if key in results}


def figures(results: dict[str, Any]) -> dict[str, float]:
    """{task_metric: value} of the tasks and groups, without the standard errors."""
    found = {}
    for task, metrics in {**results.get("results", {}), **results.get("groups", {})}.items():
        for key, value in metrics.items():
            metric, _, chosen = key.partition(",")
            if isinstance(value, (int, float)) and "," in key and not metric.endswith("_stderr"):
                name = metric if chosen == "none" else f"{metric}_{chosen}"
                found[f"{task}_{name}".replace(" ", "_")] = float(value)
    return found
