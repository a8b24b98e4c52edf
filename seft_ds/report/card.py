"""`README.md` of a sparse model: what it was made from, how sparse it is, how to load it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from seft_ds.report.facts import Facts, base_name, split_name

CARD_NAME = "README.md"


def write_model_card(
    run_dir: str | Path, sparsity: dict[str, Any], facts: Facts | None = None
) -> Path:
    """Write the model card beside the model; returns its path.

    `sparsity` is the content of `sparsity.json`; `facts` adds the course of the run, if there was one.
    """
    path = Path(run_dir) / CARD_NAME
    path.write_text(model_card(sparsity, facts, Path(run_dir).resolve().name), encoding="utf-8")
    return path


def model_card(sparsity: dict[str, Any], facts: Facts | None, title: str) -> str:
    """The card as Markdown with a YAML front matter."""
    base = base_name(str(sparsity.get("base_model") or (facts and facts.run.get("model")) or ""))
    # JSON strings are YAML strings, whatever the name holds.
    front = ["---", *([f"base_model: {json.dumps(base)}"] if base else [])]
    front += ["library_name: transformers", "pipeline_tag: text-generation"]
    front += ["tags:", "- sparse", "- seft", "---"]
    lines = [*front, "", f"# {title}", "", _opening(sparsity, base), "", *_table(sparsity), ""]
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


def _training(facts: Facts) -> list[str]:
    (first, start), (last, end) = facts.losses[0], facts.losses[-1]
    text = f"Training loss {start:.4g} at step {first:,}, {end:.4g} at step {last:,}"
    changes = f"; {facts.changes('evolution event')}" if facts.events else ""
    lines = ["## Fine-tuning", "", f"{text}{changes}.", ""]
    for record in facts.evals[-5:]:
        if record.get("value") is not None:
            lines.append(
                f"- {record.get('name')} at step {record['step']:,}: {record['value']:.4g}"
            )
    return [*lines, ""] if facts.evals else lines


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
