"""How many bytes a checkpoint will have, by part, before it is written (layout: checkpoint/layout.py)."""

from __future__ import annotations

from seft_ds.checkpoint.pieces import index_dtype
from seft_ds.targets import Target

_FP32, _FLAG = 4, 1


def checkpoint_bytes(
    targets: list[Target],
    other_bytes: int,
    weight_bytes: int,
    base: str,
    touched_share: float,
    open_share: float,
    moments: int = 2,
    rates: bool = True,
) -> dict[str, int]:
    """Bytes of the tensors in all rank files together; headers and `seft.json` are left out.

    Args:
        other_bytes: of the weights that are no targets.
        weight_bytes: per entry of a target weight (2 for bf16).
        base: "copy" or "reference".
        touched_share: of the target weights' entries, those that a slot has held or an event pruned since
            the run began.
        open_share: of the target weights' entries, those whose window is open: about window / interval.
        moments: what the optimizer keeps per slot (2 for Adam).
        rates: with `lr_scale: input`.
    """
    entries = sum(t.numel for t in targets)
    mask_bytes = sum(-(-t.numel // 8) for t in targets)
    parts = {"live masks": mask_bytes, "masks at the start": mask_bytes}
    if base == "copy":
        parts["target weights"] = entries * weight_bytes
        parts["other weights"] = other_bytes
    else:
        parts["touched masks"] = mask_bytes
        parts["touched weights"] = round(entries * touched_share) * weight_bytes
    parts["slots"] = sum(
        t.n_slots * (2 * index_dtype(t.numel).itemsize + weight_bytes + _FLAG) for t in targets
    )
    parts["deltas and moments"] = sum(t.n_slots for t in targets) * _FP32 * (1 + moments)
    parts["learning rates"] = sum(t.shape[1] for t in targets) * _FP32 * rates
    parts["open windows"] = round(entries * open_share) * 2 * _FP32
    return parts
