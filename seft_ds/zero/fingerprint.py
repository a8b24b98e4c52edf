"""Exact fingerprints of weights, the same for any ZeRO stage and any number of ranks.

The fingerprint of a weight is the sum modulo 2⁶⁴ over its flat positions of a 64-bit mix of (bits of the
value, position). A sum has no order, so the ranks' shards add up to the whole weight's number whatever
the partition is, and nothing has to be gathered but one number a weight.

The mix is a bijection of the bits at each position: a change of one value, of a single bit or the sign of
a zero, always changes the sum. Several changes at once, such as two swapped values, cancel with
probability 2⁻⁶⁴. It guards against accidents and not against somebody who wants a collision.
"""

from __future__ import annotations

import torch
from torch import nn

from seft_ds.distributed.agreement import disagreements, first_few
from seft_ds.distributed.collectives import Ranks
from seft_ds.zero import shards

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

# splitmix64's constants, as the int64 numbers that they are modulo 2⁶⁴.
_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
_FIRST = 0xBF58476D1CE4E5B9 - (1 << 64)
_SECOND = 0x94D049BB133111EB - (1 << 64)

# Values at once: on a CPU what stays in a core's cache (half a MiB a buffer), on a GPU what fills it.
_CPU_CHUNK, _GPU_CHUNK = 1 << 16, 1 << 22


def fingerprint(values: torch.Tensor, lo: int) -> int:
    """The part of a weight's fingerprint that its flat positions [lo, lo + n) make, in [0, 2⁶⁴).

    The parts of disjoint ranges add up modulo 2⁶⁴. One wait for the device, at the end.

    Args:
        values: (n,) of any dtype of up to 8 bytes. Their bits count: bf16 and fp32 copies of a weight differ.
        lo: where they begin in the weight.
    """
    bits = values.detach().view(_BITS[values.element_size()])
    n, device = bits.numel(), bits.device
    chunk = min(n, _GPU_CHUNK if bits.is_cuda else _CPU_CHUNK)
    total = torch.zeros((), dtype=torch.int64, device=device)
    position = torch.arange(lo + 1, lo + 1 + chunk, device=device)  # from 1: 0 would be mixed to 0
    mixed, scratch = torch.empty_like(position), torch.empty_like(position)
    for begin in range(0, n, max(chunk, 1)):
        k = min(chunk, n - begin)
        x = mixed[:k].copy_(bits[begin : begin + k])
        x.add_(position[:k], alpha=_GOLDEN)
        total += _mix_(x, scratch[:k]).sum()
        position += chunk
    return int(total) % (1 << 64)


def _mix_(x: torch.Tensor, scratch: torch.Tensor) -> torch.Tensor:
    """splitmix64's finaliser of `x` (n,) int64, in place; `scratch` (n,) int64 saves the allocations."""
    _xor_shifted_(x, 30, scratch).mul_(_FIRST)
    _xor_shifted_(x, 27, scratch).mul_(_SECOND)
    return _xor_shifted_(x, 31, scratch)


def _xor_shifted_(x: torch.Tensor, by: int, scratch: torch.Tensor) -> torch.Tensor:
    """x ^= x >> by, in place, without the sign bits that torch's shift brings in. x, scratch: (n,) int64."""
    torch.bitwise_right_shift(x, by, out=scratch)
    return x.bitwise_xor_(scratch.bitwise_and_((1 << (64 - by)) - 1))


def model_fingerprints(named: dict[str, nn.Parameter], ranks: Ranks) -> dict[str, str]:
    """The fingerprint of each parameter, 16 hex digits, the same on every rank. A collective.

    Partitioned parameters add up over the ranks; of whole ones each rank takes its own copy's, and these are
    compared. (Once DeepSpeed has an engine, all ranks hold what rank 0 loaded: compare before it.)

    Args:
        named: parameters by name, partitioned by ZeRO-3 or whole, or some of each.

    Raises:
        ValueError: whole weights differ between ranks, or their names do.
    """
    parts = {name: _part(param, ranks) for name, param in named.items()}
    everyone = ranks.gather_object(parts)
    differing = disagreements([{n: _show(part) for n, part in each.items()} for each in everyone])
    if differing:
        raise ValueError(
            f"the model's weights differ between ranks: {first_few(differing)}; give every machine the same "
            "model files"
        )
    return {
        name: _hex(sum(each[name][1] for each in everyone) if partitioned else part)
        for name, (partitioned, part) in parts.items()
    }


def _part(param: nn.Parameter, ranks: Ranks) -> tuple[bool, int]:
    """(whether it is partitioned, the fingerprint of what this rank holds)."""
    if shards.is_partitioned(param):
        lo, values = shards.held(param, ranks)
        return True, fingerprint(values, lo)
    return False, fingerprint(
        param.data.reshape(-1), 0
    )  # reshape: some weights are transposed views


def _show(part: tuple[bool, int]) -> str:
    """What has to be the same on all ranks: a shard's number is each rank's own."""
    partitioned, value = part
    return "partitioned" if partitioned else _hex(value)


def _hex(value: int) -> str:
    return f"{value % (1 << 64):016x}"
