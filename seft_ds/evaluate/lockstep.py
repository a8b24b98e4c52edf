"""Forward passes that ranks take together, however many each of them needs.

Under ZeRO-3 every forward pass gathers weights from all ranks. Ranks that share an evaluation need different
numbers of passes (requests of other lengths, text that ends earlier), and a rank that is done would leave its
peers waiting for ever. So before each pass the ranks add up who still has something to do (one number, all
reduced), and a rank that is done runs a pass over one token until all are.
"""

from __future__ import annotations

from types import TracebackType
from typing import Any

import torch

from seft_ds.distributed.collectives import Ranks


class Lockstep:
    """`with Lockstep(model, ranks): ...` around a part in which ranks call `model` unequally often.

    On leaving, a rank waits for its peers with passes of its own. After an error it doesn't: the run ends.

    Args:
        model: the module whose forward pass is a collective.
        active: False where a forward pass is no collective: then nothing is exchanged.
    """

    def __init__(self, model: torch.nn.Module, ranks: Ranks, active: bool, device: torch.device):
        self._model, self._ranks, self._device = model, ranks, device
        self._active = active and ranks.size > 1
        self._waiting = False
        self._hook: Any = None

    def __enter__(self) -> Lockstep:
        if self._active:
            # Before DeepSpeed's own hook, which begins to gather.
            self._hook = self._model.register_forward_pre_hook(self._join, prepend=True)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not self._active:
            return
        try:
            if kind is None:
                self._wait()
        finally:
            self._hook.remove()

    def _join(self, module: torch.nn.Module, inputs: Any) -> None:
        if not self._waiting:
            self._busy(1)

    def _busy(self, mine: int) -> int:
        """How many ranks have a pass to run. A collective, and a host sync."""
        return int(self._ranks.sum_(torch.tensor([mine], device=self._device)))

    @torch.no_grad()
    def _wait(self) -> None:
        token = torch.zeros((1, 1), dtype=torch.int64, device=self._device)
        self._waiting = True
        while self._busy(0):
            self._model(input_ids=token, use_cache=False)
        self._waiting = False
