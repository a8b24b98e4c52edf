"""Finished cells as one table: mean ± std over seeds, as Markdown, CSV and a figure.

The gap closed by a method, on log-perplexity: (pruned - repaired) / (pruned - dense). 0 is the pruned
model, 1 the dense one. It is taken seed by seed, also per minute of training (the steps, without imports and
saving).
"""

from __future__ import annotations

import csv
import math
import statistics
from pathlib import Path
from typing import Any

Record = dict[str, Any]


def mean_std(values: list[float]) -> tuple[float, float | None]:
    """The mean, and the standard deviation of a sample (n - 1); None for a single value."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def gap_closed(pruned: float, repaired: float, dense: float) -> float:
    """Share of the way from the pruned to the dense log-perplexity; nan if there is none to go."""
    way = math.log(pruned) - math.log(dense)
    return (math.log(pruned) - math.log(repaired)) / way if way else math.nan


def best_rate(records: list[Record], text: str) -> tuple[float, bool]:
    """(learning rate with the lowest perplexity on `text`, whether it is at the edge of the sweep).

    The lower rate wins a tie. A run that diverged (nan or infinite) never wins.

    Raises:
        ValueError: all of them diverged.
    """
    finite = [r for r in records if math.isfinite(r["perplexity"][text])]
    if not finite:
        raise ValueError(
            f"{records[0]['row']}: every learning rate diverged; give lower learning_rates"
        )
    best = min(finite, key=lambda r: (r["perplexity"][text], r["learning_rate"]))["learning_rate"]
    rates = sorted(r["learning_rate"] for r in records)
    return best, len(rates) > 1 and best in (rates[0], rates[-1])


def rows_of(
    cells: list[Record],
    texts: list[str],
    references: dict[str, dict[str, Record]],
    edges: set[tuple[str, str]],
    beside: str = "",
) -> list[Record]:
    """A row for each (model, method) in order of appearance, after those of the dense and pruned models.

    Args:
        cells: records of finished runs, all at their chosen learning rate.
        references: model -> {"pruned": record, "dense": record, if there is one}.
        edges: (model, method) whose learning rate lies at the edge of the sweep.
        beside: a method; of the others the difference to it, on the first text, over the seeds of both.
    """
    rows: list[Record] = []
    for model, known in references.items():
        for name in ("dense", "pruned"):
            if name in known:
                row: Record = {"model": model, "method": name, "seeds": 0}
                for text in texts:
                    row[text] = known[name]["perplexity"][text]
                if "accuracy" in known[name]:
                    row["accuracy"] = known[name]["accuracy"]["mean"]
                rows.append(row)
        groups: dict[str, list[Record]] = {}
        for cell in cells:
            if cell["model"] == model:
                groups.setdefault(cell["row"], []).append(cell)
        against = groups.get(beside, [])
        for name, group in groups.items():
            row = _row(model, name, group, texts, known, (model, name) in edges)
            if name != beside:
                row |= _difference(group, against, texts[0])
            rows.append(row)
    return rows


def _row(
    model: str,
    name: str,
    cells: list[Record],
    texts: list[str],
    known: dict[str, Record],
    edge: bool,
) -> Record:
    row: Record = {"model": model, "method": name, "seeds": len(cells)}
    row["learning_rate"], row["at_edge"] = cells[0]["learning_rate"], edge
    row["trainable"] = cells[0]["trainable"]
    minutes = [c["train_seconds"] / 60 for c in cells]
    measured: dict[str, list[float]] = {"sparsity": [c["sparsity"] for c in cells]}
    measured |= {text: [c["perplexity"][text] for c in cells] for text in texts}
    if all("accuracy" in c for c in cells):
        measured["accuracy"] = [c["accuracy"]["mean"] for c in cells]
    if "dense" in known and "pruned" in known:
        gaps = [
            gap_closed(
                *(r["perplexity"][texts[0]] for r in (known["pruned"], cell, known["dense"]))
            )
            for cell in cells
        ]
        measured["gap_closed"] = gaps
        measured["gap_per_minute"] = [g / m for g, m in zip(gaps, minutes, strict=True)]
    measured["train_minutes"] = minutes
    measured["peak_gib"] = [c["peak_bytes"] / 2**30 for c in cells]
    for key, values in measured.items():
        row[key], row[f"{key}_std"] = mean_std(values)
    return row


def _difference(cells: list[Record], against: list[Record], text: str) -> Record:
    """Perplexity on `text` less that of `against` at the same seed: what runs of a seed share is gone."""
    by_seed = {c["seed"]: c["perplexity"][text] for c in against}
    found = [c["perplexity"][text] - by_seed[c["seed"]] for c in cells if c["seed"] in by_seed]
    if not found:
        return {}
    mean, std = mean_std(found)
    return {"beside": mean, "beside_std": std}


def as_markdown(rows: list[Record], texts: list[str], notes: list[str], beside: str = "") -> str:
    """The table and what stands beside it."""
    head = ["model", "method", "learning rate", "seeds", "trainable", "sparsity left", *texts]
    tasks = any("accuracy" in row for row in rows)
    head += ["accuracy"] if tasks else []
    head += [f"{texts[0]} - {beside}'s, same seeds"] if beside else []
    head += ["gap closed", "per minute", "minutes", "peak GiB"]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * 2}{'--:|' * (len(head) - 2)}"]
    for row in rows:
        rate = f"{row['learning_rate']:g}" if "learning_rate" in row else ""
        cells = [row["model"], row["method"], rate + (" (edge)" if row.get("at_edge") else "")]
        cells += [str(row["seeds"] or ""), f"{row['trainable']:,}" if "trainable" in row else ""]
        cells += [_shown(row, "sparsity", "{:.4%}", "{:.2%}")]
        cells += [_shown(row, text, "{:.2f}", "{:.2f}") for text in texts]
        cells += [_shown(row, "accuracy", "{:.2%}", "{:.2%}")] if tasks else []
        cells += [_shown(row, "beside", "{:+.2f}", "{:.2f}")] if beside else []
        cells += [
            _shown(row, "gap_closed", "{:.1%}", "{:.1%}"),
            _shown(row, "gap_per_minute", "{:.2%}", "{:.2%}"),
            _shown(row, "train_minutes", "{:.2f}", "{:.2f}"),
            _shown(row, "peak_gib", "{:.2f}", "{:.2f}"),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", *notes]) + "\n"


def _shown(row: Record, key: str, form: str, std_form: str) -> str:
    if row.get(key) is None:
        return ""
    std = row.get(f"{key}_std")
    # A spread that is exactly 0 (a sparsity that is held) needs no column width.
    return form.format(row[key]) + (f" ± {std_form.format(std)}" if std else "")


def write_csv(path: Path, rows: list[Record]) -> None:
    """All numbers as they are, a column a number."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def draw(path: Path, rows: list[Record], text: str) -> None:
    """Perplexity on `text` by method, a panel a model; the error bar is one std."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    models = list(dict.fromkeys(row["model"] for row in rows))
    most = max(sum(row["model"] == m for row in rows) for m in models)
    figure, axes = pyplot.subplots(
        1, len(models), figsize=(5.5 * len(models), 1.2 + 0.34 * most), squeeze=False
    )
    for axis, model in zip(axes[0], models, strict=True):
        mine = [row for row in rows if row["model"] == model and row["seeds"]]
        for i, row in enumerate(mine):
            axis.errorbar(
                row[text], i, xerr=row.get(f"{text}_std") or 0, fmt="o", color="C0", capsize=3
            )
        axis.set_yticks(range(len(mine)), [row["method"] for row in mine])
        axis.invert_yaxis()
        for row in rows:
            if row["model"] == model and row["method"] in ("dense", "pruned"):
                axis.axvline(row[text], color="0.6", linestyle="--", linewidth=1)
                axis.annotate(
                    row["method"], (row[text], 1.01), xycoords=("data", "axes fraction"),
                    ha="center", fontsize=8, color="0.4",
                )  # fmt: skip
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 3, 5)))
        axis.xaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
        axis.xaxis.set_minor_locator(ticker.NullLocator())
        axis.set_xlabel(f"perplexity, {text}")
        axis.set_title(model, pad=16, fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
