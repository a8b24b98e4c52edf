"""The dense model that a pruned one came from, read from its files where its weights are asked for."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import torch

from seft_ds.config import SeftConfig
from seft_ds.distributed.agreement import all_or_none
from seft_ds.distributed.collectives import Ranks
from seft_ds.naming import PLAIN, Naming
from seft_ds.sparse import mask
from seft_ds.sparse.shard import shard_range
from seft_ds.targets import Target
from seft_ds.tensor_files import Stored, stored_tensors
from seft_ds.zero.attach import AttachedTarget


class DenseModel:
    """Values of the targets as they were before they were pruned. Nothing is kept in memory."""

    def __init__(self, folder: str | Path, targets: list[Target], naming: Naming = PLAIN):
        """
        Raises:
            ValueError: no model in safetensors there, or one that lacks a target or has it in another shape.
        """
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise ValueError(
                f"dense_model {str(folder)!r} is no folder; give the folder of the model that was pruned"
            )
        stored = stored_tensors(self.folder)
        self._parts: dict[str, list[Stored]] = {}  # of each target, in the order of their positions
        for t in targets:
            names = naming.part_names(t.name, t.experts) if t.experts else []
            names = names or [naming.in_files(t.weight_name)]
            self._parts[t.name] = [self._find(name, t.part_shape, stored) for name in names]

    def _find(self, name: str, shape: tuple[int, int], stored: dict[str, Stored]) -> Stored:
        found = stored.get(name)
        if found is None:
            raise ValueError(
                f"dense_model {self.folder} has no {name}; give the model that was pruned, as transformers "
                "saves it"
            )
        if found.shape != shape:
            raise ValueError(
                f"dense_model {self.folder}: {name} is {found.shape} there and {shape} in the pruned "
                "model; give the model that was pruned"
            )
        return found

    def read(self, name: str, lo: int, hi: int) -> torch.Tensor:
        """The values of one target at its flat positions [lo, hi), on the CPU, in the dtype of the files."""
        parts = self._parts[name]
        n, found = math.prod(parts[0].shape), []
        for p in range(lo // n, -(-hi // n)):
            found.append(parts[p].read_flat(max(lo - p * n, 0), min(hi - p * n, n)))
        return torch.cat(found) if found else torch.empty(0, dtype=parts[0].dtype)

    def check_not_pruned(self, name: str, lo: int, live: torch.Tensor) -> None:
        """ValueError if most of what was pruned is zero here as well. live: bool (n,) from position lo on."""
        values = self.read(name, lo, lo + live.numel())[~live.cpu()]
        zeros = int((values == 0).sum())
        if values.numel() and zeros > values.numel() // 2:
            raise ValueError(
                f"dense_model {self.folder} is pruned itself: {zeros} of {values.numel()} weights of {name} "
                "that the pruned model lacks are zero there too; give the model as it was before pruning"
            )


def open_dense_model(
    config: SeftConfig,
    attached: list[AttachedTarget],
    ranks: Ranks,
    naming_in: Callable[[Path], Naming] = lambda folder: PLAIN,
) -> DenseModel | None:
    """What `dense_model` names; None: nothing. A collective.

    naming_in: what a folder's files call the model's tensors; a ValueError says that they don't fit.

    Raises:
        ValueError: on every rank: it is not the model that was pruned, or every weight has an N:M pattern.
    """
    folder = config.dense_model
    if folder is None:
        return None
    free = [a for a in attached if a.target.pattern is None]
    if not free:
        raise ValueError(
            f"dense_model is given, but every weight has a pattern ({attached[0].target.pattern_text}), "
            'whose groups exchange nothing; leave dense_model out, or set pattern to "none" to give it up'
        )

    def open_and_look() -> DenseModel:
        try:
            naming = naming_in(Path(folder))
        except ValueError as error:
            raise ValueError(f"dense_model is not the model that was pruned: {error}") from error
        dense = DenseModel(folder, [a.target for a in free], naming)
        target = free[0].target
        lo, hi = shard_range(target.numel, ranks.rank, ranks.size)
        dense.check_not_pruned(target.name, lo, mask.unpack(free[0].live_bits, hi - lo))
        return dense

    return all_or_none(ranks, open_and_look)
