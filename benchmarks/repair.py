"""Which method repairs best? models x methods x seeds from a YAML grid, as one table.

    python benchmarks/repair.py benchmarks/grids/ci.yaml --work RUNS/ci --fork
    python benchmarks/repair.py benchmarks/grids/smollm2_cpu.yaml --work RUNS/smollm2 \\
        --table RESULTS.md --csv RESULTS.csv --figure RESULTS.png

In order: models are pruned (if the grid says so); the dense and pruned models are measured; every method with
several learning rates is tuned, one run each, and the rate with the best perplexity on the validation text is
taken, never by the test; then all seeds run at that rate. Equal steps, rows and tokens for all. Cells that
are finished are skipped, so that a stopped benchmark goes on; a cell that fails is told and left for the next
start. The tables hold what is finished. What a grid may say: benchmarks/repair_grid.py.
Exit status: 0; 2 for a mistake in the grid; 1 if a cell failed.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
import torch

if not torch.cuda.is_available():  # before anything imports deepspeed, which chooses once
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

from benchmarks.repair_cell import (
    CELL_NAME,
    Runner,
    in_fork,
    in_subprocess,
    run_cell,
    run_measurement,
)
from benchmarks.repair_grid import Cell, Grid, build_grid, environment, read_grid
from benchmarks.repair_table import as_markdown, best_rate, draw, rows_of, write_csv
from seft_ds.console import run
from seft_ds.errors import RunError
from seft_ds.json_file import read_object


def main(argv: list[str] | None = None) -> None:
    options = parse(argv)
    runner = in_fork if options.fork else in_subprocess
    work = Path(options.work)
    data = read_grid(Path(options.grid))
    if options.report:
        if data.get("prune") or data.get("tiny"):
            raise ValueError("--report is for grids that name their models; leave it out")
        report(build_grid(data, check_files=False), work, options)
        return
    with_inputs(data, work, runner)
    grid = build_grid(data)
    if options.fork and (grid.launcher or torch.cuda.is_available()):
        raise ValueError("--fork is for one rank on a CPU; leave it out")
    failed = run_grid(grid, work, runner, options.keep_models)
    report(grid, work, options)
    if failed:
        raise RunError(f"{len(failed)} cells failed, the first: {failed[0]}")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0], allow_abbrev=False
    )
    parser.add_argument("grid", help="YAML file")
    parser.add_argument("--work", required=True, help="folder of the cells")
    parser.add_argument("--table", help="Markdown file; default: WORK/table.md")
    parser.add_argument("--csv", help="default: WORK/table.csv")
    parser.add_argument("--figure", help="PNG file; default: WORK/table.png")
    parser.add_argument("--keep_models", action="store_true", help="of finished cells")
    parser.add_argument(
        "--report", action="store_true", help="run nothing: tables of what is there"
    )
    parser.add_argument("--fork", action="store_true", help="pay imports once: one rank, CPU")
    return parser.parse_args(argv)


def with_inputs(data: dict[str, Any], work: Path, runner: Runner) -> None:
    """Make what the grid asks for (a tiny model, pruned models) and add it to the grid's data.

    Raises:
        RunError: launch/prune.py failed.
    """
    if data.get("tiny"):
        from benchmarks.repair_tiny import make_tiny

        home = work / "inputs"
        make_tiny(home)
        data.setdefault("models", {})["tiny"] = str(home / "pruned")
        data.setdefault("dense", {})["tiny"] = str(home / "dense")
        data["train_file"] = str(home / "train.txt")
        size = {"max_length": 40}
        data["validation"] = {"text_file": str(home / "validation.txt"), **size}
        data["eval"] = [{"name": "test", "text_file": str(home / "test.txt"), **size}]
    prune = data.get("prune") or {}
    for name, folder in (prune.get("models") or {}).items():
        for method in prune["methods"]:
            for sparsity in prune["sparsities"]:
                label = f"{name}-{method}-{sparsity}"
                out = work / "inputs" / label.replace(":", "of")
                if not (out / "sparsity.json").is_file():
                    out.parent.mkdir(parents=True, exist_ok=True)
                    budget = "--pattern" if ":" in str(sparsity) else "--sparsity"
                    flags = ["--model_name_or_path", str(folder), "--output_dir", str(out)]
                    flags += ["--method", str(method), budget, str(sparsity)]
                    for key, value in (prune.get("args") or {}).items():
                        if not (method == "magnitude" and key.startswith("calibration")):
                            flags += [f"--{key}", str(value)]
                    say(f"pruning {label}")
                    log = out.with_suffix(".log")
                    runner("prune", flags, log, "", environment(data))
                data.setdefault("models", {})[label] = str(out)
                data.setdefault("dense", {})[label] = str(folder)


def run_grid(grid: Grid, work: Path, runner: Runner, keep_models: bool) -> list[str]:
    """Run what is missing; the messages of cells that failed."""
    for kind, models in (("dense", grid.dense), ("pruned", grid.models)):
        for folder in models.values():
            run_measurement(measured_in(kind, folder, grid), folder, grid, work, runner)
    failed: list[str] = []

    def go(cells: list[Cell]) -> None:
        for i, cell in enumerate(cells, start=1):
            try:
                ran = run_cell(cell, grid, work, runner, keep_models)
            except RunError as error:
                failed.append(str(error))
                say(f"FAILED {cell.folder(grid)}: {error}")
                continue
            say(f"{i} of {len(cells)} {'ran' if ran else 'is there'}: {cell.folder(grid)}")

    go(grid.tuning_cells())
    chosen, _ = choose_rates(grid, work)
    go(
        [
            c
            for c in grid.final_cells(_with_missing(grid, chosen))
            if (c.model, c.row.name) in chosen
        ]
    )
    return failed


def measured_in(kind: str, folder: str, grid: Grid) -> str:
    """Where a model's own perplexities are: one place for all rows of the grid, the same on any machine."""
    texts = [str(text) for text in (grid.validation, *grid.texts)]
    texts += [str(grid.tasks)] if grid.tasks else []
    digest = hashlib.sha256(repr([os.path.normpath(folder), *texts]).encode()).hexdigest()[:8]
    return f"{kind}/{Path(folder).name}-{digest}"


def _with_missing(grid: Grid, chosen: dict[tuple[str, str], float]) -> dict[tuple[str, str], float]:
    """A placeholder for methods whose tuning failed: their cells are left out by the caller."""
    names = [(model, row.name) for model in grid.models for row in grid.rows]
    return {name: chosen.get(name, 0.0) for name in names}


def choose_rates(
    grid: Grid, work: Path
) -> tuple[dict[tuple[str, str], float], set[tuple[str, str]]]:
    """({(model, method): learning rate}, those at the edge of their sweep), where the tuning is whole."""
    chosen = {
        (model, row.name): row.learning_rates[0]
        for model in grid.models
        for row in grid.rows
        if len(row.learning_rates) == 1
    }
    edges = set()
    tuned: dict[tuple[str, str], list[Cell]] = {}
    for cell in grid.tuning_cells():
        tuned.setdefault((cell.model, cell.row.name), []).append(cell)
    for key, cells in tuned.items():
        records = [read(work / cell.folder(grid)) for cell in cells]
        if any(record is None for record in records):
            continue
        chosen[key], at_edge = best_rate([r for r in records if r is not None], "validation")
        if at_edge:
            edges.add(key)
    return chosen, edges


def read(folder: Path) -> dict[str, Any] | None:
    path = folder / CELL_NAME
    return read_object(path) if path.is_file() else None


def report(grid: Grid, work: Path, options: argparse.Namespace) -> None:
    """Write the table, the CSV and the figure of what is finished."""
    chosen, edges = choose_rates(grid, work)
    found = [
        read(work / cell.folder(grid))
        for cell in grid.final_cells(_with_missing(grid, chosen))
        if (cell.model, cell.row.name) in chosen
    ]
    cells = [record for record in found if record is not None]
    references: dict[str, dict[str, Any]] = {}
    for model in grid.models:
        known = {"pruned": read(work / measured_in("pruned", grid.models[model], grid))}
        if model in grid.dense:
            known["dense"] = read(work / measured_in("dense", grid.dense[model], grid))
        references[model] = {name: record for name, record in known.items() if record is not None}
    texts = [text.name for text in grid.texts]
    rows = rows_of(cells, texts, references, edges, grid.beside)
    table = as_markdown(rows, texts, notes(grid, cells, options.grid), grid.beside)
    Path(options.table or work / "table.md").write_text(table)
    write_csv(Path(options.csv or work / "table.csv"), rows)
    draw(Path(options.figure or work / "table.png"), rows, texts[0])
    print(table)


def notes(grid: Grid, cells: list[dict[str, Any]], grid_file: str) -> list[str]:
    """What a figure has to stand beside: command, steps, hardware, versions, dates."""
    tuned = (
        f"Learning rates by the validation text ({grid.tune_steps} steps, seed {grid.tune_seed}); (edge): "
        "the best was the lowest or highest tried. "
    )
    asked = f", {grid.tasks.limit} questions each" if grid.tasks and grid.tasks.limit else ""
    lines = [
        f"`benchmarks/repair.py {grid_file}`: {grid.steps} steps, seeds {grid.seeds}; mean ± standard "
        f"deviation over seeds. {tuned if grid.tuning_cells() else ''}Gap closed: on {grid.texts[0].name}, "
        "of log-perplexity, from the pruned model (0 %) to the dense one (100 %). Minutes: the steps. "
        "Peak: resident memory of the largest process while training."
        + (f" Accuracy: the mean over {grid.tasks.tasks}{asked}." if grid.tasks else "")
    ]
    if cells:
        dates = sorted({cell["date"] for cell in cells})
        hardware = sorted({cell["hardware"] for cell in cells})
        named = ", ".join(f"{k} {v}" for k, v in cells[-1]["versions"].items())
        when = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
        lines.append(f"{'; '.join(hardware)}; {named}; {when}.")
    return lines


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(run(main))
