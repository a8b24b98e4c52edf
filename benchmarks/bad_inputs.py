"""Bad inputs, generated: is each refused with a clear message, in bounded time and memory?

    python benchmarks/bad_inputs.py [--count 1500] [--seed 0] [--workers 2] [--every] [--messages]

Checkpoints, model folders, configs, recipes, flags, data files and journals are made, then truncated,
flipped, exchanged, or written by somebody who means harm and knows the checksums; each goes to an entry point
of the library in a forked worker (20 s, 4 GiB), and some to the launch scripts. Prints a Markdown table: how
many were refused with a clear message, how many were taken because the change does no harm, and how many
went wrong (another error than a ValueError that names what is wrong, a hang, damage that was taken).
Exit status: 1 if any went wrong.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here may reach for the network

import torch

from benchmarks.hostile import checkpoints, models, rows, scripts, settings
from benchmarks.hostile.damage import DAMAGE
from benchmarks.hostile.made import make_all
from benchmarks.hostile.runner import Outcome, Source, try_all

SCRIPT_SHARE = 40  # one in this many goes through a launch script, each a new interpreter


def all_sources(home: Path) -> list[Source]:
    modules = (checkpoints, models, settings, rows, scripts)
    return [source for module in modules for source in module.sources(home)]


def plan(sources: list[Source], count: int, seed: int) -> list[tuple[int, str]]:
    """(source, seed of the attempt), `count` of them, each source in every round as often as it may."""
    ours = [i for i, s in enumerate(sources) if not s.entry.startswith("python ")]
    slow = [i for i in range(len(sources)) if i not in ours]
    n_slow = max(len(slow), count // SCRIPT_SHARE)
    chosen = [slow[k % len(slow)] for k in range(n_slow)]
    rng = Random(f"{seed} order")
    while len(chosen) < count:
        turn = [i for i in ours for _ in range(weight(sources[i]))]
        rng.shuffle(turn)
        chosen += turn[: count - len(chosen)]
    return [(i, f"{seed}-{k}") for k, i in enumerate(chosen)]


def weight(source: Source) -> int:
    """How often a source takes its turn, by how many different inputs it can make."""
    if source.kind not in DAMAGE:
        return 10 if source.kind == "forged tensors" else 5
    return 2 if source.kind in ("no plain file", "truncated", "bits flipped", "overwritten") else 1


def preload() -> None:
    """Slow imports, once, before workers are forked; and DeepSpeed's compiled extension, whose lock a worker
    that is killed would leave behind."""
    from deepspeed.comm.torch import build_shm_op

    import seft_ds.train.arguments
    import seft_ds.train.data  # noqa: F401
    from seft_ds.distributed.extension_lock import clear_stale_locks

    clear_stale_locks()
    build_shm_op()


@contextmanager
def stdout_on_stderr() -> Iterator[None]:
    """Keep what libraries print, in this process and its forks, out of the table."""
    sys.stdout.flush()
    ours = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(ours, 1)
        os.close(ours)


def table(sources: list[Source], outcomes: list[Outcome], every: bool) -> str:
    """Markdown: a line for each entry point and kind of input, and the sum. Accidents share one line unless
    `every`."""
    counts: dict[tuple[str, str], Counter] = {}
    for outcome in outcomes:
        counts.setdefault(_key(sources[outcome.source], every), Counter())[outcome.verdict] += 1
    lines = [
        "| entry point | input | tried | refused | harmless | wrong |",
        "|---|---|--:|--:|--:|--:|",
    ]
    for key in dict.fromkeys(_key(s, every) for s in sources):
        if key in counts:
            lines.append(_row(*key, counts[key]))
    lines.append(_row("**all**", "", sum(counts.values(), Counter())))
    return "\n".join(lines)


def _key(source: Source, every: bool) -> tuple[str, str]:
    return source.entry, source.kind if every or source.kind not in DAMAGE else "damaged files"


def _row(entry: str, kind: str, c: Counter) -> str:
    return f"| {entry} | {kind} | {c.total()} | {c['refused']} | {c['harmless']} | {c['wrong']} |"


def measure(count: int, seed: int, workers: int, home: Path) -> tuple[list[Source], list[Outcome]]:
    """Make the good inputs below `home`, then try `count` bad ones."""
    torch.set_num_threads(1)
    preload()
    make_all(home)
    sources = all_sources(home)
    outcomes: list[Outcome] = []
    try_all(sources, plan(sources, count, seed), home, workers, outcomes.append)
    return sources, outcomes


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--count", type=int, default=1500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--every", action="store_true", help="a line for each kind of damage")
    parser.add_argument("--messages", action="store_true", help="also print what was said to each")
    options = parser.parse_args()
    start = time.monotonic()
    with stdout_on_stderr(), tempfile.TemporaryDirectory(prefix="bad-inputs-") as folder:
        sources, outcomes = measure(
            options.count, options.seed, options.workers, Path(folder) / "home"
        )
    print(table(sources, outcomes, options.every))
    slowest = max(outcomes, key=lambda o: o.seconds)
    where = (
        f"{slowest.seconds:.1f} s, {sources[slowest.source].entry}, {sources[slowest.source].kind}"
    )
    print(f"\n{len(outcomes)} inputs in {time.monotonic() - start:.0f} s; the slowest {where}")
    for outcome in outcomes:
        if outcome.verdict == "wrong" or options.messages:
            source = sources[outcome.source]
            said = f"{outcome.text!r} ({outcome.what!r})"
            print(f"{outcome.verdict}: {source.entry}, {source.kind}, {outcome.seed}: {said}")
    return int(any(o.verdict == "wrong" for o in outcomes))


if __name__ == "__main__":
    sys.exit(main())
