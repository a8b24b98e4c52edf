"""How many slots each target weight gets."""

from __future__ import annotations

import re
from dataclasses import dataclass, field


@dataclass
class Target:
    """One weight that is repaired.

    A fused weight of experts (`seft_ds.naming`) is one target whose matrices are stacked along the rows. Its
    parts, ranges of positions of equal length, have live counts and slots of their own, so that an event
    chooses within each; slots come in the order of the parts, and stay in theirs.
    """

    name: str  # of the layer: "model.layers.0.self_attn.q_proj"; of a fused weight: its own
    shape: tuple[int, int]  # (out, in); of a fused weight (experts · rows of one, in)
    target_live: int
    pattern: tuple[int, int] | None = None
    n_slots: int = 0
    experts: int = 0  # 0: a plain matrix
    part_live: list[int] = field(default_factory=list)  # of each part; empty: a plain matrix
    part_slots: list[int] = field(default_factory=list)

    @property
    def numel(self) -> int:
        return self.shape[0] * self.shape[1]

    @property
    def weight_name(self) -> str:
        """The weight's name in the model."""
        return self.name if self.experts else f"{self.name}.weight"

    def slot_name(self, parameter: str) -> str:
        """The full name in the model of the weight's `seft_delta` or `seft_position`."""
        return f"{self.name}_{parameter}" if self.experts else f"{self.name}.{parameter}"

    @property
    def n_parts(self) -> int:
        return max(1, len(self.part_live))

    @property
    def part_numel(self) -> int:
        return self.numel // self.n_parts

    @property
    def part_shape(self) -> tuple[int, int]:
        """(out, in) of one part."""
        return self.shape[0] // self.n_parts, self.shape[1]

    @property
    def live_by_part(self) -> list[int]:
        """Live counts to hold, of a plain matrix: one."""
        return self.part_live or [self.target_live]

    @property
    def slots_by_part(self) -> list[int]:
        """Slots of each part, of a plain matrix: one number."""
        return self.part_slots or [self.n_slots]

    def part_ranges(self, lo: int, hi: int) -> list[tuple[int, int]]:
        """Of each part the positions that lie in [lo, hi), possibly none: (begin, end), begin <= end."""
        n = self.part_numel
        borders = [min(max(p * n, lo), hi) for p in range(self.n_parts + 1)]
        return list(zip(borders[:-1], borders[1:], strict=True))

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
    return sum(rank * t.n_parts * sum(t.part_shape) for t in targets)


def assign_slots(targets: list[Target], total: int) -> None:
    """Split `total` slots in proportion to the sizes of weights and parts, exactly, at least one each.

    As many as there are live entries (`trainable: "live"`) means all of them, whatever the sizes. Else
    largest remainders first, ties to the earlier weight. A part that was pruned away whole gets none.
    ValueError if a weight or part would get more slots than it has live entries.
    """
    live = [n for t in targets for n in t.live_by_part]
    sizes = [t.part_numel if n or not t.experts else 0 for t in targets for n in t.live_by_part]
    total = max(total, sum(size > 0 for size in sizes))
    slots = live if total == sum(live) else _apportion(total, sizes)
    first = 0
    for target in targets:
        mine = slots[first : first + target.n_parts]
        for p, (k, n) in enumerate(zip(mine, target.live_by_part, strict=True)):
            if k > n:
                where = f"part {p} of {target.name}" if target.experts else target.name
                raise ValueError(
                    f"{where}: {k} slots wanted, but only {n} of its {target.part_numel} weights are live; "
                    "lower density (or trainable)"
                )
        target.n_slots = sum(mine)
        target.part_slots = mine if target.experts else []
        first += target.n_parts


def _apportion(total: int, sizes: list[int]) -> list[int]:
    """`total` split in proportion to `sizes`, at least one each where the size isn't 0."""
    numel = sum(sizes)
    exact = [total * size / numel for size in sizes]
    slots = [max(1, int(x)) if size else 0 for x, size in zip(exact, sizes, strict=True)]
    order = sorted(
        (i for i, size in enumerate(sizes) if size), key=lambda i: (slots[i] - exact[i], i)
    )
    left, i = total - sum(slots), 0
    while left:  # the rounding left over: fewer than one a unit
        step = 1 if left > 0 else -1
        at = order[i % len(order)] if step > 0 else order[-1 - i % len(order)]
        if slots[at] + step >= 1:
            slots[at] += step
            left -= step
        i += 1
    return slots
