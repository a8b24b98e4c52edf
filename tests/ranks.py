"""Threads as ranks: the `Ranks` interface of `seft_ds.distributed` without processes (about 5 ms a test)."""

from __future__ import annotations

import importlib
import io
import threading
from collections.abc import Callable
from typing import Any

import torch


class ThreadRanks:
    """One rank of a run whose ranks are threads of this process."""

    def __init__(self, rank: int, size: int, board: dict, gate: threading.Barrier):
        self.rank, self.size, self._board, self._gate = rank, size, board, gate
        self.bytes = 0

    def _exchange(self, value: Any) -> list[Any]:
        self._board[self.rank] = value
        self._gate.wait()
        values = [self._board[r] for r in range(self.size)]
        self._gate.wait()  # nobody overwrites before everybody has read
        return values

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        parts = self._exchange(tensor.clone())
        total = parts[0].clone()
        for part in parts[1:]:
            total += part
        return tensor.copy_(total)

    def sum_scatter(self, rows: torch.Tensor) -> torch.Tensor:
        return self.sum_(rows.clone())[self.rank]

    def gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        return [part.clone() for part in self._exchange(tensor.clone())]

    def gather_known(self, tensor: torch.Tensor, lengths: list[int]) -> list[torch.Tensor]:
        parts = self.gather(tensor)
        assert [p.numel() for p in parts] == lengths
        return parts

    def gather_object(self, value: Any) -> list[Any]:
        return self._exchange(value)

    def barrier(self) -> None:
        self._gate.wait()


def run_threads(size: int, work: Callable[[ThreadRanks], Any]) -> list[Any]:
    """Run `work(ranks)` on `size` threads; their results in rank order. The first error is raised."""
    gate = threading.Barrier(size, timeout=60)
    board: dict = {}
    results: list[Any] = [None] * size
    errors: list[BaseException] = []

    def body(rank: int) -> None:
        try:
            results[rank] = work(ThreadRanks(rank, size, board, gate))
        except (
            BaseException
        ) as error:  # a broken barrier on the peers is a consequence, not the cause
            if not isinstance(error, threading.BrokenBarrierError):
                errors.append(error)
            gate.abort()

    threads = [threading.Thread(target=body, args=(r,)) for r in range(size)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    if errors:
        raise errors[0]
    return results


def run_processes(
    size: int, work: Callable[..., Any], *args: Any, timeout: float = 300
) -> list[Any]:
    """Run `work(*args)` on `size` forked processes that form a gloo group; results in rank order.

    Forking keeps the imports of this process. The first error is raised here with its traceback.
    """
    import multiprocessing as mp
    import queue

    # What an engine imports when it is first made takes seconds: once here, not once in every rank.
    importlib.import_module("seft_ds.train.run")
    context = mp.get_context("fork")
    results: Any = context.Queue()
    port = free_port()
    processes = [
        context.Process(target=_rank_main, args=(r, size, port, results, work, args))
        for r in range(size)
    ]
    for p in processes:
        p.start()
    collected: dict[int, Any] = {}
    try:
        while len(collected) < size:
            try:
                rank, ok, value = results.get(timeout=timeout)
            except queue.Empty:
                raise TimeoutError(f"no result from {size - len(collected)} ranks") from None
            if not ok:
                raise AssertionError(f"rank {rank}:\n{value}")
            collected[rank] = torch.load(io.BytesIO(value), weights_only=False)
    finally:
        for p in processes:
            p.join(timeout=5 if len(collected) == size else 0.1)
            if p.is_alive():
                p.kill()
    return [collected[r] for r in range(size)]


def _rank_main(rank: int, size: int, port: int, results: Any, work: Callable, args: tuple) -> None:
    import gc
    import os
    import traceback

    gc.freeze()  # or each collection walks over, and copies, all that the parent has imported
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), LOCAL_WORLD_SIZE=str(size),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), DS_ACCELERATOR="cpu",
    )  # fmt: skip
    try:
        file = io.BytesIO()  # tensors sent as such would need this process to outlive their reading
        torch.save(work(*args), file)
        results.put((rank, True, file.getvalue()))
        from seft_ds.distributed.collectives import close_ranks

        close_ranks()
    except BaseException:
        results.put((rank, False, traceback.format_exc()))
    results.close()
    results.join_thread()
    os._exit(0)  # the parent's test runner must not run its exit handlers here


def free_port() -> int:
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]
