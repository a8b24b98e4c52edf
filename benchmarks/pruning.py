"""Peak memory and time of pruning, against the plan and against one block.

    python benchmarks/pruning.py --model_name_or_path DIR [--methods magnitude wanda sparsegpt]
    python benchmarks/pruning.py --random 2048 5632 22 32 4 32000     # a LLaMA of random weights

Each method runs in a fork of its own, on random tokens, from the model's files to the finished folder. The
peak is that of the process's own memory (RssAnon, looked at every 2 ms) above what it had before it read the
first weight: without Python and its libraries, and without pages of files, which the system takes back when
it needs them. The time is that of the CPU, with one thread. Numbers after --random: hidden size, MLP size,
blocks, heads, key-value heads, vocabulary.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

from seft_ds.checkpoint.model_files import open_model_files
from seft_ds.prune.choose import Budget
from seft_ds.prune.empty import empty_model
from seft_ds.prune.folder import assemble, find_quotas, prune_blocks
from seft_ds.prune.plan import pruning_plan
from seft_ds.prune.recipe import recipe_of
from seft_ds.prune.source import FromFiles
from seft_ds.prune.work import Work

CPU = torch.device("cpu")
MIB = 2**20


def make_random(folder: Path, sizes: list[int]) -> None:
    """Write a LLaMA model folder with random weights in bf16, in files of 1 GB."""
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden, mlp, blocks, heads, kv, vocabulary = sizes
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=mlp, num_hidden_layers=blocks, vocab_size=vocabulary,
        num_attention_heads=heads, num_key_value_heads=kv,
    )  # fmt: skip
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="1GB")


def own_bytes(pid: int) -> int:
    """The memory of a process that is no mapped file; 0 once it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(x.split()[1]) * 1024 for x in lines if x.startswith("RssAnon:")), 0)


def measure(
    folder: Path, output: Path, method: str, samples: int, length: int, answer: Any
) -> None:
    """In a process of its own: sends its memory at the start, then (plan, CPU seconds, blocks)."""
    from seft_ds.distributed.collectives import init_ranks

    torch.set_num_threads(1)
    ranks = init_ranks()
    files = open_model_files(folder)
    dtype = files.dtype
    model = empty_model(folder, dtype, CPU, files)
    tokens = torch.randint(0, model.config.vocab_size, (samples, length))
    work = Work(output)
    work.begin({}, overwrite=True)
    source = FromFiles(model, files, work, dtype, CPU)
    recipe = recipe_of(method, Budget(sparsity=0.6))
    plan = pruning_plan(model, method, sequences=samples, length_tokens=length, dtype=dtype)
    answer.send(own_bytes(os.getpid()))
    start = time.process_time()
    quotas = find_quotas(source, recipe, tokens, ranks)
    prune_blocks(source, recipe, quotas, tokens, ranks)
    seconds = time.process_time() - start
    assemble(source, work, quotas, folder, output, {})
    answer.send((plan, seconds, len(source.blocks)))


def run(folder: Path, methods: list[str], samples: int, length: int) -> None:
    """Print a table, a row a method."""
    import deepspeed  # noqa: F401 (imported before the forks, so that it counts in none)
    import transformers  # noqa: F401

    model_bytes = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    print(f"model {model_bytes / MIB:,.0f} MiB, {samples} sequences of {length} tokens")
    print("| method | one block, MiB | peak planned | at | peak measured | CPU s a block |")
    print("|---|---|---|---|---|---|")
    context = multiprocessing.get_context("fork")
    for method in methods:
        with tempfile.TemporaryDirectory(dir=folder.parent) as output:
            answer, theirs = context.Pipe(duplex=False)
            process = context.Process(
                target=measure, args=(folder, Path(output) / "out", method, samples, length, theirs)
            )
            process.start()
            before, peak_bytes = answer.recv(), 0
            while not answer.poll(0.002):
                peak_bytes = max(peak_bytes, own_bytes(process.pid or 0) - before)
                if process.exitcode is not None:
                    sys.exit(f"{method} ended with status {process.exitcode}")
            plan, seconds, blocks = answer.recv()
            process.join()
        cells = [method, f"{plan.block_bytes / MIB:,.1f}", f"{plan.peak_bytes / MIB:,.0f}"]
        cells += [plan.peak_stage, f"{peak_bytes / MIB:,.0f}", f"{seconds / blocks:.2f}"]
        print(f"| {' | '.join(cells)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model_name_or_path", type=Path)
    parser.add_argument("--random", type=int, nargs=6, metavar="N")
    parser.add_argument("--methods", nargs="+", default=["magnitude", "wanda", "sparsegpt"])
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--length", type=int, default=256)
    options = parser.parse_args()
    if (options.random is None) == (options.model_name_or_path is None):
        sys.exit("error: give --model_name_or_path DIR or --random with six numbers")
    torch.set_num_threads(1)
    if options.model_name_or_path is not None:
        run(options.model_name_or_path, options.methods, options.samples, options.length)
        return
    with tempfile.TemporaryDirectory() as home:
        folder = Path(home) / "model"
        maker = multiprocessing.get_context("fork").Process(
            target=make_random, args=(folder, options.random)
        )
        maker.start()  # so that nothing of it is left in the memory that is measured
        maker.join()
        run(folder, options.methods, options.samples, options.length)


if __name__ == "__main__":
    main()
