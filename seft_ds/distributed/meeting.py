"""The ranks' first words, over the store that they meet at, before a backend joins them.

A rank that falls back to the CPU while its peers take GPUs joins another backend's group, and all of them
wait for each other until a timeout. Here they compare first, and one that can't go on is named.
"""

from __future__ import annotations

import json
import os
import socket
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import timedelta

import torch.distributed as dist

from seft_ds.distributed.agreement import disagreements, name_ranks
from seft_ds.errors import RunError
from seft_ds.launching import Place

_VERDICT = "verdict"
_LATER = timedelta(seconds=10)  # what the last to hear may take longer


@dataclass(frozen=True)
class Arrival:
    """What a rank says when it arrives."""

    host: str
    device: str  # "cuda" or "cpu"
    trouble: str  # why it can't go on, or ""


def meet(place: Place, device: str, trouble: str | None) -> dist.Store:
    """Wait for all ranks and compare their devices; returns the store, to be kept until they have joined.

    Raises:
        ValueError: on every rank, if some can't use their GPU, or only some use one.
        RunError: a rank didn't come, or the place where they meet can't be opened or reached.
    """
    limit = time_limit()
    where = f"{os.environ.get('MASTER_ADDR')}, port {os.environ.get('MASTER_PORT')}"
    try:
        store, _, _ = next(dist.rendezvous("env://", place.rank, place.size, timeout=limit))
        # torchrun keeps its store when it starts the ranks once more.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        mine = Arrival(socket.gethostname(), device, trouble or "")
        compare(dist.PrefixStore(f"seft/{attempt}", store), place, mine, limit)
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        reason = " ".join(str(error).split())[:200]
        if "EADDRINUSE" in reason:
            raise RunError(
                f"the ranks can't meet at {where}: another program uses that port; give another one "
                "(deepspeed --master_port N, or MASTER_PORT=N)"
            ) from error
        raise RunError(
            f"rank {place.rank} of {place.size} did not meet the others at {where} within "
            f"{limit.total_seconds() / 60:.0f} minutes: {reason}"
        ) from error
    return store


def time_limit() -> timedelta:
    """How long the ranks wait for each other; DeepSpeed's own variable and default."""
    text = os.environ.get("DEEPSPEED_TIMEOUT", "10")
    if not text.isdigit() or int(text) == 0:
        raise ValueError(
            f"DEEPSPEED_TIMEOUT is {text!r:.40}; wanted a whole number of minutes above 0"
        )
    return timedelta(minutes=int(text))


def compare(store: dist.Store, place: Place, mine: Arrival, limit: timedelta) -> None:
    """Leave `mine` in the store, and learn from rank 0 what follows from all of them.

    Raises:
        ValueError: see `meet`.
        RunError: some ranks didn't come.
    """
    names = [str(rank) for rank in range(place.size)]
    store.set(names[place.rank], json.dumps(asdict(mine)))
    if place.rank == 0:
        try:
            store.wait(names, limit)
            kind, verdict = (
                "ValueError",
                judge([Arrival(**json.loads(store.get(n))) for n in names]),
            )
        except dist.DistStoreError:
            absent = [rank for rank, name in enumerate(names) if not store.check([name])]
            minutes = limit.total_seconds() / 60
            kind = "RunError"
            verdict = (
                f"{name_ranks(absent)} of {place.size} did not come within {minutes:.0f} minutes; look at "
                "the output of those"
            )
        store.set(_VERDICT, json.dumps([kind, verdict]))
    store.wait([_VERDICT], limit + _LATER)
    kind, verdict = json.loads(store.get(_VERDICT))
    if not verdict:
        return
    store.set(f"{place.rank} heard", "")
    if place.rank == 0:  # who serves the store, so that its end would be told for the reason
        with suppress(dist.DistStoreError):
            store.wait([f"{name} heard" for name in names if store.check([name])], _LATER)
    raise RunError(verdict) if kind == "RunError" else ValueError(verdict)


def judge(arrivals: list[Arrival]) -> str:
    """What keeps these ranks from running together, or ""."""
    troubled = [rank for rank, arrival in enumerate(arrivals) if arrival.trouble]
    if troubled:
        first = arrivals[troubled[0]]
        hosts = sorted({arrivals[rank].host for rank in troubled})
        return f"{name_ranks(troubled)} ({', '.join(hosts[:3])}): {first.trouble}"
    differing = disagreements(
        [{"the device": f"{arrival.device} ({arrival.host})"} for arrival in arrivals]
    )
    if len({arrival.device for arrival in arrivals}) < 2:
        return ""
    return (
        f"the ranks don't use the same kind of device: {differing[0]}; set DS_ACCELERATOR=cpu on all of "
        "them, or give all of them GPUs"
    )
