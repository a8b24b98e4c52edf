"""One cell of a grid: run the scripts, note what it took and what came out, in `cell.json`.

A cell is finished when its `cell.json` is there; one without is run anew from the start. The file names the
commands, versions, hardware, wall time, the largest process's peak memory, perplexities, the sparsity that is
left and how many weights trained.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.hardware import cpu_name
from benchmarks.repair_grid import Cell, Grid, Tasks, Text
from seft_ds.checkpoint.export import versions
from seft_ds.errors import RunError
from seft_ds.json_file import read_object

ROOT = Path(__file__).resolve().parent.parent
CELL_NAME = "cell.json"


@dataclass
class Ended:
    """A script that has run."""

    command: str
    seconds: float
    peak_bytes: int  # the largest resident set of any of its processes


# (script, flags, log file, launcher, environment) -> how it ended; RunError if it failed
Runner = Callable[[str, list[str], Path, str, dict[str, str]], Ended]


def in_subprocess(
    script: str, flags: list[str], log: Path, launcher: str, env: dict[str, str]
) -> Ended:
    """`LAUNCHER launch/SCRIPT.py FLAGS`, as users start it."""
    start = shlex.split(launcher) if launcher else [sys.executable]
    command = [*start, str(ROOT / "launch" / f"{script}.py"), *flags]
    started = time.monotonic()
    with open(log, "a") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, env={**os.environ, **env}
        )
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    return _ended(script, flags, launcher, log, process.returncode, started, usage)


def in_fork(script: str, flags: list[str], log: Path, launcher: str, env: dict[str, str]) -> Ended:
    """The same in a fork of this process, which has paid for the imports. One rank, and CPU only."""
    import importlib

    assert not launcher, "a fork is one rank"
    module = importlib.import_module(f"launch.{script}")
    importlib.import_module("seft_ds.train.run")  # what the scripts import late
    started = time.monotonic()
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(file, 1)
            os.dup2(file, 2)
            sys.stdout, sys.stderr = open(1, "w", buffering=1), open(2, "w", buffering=1)  # noqa: SIM115
            os.environ.update(env)
            sys.argv = [f"launch/{script}.py", *flags]
            code = module.run(module.main)
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else 1
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)  # nothing of the parent's goes on here
    _, status, usage = os.wait4(pid, 0)
    return _ended(script, flags, launcher, log, os.waitstatus_to_exitcode(status), started, usage)


def _ended(
    script: str, flags: list[str], launcher: str, log: Path, code: int, started: float, usage: Any
) -> Ended:
    command = shlex.join([*shlex.split(launcher or "python"), f"launch/{script}.py", *flags])
    if code:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
        raise RunError(f"{command} ended with status {code}; the end of {log}:\n{tail}")
    return Ended(command, time.monotonic() - started, usage.ru_maxrss * 1024)


def run_cell(cell: Cell, grid: Grid, work: Path, runner: Runner, keep_model: bool) -> bool:
    """Train, measure, note. False if it was finished before.

    Raises:
        RunError: a script failed; its log is in the cell's folder.
    """
    folder = work / cell.folder(grid)
    if (folder / CELL_NAME).is_file():
        return False
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    run, log = folder / "run", folder / "log.txt"
    flags = [*cell.command(grid), "--output_dir", str(run), "--disable_tqdm", "true"]
    ended = [runner("finetune", flags, log, grid.launcher, grid.env)]
    perplexities, evaluations = measure(run, cell.texts(grid), folder, log, grid, runner)
    accuracies = {}
    if grid.tasks and not cell.tuning:
        accuracies = on_tasks(run, grid.tasks, folder, log, grid, runner, evaluations)
    record = {
        "model": cell.model,
        "row": cell.row.name,
        "method": cell.row.method,
        "learning_rate": cell.learning_rate,
        "seed": cell.seed,
        "steps": cell.steps,
        "tuning": cell.tuning,
        "perplexity": perplexities,
        **({"accuracy": accuracies} if accuracies else {}),
        **outcome(run),
        **circumstances(ended + evaluations),
        "peak_bytes": ended[0].peak_bytes,
    }
    if not keep_model:
        for path in run.glob("*.safetensors*"):
            path.unlink()
        for path in run.glob("checkpoint-*"):
            shutil.rmtree(path)
    write(folder, record)
    return True


def run_measurement(name: str, model: str, grid: Grid, work: Path, runner: Runner) -> None:
    """Perplexities of a model as it is, in `work/NAME`."""
    folder = work / name
    if (folder / CELL_NAME).is_file():
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    texts = grid.texts + ([grid.validation] if grid.validation else [])
    log = folder / "log.txt"
    perplexities, ended = measure(Path(model), texts, folder, log, grid, runner)
    record: dict[str, Any] = {"model": model, "perplexity": perplexities}
    if grid.tasks:
        record["accuracy"] = on_tasks(Path(model), grid.tasks, folder, log, grid, runner, ended)
    write(folder, record | circumstances(ended))


def measure(
    model: Path, texts: list[Text], folder: Path, log: Path, grid: Grid, runner: Runner
) -> tuple[dict[str, float], list[Ended]]:
    """Perplexity on each text, by launch/evaluate.py on one rank."""
    found, ended = {}, []
    for text in texts:
        out = folder / f"perplexity-{text.name}.json"
        flags = ["--model_name_or_path", str(model), *text.flags(), "--output_path", str(out)]
        ended.append(runner("evaluate", flags, log, "", grid.env))
        found[text.name] = float(read_object(out)["perplexity"]["perplexity"])
    return found, ended


def on_tasks(
    model: Path,
    tasks: Tasks,
    folder: Path,
    log: Path,
    grid: Grid,
    runner: Runner,
    ended: list[Ended],
) -> dict[str, float]:
    """Accuracy on each lm-eval task and their plain mean; what ran is added to `ended`."""
    out = folder / "tasks.json"
    flags = ["--model_name_or_path", str(model), *tasks.flags(), "--output_path", str(out)]
    ended.append(runner("evaluate", flags, log, "", grid.env))
    found = read_object(out)["tasks"]
    single = {
        n: r["acc,none"] for n, r in found["results"].items() if n not in found.get("groups", {})
    }
    return {**single, "mean": sum(single.values()) / len(single)}


def outcome(run: Path) -> dict[str, Any]:
    """What the run's own files say: sparsity left, what trained, how long."""
    record = read_object(run / "sparsity.json")
    lines = [json.loads(line) for line in (run / "journal.jsonl").read_text().splitlines()]
    first = next(line for line in lines if line["kind"] == "run")
    last = next(line for line in reversed(lines) if line["kind"] == "end")
    steps = [line for line in lines if line["kind"] == "step"]
    return {
        "sparsity": record["sparsity"],
        "live": record["live"],
        "changed_positions": last["changed_positions"],
        "trainable": sum(target["slots"] for target in first["targets"]),
        "train_seconds": last["seconds"],
        "tokens": sum(line.get("tokens") or 0 for line in steps),
        "last_loss": steps[-1]["loss"] if steps else None,
        "hardware": f"{first['hardware']}, {platform.machine()}, {cpu_name()}",
    }


def circumstances(ended: list[Ended]) -> dict[str, Any]:
    return {
        "commands": [e.command for e in ended],
        "seconds": [round(e.seconds, 2) for e in ended],
        "versions": versions(),
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
    }


def write(folder: Path, record: dict[str, Any]) -> None:
    """Whole or not at all."""
    aside = folder / f".{CELL_NAME}"
    aside.write_text(json.dumps(record, indent=1) + "\n")
    os.replace(aside, folder / CELL_NAME)
