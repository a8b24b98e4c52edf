"""Sampled dot products against a dense GEMM and gather: which makes the slot gradients faster?

    python benchmarks/slot_grad.py [--density 0.01] [--threads 1]

Prints one line a shape, tokens and dtype: median milliseconds of each way, measured in turns, and their
ratio. `seft_ds.sparse.slot_grad` chooses by these figures (docs/performance.md).
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from seft_ds.sparse import slot_grad

SHAPES = ((576, 576), (1536, 576), (4096, 4096))


def median_ms(ways: dict[str, Callable[[], object]], rounds: int = 7) -> dict[str, float]:
    """Median milliseconds of each way; the ways take turns, so that drift hits all alike."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds + 1):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(t[1:]) for name, t in times.items()}  # the first warms up


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--density", type=float, default=0.01)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"torch {torch.__version__}, {options.threads} threads, density {options.density}")
    print("shape        tokens dtype     sampled   dense  sampled/dense")
    for out, columns in SHAPES:
        for tokens in (256, 1024):
            for dtype in (torch.float32, torch.bfloat16):
                dy, x = torch.randn(tokens, out).to(dtype), torch.randn(tokens, columns).to(dtype)
                k = int(options.density * out * columns)
                position = torch.randperm(out * columns)[:k].to(torch.int32)
                ms = median_ms(
                    {
                        "sampled": lambda a=dy, b=x, p=position: slot_grad.sampled(a, b, p),
                        "dense": lambda a=dy, b=x, p=position: slot_grad.dense_then_gather(a, b, p),
                    }
                )
                name = str(dtype).removeprefix("torch.")
                ratio = ms["sampled"] / ms["dense"]
                print(
                    f"{out:>5} x {columns:<5} {tokens:>5} {name:<9} {ms['sampled']:7.2f} {ms['dense']:7.2f}  "
                    f"{ratio:.2f}"
                )


if __name__ == "__main__":
    main()
