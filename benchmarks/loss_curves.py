"""Loss curves of runs side by side: mean over seeds, spread, and the difference from the first group.

    python benchmarks/loss_curves.py adamw=RUN_0,RUN_1,RUN_2 adamw_8bit=RUN_3,RUN_4,RUN_5 [--every 10]

Each RUN is a run folder of launch/finetune.py (`--logging_steps 1`). Runs at the same place of two groups
have the same seed, so that their difference is free of what the seed does.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path


def losses(run: str) -> list[float]:
    """The loss of each step of a run."""
    path = Path(run) / "journal.jsonl"
    if not path.is_file():
        raise SystemExit(f"{run} has no journal.jsonl; wanted a run folder of launch/finetune.py")
    records = [json.loads(line) for line in path.read_text().splitlines()]
    return [r["loss"] for r in records if r["kind"] == "step" and r.get("loss") is not None]


def binned(values: list[float], every: int) -> list[float]:
    return [statistics.fmean(values[i : i + every]) for i in range(0, len(values), every)]


def table(groups: dict[str, list[str]], every: int) -> str:
    """One line for each `every` steps."""
    curves = {name: [binned(losses(run), every) for run in runs] for name, runs in groups.items()}
    first, *others = curves
    head = ["steps", *curves, *(f"{name} - {first}, same seed" for name in others)]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for i in range(min(len(c) for runs in curves.values() for c in runs)):
        cells = [f"{i * every + 1} to {(i + 1) * every}"]
        cells += [spread([c[i] for c in runs]) for runs in curves.values()]
        for name in others:
            pairs = zip(curves[name], curves[first], strict=True)
            cells.append(spread([a[i] - b[i] for a, b in pairs], sign=True))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def spread(values: list[float], sign: bool = False) -> str:
    """Mean ± standard deviation."""
    mean = statistics.fmean(values)
    deviation = statistics.stdev(values) if len(values) > 1 else float("nan")
    return f"{mean:{'+' if sign else ''}.4f} ± {deviation:.4f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("groups", nargs="+", help="NAME=RUN,RUN,...")
    parser.add_argument("--every", type=int, default=10, help="steps that are averaged")
    options = parser.parse_args()
    groups = {}
    for text in options.groups:
        name, _, runs = text.partition("=")
        groups[name] = runs.split(",")
    print(table(groups, options.every))


if __name__ == "__main__":
    main()
