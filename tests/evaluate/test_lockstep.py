"""Ranks that need different numbers of forward passes, each of which is a collective."""

from __future__ import annotations

import pytest
import torch

from seft_ds.evaluate.lockstep import Lockstep
from tests.ranks import ThreadRanks, run_threads


class Together(torch.nn.Module):
    """A model whose forward pass all ranks have to take part in, as under ZeRO-3."""

    def __init__(self, ranks: ThreadRanks) -> None:
        super().__init__()
        self.ranks, self.passes = ranks, 0

    def forward(self, input_ids: torch.Tensor, use_cache: bool = False) -> torch.Tensor:
        self.passes += 1
        return self.ranks.sum_(torch.ones(1))


@pytest.mark.parametrize("needs", [[0, 3], [2, 2], [5, 1, 0], [0, 0]])
def test_every_rank_takes_as_many_passes_as_the_busiest(needs: list[int]) -> None:
    def work(ranks: ThreadRanks) -> tuple[int, list[float]]:
        model = Together(ranks)
        with Lockstep(model, ranks, True, torch.device("cpu")):
            seen = [float(model(torch.zeros(1, 1))) for _ in range(needs[ranks.rank])]
        assert not model._forward_pre_hooks
        return model.passes, seen

    for rank, (passes, seen) in enumerate(run_threads(len(needs), work)):
        assert passes == max(needs)
        assert seen == [float(len(needs))] * needs[rank]


def test_an_error_ends_the_run_without_waiting() -> None:
    def work(ranks: ThreadRanks) -> None:
        with Lockstep(Together(ranks), ranks, True, torch.device("cpu")):
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        run_threads(2, work)
