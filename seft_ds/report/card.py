"""`README.md` of a sparse model: what it was made from, how sparse it is, how to load it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from seft_ds.report.facts import Facts, base_name, eval_points, split_name

CARD_NAME = "README.md"


Measured = tuple[str, str, float]  # text or task, metric, value


def write_model_card(
    run_dir: str | Path,
    sparsity: dict[str, Any],
    facts: Facts | None = None,
    evaluations: Sequence[dict[str, Any]] = (),
) -> Path:
    """Write the model card beside the model; returns its path.

    `sparsity` is the content of `sparsity.json`; `facts` adds the course of the run, if there was one;
    `evaluations`: what launch/evaluate.py wrote of this model.
    """
    path = Path(run_dir) / CARD_NAME
    measured = [row for results in evaluations for row in measured_in(results)]
    text = model_card(sparsity, facts, Path(run_dir).resolve().name, measured)
    path.write_text(text, encoding="utf-8")
    return path


def measured_in(results: dict[str, Any]) -> list[Measured]:
    """Perplexity and the tasks' metrics, without their errors, out of what launch/evaluate.py writes."""
    rows: list[Measured] = []
    text = results.get("perplexity")
    if isinstance(text, dict) and is_number(text.get("perplexity")):
        rows.append((str(text.get("text_file")), "perplexity", float(text["perplexity"])))
    tasks = results.get("tasks")
    found = tasks.get("results") if isinstance(tasks, dict) else None
    for task, metrics in found.items() if isinstance(found, dict) else ():
        for name, value in metrics.items() if isinstance(metrics, dict) else ():
            metric, _, kind = str(name).partition(",")
            if is_number(value) and kind and not metric.endswith("_stderr"):
                rows.append(
                    (str(task), metric if kind == "none" else f"{metric} ({kind})", float(value))
                )
    return rows


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def model_card(
    sparsity: dict[str, Any], facts: Facts | None, title: str, measured: Sequence[Measured] = ()
) -> str:
    """The card as Markdown with a YAML front matter."""
    base = base_name(str(sparsity.get("base_model") or (facts and facts.run.get("model")) or ""))
    # JSON strings are YAML strings, whatever the name holds.
    front = ["---", *([f"base_model: {json.dumps(base)}"] if base else [])]
    front += ["library_name: transformers", "pipeline_tag: text-generation"]
    front += ["tags:", "- sparse", "- seft", *_model_index(title, measured), "---"]
    lines = [*front, "", f"# {title}", "", _opening(sparsity, base), "", *_table(sparsity), ""]
    lines += _evaluation(measured) if measured else []
    lines += _training(facts) if facts and facts.losses else []
    return "\n".join(lines + _LOADING) + "\n"


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
    results = [
        {
            "task": {"type": "text-generation"},
            "dataset": {"name": what, "type": what},
            "metrics": [{"type": metric, "value": value}],
        }
        for what, metric, value in measured
    ]
    return [f"model-index: {json.dumps([{'name': title, 'results': results}])}"] if results else []


def _evaluation(measured: Sequence[Measured]) -> list[str]:
    rows = [
        f"| {_cell(what)} | {_cell(metric)} | {value:.4g} |" for what, metric, value in measured
    ]
    return ["## Evaluation", "", "| | metric | value |", "|---|---|--:|", *rows, ""]


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
