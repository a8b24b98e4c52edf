"""Bytes of a checkpoint of a LLaMA-3-70B shaped model, each way: python benchmarks/checkpoint_size.py

Arithmetic, no model is made; tests/checkpoint/test_checkpoint.py compares the same function with files.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from seft_ds.checkpoint.size import checkpoint_bytes
from seft_ds.targets import Target, assign_slots

HIDDEN, MLP, LAYERS, KV, VOCABULARY = 8192, 28672, 80, 1024, 128256
SHAPES = {
    "q_proj": (HIDDEN, HIDDEN), "k_proj": (KV, HIDDEN), "v_proj": (KV, HIDDEN), "o_proj": (HIDDEN, HIDDEN),
    "gate_proj": (MLP, HIDDEN), "up_proj": (MLP, HIDDEN), "down_proj": (HIDDEN, MLP),
}  # fmt: skip
# The defaults: 1 % of the weights train, 1,000 steps, so interval 25 and window 5; by the middle of the run
# 16 events have moved up to 0.2 of the slots each, and pruned as many weights as they revived.
DENSITY, OPEN, TOUCHED = 0.01, 5 / 25, 0.01 * (1 + 16 * 0.2 * 2)


def main() -> None:
    targets = [
        Target(f"layers.{i}.{n}", s, s[0] * s[1] // 2)
        for i in range(LAYERS)
        for n, s in SHAPES.items()
    ]
    entries = sum(t.numel for t in targets)
    assign_slots(targets, round(DENSITY * entries))
    other = 2 * (2 * VOCABULARY * HIDDEN + (2 * LAYERS + 1) * HIDDEN)
    print(f"{entries:,} target weights, {sum(t.n_slots for t in targets):,} slots, bf16\n")
    print("| part | copy | reference |\n|---|---|---|")
    columns = [
        checkpoint_bytes(targets, other, 2, base, TOUCHED, OPEN) for base in ("copy", "reference")
    ]
    for part in dict.fromkeys(name for column in columns for name in column):
        cells = [f"{c[part] / 1e9:.1f} GB" if part in c else "" for c in columns]
        print(f"| {part} | {' | '.join(cells)} |")
    totals = [f"{sum(c.values()) / 1e9:.1f} GB" for c in columns]
    print(f"| all | {' | '.join(totals)} |")


if __name__ == "__main__":
    main()
