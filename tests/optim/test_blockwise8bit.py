"""Edits of 8-bit state, against bitsandbytes' own quantiser and one entry at a time."""

from __future__ import annotations

import bitsandbytes.functional as F
import pytest
import torch

from seft_ds.optim import blockwise8bit
from seft_ds.optim.families import Blocks


def state(signed: bool, n: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(codes, absmax, qmap) of n random values, made by bitsandbytes."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(n, generator=generator) * 10.0 ** torch.randint(
        -6, 2, (n,), generator=generator
    )
    qmap = F.create_dynamic_map(signed=signed)
    values = values if signed else values.abs()
    codes, quant = F.quantize_blockwise(values, code=qmap, blocksize=blockwise8bit.BLOCK)
    return codes.view(-1), quant.absmax.view(-1), qmap


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("n", [1, 255, 256, 257, 1000])
def test_reads_and_requantises_as_bitsandbytes_does(signed: bool, n: int) -> None:
    codes, absmax, qmap = state(signed, n)
    every = torch.arange(n)
    values = blockwise8bit.read(codes, absmax, qmap, every)
    theirs = F.dequantize_blockwise(
        codes, F.QuantState(absmax, code=qmap, blocksize=blockwise8bit.BLOCK, dtype=torch.float32)
    )
    assert torch.equal(values, theirs)
    again = codes.clone().fill_(3)
    assert int(blockwise8bit.write(again, absmax, qmap, every, values)) == 0
    assert torch.equal(qmap[again.long()], qmap[codes.long()])  # every code comes back


@pytest.mark.parametrize("signed", [True, False])
def test_an_edit_touches_its_own_codes_and_cuts_what_does_not_fit(signed: bool) -> None:
    codes, absmax, qmap = state(signed, 700)
    before, index = codes.clone(), torch.tensor([0, 3, 255, 256, 511, 699])
    limits = absmax[index // 256]
    values = torch.tensor([0.0, 0.3, 1.0, 1.5, 0.05, 7.0]) * limits
    if signed:
        values[1], values[3] = -values[1], -values[3]
    cut = int(blockwise8bit.write(codes, absmax, qmap, index, values))
    assert cut == 2  # 1.5 and 7 times the block's largest
    stays = torch.ones(700, dtype=torch.bool)
    stays[index] = False
    assert torch.equal(codes[stays], before[stays])
    for j, value, limit in zip(index.tolist(), values.tolist(), limits.tolist(), strict=True):
        scaled = max(-1.0, min(1.0, value / limit))
        best = int((qmap - scaled).abs().argmin())
        assert abs(float(qmap[codes[j].long()] - qmap[best])) < 1e-6
    assert float(qmap[codes[0].long()]) == 0.0  # zero is zero, which is code 0 in one map only


def test_a_block_without_a_gradient_holds_zeros_only() -> None:
    qmap = F.create_dynamic_map(signed=True)
    codes, absmax = torch.zeros(300, dtype=torch.uint8), torch.tensor([0.0, 2.0])
    cut = blockwise8bit.write(codes, absmax, qmap, torch.tensor([5, 260]), torch.tensor([1.0, 1.0]))
    assert int(cut) == 1
    assert float(blockwise8bit.read(codes, absmax, qmap, torch.tensor([5]))) == 0.0
    assert float(qmap[codes[5].long()]) == 0.0
    assert abs(float(blockwise8bit.read(codes, absmax, qmap, torch.tensor([260]))) - 1.0) < 0.02


def test_assigning_with_the_same_scales_gives_the_same_codes() -> None:
    codes, absmax, qmap = state(True, 1000, seed=4)
    moment = Blocks(codes.clone(), absmax.clone(), qmap)
    values = moment.read(0, 1000)
    other = Blocks(torch.zeros_like(codes), torch.zeros_like(absmax), qmap)
    other.assign(values, absmax)
    assert torch.equal(other.codes, codes) and torch.equal(other.absmax, absmax)
    other.assign(values, None)  # elsewhere cut: new scales, values as near as 8 bits come
    torch.testing.assert_close(
        other.read(0, 1000), values, rtol=0.07, atol=float(absmax.max()) * 1e-6
    )
