"""One target for each matrix of each expert, or one for each fused weight: what does it cost under ZeRO-3?

    python benchmarks/experts.py --matrices 512 --slots 200 --ranks 2

The same number of slots, as one parameter of deltas and as one for each matrix, in a model that does nothing
else: median milliseconds of steps in turns. Then an event on one rank that chooses within each matrix, and
one that chooses over all of them: seconds, median of three in turns.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


class Deltas(nn.Module):
    """`count` parameters of `slots` entries, frozen positions beside them, in one module."""

    def __init__(self, count: int, slots: int):
        super().__init__()
        for i in range(count):
            self.register_parameter(f"delta{i}", nn.Parameter(torch.zeros(slots)))
            fixed = torch.zeros(slots, dtype=torch.int32)
            self.register_parameter(f"position{i}", nn.Parameter(fixed, requires_grad=False))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * sum(p.sum() for n, p in self.named_parameters() if n.startswith("delta"))


def engine_of(count: int, slots: int) -> Any:
    import deepspeed

    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 3},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
        "steps_per_print": 10**9,
    }
    model = Deltas(count, slots)
    params = [p for p in model.parameters() if p.requires_grad]
    return deepspeed.initialize(model=model, model_parameters=params, config=config)[0]


def measure(matrices: int, slots: int, rounds: int) -> list[tuple[str, float]]:
    """Median milliseconds of a step, by how the slots are held."""
    engines = {
        "one a fused weight": engine_of(1, matrices * slots),
        "one a matrix": engine_of(matrices, slots),
    }
    times: dict[str, list[float]] = {name: [] for name in engines}
    for _ in range(rounds):
        for name, engine in engines.items():
            started = time.perf_counter()
            engine.backward(engine(torch.ones(1)).sum())
            engine.step()
            times[name].append(1000 * (time.perf_counter() - started))
    return [(name, statistics.median(values[2:])) for name, values in times.items()]


def event_views(matrices: int, positions: int, slots: int) -> dict[str, list[Any]]:
    """The same random weight as a view for each matrix, and as one."""
    from seft_ds.sparse.topology import Shard

    g, n = torch.Generator().manual_seed(0), matrices * positions
    live = torch.rand(n, generator=g) < 0.4
    weight, G = torch.randn(n, generator=g) * live, torch.randn(n, generator=g)
    Q, delta = G.square(), torch.randn(matrices * slots, generator=g)
    at = []
    for m in range(matrices):
        found = live[m * positions : (m + 1) * positions].nonzero().squeeze(1)
        chosen = found[torch.randperm(found.numel(), generator=g)[:slots]]
        at.append(chosen.sort().values + m * positions)
    position = torch.cat(at)

    def view(first: int, stop: int) -> Any:
        here, rows = slice(first * positions, stop * positions), slice(first * slots, stop * slots)
        return Shard(
            name="experts", lo=here.start, weight=weight[here], live=live[here], G=G[here], Q=Q[here],
            position=position[rows], slot=torch.arange(rows.start, rows.stop), delta=delta[rows],
            base=weight[position[rows]], born_dead=torch.zeros(rows.stop - rows.start).bool(),
            n_slots=rows.stop - rows.start, seed=0,
        )  # fmt: skip

    return {
        "within each matrix": [view(m, m + 1) for m in range(matrices)],
        "over all of them": [view(0, matrices)],
    }


def event_seconds(matrices: int, positions: int, slots: int) -> dict[str, float]:
    from seft_ds.config import SeftConfig
    from seft_ds.distributed.event import plan
    from tests.ranks import run_threads

    config = SeftConfig(prune="fisher")
    ways = event_views(matrices, positions, slots)
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(3):
        for name, views in ways.items():
            started = time.perf_counter()
            run_threads(1, lambda ranks, v=views: plan(v, 0.2, config, ranks))
            times[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    from tests.ranks import run_processes

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--matrices", type=int, default=512)
    parser.add_argument("--slots", type=int, default=200, help="of each matrix")
    parser.add_argument("--positions", type=int, default=20_000, help="of each matrix, in an event")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=12)
    args = parser.parse_args()
    found = run_processes(args.ranks, measure, args.matrices, args.slots, args.rounds)[0]
    for name, milliseconds in found:
        print(f"{name:<20}{milliseconds:>10.1f} ms a step")
    torch.set_num_threads(1)
    for name, seconds in event_seconds(args.matrices, args.positions, args.slots).items():
        print(f"{name:<20}{seconds:>10.2f} s an event")


if __name__ == "__main__":
    main()
