"""The grid of benchmarks/repair.py: what a YAML file may say, and the cells that it stands for.

    models:          {NAME: FOLDER}        pruned models
    dense:           {NAME: FOLDER}        of each the model that it was pruned from; for the gap that closes
    prune:           models are made here by launch/prune.py, named DENSE-METHOD-SPARSITY:
      models:        {NAME: FOLDER}        dense
      methods:       [wanda, magnitude]
      sparsities:    [0.6, "2:4"]
      args:          {calibration_file: TEXT, ...}     flags of launch/prune.py
    tiny: true       instead of models: a tiny model and its texts are made and trained here
    train_file:      TEXT
    validation:      {text_file, max_length, max_windows}     learning rates are chosen by it
    eval:            [{name, text_file, max_length, max_windows}]
    tasks:           {tasks: NAME,NAME, include_path, limit, max_length, batch_size} of lm-eval
    methods:         [{name: seft, args: {...}, seft: {...}, learning_rates: [...]}]
                     name: of the row; method: what --method gets (default: the name)
    learning_rates:  [1e-3, 5e-3]          one: nothing is tuned
    tune:            {steps: 50, seed: 0}  default: all steps, the first seed
    seeds:           [0, 1, 2]
    steps:           100
    deepspeed:       ds_configs/zero3.json
    args:            {...}                 flags of launch/finetune.py for all methods
    seft:            {...}                 the same for --seft.*: methods without slots don't get them, and no
                     method gets what it fixes itself
    launcher:        "deepspeed --num_gpus 2"          default: one process
    env:             {OMP_NUM_THREADS: 2}

Paths are relative to the working directory.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from seft_ds.baselines.methods import find_method
from seft_ds.json_file import read_text
from seft_ds.train.flags import RecipeLoader

_KNOWN = {
    "models", "dense", "prune", "tiny", "train_file", "validation", "eval", "tasks", "methods",
    "learning_rates", "tune", "seeds", "steps", "deepspeed", "args", "seft", "launcher", "env",
    "beside",
}  # fmt: skip
_GRID_BYTES = 1 << 20


@dataclass(frozen=True)
class Text:
    """A text that models are measured on."""

    name: str
    text_file: str
    max_length: int = 1024
    max_windows: int | None = None

    def flags(self) -> list[str]:
        flags = ["--text_file", self.text_file, "--max_length", str(self.max_length)]
        return flags + (["--max_windows", str(self.max_windows)] if self.max_windows else [])


@dataclass(frozen=True)
class Tasks:
    """lm-eval tasks that final runs are measured on."""

    tasks: str  # names, commas between
    include_path: str | None = None
    limit: int | None = None
    max_length: int = 1024
    batch_size: int = 8

    def flags(self) -> list[str]:
        given = {name: value for name, value in vars(self).items() if value is not None}
        return _flags(given, "--")


@dataclass(frozen=True)
class Row:
    """One method with its arguments: a row of the table."""

    name: str
    method: str
    flags: tuple[str, ...]
    learning_rates: tuple[float, ...]


@dataclass(frozen=True)
class Cell:
    """One run: a model, a row, a learning rate, a seed."""

    model: str
    row: Row
    learning_rate: float
    seed: int
    steps: int
    tuning: bool = False  # measured on the validation text only

    def command(self, grid: Grid) -> list[str]:
        """Flags of launch/finetune.py, all but the output folder."""
        return [
            "--model_name_or_path", grid.models[self.model], "--train_file", grid.train_file,
            "--deepspeed", grid.deepspeed, "--method", self.row.method,
            "--max_steps", str(self.steps), "--learning_rate", repr(self.learning_rate),
            "--seed", str(self.seed), "--seft.seed", str(self.seed), *self.row.flags,
        ]  # fmt: skip

    def folder(self, grid: Grid) -> Path:
        """Named for people; the digest makes a changed grid another cell."""
        asked: list[Any] = [self.command(grid), grid.launcher, [vars(t) for t in self.texts(grid)]]
        if grid.tasks and not self.tuning:
            asked.append(vars(grid.tasks))
        digest = hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:8]
        kind = "tune" if self.tuning else "run"
        name = f"{kind}-lr{self.learning_rate:g}-seed{self.seed}-{digest}"
        return Path(self.model) / self.row.name / name

    def texts(self, grid: Grid) -> list[Text]:
        chosen = [grid.validation] if grid.validation else []
        return chosen if self.tuning else chosen + grid.texts


@dataclass
class Grid:
    models: dict[str, str]
    train_file: str
    texts: list[Text]
    rows: list[Row]
    seeds: list[int]
    steps: int
    deepspeed: str
    validation: Text | None = None
    tasks: Tasks | None = None
    dense: dict[str, str] = field(default_factory=dict)
    tune_steps: int = 0
    tune_seed: int = 0
    launcher: str = ""
    env: dict[str, str] = field(default_factory=dict)
    beside: str = ""  # the row that others are compared with, seed by seed

    def tuning_cells(self) -> list[Cell]:
        """Of every row with several learning rates, one run for each.

        Where they are as long as the final runs, that of the chosen rate is one of those, and not run twice.
        """
        whole = self.tune_steps == self.steps and self.tune_seed in self.seeds
        return [
            Cell(model, row, rate, self.tune_seed, self.tune_steps, tuning=not whole)
            for model in self.models
            for row in self.rows
            if len(row.learning_rates) > 1
            for rate in row.learning_rates
        ]

    def final_cells(self, chosen: dict[tuple[str, str], float]) -> list[Cell]:
        """Every row at its learning rate, for each seed. chosen: by (model, row)."""
        return [
            Cell(model, row, chosen[model, row.name], seed, self.steps)
            for seed in self.seeds  # whole tables early: seeds are the outermost
            for model in self.models
            for row in self.rows
        ]


def read_grid(path: Path) -> dict[str, Any]:
    """The YAML file as plain data.

    Raises:
        ValueError: no such file, not YAML, an unknown key.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file; grids are in benchmarks/grids/")
    try:
        data = yaml.load(read_text(path, _GRID_BYTES), RecipeLoader)
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML that can be read ({error})") from None
    if not isinstance(data, dict):
        raise ValueError(f"{path}: wanted NAME: VALUE lines, got {type(data).__name__}")
    unknown = sorted(set(data) - _KNOWN)
    if unknown:
        raise ValueError(
            f"{path}: unknown {', '.join(unknown)}; known: {', '.join(sorted(_KNOWN))}"
        )
    return data


def build_grid(data: dict[str, Any], check_files: bool = True) -> Grid:
    """A checked grid; what `prune` and `tiny` make has been added to its models.

    check_files: whether what it names has to be there.

    Raises:
        ValueError: something is missing, doubled or not there.
    """
    for key in ("models", "train_file", "eval", "methods", "seeds", "steps"):
        if not data.get(key):
            raise ValueError(f"the grid has no {key}")
    rates = tuple(float(r) for r in data.get("learning_rates", [1e-3]))
    rows = [_row(entry, data, rates) for entry in data["methods"]]
    texts = [_text(entry) for entry in data["eval"]]
    for what, names in (("methods", [r.name for r in rows]), ("eval", [t.name for t in texts])):
        if len(set(names)) != len(names):
            raise ValueError(f"{what}: two of the same name in {', '.join(names)}")
    validation = data.get("validation")
    if validation is None and any(len(row.learning_rates) > 1 for row in rows):
        raise ValueError(
            "several learning rates, and no validation text to choose by (never the test): give validation"
        )
    dense = data.get("dense") or {}
    unknown = sorted(set(dense) - set(data["models"]))
    if unknown:
        raise ValueError(f"dense names {', '.join(unknown)}, which models doesn't")
    tune = data.get("tune") or {}
    grid = Grid(
        models={str(n): str(f) for n, f in data["models"].items()},
        train_file=str(data["train_file"]),
        texts=texts,
        rows=rows,
        seeds=[int(s) for s in data["seeds"]],
        steps=int(data["steps"]),
        deepspeed=str(data.get("deepspeed", "ds_configs/zero3.json")),
        validation=_text({**validation, "name": "validation"}) if validation else None,
        tasks=_tasks(data.get("tasks")),
        dense={str(n): str(f) for n, f in dense.items()},
        tune_steps=int(tune.get("steps", data["steps"])),
        tune_seed=int(tune.get("seed", data["seeds"][0])),
        launcher=str(data.get("launcher") or ""),
        env=environment(data),
        beside=str(data.get("beside") or ""),
    )
    if grid.beside and grid.beside not in [row.name for row in rows]:
        raise ValueError(f"beside names {grid.beside}, which is none of the methods")
    if check_files:
        _check_files(grid)
    return grid


def environment(data: dict[str, Any]) -> dict[str, str]:
    """The variables that the scripts get on top of this process's."""
    return {str(k): str(v) for k, v in (data.get("env") or {}).items()}


def _row(entry: dict[str, Any], data: dict[str, Any], rates: tuple[float, ...]) -> Row:
    unknown = sorted(set(entry) - {"name", "method", "args", "seft", "learning_rates"})
    if unknown or not entry.get("name"):
        raise ValueError(f"a method wants a name, and may have method, args, seft: got {entry}")
    name = str(entry["name"])
    method = str(entry.get("method", name))
    fixed = find_method(method).settings
    shared = dict(data.get("args") or {})
    if "trainable" in fixed:
        shared.pop("trainable", None)
    seft: dict[str, Any] = {}
    if find_method(method).adapter is None:
        seft = {k: v for k, v in (data.get("seft") or {}).items() if k not in fixed}
    flags = _flags(shared | (entry.get("args") or {}), "--")
    flags += _flags(seft | (entry.get("seft") or {}), "--seft.")
    own = entry.get("learning_rates")
    return Row(name, method, tuple(flags), tuple(float(r) for r in own) if own else rates)


def _text(entry: dict[str, Any]) -> Text:
    try:
        return Text(**entry)
    except TypeError as error:
        raise ValueError(
            f"a text wants name, text_file, and may have max_length, max_windows: {error}"
        ) from None


def _tasks(entry: dict[str, Any] | None) -> Tasks | None:
    try:
        return Tasks(**entry) if entry else None
    except TypeError as error:
        raise ValueError(
            f"tasks wants tasks, and may have include_path, limit, max_length, batch_size: {error}"
        ) from None


def _flags(values: dict[str, Any], prefix: str) -> list[str]:
    flags = []
    for name, value in values.items():
        text = json.dumps(value) if isinstance(value, (bool, list, dict)) else str(value)
        flags += [f"{prefix}{name}", text]
    return flags


def _check_files(grid: Grid) -> None:
    texts = grid.texts + ([grid.validation] if grid.validation else [])
    for path in [grid.train_file, grid.deepspeed, *(t.text_file for t in texts)]:
        if not os.path.isfile(path):
            raise ValueError(f"the grid names {path}: there is no such file")
    if grid.tasks and grid.tasks.include_path and not os.path.isdir(grid.tasks.include_path):
        raise ValueError(f"the grid names {grid.tasks.include_path}: there is no such folder")
    for path in [*grid.models.values(), *grid.dense.values()]:
        if not os.path.isfile(os.path.join(path, "config.json")):
            raise ValueError(f"the grid names {path}: that is no folder of a model")
