"""Window sums over ranks against plain dense gradients."""

from __future__ import annotations

import pytest
import torch

from seft_ds.distributed import window
from seft_ds.distributed.window import Window
from seft_ds.sparse import slot_grad
from seft_ds.sparse.shard import shard_range
from tests.ranks import run_threads

OUT, IN = 7, 5


def micro_batches(rank: int, step: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Small whole numbers, so that sums are exact in any order."""
    g = torch.Generator().manual_seed(10 * step + rank)
    return [
        tuple(torch.randint(-3, 4, (4, n), generator=g).float() for n in (OUT, IN))
        for _ in range(2)
    ]


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("in_pieces", [False, True])
@pytest.mark.parametrize("with_product", ["all", "one rank", "none"])
def test_sums_are_those_of_the_dense_gradients(
    size: int, in_pieces: bool, with_product: str, monkeypatch
) -> None:
    if in_pieces:
        monkeypatch.setattr(slot_grad, "_BLOCK_ENTRIES", 2 * IN)
        assert window.rows_a_piece(size, IN) < OUT

    def work(ranks):
        sums = Window(OUT * IN, 1, ranks, torch.device("cpu"))
        shares = with_product == "all" or (with_product == "one rank" and ranks.rank == 0)
        for step in range(4):
            if step != 1:  # in step 1 no token comes this way
                for dy, x in micro_batches(ranks.rank, step):
                    sums.add(dy, x, None, dy.t() @ x if shares else None)
            sums.discard_step() if step == 2 else sums.finish_step(0.5)
        return sums.G, sums.Q, sums.steps

    taken = [
        0.5 * sum(dy.t() @ x for r in range(size) for dy, x in micro_batches(r, step))
        for step in (0, 3)
    ]
    G, Q = sum(taken).view(-1), sum(g.square() for g in taken).view(-1)
    for rank, (mine_G, mine_Q, steps) in enumerate(run_threads(size, work)):
        lo, hi = shard_range(OUT * IN, rank, size)
        assert torch.equal(mine_G, G[lo:hi]) and torch.equal(mine_Q, Q[lo:hi]) and steps == 3
