"""Do the values in a checkpoint's files fit together?

Checksums find damage, not somebody who means harm and makes them right again. What a run relies on without
looking is looked at here, before anything is changed: how many positions are live, that the dead ones are
zero, that slots sit where they can. Values that are merely others can't be told from honest ones.
"""

from __future__ import annotations

import torch

from seft_ds.checkpoint.pieces import Pieces
from seft_ds.checkpoint.verify import groups_off_pattern
from seft_ds.distributed.agreement import all_or_none
from seft_ds.distributed.collectives import Ranks
from seft_ds.optim.families import SQUARE, TOTAL
from seft_ds.sparse import mask
from seft_ds.targets import Target


def check_contents(pieces: Pieces, share: tuple[int, int] = (0, 1)) -> list[int]:
    """Look at every weight of this rank's share, one in memory at a time; returns their live counts.

    Raises:
        ValueError: naming the file or the weight that can't be right.
    """
    rank, size = share
    for k in range(len(pieces.meta.others)):
        pieces.expect_other(k)
    return [_check_target(pieces, i) for i in range(rank, len(pieces.meta.targets), size)]


def check_contents_together(pieces: Pieces, ranks: Ranks) -> None:
    """`check_contents`, each rank a share of the weights. A collective; ValueError on every rank."""
    counts = all_or_none(ranks, lambda: check_contents(pieces, (ranks.rank, ranks.size)))
    check_total(pieces, sum(sum(per_rank) for per_rank in ranks.gather_object(counts)))


def check_total(pieces: Pieces, live: int) -> None:
    """With `scope: global` only the sum over all weights is given; without `adapt` no count is."""
    if not pieces.meta.config.get("adapt", True):
        return
    wanted = sum(target.target_live for target in pieces.meta.targets)
    if live != wanted:
        raise ValueError(
            f"{pieces.directory}: {live} live positions, wanted {wanted}; it is damaged"
        )


def _check_target(pieces: Pieces, i: int) -> int:
    target = pieces.meta.targets[i].target()
    live = mask.unpack(pieces.bits(i, "live_bits", 0, target.numel), target.numel)
    start = mask.unpack(pieces.bits(i, "start_bits", 0, target.numel), target.numel)
    position = pieces.slot_positions(i)
    table = pieces.slots(i, 0, target.numel)
    by_part, config = live.view(target.n_parts, -1).sum(dim=1).tolist(), pieces.meta.config
    count = sum(by_part)
    exact = config.get("scope") != "global" and config.get("adapt", True)
    text = target.pattern_text
    wrong = {
        f"{count} positions are live, wanted {target.target_live}": exact
        and count != target.target_live,
        f"its parts have {by_part} live, wanted {target.part_live}": exact
        and by_part != target.live_by_part,
        "a slot of one expert's matrix sits in another": not _slots_in_parts(target, position),
        f"its live positions don't follow the pattern {text}": text is not None
        and groups_off_pattern(live.view(target.shape), text) != 0,
        "a slot sits on a dead position": not bool(live[position].all()),
        "a slot that was born dead has a base": bool((table.base[table.born_dead] != 0).any()),
        "its weights don't fit its mask": not _weights_fit(pieces, i, live, start, position),
        "its deltas, moments or window are not what a run computes": not _values_fit(pieces, i),
    }
    pieces.fresh_slots(i)
    for what, is_so in wrong.items():
        if is_so:
            raise ValueError(
                f"{pieces.directory}: {target.name}: {what}; the checkpoint is damaged"
            )
    return count


def _slots_in_parts(target: Target, position: torch.Tensor) -> bool:
    """Does each part have its slots within it? position: int64 (K,), of each slot."""
    n, counts = target.part_numel, torch.tensor(target.slots_by_part)
    parts = torch.arange(target.n_parts).repeat_interleave(counts)
    return torch.equal(position // n, parts)


def _weights_fit(
    pieces: Pieces, i: int, live: torch.Tensor, start: torch.Tensor, position: torch.Tensor
) -> bool:
    """Are weights finite, dead positions +0.0, and all that can differ from the base model marked so?"""
    n = live.numel()
    if pieces.meta.base == "copy":
        weight = pieces.weight(i, 0, n)
        return bool(weight.isfinite().all()) and _all_zero(weight[~live])
    at, value = pieces.touched(i, 0, n)
    touched = mask.unpack(pieces.bits(i, "touched_bits", 0, n), n)
    marked = touched[position].all() & ~((live ^ start) & ~touched).any()
    return bool(marked & value.isfinite().all()) and _all_zero(value[~live[at]])


def _all_zero(values: torch.Tensor) -> bool:
    """+0.0 everywhere, and not -0.0."""
    return not bool((values != 0).any() | torch.signbit(values).any())


def _values_fit(pieces: Pieces, i: int) -> bool:
    """Are they what a run computes, which takes no step that isn't finite? Sums of squares may overflow."""
    meta = pieces.meta
    k, n = meta.targets[i].n_slots, meta.targets[i].target().numel
    names = ["delta", *(f"moment.{m}" for m in meta.moments)]
    values = {name: pieces.by_slot(i, name, 0, k) for name in names}
    if meta.window_steps[i] is not None:
        values |= {name: pieces.window(i, name, 0, n) for name in ("G", "Q")}
    if meta.curvature_steps[i] is not None:
        values |= dict(zip(("output", "input"), pieces.curvature(i), strict=True))
    if meta.rates and not bool((pieces.rates(i) > 0).all()):
        return False
    squares = (f"moment.{SQUARE}", f"moment.{TOTAL}", "Q", "output", "input")
    return all(
        bool((x >= 0).all() if name in squares else x.isfinite().all())
        for name, x in values.items()
    )
