"""A model in safetensors files, of which one block at a time is in memory.

The module is there whole, but its parameters are on the meta device; a block's are read when it is opened
and dropped when it is closed. What stands before the blocks (the embedding) reads itself when it is called
for the first time, and goes when the hidden states are made; the final norm and the head are never read.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from seft_ds.checkpoint.model_files import ModelFiles, read_converted
from seft_ds.checkpoint.parts import stored_infos
from seft_ds.prune.blocks import Block, decoder_blocks
from seft_ds.prune.walk import Pruned, weights_of
from seft_ds.prune.work import Work
from seft_ds.tensor_files import TensorInfo


class FromFiles:
    """A walk's source (prune/walk.py) that reads a block from files and puts what is pruned into `work`.

    model: on meta, as `empty_model` makes it. files: of its folder. writes: whether this rank hands its
    blocks to `work`; others only need to see the folder. finished: the blocks that are in `work` already,
    the same on every rank. targets: the layers that are pruned (`decoder_blocks`).
    """

    def __init__(
        self,
        model: nn.Module,
        files: ModelFiles,
        work: Work,
        dtype: torch.dtype,
        device: torch.device,
        *,
        writes: bool = True,
        finished: set[int] | None = None,
        targets: Sequence[str] | str = "auto",
    ) -> None:
        self.model, self.device = model, device
        self.blocks = decoder_blocks(model, files.naming, targets)
        self._files, self._tensors, self._naming = files, files.stored, files.naming
        self._work, self._dtype, self._writes = work, dtype, writes
        self._converted = {name: group for group in files.converted for name in group.names}
        self._buffers = {self._naming.in_files(name) for name, _ in model.named_buffers()}
        self._finished = finished or set()
        self._open: int | None = None
        _give_freed_memory_back()

    def read(self, name: str, device: torch.device | None = None) -> torch.Tensor:
        """The dense tensor of a name, in the run's dtype, on the run's device unless another is given."""
        return self._tensors[name].read().to(device or self.device, self._dtype_of(name))

    def _dtype_of(self, name: str) -> torch.dtype:
        """Weights are in the run's dtype; buffers keep their own (a router's correction is fp32)."""
        stored = self._tensors[name].dtype
        return self._dtype if stored.is_floating_point and name not in self._buffers else stored

    def layout(self) -> list[TensorInfo]:
        """Name, shape and dtype of every tensor that the pruned model has: those of the dense one's files."""
        infos = [
            TensorInfo(name, t.shape, self._dtype_of(name)) for name, t in self._tensors.items()
        ]
        shapes = {info.name: info for info in infos}
        return infos + [replace(shapes[o], name=c) for c, o in self._files.copies.items()]

    def original_of(self, name: str) -> str:
        """The tensor that a tied copy in the files is a copy of; of any other, itself."""
        return self._files.copies.get(name, name)

    @contextmanager
    def entrance(self) -> Iterator[None]:
        """What stands before the blocks loads itself when it is called, and is dropped at the end."""
        inner = {id(m) for block in self.blocks for m in block.module.modules()}
        self._fill_buffers()
        loaded: list[tuple[nn.Module, str]] = []

        def loader(prefix: str) -> Any:
            def load(module: nn.Module, args: tuple) -> None:
                for name, parameter in list(module.named_parameters(recurse=False)):
                    if parameter.device.type == "meta":
                        _put(module, name, self.read(self._naming.in_files(f"{prefix}.{name}")))
                        loaded.append((module, name))

            return load

        handles = [
            module.register_forward_pre_hook(loader(prefix))
            for prefix, module in self.model.named_modules()
            if id(module) not in inner
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            for module, name in loaded:
                _drop(module, name)

    @contextmanager
    def opened(self, index: int) -> Iterator[Block]:
        block = self.blocks[index]
        kept = self._work.names(index) if index in self._finished else set()
        names = [name for name, _ in block.module.named_parameters()]
        try:
            for name in names:
                _put(*_place(block.module, name), self._parameter(index, block, name, kept))
            self._open = index
            yield block
        finally:
            self._open = None
            for name in names:
                _drop(*_place(block.module, name))
            _give_freed_memory_back()

    def _parameter(self, index: int, block: Block, name: str, kept: set[str]) -> torch.Tensor:
        """A parameter of a block, its pieces read from the files, or from the work where it has them."""
        whole = block.module.get_parameter(name)
        group = self._converted.get(f"{block.prefix}.{name}")
        if group is not None:
            return read_converted(group, self.read, self.model)[f"{block.prefix}.{name}"]
        infos = stored_infos(
            self._naming, f"{block.prefix}.{name}", tuple(whole.shape), whole.dtype
        )
        dtype = self._dtype if whole.is_floating_point() else whole.dtype
        value = torch.empty(whole.shape, dtype=dtype, device=self.device)
        for info, piece in zip(infos, value.view(len(infos), -1), strict=True):
            read = self._work.read(index, info.name) if info.name in kept else self.read(info.name)
            piece.copy_(read.view(-1))
        return value

    def finished(self, index: int) -> bool:
        return index in self._finished

    def keep(self, index: int, pruned: Pruned) -> None:
        """Write the open block's pruned weights with their masks, if it is this rank that does."""
        assert self._open == index
        if self._writes:
            weights = weights_of(self.blocks[index])
            weights = {name: weights[name] for name in pruned.deaths}
            self._work.keep(index, weights, pruned.deaths, len(pruned.by_magnitude))
        self._finished.add(index)

    def _fill_buffers(self) -> None:
        """Buffers that the files hold, which few models have."""
        for name, _ in list(self.model.named_buffers()):
            stored = self._naming.in_files(name)
            if stored in self._tensors:
                module, leaf = _place(self.model, name)
                module._buffers[leaf] = self.read(stored)


def _give_freed_memory_back() -> None:
    """Have the C library return what was freed, and from now on what is freed in pieces of 1 MiB or more.

    glibc comes to keep pieces of up to 32 MB, which may add up to several blocks. Elsewhere: nothing.
    """
    mmap_threshold = -3  # M_MMAP_THRESHOLD of malloc.h; setting it also keeps it from growing
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        library.mallopt(mmap_threshold, 1 << 20)
        library.malloc_trim(0)


def _place(root: nn.Module, name: str) -> tuple[nn.Module, str]:
    owner, _, leaf = name.rpartition(".")
    return root.get_submodule(owner), leaf


def _put(module: nn.Module, name: str, tensor: torch.Tensor) -> None:
    module._parameters[name] = nn.Parameter(tensor, requires_grad=False)


def _drop(module: nn.Module, name: str) -> None:
    parameter = module._parameters[name]
    assert parameter is not None
    module._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=False)
