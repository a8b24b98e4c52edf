"""Which kernel computes a weight's slot gradients fastest on this device: measured once, kept in a file.

The cost of a kernel on one weight is taken as linear in the tokens, from two measurements with random
data; a run then chooses by its own number of tokens. The file holds what was measured by machine, threads
and torch version, so that runs on one machine choose alike. Small weights go by `slot_grad.by_rule`.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from seft_ds.sparse import slot_grad

CACHE_VARIABLE = "SEFT_CACHE"  # a folder instead of ~/.cache/seft_ds; "off": nothing is measured
TOKENS = (256, 1024)  # of the two measurements
_ROUNDS = 3
_SMALLEST = 1 << 18  # entries: below it a call costs more in overhead than any choice can save
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Problem:
    """One weight's slot gradients."""

    out: int
    columns: int
    slots: int
    dtype: str

    @classmethod
    def of(cls, shape: tuple[int, int], slots: int, dtype: torch.dtype) -> Problem:
        """With the slots to two digits: weights of one shape may differ by one slot, and are one problem."""
        return cls(*shape, int(float(f"{slots:.1e}")), str(dtype).removeprefix("torch."))

    @property
    def key(self) -> str:
        return f"{self.out}x{self.columns}, {self.slots} slots, {self.dtype}"

    @property
    def numel(self) -> int:
        return self.out * self.columns


# Seconds of each kernel on a problem: kernel -> [at TOKENS[0], at TOKENS[1]]
Seconds = dict[str, list[float]]


@dataclass
class KernelCosts:
    """What was measured on this device, by `Problem.key`."""

    seconds: dict[str, Seconds] = field(default_factory=dict)

    def fastest(self, problem: Problem, tokens: int, device: torch.device) -> str:
        """The kernel for so many tokens; by the rule if the problem was not measured."""
        found = self.seconds.get(problem.key)
        if not found:
            dtype = getattr(torch, problem.dtype)
            return slot_grad.by_rule(dtype, device, problem.slots, problem.numel)
        return min(found, key=lambda kernel: predict(found[kernel], tokens))

    def lines(self) -> list[str]:
        """A line a problem, for people."""
        return [
            f"{key}: "
            + "; ".join(
                f"{kernel} {1e3 * low:.2f} and {1e3 * high:.2f} ms"
                for kernel, (low, high) in sorted(found.items())
            )
            for key, found in sorted(self.seconds.items())
        ]


def predict(seconds: list[float], tokens: int) -> float:
    """Seconds at `tokens`, on the line through both measurements, and never under 0."""
    low, high = seconds
    slope = (high - low) / (TOKENS[1] - TOKENS[0])
    return max(0.0, low + slope * (tokens - TOKENS[0]))


def known_costs(problems: Iterable[Problem], device: torch.device) -> KernelCosts:
    """Measurements of these problems: of the cache file, and what it lacks made now (seconds) and added.

    A file that can't be read or written is no error: the measurements then last for this run.
    """
    wanted = {p.key: p for p in problems if p.numel >= _SMALLEST}
    if os.environ.get(CACHE_VARIABLE) == "off" or len(slot_grad.available(device)) < 2:
        return KernelCosts()
    path, machine = cache_file(), machine_name(device)
    everything = _read(path)
    mine = everything.setdefault(machine, {})
    missing = [p for key, p in wanted.items() if key not in mine]
    for problem in missing:
        mine[problem.key] = measure(problem, device)
    if missing:
        _write(path, everything)
        logger.info("measured the kernels of slot gradients on %s; kept in %s", machine, path)
    return KernelCosts({key: mine[key] for key in wanted})


def cache_file() -> Path:
    """Where measurements are kept."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get(CACHE_VARIABLE) or Path(base) / "seft_ds") / "kernels.json"


def machine_name(device: torch.device) -> str:
    """What a measurement holds for."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    threads = torch.get_num_threads()
    return f"{platform.node()}, {platform.machine()}, {threads} threads, torch {torch.__version__}"


def measure(problem: Problem, device: torch.device) -> Seconds:
    """Median seconds of every kernel that `device` has, in turns, at both token counts."""
    generator = torch.Generator().manual_seed(0)
    position = torch.randint(problem.numel, (problem.slots,), generator=generator)
    position = position.to(device, torch.int32 if problem.numel < 2**31 else torch.int64)
    result: Seconds = {kernel: [] for kernel in slot_grad.available(device)}
    for tokens in TOKENS:
        dy, x = (
            torch.randn(tokens, n, generator=generator).to(device, getattr(torch, problem.dtype))
            for n in (problem.out, problem.columns)
        )
        ways = {
            kernel: functools.partial(slot_grad.slot_gradient, dy, x, position, kernel)
            for kernel in result
        }
        for kernel, seconds in median_seconds(ways, device).items():
            result[kernel].append(seconds)
    return result


def median_seconds(
    ways: Mapping[str, Callable[[], object]], device: torch.device, rounds: int = _ROUNDS
) -> dict[str, float]:
    """Median seconds of each way; the ways take turns, so that drift hits all alike."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds + 1):
        for name, way in ways.items():
            _wait(device)
            start = time.perf_counter()
            way()
            _wait(device)
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(t[1:]) for name, t in times.items()}  # the first warms up


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _read(path: Path) -> dict[str, dict[str, Seconds]]:
    """The file's contents; empty if it isn't there, or isn't what `_write` wrote."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return {str(m): {str(k): _checked(s) for k, s in by.items()} for m, by in found.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def _checked(seconds: Any) -> Seconds:
    found = {str(k): [float(low), float(high)] for k, (low, high) in seconds.items()}
    if not found or set(found) - set(slot_grad.KERNELS):
        raise ValueError("no kernels that this version knows")
    return found


def _write(path: Path, everything: dict[str, dict[str, Seconds]]) -> None:
    """Whole or not at all: another run may read it meanwhile."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(f".{path.name}.{os.getpid()}")
        aside.write_text(json.dumps(everything, indent=1) + "\n", encoding="utf-8")
        os.replace(aside, path)
    except OSError as error:
        logger.warning("the kernels' measurements can't be kept in %s: %s", path, error)
