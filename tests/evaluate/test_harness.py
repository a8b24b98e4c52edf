"""lm-eval over ranks: who answers what, and tasks on local files."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml

from seft_ds.evaluate.harness import (
    answer_together,
    as_json,
    as_table,
    check_figure,
    check_names,
    evaluate_tasks,
    figures,
    load_tasks,
    shares,
    task_manager,
)
from tests.prune.models import WORDS, tiny_model, tiny_tokenizer
from tests.ranks import run_threads

CHOICE = """
task: tiny_choice
dataset_path: json
dataset_kwargs:
  data_files:
    test: {rows}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{query}}}}"
doc_to_choice: choices
doc_to_target: gold
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""
ROLLING = """
task: tiny_rolling
dataset_path: json
dataset_kwargs:
  data_files:
    test: {rows}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: query
metric_list:
  - metric: word_perplexity
    aggregation: weighted_perplexity
    higher_is_better: false
"""

BROKEN = CHOICE.replace('"{{{{query}}}}"', '"{{{{query if gold == 1 else 1 / 0}}}}"')


@dataclass
class Request:
    args: tuple


@pytest.mark.parametrize("size", [1, 2, 3, 9])
def test_shares_cover_each_request_once_and_keep_contexts_together(size):
    contexts = ["a", "b", "a", "c", "d", "b", "e", "a"]
    dealt = shares(contexts, size)
    assert sorted(i for part in dealt for i in part) == list(range(8))
    for context in set(contexts):
        owners = {r for r, part in enumerate(dealt) for i in part if contexts[i] == context}
        assert len(owners) == 1
    distinct = [len({contexts[i] for i in part}) for part in dealt]
    assert max(distinct) - min(distinct) <= 1


@pytest.mark.parametrize("size", [1, 2, 3, 9])
def test_every_rank_gets_every_answer_in_order(size):
    requests = [Request((f"c{i % 3}", i)) for i in range(7)]
    asked: list[list[int]] = [[] for _ in range(size)]

    def work(ranks):
        def answer(part):
            asked[ranks.rank] = [r.args[1] for r in part]
            return [r.args[1] * 10 for r in part]

        return answer_together(requests, answer, ranks)

    assert run_threads(size, work) == [[i * 10 for i in range(7)]] * size
    assert sorted(i for part in asked for i in part) == list(range(7))


@pytest.fixture(scope="module")
def task_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    generator = torch.Generator().manual_seed(0)
    rows = []
    for _ in range(11):
        picked = [WORDS[i] for i in torch.randint(0, 60, (9,), generator=generator)]
        rows.append({"query": " ".join(picked[:6]), "choices": picked[6:], "gold": 1})
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for name, template in (("choice", CHOICE), ("rolling", ROLLING)):
        (folder / f"{name}.yaml").write_text(template.format(rows=folder / "rows.jsonl"))
    odd = [*rows[:3], rows[3] | {"gold": 2}]
    (folder / "odd.jsonl").write_text("\n".join(map(json.dumps, odd)))
    for name, template, data in (("broken", BROKEN, "odd"), ("missing", CHOICE, "none")):
        text = template.format(rows=folder / f"{data}.jsonl").replace("tiny_choice", f"tiny_{name}")
        (folder / f"{name}.yaml").write_text(text)
    return folder, rows


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """The made-up rows leave nothing behind among the user's data sets."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def manager(task_folder):
    """Once for all tests: the index of lm-eval's own tasks takes seconds."""
    return task_manager(["tiny_choice", "tiny_rolling"], str(task_folder[0]))


def slow_accuracy(model, tokenizer, rows) -> float:
    """Share of the rows whose gold word has the highest logit."""
    hits = 0
    for row in rows:
        ids = torch.tensor([tokenizer(row["query"])["input_ids"]])
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, -1]
        scores = [float(logits[tokenizer(c)["input_ids"][0]]) for c in row["choices"]]
        hits += max(range(3), key=lambda i: scores[i]) == row["gold"]
    return hits / len(rows)


def test_tasks_give_the_same_on_one_and_two_ranks(task_folder, manager):
    _, rows = task_folder
    names = ["tiny_choice", "tiny_rolling"]
    model, tokenizer = tiny_model(), tiny_tokenizer()

    def work(ranks, limit=None):
        found = evaluate_tasks(
            model, tokenizer, names, ranks, manager=manager, batch_size=2, limit=limit
        )
        return found["results"]

    (alone,) = run_threads(1, work)
    assert alone["tiny_choice"]["acc,none"] == slow_accuracy(model, tokenizer, rows)
    for result in run_threads(2, work):
        assert result["tiny_choice"]["acc,none"] == alone["tiny_choice"]["acc,none"]
        assert result["tiny_rolling"]["word_perplexity,none"] == pytest.approx(
            alone["tiny_rolling"]["word_perplexity,none"], rel=1e-5
        )
    # Fewer documents than ranks: nobody waits for ever.
    for result in run_threads(2, lambda ranks: work(ranks, limit=1)):
        assert result["tiny_choice"]["acc,none"] == slow_accuracy(model, tokenizer, rows[:1])


def test_requests_begin_as_the_tokenizer_begins_a_text(manager):
    model, tokenizer = tiny_model("gemma"), tiny_tokenizer("<bos> $A")
    tokenizer.pad_token = "</s>"
    firsts: list[int] = []
    model.register_forward_pre_hook(lambda _, args: firsts.extend(args[0][:, 0].tolist()))

    def work(ranks, added):
        evaluate_tasks(
            model, tokenizer, ["tiny_choice"], ranks, manager=manager, limit=4, add_bos_token=added
        )

    for added in (True, False):
        firsts.clear()
        run_threads(1, lambda ranks, added=added: work(ranks, added))
        assert firsts and all((first == 62) == added for first in firsts)


def test_results_for_people_and_for_files(manager):
    model, tokenizer = tiny_model(), tiny_tokenizer()

    def work(ranks):
        return evaluate_tasks(model, tokenizer, ["tiny_choice"], ranks, manager=manager, limit=4)

    (results,) = run_threads(1, work)
    assert "tiny_choice" in as_table(results)
    kept = json.loads(json.dumps(as_json(results), default=str))
    assert kept["n-samples"]["tiny_choice"]["effective"] == 4
    assert 0 <= kept["results"]["tiny_choice"]["acc,none"] <= 1


def test_the_tasks_of_recipes_exist(manager):
    found = 0
    for recipe in (Path(__file__).resolve().parents[2] / "launch/recipes").glob("*.yaml"):
        tasks = yaml.safe_load(recipe.read_text()).get("eval_tasks")
        if tasks:
            check_names(tasks.split(","), manager)
            found += 1
    assert found


def test_figures_by_task_and_metric():
    results = {
        "results": {"arc": {"alias": "arc", "acc,none": 0.5, "acc_stderr,none": 0.1}},
        "groups": {"g": {"exact_match,strict-match": 1, "alias": "g"}},
    }
    assert figures(results) == {"arc_acc": 0.5, "g_exact_match_strict-match": 1.0}


def test_unknown_tasks_and_folders_are_named(task_folder, manager):
    folder, _ = task_folder
    with pytest.raises(ValueError, match="no task tiny_chioce.*--include_path"):
        check_names(["tiny_choice", "tiny_chioce"], manager)
    with pytest.raises(ValueError, match="no folder .*absent"):
        task_manager(["tiny_choice"], str(folder / "absent"))
    with pytest.raises(ValueError, match="names no task"):
        task_manager([], None)


def test_a_figure_is_known_before_it_is_measured(task_folder, manager):
    """Every figure of a real evaluation passes; another name is refused with those that there are."""
    names = ["tiny_choice", "tiny_rolling"]
    loaded = load_tasks(names, manager)

    def work(ranks):
        return evaluate_tasks(
            tiny_model(), tiny_tokenizer(), names, ranks, manager=manager, batch_size=2
        )

    [results] = run_threads(1, work)
    measured = figures(results)
    assert set(measured) == {"tiny_choice_acc", "tiny_rolling_word_perplexity"}
    for name in measured:
        check_figure(name, loaded)
    check_figure("tiny_choice_acc_some-filter", loaded)
    for name in ("piqa_acc", "tiny_choice", "tiny_choice_account", "acc"):
        with pytest.raises(ValueError, match="they have tiny_choice_acc, tiny_rolling_word"):
            check_figure(name, loaded)


def test_a_task_that_fails_loses_no_other_result(task_folder, manager):
    """One whose data is missing is named before anything is measured; one that fails later is left out."""
    names = ["tiny_broken", "tiny_choice"]
    with pytest.raises(
        ValueError, match="task tiny_missing can't be loaded: .*none.jsonl"
    ) as caught:
        load_tasks(["tiny_choice", "tiny_missing"], manager)
    assert "tiny_choice" not in str(caught.value)
    assert set(load_tasks(names, manager)) == set(names)
    model, tokenizer = tiny_model(), tiny_tokenizer()

    def work(ranks):
        return evaluate_tasks(model, tokenizer, names, ranks, manager=manager, batch_size=2)

    for found in run_threads(2, work):
        assert set(found["results"]) == {"tiny_choice"}
        assert found["results"]["tiny_choice"]["acc,none"] == slow_accuracy(
            model, tokenizer, task_folder[1]
        )
        assert found["failed"].keys() == {"tiny_broken"}
        assert "ZeroDivisionError: division by zero" in found["failed"]["tiny_broken"]
        assert as_json(found)["failed"] == found["failed"] and "tiny_choice" in as_table(found)
