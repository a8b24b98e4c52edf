"""Step time and memory of SEFT beside what a user would pick instead: same model, engine, tokens, in turns.

    python benchmarks/speed.py --model_name_or_path PRUNED_OR_CONFIG --rank 8 --output TABLE.md

Every method is a process of its own with a DeepSpeed engine of one rank; the processes take turns, a few
steps each, so that whatever else the machine does falls on all of them alike. A step is forward, backward
and optimizer. Wall and CPU time are medians over all measured steps; the ratio is the median of the ratios
to `--beside` within a turn, with its quartiles. Memory is what the process's resident set grew by at its
peak, over the state before the model was made (on a GPU: `torch.cuda.max_memory_allocated`).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("DS_ACCELERATOR", "cpu")

import torch

METHODS = ("seft", "fixed", "lora", "spp", "sqft", "masked_full", "full")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model_name_or_path", required=True, help="a folder, or a config.json")
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--beside", default="lora", choices=METHODS, help="ratios are to this one")
    parser.add_argument("--rank", type=int, default=8, help="of adapters; slots are as many")
    parser.add_argument("--sparsity", type=float, default=0.6, help="of a model made from a config")
    parser.add_argument(
        "--layers", type=int, help="of a model made from a config: fewer than it says"
    )
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--length", type=int, default=512, help="tokens of a row")
    parser.add_argument("--stage", type=int, default=2, help="of ZeRO")
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing")
    parser.add_argument("--turns", type=int, default=8)
    parser.add_argument("--steps", type=int, default=3, help="in a turn")
    parser.add_argument(
        "--warm_turns", type=int, default=1,
        help="not measured, before the others: with at least an interval of steps events come evenly",
    )  # fmt: skip
    parser.add_argument("--interval", type=int, default=40, help="of SEFT's events")
    parser.add_argument("--output", help="write the table to this file too")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


# What a process of one method does.


def make_model(options: argparse.Namespace) -> Any:
    """The model of a folder, or one with random weights, pruned at random, of a config."""
    from transformers import AutoConfig, AutoModelForCausalLM

    dtype = getattr(torch, options.dtype)
    path = Path(options.model_name_or_path)
    torch.manual_seed(0)
    if path.is_dir():
        return AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    config = AutoConfig.from_pretrained(path)
    if options.layers:
        config.num_hidden_layers = options.layers
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    for module in model.model.layers.modules():
        if isinstance(module, torch.nn.Linear):
            keep = torch.rand_like(module.weight, dtype=torch.float32) >= options.sparsity
            module.weight.data.mul_(keep)
    return model


def make_engine(options: argparse.Namespace, total_steps: int) -> Any:
    import deepspeed

    import seft_ds
    from seft_ds.baselines.adapters import attach_adapters
    from seft_ds.baselines.methods import find_method
    from seft_ds.config import parse_seft
    from seft_ds.distributed.collectives import init_ranks

    ranks, model = init_ranks(), make_model(options)
    if options.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": options.batch,
        "bf16": {"enabled": options.dtype == "bfloat16"},
        "zero_optimization": {"stage": options.stage},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "torch_adam": True}},
        "steps_per_print": 10**9,
    }
    method = options.worker
    budget = {"trainable": f"rank={options.rank}"}
    if method == "full" or find_method(method).adapter:
        if method != "full":
            attach_adapters(model, method, parse_seft(budget), ranks)
        trained = [p for p in model.parameters() if p.requires_grad]
        made = deepspeed.initialize(model=model, config=settings, model_parameters=trained)
        return made[0]
    schedule = {"interval": options.interval, "total_steps": total_steps, "stop": 1.0}
    settings["seft"] = budget | schedule | find_method(method).settings
    return seft_ds.initialize(model=model, config=settings)[0]


def work(options: argparse.Namespace) -> None:
    """Serve one method: a line "go" runs a turn and answers with the seconds of each of its steps."""
    from seft_ds.distributed.collectives import close_ranks

    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever libraries print is no answer
    before = peak_bytes()
    engine = make_engine(options, (options.turns + options.warm_turns) * options.steps)
    size = (options.batch, options.length)
    rows = torch.randint(0, engine.module.config.vocab_size, size, device=engine.device)

    def turn() -> dict[str, Any]:
        wall, cpu = [], []
        for _ in range(options.steps):
            started, used = time.perf_counter(), time.process_time()
            engine.backward(engine(input_ids=rows, labels=rows).loss)
            engine.step()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            wall.append(time.perf_counter() - started)
            cpu.append(time.process_time() - used)
        seft = getattr(engine, "seft", None)
        return {
            "wall": wall,
            "cpu": cpu,
            "bytes": peak_bytes() - before,
            "events": getattr(seft, "n_events", 0),
            "event_seconds": getattr(seft, "event_seconds", 0.0),
            "trained": sum(getattr(p, "ds_numel", p.numel()) for p in engine.module.parameters()
                           if p.requires_grad),
        }  # fmt: skip

    for line in sys.stdin:
        if line.strip() != "go":
            break
        print(json.dumps(turn()), file=answers)
    close_ranks()


def peak_bytes() -> int:
    """The most memory that this process has held."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise OSError("no VmHWM in /proc/self/status: memory is measured on Linux only")


# What the process that was started does.


def start(method: str, argv: list[str]) -> subprocess.Popen:
    command = [sys.executable, __file__, *argv, "--worker", method]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def ask(worker: subprocess.Popen, method: str) -> dict[str, Any]:
    assert worker.stdin is not None and worker.stdout is not None
    worker.stdin.write("go\n")
    worker.stdin.flush()
    answer = worker.stdout.readline()
    if not answer:
        raise RuntimeError(f"the process of {method} has ended; its error is above")
    return json.loads(answer)


def take_turns(
    methods: list[str], options: argparse.Namespace, argv: list[str], say: Callable[[str], None]
) -> dict[str, list[dict[str, Any]]]:
    """Every method's answers, turn by turn; those of the first turns, which warm up, are not among them."""
    workers = {method: start(method, argv) for method in methods}
    turns: dict[str, list[dict[str, Any]]] = {method: [] for method in methods}
    try:
        for number in range(1 - options.warm_turns, options.turns + 1):
            for method, worker in workers.items():
                answer = ask(worker, method)
                if number > 0:
                    turns[method].append(answer)
            say(f"turn {number} of {options.turns}")
    finally:
        for worker in workers.values():
            assert worker.stdin is not None
            worker.stdin.close()
            worker.wait(60)
    return turns


def quartiles(values: list[float]) -> tuple[float, float, float]:
    low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else [values[0]] * 3
    return low, middle, high


def ratios(mine: list[dict], other: list[dict], clock: str) -> tuple[float, float, float]:
    """Quartiles of the ratio of mean step times within a turn."""
    return quartiles([sum(a[clock]) / sum(b[clock]) for a, b in zip(mine, other, strict=True)])


def table(turns: dict[str, list[dict[str, Any]]], beside: str) -> str:
    lines = [
        f"| method | trained | wall, s a step | CPU, s a step | CPU beside {beside} (quartiles) | "
        "wall beside | slowest step / median | peak GiB | memory beside |",
        "|---|" + "--:|" * 8,
    ]
    other = turns[beside]
    for method, mine in turns.items():
        wall = [s for t in mine for s in t["wall"]]
        cpu = [s for t in mine for s in t["cpu"]]
        low, middle, high = ratios(mine, other, "cpu")
        peak, its = mine[-1]["bytes"], other[-1]["bytes"]
        middle_wall, middle_cpu = statistics.median(wall), statistics.median(cpu)
        lines.append(
            f"| {method} | {mine[-1]['trained']:,} | {middle_wall:.3f} | {middle_cpu:.3f} | "
            f"{middle:.2f} ({low:.2f} to {high:.2f}) | {ratios(mine, other, 'wall')[1]:.2f} | "
            f"{max(cpu) / middle_cpu:.2f} | {peak / 2**30:.2f} | {peak / its:.2f} |"
        )
    return "\n".join(lines) + "\n"


def events_line(turns: dict[str, list[dict[str, Any]]]) -> str:
    """What the events of the measured steps took of them."""
    if "seft" not in turns or len(turns["seft"]) < 2:
        return ""
    first, last = turns["seft"][0], turns["seft"][-1]
    seconds = last["event_seconds"] - first["event_seconds"]
    whole = sum(s for t in turns["seft"][1:] for s in t["wall"])
    count = last["events"] - first["events"]
    return f"SEFT: {count} weight events took {seconds:.2f} of {whole:.2f} s ({seconds / whole:.1%}).\n"


def main() -> None:
    options = parse()
    if options.worker:
        work(options)
        return
    methods = list(dict.fromkeys([*options.methods, options.beside]))
    turns = take_turns(methods, options, sys.argv[1:], lambda t: print(t, file=sys.stderr))
    text = table(turns, options.beside) + "\n" + events_line(turns)
    print(text)
    if options.output:
        Path(options.output).write_text(text)


if __name__ == "__main__":
    main()
