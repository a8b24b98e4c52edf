"""Which kernel makes the slot gradients fastest? The measurements by which a run chooses, for some shapes.

    python benchmarks/slot_grad.py [--density 0.01] [--threads 1]

One line a shape, dtype and number of tokens: median milliseconds of each kernel that this device has,
measured in turns, and the first one's ratio to the second's. Runs measure the same for their own shapes, and
keep it (`seft_ds/sparse/kernel_costs.py`, docs/performance.md); this prints, and keeps nothing.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from seft_ds.sparse.kernel_costs import TOKENS, Problem, measure

SHAPES = ((576, 576), (1536, 576), (4096, 4096), (14336, 4096))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--density", type=float, default=0.01)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(
        f"torch {torch.__version__}, {device.type}, {options.threads} threads, density {options.density}"
    )
    for shape in SHAPES:
        for dtype in (torch.float32, torch.bfloat16):
            slots = int(options.density * shape[0] * shape[1])
            found = measure(Problem.of(shape, slots, dtype), device)
            for i, tokens in enumerate(TOKENS):
                ms = {kernel: 1e3 * seconds[i] for kernel, seconds in found.items()}
                each = ", ".join(f"{kernel} {took:.2f}" for kernel, took in ms.items())
                first, *others = ms.values()
                ratio = f", ratio {first / others[0]:.2f}" if others else ""
                name = str(dtype).removeprefix("torch.")
                print(f"{shape[0]} x {shape[1]}, {tokens} tokens, {name}: {each} ms{ratio}")


if __name__ == "__main__":
    main()
