"""What events cost one rank of a large run: its real share of every weight, at 16, 64 or 512 ranks.

    python benchmarks/scale.py --ranks 16 64 512 --output TABLE.md

For each different target shape of a LLaMA model one rank's share is filled with random values, live
positions, window sums and slots; the project's own code decides an event, applies it, and writes values
through. The other ranks are silent: sums come back as they went in, and their lists are made up, as long as
ours, so that what a rank has to go through is what it would be. Times are CPU time of the calculation, not of
a network. Each shape counts as often as the model has it. Memory is the peak of the process over the state
before the event.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks.hardware import cpu_name
from seft_ds.config import SeftConfig
from seft_ds.distributed.event import Change, plan
from seft_ds.distributed.window import Window
from seft_ds.sparse import mask
from seft_ds.sparse.curvature import Curvature
from seft_ds.sparse.shard import shard_range
from seft_ds.targets import Target
from seft_ds.zero.weight_state import SlotTable, WeightState

# hidden, intermediate, width of keys, blocks; of TinyLlama-1.1B and LLaMA-2
MODELS = {
    "1.1B": (2048, 5632, 256, 22),
    "7B": (4096, 11008, 4096, 32),
    "13B": (5120, 13824, 5120, 40),
    "70B": (8192, 28672, 1024, 80),
}


_MOST_COUNTS = 8  # numbers that an event's collectives of counts have for one weight


class SilentRanks:
    """`Ranks` of a run whose other ranks have nothing to say: a group of `size` that only we are in."""

    def __init__(self, rank: int, size: int):
        self.rank, self.size, self.bytes = rank, size, 0

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        self.bytes += tensor.nbytes
        return tensor

    def gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        self.bytes += tensor.nbytes
        # A few numbers are counts, of which the others have 0; what is longer is a list.
        silent = torch.zeros_like(tensor) if tensor.numel() <= _MOST_COUNTS else tensor[:0]
        return [tensor if r == self.rank else silent for r in range(self.size)]


@dataclass
class Cost:
    """Of one event of one weight on one rank."""

    decide: float  # seconds
    apply: float
    write: float  # of a step's write-through
    peak: int  # bytes
    sent: int  # bytes handed to collectives whose size doesn't depend on the model
    lists: int  # bytes of the gathered lists


def shapes_of(model: str) -> dict[tuple[int, int], int]:
    """Target shape -> how many the model has."""
    hidden, intermediate, keys, blocks = MODELS[model]
    shapes: dict[tuple[int, int], int] = {}
    for shape, times in [
        ((hidden, hidden), 2), ((keys, hidden), 2), ((intermediate, hidden), 2),
        ((hidden, intermediate), 1),
    ]:  # fmt: skip
        shapes[shape] = shapes.get(shape, 0) + times * blocks
    return shapes


def partitioned(flat: torch.Tensor, shape: tuple[int, ...], numel: int) -> Any:
    """A parameter as ZeRO-3 leaves it: nothing but this rank's part."""
    return SimpleNamespace(ds_tensor=flat, ds_shape=shape, ds_numel=numel)


def share_of(shape: tuple[int, int], density: float, ranks: SilentRanks) -> WeightState:
    """A `WeightState` of this rank's share, without engine and model. Slots: those of the share."""
    numel = shape[0] * shape[1]
    lo, hi = shard_range(numel, ranks.rank, ranks.size)
    n, k = hi - lo, max(1, int(density * (hi - lo)))
    generator = torch.Generator().manual_seed(0)
    live = torch.rand(n, generator=generator) < 0.4
    alive = live.nonzero().squeeze(1)
    slots = alive[torch.randperm(alive.numel(), generator=generator)[:k]].sort().values + lo
    state = WeightState.__new__(WeightState)
    state.target = Target("weight", shape, int(live.sum()), n_slots=k)
    state.ranks, state.multiple = ranks, 1  # type: ignore[assignment]
    state.lo, state.hi, state.held_lo, state.held_hi = lo, hi, lo, hi
    weight = torch.randn(n, generator=generator, dtype=torch.bfloat16).mul_(live)
    state.weight = partitioned(weight, shape, numel)
    own = shard_range(k * ranks.size, ranks.rank, ranks.size)
    state.position = partitioned(slots.to(torch.int32), (k * ranks.size,), k * ranks.size)
    state.live_bits, state.touched_bits = mask.pack(live), mask.pack(torch.zeros_like(live))
    state.slots = SlotTable(
        slots, torch.arange(*own), weight[slots - lo], torch.zeros(k, dtype=torch.bool)
    )
    state.slot_shard = SimpleNamespace(lo=0, hi=0, master=torch.empty(0))  # type: ignore[assignment]
    state.n_events = 0
    state.rates = None
    state.keeps_curvature = True
    state.curvature = Curvature(*shape, state.live_bits.device)
    state.curvature.steps = 5
    for factor in (state.curvature.output, state.curvature.input):
        factor.uniform_(generator=generator)
    open_window(state, generator)
    return state


def open_window(state: WeightState, generator: torch.Generator) -> None:
    state.window = window = Window.__new__(Window)
    window.steps = 5
    n = state.hi - state.lo
    window.G = torch.randn(n, generator=generator)
    window.Q = window.G.square() / 5


def as_of_all(change: Change, state: WeightState, size: int) -> Change:
    """The change with lists as long as `size` ranks like this one would make them."""
    n, numel = state.hi - state.lo, state.target.numel

    def spread(mine: torch.Tensor) -> torch.Tensor:
        """Ours, and as many of every other rank, at positions that we don't hold."""
        others = torch.randint(numel - n, ((size - 1) * mine.numel(),))
        others[others >= state.lo] += n
        return torch.cat([mine, others])

    def repeated(mine: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
        return mine.repeat(size)[order]

    parts: dict[str, torch.Tensor] = {}
    for head, along in [
        ("released", ["released_slot", "folded", "died"]),
        ("fresh", ["fresh_G", "fresh_Q", "fresh_base", "revived"]),
        ("pruned", []),
    ]:
        parts[head], order = spread(getattr(change, head)).sort()
        parts |= {name: repeated(getattr(change, name), order) for name in along}
    return replace(change, **parts)  # type: ignore[arg-type]


def timed(action: Callable[[], Any]) -> tuple[float, Any]:
    started = time.process_time()
    result = action()
    return time.process_time() - started, result


def status_bytes(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"no {name} in /proc/self/status: memory is measured on Linux only")


def measure(shape: tuple[int, int], size: int, density: float, rate: float, rounds: int) -> Cost:
    """Medians over `rounds` events of one weight."""
    costs = []
    for _ in range(rounds + 1):
        ranks = SilentRanks(size // 2, size)
        state = share_of(shape, density, ranks)
        k = state.target.n_slots
        delta = torch.randn(k * size)
        write, _ = timed(lambda s=state, d=delta: s.write_through(d))
        gc.collect()
        ctypes.CDLL(None).malloc_trim(
            0
        )  # or what was freed before would be used again, and not seen
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
        before = status_bytes("VmRSS")
        decide, (change,) = timed(
            lambda s=state, d=delta, r=ranks: plan(s.views(d, 0), rate, SeftConfig(), r)
        )
        peak = status_bytes("VmHWM") - before
        m, p = change.fresh.numel(), change.pruned.numel()
        lists = m * (3 * 8 + 3 * 4 + 3) + p * 8
        whole = as_of_all(change, state, size)
        apply, _ = timed(lambda s=state, c=whole: s.apply(c))
        costs.append(Cost(decide, apply, write, max(peak, 0), ranks.bytes - lists, lists * size))
    costs = costs[1:]  # the first warms up
    return Cost(*(statistics.median(getattr(c, f) for c in costs) for f in Cost.__annotations__))


def row(model: str, size: int, density: float, rate: float, rounds: int) -> str:
    """One line of the table: all weights of the model once, which is what an interval has."""
    shapes = shapes_of(model)
    costs = {s: measure(s, size, density, rate, rounds) for s in shapes}
    n = sum(shapes.values())

    def whole(field: str) -> float:
        return sum(times * getattr(costs[s], field) for s, times in shapes.items())

    share = sum(times * s[0] * s[1] for s, times in shapes.items()) / size
    return (
        f"| {model} | {size} | {density:.1%} | {share / 1e6:,.1f} | {whole('decide'):.2f} | "
        f"{whole('apply'):.2f} | {whole('write'):.3f} | {1e9 * whole('decide') / share:.1f} | "
        f"{max(c.peak for c in costs.values()) / 2**20:.0f} | {whole('sent') / n / 1024:.0f} | "
        f"{whole('lists') / n / 1024:,.0f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[16, 64, 512])
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--densities", type=float, nargs="+", default=[0.005, 0.01, 0.02])
    parser.add_argument("--rate", type=float, default=0.1, help="share of the slots that drop")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", help="write the table to this file too")
    options = parser.parse_args()
    most, usual = (
        max(options.models, key=list(MODELS).index),
        options.densities[len(options.densities) // 2],
    )
    cases = [(most, size, usual) for size in options.ranks]
    cases += [(m, options.ranks[0], usual) for m in options.models if m != most]
    cases += [(most, options.ranks[0], d) for d in options.densities if d != usual]
    lines = [
        "| model | ranks | slots | positions a rank, million | decide, s | apply, s | write-through, s | "
        "decide, ns a position | peak MiB of a weight | sums KiB a weight | lists KiB a weight |",
        "|---|" + "--:|" * 10,
    ]
    print("\n".join(lines))
    for case in cases:
        lines.append(row(*case, options.rate, options.rounds))
        print(lines[-1], flush=True)
    lines.append(
        f"\n`python {' '.join(sys.argv)}`, {torch.get_num_threads()} threads, {cpu_name()}, torch "
        f"{torch.__version__}, {time.strftime('%d %B %Y')}"
    )
    if options.output:
        Path(options.output).write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
