"""Put the results of benchmarks/repair.py into the README and docs/results.md.

    python benchmarks/headline.py

reads docs/results/repair.csv and repair.md, which repair.py writes of the grid smollm2_cpu.yaml (`--csv
--table --figure`), and the tables of `OTHERS`, of the grids of these names, and fills the blocks of both
pages. A test compares the pages with what this would write.
"""

from __future__ import annotations

import argparse
import csv
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.blocks import put_block

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "results"
# What a reader of the README wants to know of each method, in its own words.
WHAT = {
    "seft": "**SEFT**, dense model at hand",
    "seft+distill": "SEFT, dense model at hand, also distilled from it",
    "evolving": "SEFT without the dense model",
    "fixed": "as many slots that never move",
    "fixed+distill": "as many slots that never move, distilled from the dense model",
    "random_grow": "slots grown at random",
    "spiel": "SpIEL",
    "masked_full": "all live weights train",
    "lora": "LoRA, merged",
    "lora_pruned": "LoRA, merged and pruned back",
    "spp": "SPP",
    "sqft": "SQFT (SparsePEFT)",
}
TEXT = "wikitext2"
# Tables as they are.
OTHERS = ("pruners", "2of4", "commonsense", "ablations", "500_steps", "2000_steps")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.parse_args(argv)
    for page, name, text in blocks():
        put_block(page, name, text)


def blocks() -> list[tuple[Path, str, str]]:
    """(page, block, what stands in it)."""
    with open(RESULTS / "repair.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    full, *others = (
        (RESULTS / f"{name}.md").read_text(encoding="utf-8").strip() for name in ("repair", *OTHERS)
    )
    figure = "![perplexity by method]({}repair.png)"
    return [
        (ROOT / "README.md", "repair", headline(rows) + "\n\n" + figure.format("docs/results/")),
        (ROOT / "docs/results.md", "repair", full + "\n\n" + figure.format("results/")),
        *(
            (ROOT / "docs/results.md", name, text)
            for name, text in zip(OTHERS, others, strict=True)
        ),
    ]


def headline(rows: list[dict[str, str]]) -> str:
    """A short table: of each model the methods from the best to the worst."""
    lines = [
        "| | weights that train | sparsity after | perplexity, WikiText-2 | gap closed | seeds |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for model in dict.fromkeys(row["model"] for row in rows):
        mine = [row for row in rows if row["model"] == model]
        ends = [row for row in mine if row["method"] in ("dense", "pruned")]
        methods = [row for row in mine if row["method"] not in ("dense", "pruned")]
        for row in [*ends, *sorted(methods, key=lambda row: float(row[TEXT]))]:
            lines.append(_line(row, model))
    return "\n".join(lines)


def _line(row: dict[str, str], model: str) -> str:
    if row["method"] in ("dense", "pruned"):
        name = f"{row['method']} ({model})" if row["method"] == "pruned" else "dense"
        return f"| {name} | | | {float(row[TEXT]):.2f} | | |"
    spread = f" ± {float(row[f'{TEXT}_std']):.2f}" if row.get(f"{TEXT}_std") else ""
    cells = [
        WHAT.get(row["method"], row["method"]),
        f"{int(row['trainable']):,}",
        f"{float(row['sparsity']):.2%}",
        f"{float(row[TEXT]):.2f}{spread}",
        f"{float(row['gap_closed']):.1%}",
        row["seeds"],
    ]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
