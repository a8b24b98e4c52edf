"""Pruned again after the merge, by Wanda, to the very counts that each row (or group) had before.

LoRA* of the SEFT paper: the adapter fills the zeros, so what is compared at equal sparsity is the merged
model pruned once more. Scores are |W| · ‖x‖ (arXiv 2306.11695), the norms those of the layer's inputs in the
merged, still dense model: all weights are scored in one pass, where Wanda's own code goes block by block and
scores each with what the pruned blocks before it give. Under ZeRO-3 that walk would need the weights pruned
in between.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from seft_ds.baselines.adapters import Adapter
from seft_ds.distributed.collectives import Ranks
from seft_ds.prune.choose import check_scores, lowest, lowest_of_groups
from seft_ds.prune.wanda import square_sums, wanda_scores


@torch.no_grad()
def input_square_sums(
    engine: Any, layers: list[Adapter], sequences: list[torch.Tensor], ranks: Ranks
) -> dict[str, torch.Tensor]:
    """float64 (in,) of each target: Σ x² of its inputs over the tokens of all `sequences`.

    The sequences, int64 (tokens,) each and the same on every rank, are dealt out to the ranks. One collective
    a target; under ZeRO-3 as many forward passes on every rank, since each gathers weights.
    """
    sums = {
        layer.target.name: torch.zeros(
            layer.target.shape[1], dtype=torch.float64, device=engine.device
        )
        for layer in layers
    }
    counting = [True]

    def add_to(total: torch.Tensor) -> Any:
        def add(module: nn.Module, args: tuple) -> None:
            if counting[0]:
                total.add_(square_sums(args[0]))

        return add

    handles = [
        layer.module.register_forward_pre_hook(add_to(sums[layer.target.name])) for layer in layers
    ]
    was_training = engine.module.training
    engine.eval()
    try:
        for first in range(0, len(sequences), ranks.size):
            mine = first + ranks.rank
            counting[0] = mine < len(sequences)  # a rank without one runs another's, uncounted
            ids = sequences[mine if counting[0] else first].to(engine.device).unsqueeze(0)
            engine(input_ids=ids, use_cache=False, logits_to_keep=1)
    finally:
        for handle in handles:
            handle.remove()
        engine.train(was_training)
    return {name: ranks.sum_(total).cpu() for name, total in sums.items()}


def live_again(
    merged: torch.Tensor,  # (out, in)
    before: torch.Tensor,  # (out, in) bool: what was live in the pruned model
    sums: torch.Tensor,  # (in,) float64
    pattern: tuple[int, int] | None,
    name: str,
) -> torch.Tensor:
    """Bool (out, in): the best by Wanda, as many in every row as `before` had, or N of every M.

    Raises:
        ValueError: a score of weight `name` isn't finite.
    """
    scores = wanda_scores(merged, sums)
    check_scores(scores, name)
    if pattern is not None:
        return ~lowest_of_groups(scores, *pattern, name)
    live = torch.empty_like(before)
    dead_in_row = (~before).sum(dim=1)
    for k in dead_in_row.unique().tolist():  # Wanda prunes rows alike, magnitude does not
        rows = dead_in_row == k
        live[rows] = ~lowest(scores[rows], k)
    return live
