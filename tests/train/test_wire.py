"""Bytes on the wire: the planner's figures against what real engines hand to torch.distributed."""

from __future__ import annotations

import pytest

from benchmarks.wire import count, planned
from seft_ds.config import parse_seft
from seft_ds.memory import Setup
from seft_ds.targets import Target
from seft_ds.train.wire import wire_bytes
from tests.ranks import run_processes

SMALL = (2, 64, 2)  # ranks, width, blocks


@pytest.mark.parametrize(
    ("method", "stage", "reuse", "micro_batches"),
    [
        ("seft", 1, 10**9, 2), ("seft", 2, 10**9, 1), ("fixed", 2, 10**9, 2), ("seft", 3, 10**9, 1),
        ("seft", 3, 0, 2), ("lora", 3, 0, 1),
    ],
)  # fmt: skip
def test_planned_bytes_are_those_of_a_real_run(
    method: str, stage: int, reuse: int, micro_batches: int
) -> None:
    counted = run_processes(2, count, method, stage, *SMALL, 10, reuse, micro_batches)
    said = planned(method, stage, *SMALL, reuse, micro_batches)
    assert max(sum(sent.values()) for sent in counted) == pytest.approx(said, rel=0.02)


def test_messages_of_events_do_not_grow_with_the_weights() -> None:
    config = parse_seft({"interval": 10, "window": 2})
    setup = Setup(stage=3, ranks=16)
    small, large = (
        wire_bytes([Target("w", (n, n), n * n // 2, n_slots=1000)], [], setup, config)
        for n in (100, 1000)
    )
    assert small["events"] == large["events"] > 0
    assert large["windows"] == pytest.approx(100 * small["windows"])
    assert large["weights"] > 10 * small["weights"]


def test_one_rank_sends_nothing() -> None:
    config = parse_seft({})
    for stage in range(4):
        sent = wire_bytes([Target("w", (8, 8), 32, n_slots=4)], [10], Setup(stage, 1), config)
        assert not any(sent.values())
