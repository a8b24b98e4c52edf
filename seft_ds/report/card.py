"""`README.md` of a sparse model: what it was made from, how sparse it is, how to load it."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from seft_ds.report.facts import Facts, base_name, eval_points, split_name

CARD_NAME = "README.md"


class Measured(NamedTuple):
    """One figure of one text or task."""

    what: str
    metric: str
    value: float
    error: float | None = None  # standard error
    on: str = ""  # how much of it was measured


def write_model_card(
    run_dir: str | Path,
    sparsity: dict[str, Any],
    facts: Facts | None = None,
    evaluations: Sequence[dict[str, Any]] = (),
    before: Sequence[dict[str, Any]] = (),
) -> Path:
    """Write the model card beside the model; returns its path.

    `sparsity` is the content of `sparsity.json`; `facts` adds the course of the run, if there was one;
    `evaluations`: what launch/evaluate.py wrote of this model; `before`: of the one that it was made from.
    """
    run_dir = Path(run_dir)
    path = run_dir / CARD_NAME
    measured = [row for results in evaluations for row in measured_in(results)]
    earlier = [row for results in before for row in measured_in(results)]
    licences = sorted(p.name for p in run_dir.glob("LICEN[SC]E*"))
    if licences and "license" not in sparsity:
        named = {"license": "other", "license_name": "base-model", "license_link": licences[0]}
        sparsity = {**sparsity, "license": named}
    text = model_card(sparsity, facts, run_dir.resolve().name, measured, earlier)
    path.write_text(text, encoding="utf-8")
    return path


def measured_in(results: dict[str, Any]) -> list[Measured]:
    """Perplexity and the tasks' metrics, with their errors, out of what launch/evaluate.py writes."""
    rows: list[Measured] = []
    text = results.get("perplexity")
    if isinstance(text, dict) and is_number(text.get("perplexity")):
        windows, tokens = text.get("windows"), text.get("window_tokens")
        on = f"{windows:,} windows of {tokens} tokens" if is_number(windows) else ""
        rows.append(
            Measured(str(text.get("text_file")), "perplexity", float(text["perplexity"]), None, on)
        )
    tasks = results.get("tasks")
    found = tasks.get("results") if isinstance(tasks, dict) else None
    for task, metrics in found.items() if isinstance(found, dict) else ():
        for name, value in metrics.items() if isinstance(metrics, dict) else ():
            metric, _, kind = str(name).partition(",")
            if not is_number(value) or not kind or metric.endswith("_stderr"):
                continue
            error = metrics.get(f"{metric}_stderr,{kind}")
            shown = metric if kind == "none" else f"{metric} ({kind})"
            rows.append(
                Measured(
                    str(task), shown, float(value), float(error) if is_number(error) else None,
                    _documents(tasks, task),
                )
            )  # fmt: skip
    return rows


def _documents(tasks: Any, task: str) -> str:
    """How many documents a task's figures come from; "" if nobody said."""
    counts = (tasks.get("n-samples") or {}).get(task)
    if not isinstance(counts, dict) or not is_number(counts.get("effective")):
        return ""
    used, there = counts["effective"], counts.get("original")
    if is_number(there) and used < there:
        return f"the first {used:,} of {there:,} documents"
    return f"{used:,} documents"


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def model_card(
    sparsity: dict[str, Any],
    facts: Facts | None,
    title: str,
    measured: Sequence[Measured] = (),
    before: Sequence[Measured] = (),
) -> str:
    """The card as Markdown with a YAML front matter."""
    base = base_name(str(sparsity.get("base_model") or (facts and facts.run.get("model")) or ""))
    # JSON strings are YAML strings, whatever the name holds.
    front = ["---"]
    if re.fullmatch(r"[\w.-]+/[\w.-]+", base):  # a folder's name means nothing on a hub
        front += [f"base_model: {json.dumps(base)}", "base_model_relation: finetune"]
    licence = sparsity.get("license")
    for key, value in licence.items() if isinstance(licence, dict) else ():
        front.append(f"{key}: {json.dumps(value)}")
    front += ["library_name: transformers", "pipeline_tag: text-generation"]
    front += ["tags:", "- sparse", "- seft", *_model_index(title, measured), "---"]
    lines = [*front, "", f"# {title}", "", _opening(sparsity, base), "", *_table(sparsity), ""]
    lines += _pruning(sparsity.get("pruning"))
    lines += _evaluation(measured, before) if measured else []
    lines += _training(facts) if facts and facts.losses else []
    return "\n".join(lines + _LOADING) + "\n"


def _pruning(settings: Any) -> list[str]:
    """How the model was pruned, as far as its record says."""
    if not isinstance(settings, dict) or not settings:
        return []
    told = ", ".join(
        f"{_cell(str(k))} {_cell(str(v))}" for k, v in settings.items() if v is not None
    )
    return ["## Pruning", "", f"{told}.", ""]


def _opening(sparsity: dict[str, Any], base: str) -> str:
    of = f" of `{base}`" if base else ""
    kind = sparsity.get("pattern")
    kind = "unstructured" if kind == "unstructured" else f"{kind} pattern"
    name = sparsity.get("method")
    method = f", pruned by {name}" if name else ""
    if name == "seft":  # its base is pruned already
        method = ", repaired at fixed sparsity by SEFT (arXiv 2505.24037)"
    elif "steps" in sparsity:
        method = f", pruned, then trained by {name}"
    return (
        f"A sparse version{of}{method}: {100 * sparsity['sparsity']:.2f} % of the target weights are "
        f"exactly zero ({kind}); {sparsity['live']:,} of {sparsity['total']:,} are live."
    )


def _table(sparsity: dict[str, Any]) -> list[str]:
    """Counts per projection, as Markdown."""
    rows: dict[str, list[int]] = {}
    for name, entry in sparsity.get("targets", {}).items():
        total = 1
        for size in entry["shape"]:
            total *= size
        row = rows.setdefault(split_name(name)[1], [0, 0, 0])
        row[:] = [row[0] + 1, row[1] + total, row[2] + entry["live"]]
    lines = ["| projection | tensors | weights | live | sparsity |", "|---|--:|--:|--:|--:|"]
    for name, (tensors, total, live) in rows.items():
        share = 100 * (1 - live / max(total, 1))
        lines.append(f"| `{name}` | {tensors} | {total:,} | {live:,} | {share:.2f} % |")
    return lines


def _model_index(title: str, measured: Sequence[Measured]) -> list[str]:
    """The results as a hub shows them beside the model; JSON is YAML."""
    results = []
    for row in measured:
        name = f"{row.what} ({row.on})" if row.on.startswith("the first") else row.what
        metric = {"type": row.metric, "value": row.value}
        results.append(
            {
                "task": {"type": "text-generation"},
                "dataset": {"name": name, "type": row.what},
                "metrics": [metric],
            }
        )
    return [f"model-index: {json.dumps([{'name': title, 'results': results}])}"] if results else []


def _evaluation(measured: Sequence[Measured], before: Sequence[Measured]) -> list[str]:
    """The figures as a table, beside those of the model that this one was made from, if they are known."""
    earlier = {(row.what, row.metric, row.on): row for row in before}
    found = [earlier.get((row.what, row.metric, row.on)) for row in measured]
    known = any(found)
    head = ["", "metric", *(["before"] if known else []), "value", "measured on"]
    lines = [f"| {' | '.join(head)} |", f"|---|---|{'--:|' * (1 + known)}---|"]
    for row, old in zip(measured, found):
        figures = [_figure(old) if old else ""] * known + [_figure(row)]
        cells = [_cell(row.what), _cell(row.metric), *figures, _cell(row.on)]
        lines.append(f"| {' | '.join(cells)} |")
    return ["## Evaluation", "", *lines, ""]


def _figure(row: Measured) -> str:
    error = "" if row.error is None else f" ± {row.error:.2g}"
    return f"{row.value:.4g}{error}"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _training(facts: Facts) -> list[str]:
    (first, start), (last, end) = facts.losses[0], facts.losses[-1]
    text = f"Training loss {start:.4g} at step {first:,}, {end:.4g} at step {last:,}"
    changes = f"; {facts.changes('evolution event')}" if facts.events else ""
    lines = ["## Fine-tuning", "", f"{text}{changes}.", ""]
    evals = eval_points(facts)
    if evals:
        lines += ["| while it trained | first | last |", "|---|--:|--:|"]
        for name, points in evals.items():
            ends = [f"{value:.4g} (step {step:,})" for step, value in (points[0], points[-1])]
            lines.append(f"| {_cell(name)} | {' | '.join(ends)} |")
        lines.append("")
    settings = facts.run.get("arguments")
    shown = (
        {k: v for k, v in settings.items() if k != "train"} if isinstance(settings, dict) else {}
    )
    if shown:
        lines += [", ".join(f"{_cell(str(k))} {_cell(str(v))}" for k, v in shown.items()) + ".", ""]
    return lines


_LOADING = """## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("PATH_OR_NAME")
tokenizer = AutoTokenizer.from_pretrained("PATH_OR_NAME")
```

The files are plain safetensors with the zeros in place, so anything that loads the base model loads
this one. Zeros alone bring no speed on a GPU: dense kernels serve them. Gains come from 2:4 kernels and
from engines that compress sparse weights.

`sparsity.json` records the live count and a mask digest of every weight;
`python launch/verify.py PATH` recounts them from the files.""".split("\n")
