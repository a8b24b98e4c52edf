"""benchmarks/repair.py: what grids may say, how cells add up to a table, and a small grid from end to end."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks import repair, repair_cell, repair_table, repair_tiny
from benchmarks.repair_grid import Grid, build_grid, read_grid
from seft_ds.baselines.methods import METHODS
from seft_ds.errors import RunError

ROOT = Path(__file__).resolve().parents[2]


def data(folder: Path, **changes: Any) -> dict[str, Any]:
    """A grid whose files are there."""
    for name in ("pruned", "dense"):
        (folder / name).mkdir(exist_ok=True)
        (folder / name / "config.json").write_text("{}")
    (folder / "text.txt").write_text("a")
    text = str(folder / "text.txt")
    return {
        "models": {"m": str(folder / "pruned")},
        "dense": {"m": str(folder / "dense")},
        "train_file": text,
        "validation": {"text_file": text, "max_length": 8},
        "eval": [{"name": "test", "text_file": text, "max_length": 8, "max_windows": 2}],
        "methods": [{"name": name} for name in METHODS],
        "learning_rates": [1e-3, 1e-2],
        "seeds": [0, 1],
        "steps": 10,
        "deepspeed": str(ROOT / "ds_configs/zero2.json"),
        "args": {"trainable": "rank=2", "packing": True},
        "seft": {"interval": 20, "drop_fraction": 0.1},
        **changes,
    }


def test_every_method_gets_the_flags_that_it_takes(tmp_path: Path) -> None:
    grid = build_grid(data(tmp_path))
    flags = {row.name: " ".join(row.flags) for row in grid.rows}
    assert flags["seft"] == (
        "--trainable rank=2 --packing true --seft.interval 20 --seft.drop_fraction 0.1"
    )
    assert "drop_fraction" not in flags["fixed"] and "interval" in flags["fixed"]
    assert "trainable" not in flags["masked_full"]
    assert "--seft" not in flags["lora"] and "rank=2" in flags["lora"]
    assert len(grid.tuning_cells()) == 2 * len(METHODS)
    chosen = {("m", name): 1e-2 for name in METHODS}
    cells = grid.final_cells(chosen)
    assert [c.seed for c in cells] == [0] * len(METHODS) + [1] * len(METHODS)
    assert {c.learning_rate for c in cells} == {1e-2}
    # The run of the chosen rate and the first seed is one of the tuning; with fewer steps it is not.
    assert len({c.folder(grid) for c in cells + grid.tuning_cells()}) == 3 * len(METHODS)
    short = build_grid(data(tmp_path, tune={"steps": 5}))
    assert all(c.tuning and c.steps == 5 for c in short.tuning_cells())
    assert len({c.folder(short) for c in cells + short.tuning_cells()}) == 4 * len(METHODS)
    changed = build_grid(data(tmp_path, args={"trainable": "rank=3"}))
    assert not {c.folder(grid) for c in cells} & {c.folder(changed) for c in cells_of(changed)} - {
        c.folder(grid) for c in cells if c.row.name == "masked_full"
    }


def cells_of(grid: Grid) -> list:
    return grid.final_cells({("m", row.name): 1e-2 for row in grid.rows})


def test_a_methods_own_settings_win(tmp_path: Path) -> None:
    own = {"name": "fast", "method": "seft", "args": {"trainable": "rank=4"}, "seft": {"interval": 5},
           "learning_rates": [0.5]}  # fmt: skip
    grid = build_grid(data(tmp_path, methods=[own]))
    assert grid.rows[0].method == "seft" and not grid.tuning_cells()
    command = " ".join(cells_of(grid)[0].command(grid))
    assert "--trainable rank=4" in command and "--seft.interval 5" in command
    assert "--learning_rate 0.01" in command and "--seft.seed 0" in command


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"methods": []}, "no methods"),
        ({"methods": [{"name": "adalora"}]}, "wanted one of"),
        ({"methods": [{"name": "lora"}, {"name": "lora"}]}, "two of the same name"),
        ({"methods": [{"name": "lora", "arg": 1}]}, "a method wants a name"),
        ({"validation": None}, "no validation text"),
        ({"dense": {"other": "x"}}, "which models doesn't"),
        ({"beside": "best"}, "none of the methods"),
        ({"train_file": "none.txt"}, "no such file"),
        ({"models": {"m": "nowhere"}, "dense": {}}, "no folder of a model"),
        ({"eval": [{"name": "x", "file": "y"}]}, "a text wants"),
    ],
)
def test_grids_that_are_refused(tmp_path: Path, changes: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        build_grid(data(tmp_path, **changes))


def test_files_that_are_no_grid(tmp_path: Path) -> None:
    path = tmp_path / "grid.yaml"
    for text, said in (
        ("- a", "wanted NAME"),
        ("a: [", "not YAML"),
        ("modles: {}", "unknown modles"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=said):
            read_grid(path)
    for shipped in (ROOT / "benchmarks/grids").glob("*.yaml"):
        assert read_grid(shipped)["methods"]


def cell(row: str, seed: int, perplexity: float, **more: Any) -> dict[str, Any]:
    return {
        "model": "m", "row": row, "seed": seed, "learning_rate": 0.01, "trainable": 7,
        "sparsity": 0.5, "perplexity": {"test": perplexity, "validation": perplexity},
        "train_seconds": 120.0, "peak_bytes": 2**30, **more,
    }  # fmt: skip


def test_the_table_is_means_and_spreads_over_seeds(tmp_path: Path) -> None:
    cells = [cell("a", 0, 40.0), cell("b", 0, 100.0), cell("a", 1, 50.0), cell("a", 2, 60.0)]
    known = {
        "m": {"pruned": {"perplexity": {"test": 100.0}}, "dense": {"perplexity": {"test": 10.0}}}
    }
    rows = repair_table.rows_of(cells, ["test"], known, {("m", "b")})
    assert [row["method"] for row in rows] == ["dense", "pruned", "a", "b"]
    a, b = rows[2], rows[3]
    assert a["test"] == pytest.approx(50.0) and a["test_std"] == pytest.approx(10.0)
    assert a["seeds"] == 3 and b["test_std"] is None
    gaps = [(math.log(100) - math.log(p)) / (math.log(100) - math.log(10)) for p in (40, 50, 60)]
    assert a["gap_closed"] == pytest.approx(sum(gaps) / 3)
    assert a["gap_per_minute"] == pytest.approx(sum(gaps) / 6) and b["gap_closed"] == 0.0
    text = repair_table.as_markdown(rows, ["test"], ["note"])
    assert "| m | a | 0.01 | 3 | 7 | 50.0000% | 50.00 ± 10.00 |" in text
    assert "| m | b | 0.01 (edge) | 1 |" in text and text.endswith("note\n")
    repair_table.write_csv(tmp_path / "t.csv", rows)
    with open(tmp_path / "t.csv") as file:
        read = list(csv.DictReader(file))
    assert float(read[2]["test_std"]) == pytest.approx(10.0) and read[0]["test"] == "10.0"
    repair_table.draw(tmp_path / "t.png", rows, "test")
    assert (tmp_path / "t.png").stat().st_size > 1000


def test_differences_are_taken_seed_by_seed() -> None:
    cells = [cell("a", 0, 40.0), cell("a", 1, 50.0), cell("b", 1, 51.0), cell("b", 0, 43.0)]
    cells += [cell("c", 1, 49.0), cell("d", 2, 1.0)]
    known: dict[str, dict[str, Any]] = {"m": {}}
    a, b, c, d = repair_table.rows_of(cells, ["test"], known, set(), "a")
    assert b["beside"] == pytest.approx(2.0) and b["beside_std"] == pytest.approx(math.sqrt(2))
    assert (c["beside"], c["beside_std"]) == (-1.0, None) and "beside" not in a | d
    text = repair_table.as_markdown([a, b, c, d], ["test"], [], "a")
    assert "| test - a's, same seeds |" in text and "| +2.00 ± 1.41 |" in text


def test_the_best_rate_is_by_validation_and_never_one_that_diverged() -> None:
    def at(rate: float, value: float) -> dict[str, Any]:
        return {
            "row": "a",
            "learning_rate": rate,
            "perplexity": {"validation": value, "test": -value},
        }

    best = repair_table.best_rate
    assert best([at(0.1, 5.0), at(0.2, 4.0), at(0.3, 4.5)], "validation") == (0.2, False)
    assert best([at(0.1, 5.0), at(0.2, 5.0), at(0.3, math.nan)], "validation") == (0.1, True)
    with pytest.raises(ValueError, match="every learning rate diverged"):
        best([at(0.1, math.inf)], "validation")


def test_a_small_grid_goes_on_where_it_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(repair_tiny, "STEPS", 30)  # it need not have learnt much
    grid = yaml.safe_load((ROOT / "benchmarks/grids/ci.yaml").read_text())
    grid["args"]["logging_steps"] = 1
    grid |= {
        "methods": [
            {"name": "fixed", "learning_rates": ["1e-3", "1e-2"]},
            {"name": "lora_pruned", "learning_rates": [1e-2], "args": {"calibration_rows": 4}},
        ],
        "tune": {"steps": 2}, "steps": 4, "seeds": [0, 1],
        "deepspeed": str(ROOT / "ds_configs/zero2.json"),
    }  # fmt: skip
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(grid))
    argv = [str(tmp_path / "grid.yaml"), "--work", str(tmp_path / "work"), "--fork"]
    started: list[str] = []
    really = repair_cell.in_fork

    def runner(script: str, flags: list[str], log: Path, *rest: Any) -> Any:
        started.append(script)
        if "lora_pruned" in flags and len(started) < 20:
            flags = [*flags, "--max_steps", "0.5"]  # fails
        return really(script, flags, log, *rest)

    monkeypatch.setattr(repair, "in_fork", runner)
    with pytest.raises(RunError, match="2 cells failed.*status"):
        repair.main(argv)
    # Two models, two tuning cells (validation only), and two seeds (validation and test).
    assert started.count("evaluate") == 2 * 2 + 2 + 2 * 2
    assert "lora_pruned" not in (tmp_path / "work/table.md").read_text()
    started[:] = ["x"] * 20
    repair.main(argv)
    assert started[20:] == ["finetune", "evaluate", "evaluate"] * 2  # only what was missing
    found = [json.loads(p.read_text()) for p in (tmp_path / "work/tiny").rglob("cell.json")]
    assert len(found) == 6 and {c["row"] for c in found} == {"fixed", "lora_pruned"}
    for record in found:
        assert record["commands"][0].startswith("python launch/finetune.py --model_name_or_path")
        assert record["versions"]["torch"] and record["hardware"] and record["date"]
        assert record["train_seconds"] > 0 and record["peak_bytes"] > 2**26 and record["tokens"] > 0
        assert set(record["perplexity"]) == {"validation"} | (
            set() if record["tuning"] else {"test"}
        )
    assert len({(c["trainable"], round(c["sparsity"], 6)) for c in found}) == 1
    assert not list((tmp_path / "work/tiny").rglob("*.safetensors"))  # of finished cells
    table = (tmp_path / "work/table.md").read_text()
    assert "| tiny | lora_pruned | 0.01 | 2 |" in table and "gap closed" in table
    assert (tmp_path / "work/table.png").is_file() and (tmp_path / "work/table.csv").is_file()
