"""How many slots each target weight gets."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass
class Target:
    """One weight that is repaired."""

    name: str  # of the layer: "model.layers.0.self_attn.q_proj"
    shape: tuple[int, int]  # (out, in)
    target_live: int
    pattern: tuple[int, int] | None = None
    n_slots: int = 0

    @property
    def numel(self) -> int:
        return self.shape[0] * self.shape[1]

    @property
    def multiple(self) -> int:
        """What borders between owners are rounded to: M of an N:M pattern."""
        return self.pattern[1] if self.pattern else 1

    @property
    def pattern_text(self) -> str | None:
        """The pattern as "N:M"; None: unstructured."""
        return f"{self.pattern[0]}:{self.pattern[1]}" if self.pattern else None


def parse_pattern(text: str) -> tuple[int, int]:
    """Read "2:4" as (2, 4): N live in each group of M. ValueError for anything else."""
    n, _, m = text.partition(":")
    if not (n.isdecimal() and m.isdecimal() and 0 < int(n) < int(m)):
        raise ValueError(f"pattern {text!r:.80}: wanted N:M with 0 < N < M, such as 2:4")
    return int(n), int(m)


def matches(name: str, wanted: list[str] | str) -> bool:
    """Whether a layer name ends in one of the wanted names ("q_proj", "layers.3.mlp.up_proj")."""
    if wanted == "auto":
        return True
    return any(name == w or name.endswith("." + w) for w in wanted)


def total_slots(targets: list[Target], density: float, trainable: int | str | None) -> int:
    """The number of slots over all targets: a share, a count, all live weights, or as many as LoRA of a
    rank trains."""
    if trainable is None:
        return round(density * sum(t.numel for t in targets))
    if isinstance(trainable, int):
        return trainable
    if trainable == "live":
        return sum(t.target_live for t in targets)
    rank = int(re.fullmatch(r"rank=(\d+)", trainable)[1])  # type: ignore[index]
    return sum(rank * sum(t.shape) for t in targets)


def assign_slots(targets: list[Target], total: int) -> None:
    """Split `total` slots in proportion to the weights' sizes, exactly, at least one each.

    As many as there are live entries (`trainable: "live"`) means all of them, whatever the sizes. Else
    largest remainders first, ties to the earlier weight. ValueError if a weight would get more slots than
    it has live entries.
    """
    total = max(total, len(targets))
    if total == sum(t.target_live for t in targets):
        for target in targets:
            target.n_slots = target.target_live
        return
    numel = sum(t.numel for t in targets)
    exact = [total * t.numel / numel for t in targets]
    slots = [max(1, int(x)) for x in exact]
    order = sorted(range(len(targets)), key=lambda i: (slots[i] - exact[i], i))
    i = 0
    while sum(slots) != total:  # the rounding left over: fewer than one a target
        step = 1 if sum(slots) < total else -1
        at = order[i % len(order)] if step > 0 else order[-1 - i % len(order)]
        if slots[at] + step >= 1:
            slots[at] += step
        i += 1
    for target, k in zip(targets, slots, strict=True):
        if k > target.target_live:
            raise ValueError(
                f"{target.name}: {k} slots wanted, but only {target.target_live} of its "
                f"{target.numel} weights are live; lower density (or trainable)"
            )
        target.n_slots = k
