"""Reads any range of a checkpoint's tensors out of the files that its ranks wrote.

Every tensor is checked against what `seft.json` says of it (shape, dtype, range): files may be damaged,
or come from somebody who means harm, and a wrong position must not be written anywhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from seft_ds.checkpoint.layout import CheckpointMeta, rank_file
from seft_ds.optim.blockwise8bit import BLOCK
from seft_ds.sparse import mask
from seft_ds.sparse.shard import shard_range
from seft_ds.tensor_files import DTYPE_OF_CODE, open_tensors
from seft_ds.zero.weight_state import SlotTable


def index_dtype(numel: int) -> torch.dtype:
    """What positions in a weight of `numel` entries are stored as."""
    return torch.int32 if numel < 2**31 else torch.int64


class Pieces:
    """The rank files of one checkpoint, opened as they are needed."""

    def __init__(self, directory: Path, meta: CheckpointMeta):
        self.directory, self.meta = directory, meta
        self._open: dict[int, Any] = {}
        self._names: dict[int, set[str]] = {}
        self.dtype = getattr(torch, meta.dtype)
        for rank in range(meta.ranks):
            if not (directory / rank_file(rank, meta.ranks)).is_file():
                raise ValueError(
                    f"{directory}: {rank_file(rank, meta.ranks)} is missing; the checkpoint is incomplete"
                )

    # Whole values of one target.

    def weight(self, i: int, lo: int, hi: int) -> torch.Tensor:
        """Effective weights at the positions [lo, hi), (hi - lo,), of a checkpoint with base copies."""
        return self._by_position(i, "weight", lo, hi, self.dtype)

    def touched(self, i: int, lo: int, hi: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(positions, effective weights) that may differ from the base model's within [lo, hi)."""
        positions, values = [torch.empty(0, dtype=torch.int64)], [torch.empty(0, dtype=self.dtype)]
        for rank, begin, _ in self._overlaps(self.meta.positions(i), lo, hi):
            at = self._bits(rank, i, "touched_bits").nonzero().squeeze(1) + begin
            value = self._tensor(rank, f"{i}.touched_values", self.dtype, at.numel())
            inside = (at >= lo) & (at < hi)
            positions.append(at[inside])
            values.append(value[inside])
        return torch.cat(positions), torch.cat(values)

    def bits(self, i: int, name: str, lo: int, hi: int) -> torch.Tensor:
        """A mask of the positions [lo, hi), packed."""
        parts = [torch.empty(0, dtype=torch.bool)]
        for rank, begin, end in self._overlaps(self.meta.positions(i), lo, hi):
            live = self._bits(rank, i, name)
            parts.append(live[max(lo, begin) - begin : min(hi, end) - begin])
        return mask.pack(torch.cat(parts))

    def window(self, i: int, name: str, lo: int, hi: int) -> torch.Tensor:
        """G or Q of the open window, fp32 (hi - lo,)."""
        return self._by_position(i, f"window.{name}", lo, hi, torch.float32)

    def slots(self, i: int, lo: int, hi: int) -> SlotTable:
        """The slots on the positions [lo, hi), ascending."""
        target = self.meta.targets[i]
        rows = []
        for rank, begin, end in self._overlaps(self.meta.positions(i), lo, hi):
            index = index_dtype(target.shape[0] * target.shape[1])
            position = self._tensor(rank, f"{i}.slots.position", index)
            n = position.numel()
            table = SlotTable(
                position.long(),
                self._tensor(rank, f"{i}.slots.slot", index, n).long(),
                self._tensor(rank, f"{i}.slots.base", self.dtype, n),
                self._tensor(rank, f"{i}.slots.born_dead", torch.bool, n),
            )
            ascending = bool((table.position.diff() > 0).all())
            inside = n == 0 or (int(position[0]) >= begin and int(position[-1]) < end)
            known = n == 0 or (
                int(table.slot.min()) >= 0 and int(table.slot.max()) < target.n_slots
            )
            if not (ascending and inside and known):
                raise self._damaged(rank, f"the slots of {target.name} are not where they can be")
            rows.append(table.take((position >= lo) & (position < hi)))
        empty = SlotTable(
            torch.empty(0, dtype=torch.int64),
            torch.empty(0, dtype=torch.int64),
            torch.empty(0, dtype=self.dtype),
            torch.empty(0, dtype=torch.bool),
        )
        parts = [empty, *rows]
        return SlotTable(
            torch.cat([p.position for p in parts]),
            torch.cat([p.slot for p in parts]),
            torch.cat([p.base for p in parts]),
            torch.cat([p.born_dead for p in parts]),
        )

    def slot_positions(self, i: int) -> torch.Tensor:
        """The position of each slot, int64 (K,)."""
        target = self.meta.targets[i]
        table = self.slots(i, 0, target.shape[0] * target.shape[1])
        if table.slot.numel() != target.n_slots or not torch.equal(
            table.slot.sort().values, torch.arange(target.n_slots)
        ):
            raise self._damaged(0, f"{target.name} has not each of its {target.n_slots} slots once")
        positions = torch.empty(target.n_slots, dtype=torch.int64)
        positions[table.slot] = table.position
        return positions

    def by_slot(self, i: int, name: str, lo: int, hi: int) -> torch.Tensor:
        """delta or a moment of the slots [lo, hi), fp32 (hi - lo,)."""
        ranges = [(r[i][0], r[i][1]) for r in self.meta.slot_ranges]
        return self._cut(ranges, f"{i}.{name}", lo, hi, torch.float32)

    def block_scales(self, rank: int, k: int, name: str, numel: int) -> torch.Tensor | None:
        """fp32 (blocks,): the absmax of an 8-bit moment in one rank's k-th flat tensor of `numel` entries;
        None if it was not kept in 8 bits."""
        tensor_name = f"flat.{k}.absmax.{name}"
        if tensor_name not in self._file_names(rank):
            return None
        scales = self._tensor(rank, tensor_name, torch.float32, -(-numel // BLOCK))
        if not bool((scales >= 0).all() & scales.isfinite().all()):
            raise self._damaged(rank, f"{tensor_name} holds what no magnitude can be")
        return scales

    def fresh_slots(self, i: int) -> torch.Tensor | None:
        name = f"{i}.fresh_slots"
        if name not in self._file_names(0):
            return None
        found = self._tensor(0, name, torch.int64)
        if found.numel() and not 0 <= int(found.min()) <= int(found.max()) < (
            self.meta.targets[i].n_slots
        ):
            raise self._damaged(0, f"{name} names slots that there are not")
        return found

    def curvature(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The sums of outputs, fp32 (out,), and inputs, fp32 (in,), of an exchange's open window; of a fused
        weight the inputs of each expert."""
        names = (f"{i}.curvature.output", f"{i}.curvature.input")
        target = self.meta.targets[i]
        sizes = (target.shape[0], target.shape[1] * max(1, target.experts))
        output, input = (
            self._tensor(0, n, torch.float32, k) for n, k in zip(names, sizes, strict=True)
        )
        return output, input

    def rates(self, i: int) -> torch.Tensor:
        """The factors on the learning rate, fp32 (in,)."""
        return self._tensor(0, f"{i}.rates", torch.float32, self.meta.targets[i].shape[1])

    def other(self, k: int, lo: int, hi: int) -> torch.Tensor:
        """The flat values [lo, hi) of the k-th of `meta.others`."""
        other = self.meta.others[k]
        ranges = [shard_range(other.numel, r, self.meta.ranks) for r in range(self.meta.ranks)]
        return self._cut(ranges, f"other.{other.name}", lo, hi, getattr(torch, other.dtype))

    def expect_other(self, k: int) -> None:
        """ValueError unless the files hold the k-th of `meta.others`; its values are not read."""
        other = self.meta.others[k]
        for rank in range(self.meta.ranks):
            begin, end = shard_range(other.numel, rank, self.meta.ranks)
            if end > begin:
                dtype = getattr(torch, other.dtype)
                self._expect(rank, f"other.{other.name}", dtype, end - begin)

    # Reading.

    def _by_position(self, i: int, name: str, lo: int, hi: int, dtype: torch.dtype) -> torch.Tensor:
        return self._cut(self.meta.positions(i), f"{i}.{name}", lo, hi, dtype)

    def _cut(
        self, ranges: list[tuple[int, int]], name: str, lo: int, hi: int, dtype: torch.dtype
    ) -> torch.Tensor:
        """[lo, hi) of a tensor that the ranks hold in consecutive `ranges`."""
        parts = [torch.empty(0, dtype=dtype)]
        for rank, begin, end in self._overlaps(ranges, lo, hi):
            self._expect(rank, name, dtype, end - begin)
            view = self._file(rank).get_slice(name)
            parts.append(view[max(lo, begin) - begin : min(hi, end) - begin])
        return torch.cat(parts)

    @staticmethod
    def _overlaps(
        ranges: list[tuple[int, int]], lo: int, hi: int
    ) -> Iterator[tuple[int, int, int]]:
        for rank, (begin, end) in enumerate(ranges):
            if max(begin, lo) < min(end, hi):
                yield rank, begin, end

    def _bits(self, rank: int, i: int, name: str) -> torch.Tensor:
        """Bool: a mask of all positions of one rank's file."""
        begin, end = self.meta.positions(i)[rank]
        n = end - begin
        packed = self._tensor(rank, f"{i}.{name}", torch.uint8, -(-n // 8))
        if n % 8 and int(packed[-1]) >> n % 8:
            raise self._damaged(rank, f"{i}.{name} has bits past its end")
        return mask.unpack(packed, n)

    def _tensor(
        self, rank: int, name: str, dtype: torch.dtype, numel: int | None = None
    ) -> torch.Tensor:
        self._expect(rank, name, dtype, numel)
        return self._file(rank).get_tensor(name)

    def _expect(self, rank: int, name: str, dtype: torch.dtype, numel: int | None) -> None:
        """ValueError unless the file has this 1-D tensor, in this dtype and size."""
        if name not in self._file_names(rank):
            raise self._damaged(rank, f"{name} is missing")
        view = self._file(rank).get_slice(name)
        shape, found = view.get_shape(), DTYPE_OF_CODE.get(view.get_dtype())
        if len(shape) != 1 or found != dtype or (numel is not None and shape[0] != numel):
            wanted = f"{dtype} of {'any length' if numel is None else numel}"
            raise self._damaged(rank, f"{name} is {view.get_dtype()} of {shape}, wanted {wanted}")

    def _file(self, rank: int) -> Any:
        if rank not in self._open:
            self._open[rank] = open_tensors(self.directory / rank_file(rank, self.meta.ranks))
        return self._open[rank]

    def _file_names(self, rank: int) -> set[str]:
        if rank not in self._names:
            self._names[rank] = set(self._file(rank).keys())
        return self._names[rank]

    def _damaged(self, rank: int, what: str) -> ValueError:
        name = rank_file(rank, self.meta.ranks)
        return ValueError(f"{self.directory / name}: {what}; the checkpoint is damaged")
