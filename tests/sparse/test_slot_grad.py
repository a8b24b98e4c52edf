from __future__ import annotations

import importlib.util
import subprocess
import sys

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


@pytest.mark.parametrize(
    "parts",
    [[(0, 77)], [(0, 26), (26, 52), (52, 77)], [(3, 5), (60, 77)], [(0, 7), (7, 14), (77, 77)]],
)
def test_dense_parts_are_the_ranges_side_by_side(parts: list[tuple[int, int]]) -> None:
    dy, x, _, exact = problem(6, 7, 11, 1, torch.float32)
    got = slot_grad.dense_parts(dy, x, parts)
    assert got.shape == (len(parts), max(hi - lo for lo, hi in parts))
    for (lo, hi), row in zip(parts, got.double(), strict=True):
        torch.testing.assert_close(row[: hi - lo], exact[lo:hi], rtol=1e-5, atol=1e-5)
        assert not row[hi - lo :].any()


def test_pieces_are_bounded_but_hold_some_rows_of_every_part() -> None:
    assert slot_grad.rows_a_piece(8, 4096) * 8 * 4096 == 1 << 24
    assert slot_grad.rows_a_piece(512, 28672) == 4  # fewer would compute many rows twice


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize(
    "shape", [(5, 7, 11, 9), (33, 16, 24, 384), (2, 40, 3, 1), (300, 20, 30, 70)]
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_triton_kernel_is_the_dense_gradient(shape, dtype: str) -> None:
    """In Triton's interpreter, which has to be chosen before the kernel is defined: a process of its own."""
    code = f"""
import os; os.environ["TRITON_INTERPRET"] = "1"
import torch
from seft_ds.sparse.triton_slot_grad import dot_products
from tests.sparse.test_slot_grad import problem
dy, x, position, exact = problem(*{shape}, torch.{dtype})
got = dot_products(dy, x, position, blocks=(16, 32))
assert got.dtype == torch.float32
torch.testing.assert_close(got.double(), exact[position.long()], rtol=1e-5, atol=1e-4)
assert dot_products(dy, x, position[:0], blocks=(16, 32)).numel() == 0
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
