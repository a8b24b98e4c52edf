"""When what happens: a pure function of the step, so that a resumed run continues exactly.

Steps count from 1. The event of a weight comes after an optimizer step; its window is that step and the
`window - 1` before it. In waves, weight i of N has phase i · interval / N: each evolves once per
interval, and the windows of different weights are spread evenly over the steps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

EVENTS_PER_RUN = 40  # what `interval: auto` aims for
# Closer together events cost more and bring nothing (docs/results.md); in short runs there would be none.
MIN_AUTO_INTERVAL, SHORT_RUN_INTERVAL, SHORT_RUN_EVENTS = 20, 10, 5


def resolve_interval(interval: int | str, window: int, total_steps: int) -> int:
    """`auto` means about 40 events a run, but never under 20 steps (in a run of under 100: a fifth of it,
    never under 10) nor under the window."""
    if interval == "auto":
        least = min(MIN_AUTO_INTERVAL, max(SHORT_RUN_INTERVAL, total_steps // SHORT_RUN_EVENTS))
        return max(least, window, total_steps // EVENTS_PER_RUN)
    return int(interval)


@dataclass(frozen=True)
class Schedule:
    """The schedule of one run. Everything is derived from the step number."""

    total_steps: int
    interval: int
    window: int
    drop_fraction: float
    stop: float
    n_targets: int
    waves: bool = True
    replace_all_first: bool = False  # `start: gradient`
    exchange: float = 0.0  # share of positions that an exchange may bring back; 0: there is none
    exchanges: int = 1

    def phase(self, target: int) -> int:
        """Steps by which this weight's events are shifted: 0 ≤ phase < interval."""
        return target * self.interval // self.n_targets if self.waves else 0

    @property
    def stop_step(self) -> int:
        """The last step that may have an event."""
        return math.floor(self.stop * self.total_steps)

    @property
    def evolves(self) -> bool:
        """Whether the run has any event."""
        return self.largest_rate is not None

    @property
    def largest_rate(self) -> float | None:
        """Share of slots that the first weight's first event drops, the earliest of all; None: no event."""
        return self._first_rate(0)

    def without_event(self) -> int:
        """How many weights have no event in the whole run."""
        return sum(self._first_rate(i) is None for i in range(self.n_targets))

    def _first_rate(self, target: int) -> float | None:
        first = self.window if self.replace_all_first else self.interval
        return self.rate(target, self.phase(target) + first)

    def exchanges_that_fit(self) -> int:
        """How many of the exchanges come before `stop`."""
        fit = (self.stop_step - self.window) // self.interval + 1
        return max(0, min(fit, self.exchanges)) if self.exchange else 0

    def rate(self, target: int, step: int) -> float | None:
        """Share of slots to drop in this weight's event after `step`; None: no event."""
        if step > self.stop_step:
            return None
        own = step - self.phase(target)  # the step as this weight counts
        if self.replace_all_first and own == self.window:
            return 1.0
        first = self.window if self.replace_all_first else 0
        if own < self.interval or own % self.interval or own - first < self.window:
            return None
        rate = self.drop_fraction * 0.5 * (1 + math.cos(math.pi * step / self.stop_step))
        return rate if rate > 0 else None

    def due(self, step: int) -> list[int]:
        """The weights that have an event after `step`."""
        return [i for i in range(self.n_targets) if self.rate(i, step) is not None]

    def in_window(self, target: int, step: int) -> bool:
        """Whether the gradients of `step` are scored for an event of this weight."""
        return any(self.rate(target, step + ahead) is not None for ahead in range(self.window))

    def exchange_rate(self, step: int) -> float | None:
        """Share of the positions that may change places after `step`; None: no exchange.

        The first comes as soon as its window is full, so that what it brings is trained for longest.
        """
        number, off = divmod(step - self.window, self.interval)
        if off or not 0 <= number < self.exchanges or step > self.stop_step:
            return None
        return self.exchange or None

    def in_exchange_window(self, step: int) -> bool:
        """Whether `step` is measured for an exchange."""
        return any(self.exchange_rate(step + ahead) is not None for ahead in range(self.window))


def without_effect(s: Schedule, slots: list[int], together: bool, exchanging: bool) -> list[str]:
    """What was asked for and can't happen in a run of this length, a line each.

    Args:
        slots: of each weight, or of each part of a fused one.
        together: which slots drop is decided over all weights.
        exchanging: some weight takes part in exchanges.
    """
    found = []
    most = sum(slots) if together else max(slots)
    if (s.drop_fraction or s.replace_all_first) and not s.evolves:
        found.append(
            f"no evolution event fits into {s.total_steps} steps with interval {s.interval} and stop "
            f"{s.stop}: the slots will train where they are"
        )
    elif s.largest_rate is not None and int(s.largest_rate * most) == 0:
        found.append(
            f"drop_fraction {s.drop_fraction} of at most {most} slots is less than one: no event will move "
            "any; raise drop_fraction or density"
        )
    elif s.evolves and s.without_event():
        found.append(
            f"{s.without_event()} of {s.n_targets} weights have no event in {s.total_steps} steps: their "
            "turn would come after stop; take more steps, or lower interval"
        )
    fit = s.exchanges_that_fit()
    if exchanging and not fit:
        found.append(
            f"no exchange fits into {s.total_steps} steps with window {s.window} and stop {s.stop}: nothing "
            "will come back from the dense model; lower window, or take more steps"
        )
    elif exchanging and fit < s.exchanges:
        found.append(
            f"{fit} of {s.exchanges} exchanges fit into {s.total_steps} steps with window {s.window}, "
            f"interval {s.interval} and stop {s.stop}"
        )
    return found
