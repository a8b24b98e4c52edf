"""The methods of `launch/finetune.py --method`, and what each of them means in settings.

The first five run the SEFT engine, with some entries of the "seft" block fixed. The others train adapters
beside frozen weights in plain DeepSpeed and are merged when training ends; of the block they use what names
the target weights and the budget.

Equal budgets: `trainable: rank=r` is r · (out + in) a weight for LoRA and SparsePEFT, as many slots over all
weights for the engine's methods, and the nearest that SPP's shapes allow (baselines/spp.py).
`masked_full` has no budget: it trains every live weight.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

# What of the "seft" block means something to a method without slots.
_ADAPTER_SETTINGS = ("targets", "trainable", "pattern", "min_sparsity", "seed")


@dataclass(frozen=True)
class Method:
    """One method."""

    about: str  # what it does, and where it is described
    settings: dict[str, Any] = field(
        default_factory=dict
    )  # entries of the "seft" block that it fixes
    adapter: str | None = None  # lora, spp or sqft; None: it trains slots
    prunes_again: bool = False  # after the merge


# Exchanges are SEFT's: what it is compared with keeps, or evolves, the zeros that it was given.
_NO_EXCHANGE = {"dense_model": None}

METHODS: dict[str, Method] = {
    "seft": Method("slots that evolve at fixed sparsity (arXiv 2505.24037)"),
    "fixed": Method("the same random live slots all run", {"drop_fraction": 0.0, **_NO_EXCHANGE}),
    "random_grow": Method("slots evolve, grown at random", {"grow": "random", **_NO_EXCHANGE}),
    # As its authors' code: one replacement of all slots after the first window, the shares of each weight
    # apart, dropped deltas forgotten. It scores all positions where that code keeps a pool of candidates.
    "spiel": Method(
        "slots evolve over all weights, zeros too, and nothing is pruned (arXiv 2401.16405)",
        {
            "adapt": False,
            "release": "revert",
            "grow": "magnitude",
            "start": "gradient",
            "pattern": "none",
            "scope": "layer",
            "lr_scale": "none",
            **_NO_EXCHANGE,
        },
    ),  # fmt: skip
    "masked_full": Method(
        "every live weight trains, zeros held",
        {"trainable": "live", "drop_fraction": 0.0, "lr_scale": "none", **_NO_EXCHANGE},
    ),
    "lora": Method("LoRA, merged: fills the zeros (arXiv 2106.09685)", adapter="lora"),
    "lora_pruned": Method(
        "LoRA, merged, pruned back by Wanda (LoRA* in arXiv 2505.24037)",
        adapter="lora",
        prunes_again=True,
    ),
    "spp": Method("weights scaled by row and column, zeros stay (arXiv 2405.16057)", adapter="spp"),
    "sqft": Method("LoRA under the mask: SparsePEFT (arXiv 2410.03750)", adapter="sqft"),
}


def find_method(name: str) -> Method:
    """The method of that name.

    Raises:
        ValueError: there is none.
    """
    if name not in METHODS:
        raise ValueError(f"--method {name!r:.80}: wanted one of {', '.join(METHODS)}")
    return METHODS[name]


def fixed_settings(name: str, chosen: dict[str, Any]) -> dict[str, Any]:
    """The entries of the "seft" block that the method fixes.

    Args:
        chosen: the entries that the user set beside the method.

    Raises:
        ValueError: no such method, or an entry that contradicts it or means nothing to it.
    """
    method = find_method(name)
    for key, value in chosen.items():
        if method.adapter is not None and key not in _ADAPTER_SETTINGS:
            raise ValueError(
                f"--method {name} has no slots, so --seft.{key} means nothing to it; leave it out "
                f"(it uses {', '.join(_ADAPTER_SETTINGS)})"
            )
        if key in method.settings and value != method.settings[key]:
            raise ValueError(
                f"--method {name} means {key} = {method.settings[key]}, but {key} = {str(value):.80} was "
                "given; leave one of them out"
            )
        if "trainable" in method.settings and key == "density":
            raise ValueError(
                f"--method {name} trains every live weight, but density = {str(value):.80} was given; "
                "leave one of them out"
            )
    return dict(method.settings)


def rank_of(trainable: Any, name: str) -> int:
    """The rank in "rank=r".

    Raises:
        ValueError: another kind of budget, which an adapter can't be cut to.
    """
    found = (
        re.fullmatch("rank=([1-9][0-9]{0,8})", trainable) if isinstance(trainable, str) else None
    )
    if found is None:
        raise ValueError(
            f"--method {name} needs the rank of its adapters: give --trainable rank=8 (it has no density, "
            f"and no count: got {trainable!r:.40})"
        )
    return int(found[1])
