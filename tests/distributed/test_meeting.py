"""Ranks that compare their devices before a backend joins them: threads at one store."""

from __future__ import annotations

import threading
from datetime import timedelta

import pytest
import torch.distributed as dist

from seft_ds.distributed.meeting import Arrival, compare, judge, time_limit
from seft_ds.errors import RunError
from seft_ds.launching import Place
from tests.ranks import run_processes

LONG = timedelta(seconds=30)
GOOD = Arrival("node-0", "cuda", "")
BAD = Arrival("node-1", "cpu", "CUDA_VISIBLE_DEVICES is 0, but the driver is too old")


def outcomes(arrivals: list[Arrival | None], limit: timedelta = LONG) -> list[str]:
    """What each rank that comes is told."""
    store, said = dist.HashStore(), [""] * len(arrivals)

    def arrive(rank: int, arrival: Arrival) -> None:
        try:
            compare(store, Place(rank, len(arrivals)), arrival, limit)
        except (ValueError, RunError) as error:
            said[rank] = f"{type(error).__name__}: {error}"

    threads = [
        threading.Thread(target=arrive, args=(rank, a))
        for rank, a in enumerate(arrivals)
        if a is not None
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return said


def test_ranks_that_agree_go_on():
    assert outcomes([GOOD] * 3) == ["", "", ""]
    assert judge([Arrival(f"node-{r}", "cpu", "") for r in range(3)]) == ""


def test_one_bad_node_among_good_ones_is_named_to_all():
    said = outcomes([GOOD, GOOD, BAD, BAD])
    assert said == [f"ValueError: ranks 2, 3 (node-1): {BAD.trouble}"] * 4


def test_a_node_that_shows_no_gpu_at_all_is_named():
    text = judge([GOOD, Arrival("node-1", "cpu", "")])
    assert "cuda (node-0) on rank 0 and cpu (node-1) on rank 1" in text


def test_a_rank_that_does_not_come_is_named():
    said = outcomes([GOOD, None, GOOD], timedelta(seconds=0.3))
    assert said[0].startswith("RunError: rank 1 of 3 did not come")
    assert said[2] == said[0]


def test_the_time_limit_is_deepspeeds(monkeypatch):
    monkeypatch.delenv("DEEPSPEED_TIMEOUT", raising=False)
    assert time_limit() == timedelta(minutes=10)
    monkeypatch.setenv("DEEPSPEED_TIMEOUT", "soon")
    with pytest.raises(ValueError, match="DEEPSPEED_TIMEOUT is 'soon'"):
        time_limit()


def test_a_run_of_processes_is_ended_by_one_bad_rank():
    said = run_processes(2, _joins)
    assert said[0] == said[1] and "rank 1 (" in said[0] and "the driver is too old" in said[0]


def _joins() -> str:
    import os

    from seft_ds.distributed import collectives

    if os.environ["RANK"] == "1":  # as on a node whose driver is older than torch's CUDA
        real = collectives.choose_device
        collectives.choose_device = lambda place: (real(place)[0], "the driver is too old")
    try:
        collectives.init_ranks()
    except ValueError as error:
        return str(error)
    return "joined"
