"""What a pruning run does: the method, how much, over which unit, and whether all blocks give up as much."""

from __future__ import annotations

from dataclasses import dataclass

from seft_ds.prune.choose import Budget
from seft_ds.prune.owl import OwlSettings

# Over what entries compete, by method; the paper's own first.
UNITS = {
    "wanda": ("row", "weight"),
    "magnitude": ("weight", "row", "global"),
    "sparsegpt": ("weight",),
}
LAYERWISE = ("uniform", "owl")


@dataclass(frozen=True)
class Recipe:
    """Settings that have been checked against each other; make them with `recipe_of`."""

    method: str  # a key of UNITS
    budget: Budget
    unit: str = "weight"  # "row", "weight" or "global"; with a pattern it is the group
    owl: OwlSettings | None = None  # None: all blocks give up the same share

    @property
    def needs_text(self) -> bool:
        """Whether calibration text decides about the result."""
        return self.method != "magnitude"


def recipe_of(
    method: str,
    budget: Budget,
    unit: str = "auto",
    layerwise: str = "uniform",
    owl: OwlSettings | None = None,
) -> Recipe:
    """The recipe of what the user asks for.

    Raises:
        ValueError: a name that is not known, or settings that do not go together.
    """
    if method not in UNITS:
        raise ValueError(f"got --method {method}; wanted one of {', '.join(UNITS)}")
    if layerwise not in LAYERWISE:
        raise ValueError(f"got --layerwise {layerwise}; wanted one of {', '.join(LAYERWISE)}")
    if budget.pattern is not None and (unit != "auto" or layerwise != "uniform"):
        raise ValueError(
            f"got --pattern {budget.pattern} with --budget {unit} and --layerwise {layerwise}; a pattern "
            "says how many of each group stay: leave both out, or give --sparsity instead"
        )
    if unit != "auto" and unit not in UNITS[method]:
        raise ValueError(
            f"got --budget {unit}; for --method {method} wanted auto or one of {', '.join(UNITS[method])}"
        )
    if layerwise == "owl" and method == "magnitude":
        raise ValueError(
            "got --layerwise owl with --method magnitude; owl looks at the inputs of each block: use "
            "--method wanda or sparsegpt, or --budget global for magnitude"
        )
    unit = UNITS[method][0] if unit == "auto" else unit
    return Recipe(method, budget, unit, (owl or OwlSettings()) if layerwise == "owl" else None)
