"""What zeros bring at serving time on a CPU: a dense layer beside the same layer in a sparse format.

    python benchmarks/serving_cpu.py --threads 1

One weight of LLaMA's size, its zeros placed at random, times the hidden states of a decode step (1 token) and
of a prefill (256 tokens). Dense GEMM in bf16 and fp32; torch.sparse's CSR in fp32 with int32 indices, which
is what torch has for a CPU. Each way once a round, in turns, so that what else the machine does meets all of
them; the fastest round of each, which the other jobs disturbed least.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.hardware import cpu_name

Way = Callable[[], torch.Tensor]


def sparse_weight(out: int, inputs: int, sparsity: float, seed: int = 0) -> torch.Tensor:
    """fp32 (out, inputs) with exactly the share `sparsity` of zeros, at random positions."""
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(out, inputs, generator=g)
    dead = torch.randperm(weight.numel(), generator=g)[: round(sparsity * weight.numel())]
    weight.view(-1)[dead] = 0.0
    return weight


def as_csr(weight: torch.Tensor) -> torch.Tensor:
    """The same in compressed rows: a value and an int32 column a live weight."""
    csr = weight.to_sparse_csr()
    rows, columns = csr.crow_indices().int(), csr.col_indices().int()
    return torch.sparse_csr_tensor(
        rows, columns, csr.values(), weight.shape, check_invariants=False
    )


def ways_of(weight: torch.Tensor, x: torch.Tensor) -> dict[str, Way]:
    """The layer's product, x: (tokens, inputs), in every form."""
    csr, transposed = as_csr(weight), x.t().contiguous()
    weight16, x16 = weight.bfloat16(), x.bfloat16()
    return {
        "dense bf16": lambda: x16 @ weight16.t(),
        "dense fp32": lambda: x @ weight.t(),
        "CSR fp32": lambda: csr @ transposed,  # (out, tokens)
    }


def bytes_of(weight: torch.Tensor) -> dict[str, int]:
    """What each form holds in memory."""
    csr = as_csr(weight)
    parts = (csr.crow_indices(), csr.col_indices(), csr.values())
    return {
        "dense bf16": 2 * weight.numel(),
        "dense fp32": 4 * weight.numel(),
        "CSR fp32": sum(p.nbytes for p in parts),
    }


def fastest(ways: dict[str, Way], rounds: int) -> dict[str, float]:
    """Seconds of each way, the fewest over rounds in which each runs once."""
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for way in ways.values():
        way()
    for _ in range(rounds):
        for name, way in ways.items():
            started = time.perf_counter()
            way()
            taken[name].append(time.perf_counter() - started)
    return {name: min(seconds) for name, seconds in taken.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", default="4096x4096", help="outputs x inputs")
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.6, 0.8, 0.9])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 256])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
    torch.set_num_threads(options.threads)
    out, inputs = map(int, options.shape.split("x"))
    print(f"{cpu_name()}, {options.threads} thread(s), torch {torch.__version__}\n")
    names = ["dense bf16", "dense fp32", "CSR fp32"]
    print(
        "| sparsity | tokens | " + " | ".join(f"{n}, ms" for n in names) + " | CSR / dense bf16 |"
    )
    print("|--:" * (len(names) + 3) + "|")
    for sparsity in options.sparsity:
        weight = sparse_weight(out, inputs, sparsity)
        for tokens in options.tokens:
            x = torch.randn(tokens, inputs, generator=torch.Generator().manual_seed(1))
            found = fastest(ways_of(weight, x), options.rounds)
            cells = " | ".join(f"{1e3 * found[n]:.2f}" for n in names)
            ratio = found["CSR fp32"] / found["dense bf16"]
            print(f"| {sparsity:.0%} | {tokens} | {cells} | {ratio:.2f} |", flush=True)
    sizes = bytes_of(sparse_weight(out, inputs, options.sparsity[0]))
    print(f"\nMiB at {options.sparsity[0]:.0%}: ", end="")
    print(", ".join(f"{name} {size / 2**20:.1f}" for name, size in sizes.items()))


if __name__ == "__main__":
    main()
