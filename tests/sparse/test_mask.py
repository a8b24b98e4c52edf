from __future__ import annotations

import pytest
import torch

from seft_ds.sparse import mask


@pytest.mark.parametrize("n", [0, 1, 7, 8, 9, 64, 1001])
def test_pack_count_unpack(n: int) -> None:
    live = torch.rand(n, generator=torch.Generator().manual_seed(n)) < 0.3
    bits = mask.pack(live)
    assert bits.numel() == -(-n // 8)
    assert mask.count(bits) == sum(live.tolist())
    assert mask.unpack(bits, n).tolist() == live.tolist()
    for i in range(n):  # the layout contract, bit by bit
        assert bool(bits[i // 8] >> (i % 8) & 1) == bool(live[i])


def test_put_where_positions_share_bytes() -> None:
    live = torch.rand(100, generator=torch.Generator().manual_seed(0)) < 0.5
    bits = mask.pack(live)
    on, off = torch.tensor([0, 1, 2, 3, 4, 5, 6, 7, 99]), torch.tensor([8, 9, 15, 50])
    mask.put(bits, on, True)
    mask.put(bits, off, False)
    live[on], live[off] = True, False
    assert mask.unpack(bits, 100).tolist() == live.tolist()


def test_count_is_exact_beyond_what_bf16_or_fp32_can_count() -> None:
    assert mask.count(torch.full((2**21 + 1,), 255, dtype=torch.uint8)) == 8 * (2**21 + 1)
