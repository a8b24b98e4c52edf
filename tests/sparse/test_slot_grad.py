from __future__ import annotations

import pytest
import torch

from seft_ds.sparse import slot_grad


def problem(tokens: int, rows: int, columns: int, k: int, dtype: torch.dtype):
    g = torch.Generator().manual_seed(tokens + rows)
    dy = torch.randn(tokens, rows, generator=g).to(dtype)
    x = torch.randn(tokens, columns, generator=g).to(dtype)
    position = torch.randperm(rows * columns, generator=g)[:k].to(torch.int32)
    exact = (dy.double().t() @ x.double()).view(-1)
    return dy, x, position, exact


@pytest.mark.parametrize("way", [slot_grad.sampled, slot_grad.dense_then_gather])
@pytest.mark.parametrize("shape", [(5, 7, 11, 9), (33, 16, 24, 384), (2, 40, 3, 1)])
@pytest.mark.parametrize("block", [1, 50, 1 << 24])
def test_equals_the_dense_gradient(way, shape, block, monkeypatch) -> None:
    monkeypatch.setattr(slot_grad, "_BLOCK_ENTRIES", block)
    dy, x, position, exact = problem(*shape, torch.float32)
    got = way(dy, x, position)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), exact[position.long()], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_chosen_way_is_within_rounding(dtype: torch.dtype) -> None:
    dy, x, position, exact = problem(64, 48, 56, 27, dtype)
    got = slot_grad.slot_gradient(dy, x, position).double()
    tolerance = 1e-5 if dtype == torch.float32 else 2**-7
    torch.testing.assert_close(got, exact[position.long()], rtol=tolerance, atol=tolerance * 8)


@pytest.mark.parametrize("span", [(0, 77), (3, 5), (6, 60), (76, 77), (10, 10)])
@pytest.mark.parametrize("block", [1, 25, 1 << 24])
def test_dense_blocks_tile_the_range(span: tuple[int, int], block: int) -> None:
    dy, x, _, exact = problem(6, 7, 11, 1, torch.float32)
    seen, at = [], span[0]
    for begin, end, values in slot_grad.dense_blocks(dy, x, *span, block_entries=block):
        assert begin == at and values.numel() == end - begin
        seen.append(values)
        at = end
    assert at == span[1]
    if seen:
        torch.testing.assert_close(
            torch.cat(seen).double(), exact[slice(*span)], rtol=1e-5, atol=1e-5
        )
