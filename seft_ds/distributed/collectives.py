"""The ranks of a run, and the few things they say to each other.

Everything that talks to other ranks takes a `Ranks` object, so that one code path serves a single
process, gloo, NCCL, and the threads that the tests use as ranks. World size 1 is not a special case.
Every method is a collective: all ranks call it, in the same order.
"""

from __future__ import annotations

import os
import sys
from typing import Any, Protocol

import torch
import torch.distributed as dist

from seft_ds.devices import choose_device, device_of_group
from seft_ds.distributed.extension_lock import clear_stale_locks
from seft_ds.distributed.liveness import current_watch
from seft_ds.distributed.meeting import meet
from seft_ds.launching import settle


class Ranks(Protocol):
    """What the rest of the code needs of the other ranks."""

    rank: int
    size: int
    bytes: int  # payload that this rank has put into collectives so far

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Add `tensor` over all ranks, in place, and return it."""
        ...

    def sum_scatter(self, rows: torch.Tensor) -> torch.Tensor:
        """Add `rows` (size, n) over all ranks; each gets its own row (n,). May overwrite `rows`."""
        ...

    def gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """The 1-D tensors of all ranks, in rank order; lengths may differ, dtypes may not."""
        ...

    def gather_known(self, tensor: torch.Tensor, lengths: list[int]) -> list[torch.Tensor]:
        """`gather` where every rank already knows all `lengths`: one collective, no host sync."""
        ...

    def gather_object(self, value: Any) -> list[Any]:
        """Small picklable values of all ranks, in rank order."""
        ...

    def barrier(self) -> None: ...


class ProcessRanks:
    """`Ranks` over torch.distributed's default group.

    Tensors may be on the host or on the device: with NCCL, which only takes device tensors, those of
    the host travel through the device. (A model that has just been loaded is on the host.)
    """

    def __init__(self) -> None:
        assert dist.is_initialized(), "call init_ranks() first"
        self.rank = dist.get_rank()
        self.size = dist.get_world_size()
        self.bytes = 0
        only_device = dist.get_backend() == "nccl"
        self._device = torch.device("cuda", torch.cuda.current_device()) if only_device else None

    def _ready(self, tensor: torch.Tensor) -> torch.Tensor:
        """Contiguous, and where the backend can take it."""
        self.bytes += tensor.nbytes
        return tensor.to(self._device or tensor.device).contiguous()

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        moved = self._ready(tensor)
        dist.all_reduce(moved)
        return tensor if moved is tensor else tensor.copy_(moved)

    def sum_scatter(self, rows: torch.Tensor) -> torch.Tensor:
        moved = self._ready(rows)
        if self._device is not None:
            mine = torch.empty_like(moved[0])
            dist.reduce_scatter_tensor(mine, moved)
            return mine.to(rows.device)
        # gloo sums all rows on all ranks and cuts its row out: a reduction to each owner moves less.
        for owner, row in enumerate(moved):
            dist.reduce(row, dst=owner)
        return moved[self.rank]

    def gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        length = self._ready(
            torch.tensor([tensor.numel()], dtype=torch.int64, device=tensor.device)
        )
        lengths = torch.empty(self.size, dtype=torch.int64, device=length.device)
        dist.all_gather_into_tensor(lengths, length)
        return self.gather_known(tensor, [int(n) for n in lengths.tolist()])

    def gather_known(self, tensor: torch.Tensor, lengths: list[int]) -> list[torch.Tensor]:
        longest = max(lengths)
        if longest == 0:
            return [tensor.new_empty(0) for _ in lengths]
        padded = tensor.new_zeros(longest)
        padded[: tensor.numel()] = tensor
        padded = self._ready(padded)
        everyone = padded.new_empty(self.size * longest)
        dist.all_gather_into_tensor(everyone, padded)
        everyone = everyone.to(tensor.device)
        return [everyone[r * longest : r * longest + n] for r, n in enumerate(lengths)]

    def gather_object(self, value: Any) -> list[Any]:
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        dist.barrier()


def init_ranks() -> ProcessRanks:
    """Join the run that the launcher announced (see `launching`), or be a run of one.

    Safe to call more than once. Without a launcher's variables it makes a group of one rank on a free
    local port, so that `python launch/prune.py` runs the same code as eight ranks do.

    Raises:
        ValueError: the launcher's variables leave something open, or a rank can't use its GPU.
        RunError: the ranks didn't meet.
    """
    if dist.is_initialized():
        _follow_group()
        return ProcessRanks()
    place = settle()
    device, trouble = choose_device(place)
    if trouble and place.size == 1:
        raise ValueError(trouble)
    store = meet(place, device.type, trouble) if place.size > 1 else None
    own_tools_first()
    import deepspeed

    clear_stale_locks()  # of extensions that an engine may load: FusedAdam's, CPUAdam's
    if device.type == "cpu":
        _leave_out_inference_op()
    deepspeed.init_distributed(auto_mpi_discovery=False)
    del store  # the group has its own by now, served by the same process
    return ProcessRanks()


def _follow_group() -> None:
    """Take the device of a group that somebody else has made, who may not have set it."""
    if dist.get_backend() != "nccl":
        return
    bound = getattr(dist.group.WORLD, "bound_device_id", None)
    index = device_of_group(
        None if bound is None else bound.index,
        torch.cuda.current_device(),
        settle().local_rank,
        torch.cuda.device_count(),
    )
    if index != torch.cuda.current_device():
        torch.cuda.set_device(index)


def _leave_out_inference_op() -> None:
    """Have DeepSpeed not load its all-reduce for inference on CPUs, which nothing in a training run calls.

    It would need a compiler and two minutes of its work in each new environment, and take 69 MB of /dev/shm a
    rank, which killed ranks leave there (deepspeed 0.19.8, comm/torch.py: `build_shm_op`). Not called on
    GPUs, where there is none: the first look at this table tries compilers and looks at each GPU.
    """
    from deepspeed import ops

    ops.__compatible_ops__["deepspeed_shm_comm"] = False


def own_tools_first() -> None:
    """Put this environment's programs first in PATH, as an activated one has them.

    DeepSpeed compiles an extension with the first `ninja` in PATH. Two versions of it don't accept what the
    other has built, so runs with and without activation would compile in turns, a minute each.
    """
    own = os.path.dirname(sys.executable)
    path = os.environ.get("PATH", "")
    if path.split(os.pathsep)[0] != own:
        os.environ["PATH"] = own + os.pathsep + path


def close_ranks() -> None:
    """Leave together: without it some runs abort at exit, after correct results (deepspeed 0.19.8, gloo)."""
    if dist.is_initialized():
        dist.barrier()
        current_watch().close()  # from here on an end is no loss
        dist.destroy_process_group()
