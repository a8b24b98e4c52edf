"""The scoring window of one weight: dense gradients of a few steps, summed on their owners.

The gradient of one optimizer step is g; a window keeps G = Σ g (signed) and Q = Σ g² in fp32. g is first
summed over micro-batches and ranks, so magnitudes and squares are those of the gradient that the
optimizer sees (mean over ranks, after loss scaling and clipping).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from seft_ds.distributed.collectives import Ranks
from seft_ds.sparse.shard import shard_range
from seft_ds.sparse.slot_grad import dense_parts, parts_of_product, rows_a_piece


class Window:
    """Gradient sums over the positions of one weight that this rank owns."""

    def __init__(self, numel: int, multiple: int, ranks: Ranks, device: torch.device):
        self._ranks = ranks
        self._ranges = [shard_range(numel, r, ranks.size, multiple) for r in range(ranks.size)]
        lo, hi = self._ranges[ranks.rank]
        self._lo = lo
        # g, still adding up. Only while a step's backward runs: what activations leave free is enough for it.
        self._step: torch.Tensor | None = None
        self.G = torch.zeros(hi - lo, dtype=torch.float32, device=device)
        self.Q = torch.zeros_like(self.G)
        self.steps = 0

    uses_product = True

    def add(
        self,
        dy: torch.Tensor,
        x: torch.Tensor,
        ends: Sequence[int] | None = None,
        product: torch.Tensor | None = None,
    ) -> None:
        """Add one micro-batch's gradient dyᵀx. dy: (tokens, out); x: (tokens, in); product: dyᵀx, if it is
        there already.

        A collective, called inside backward: every rank must run the same graph. In pieces of bounded size,
        each with some rows of every owner, so that one sum serves them all whatever the number of ranks. How
        many there are does not depend on `ends` (`dense_parts`): ranks may send tokens to different experts.
        """
        columns = x.shape[1]
        length = rows_a_piece(len(self._ranges), columns) * columns
        longest = max(hi - lo for lo, hi in self._ranges)
        begun, step = self._step is not None, self._step
        for begin in range(0, longest, length):
            parts = [(min(lo + begin, hi), min(lo + begin + length, hi)) for lo, hi in self._ranges]
            rows = (
                dense_parts(dy, x, parts, ends)
                if product is None
                else parts_of_product(product, parts)
            )
            lo, hi = parts[self._ranks.rank]
            mine = self._ranks.sum_scatter(rows)[: hi - lo]
            if step is None and len(mine) == len(self.G) and _has_own_memory(mine):
                step = mine  # all of it at once
                continue
            step = torch.empty_like(self.G) if step is None else step
            into = step[lo - self._lo : hi - self._lo]
            into.add_(mine) if begun else into.copy_(mine)
        self._step = step

    def finish_step(self, scale: float) -> None:
        """Close one optimizer step: g times `scale` is what the optimizer saw."""
        self.steps += 1
        if self._step is None:  # no token came this way
            return
        self.G.add_(self._step, alpha=scale)
        self.Q.addcmul_(self._step, self._step, value=scale * scale)
        self._step = None

    def unfinished(self) -> list[torch.Tensor]:
        """What it has of the step that is not closed yet."""
        return [] if self._step is None else [self._step]

    def tensors(self) -> list[torch.Tensor]:
        """What it holds per position between steps: G and Q."""
        return [self.G, self.Q]

    def discard_step(self) -> None:
        """Forget the step: the optimizer skipped it."""
        self._step = None


def _has_own_memory(tensor: torch.Tensor) -> bool:
    """Whether nothing else is kept alive with it."""
    return tensor.untyped_storage().nbytes() == tensor.nbytes
