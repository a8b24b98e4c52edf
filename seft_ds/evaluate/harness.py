"""lm-eval tasks on a model that is already in memory, on any number of ranks.

Every rank builds the same requests. Each call for likelihoods or generated text answers this rank's
share and exchanges the answers, so every rank then holds all of them and computes the same metrics.
lm-eval itself sees a single process: its own way of splitting a task gives a rank without documents
nothing to wait with, and needs the launcher of accelerate.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import make_table

from seft_ds.distributed.collectives import Ranks


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

    A request's first argument is its context, as lm-eval has it.
    """
    dealt = shares([request.args[0] for request in requests], ranks.size)
    mine = [requests[i] for i in dealt[ranks.rank]]
    answers: list[Any] = [None] * len(requests)
    for indices, found in zip(dealt, ranks.gather_object(answer(mine) if mine else [])):
        for index, value in zip(indices, found, strict=True):
            answers[index] = value
    return answers


class SharedModel(HFLM):
    """lm-eval's wrapper of a Hugging Face model, whose requests the ranks answer together."""

    def __init__(self, ranks: Ranks, **settings: Any) -> None:
        super().__init__(**settings)
        self.ranks = ranks

    def loglikelihood(self, requests: list, disable_tqdm: bool = False) -> list:
        return self._together(super().loglikelihood, requests, disable_tqdm)

    def loglikelihood_rolling(self, requests: list, disable_tqdm: bool = False) -> list:
        return self._together(super().loglikelihood_rolling, requests, disable_tqdm)

    def generate_until(self, requests: list, disable_tqdm: bool = False) -> list:
        return self._together(super().generate_until, requests, disable_tqdm)

    def _together(self, method: Callable, requests: list, quiet: bool) -> list:
        quiet = quiet or self.ranks.rank != 0
        return answer_together(requests, lambda part: method(part, disable_tqdm=quiet), self.ranks)


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
) -> dict[str, Any]:
    """lm-eval's results for `tasks` on the first rank of each machine; elsewhere an empty dict.

    `limit` is documents per task; below 1 a share of them. Collectives: one per kind of request.
    Without a network the tasks' data must be local (YAMLs with data files) or cached.
    """
    shared = SharedModel(
        ranks,
        pretrained=model,
        tokenizer=tokenizer,
        batch_size=batch_size,
        max_length=max_length_tokens,
    )
    results = simple_evaluate(
        model=shared,
        tasks=list(tasks),
        task_manager=manager,
        limit=limit,
        log_samples=False,
        bootstrap_iters=1000,
    )
    return results or {}


def as_table(results: dict[str, Any]) -> str:
    """The results as a table for people, the groups' averages below the tasks."""
    tables = [make_table(results)]
    if results.get("groups"):
        tables.append(make_table(results, "groups"))
    return "\n".join(tables)


def as_json(results: dict[str, Any]) -> dict[str, Any]:
    """The parts of the results that a file should keep: metrics, averages, counts and versions."""
    kept = ("results", "groups", "n-samples", "n-shot", "versions", "higher_is_better")
    return {key: results[key] for key in kept if key in results}
