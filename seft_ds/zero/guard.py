"""Is the step fit to be taken? Agreed by all ranks, once a step.

Backward sets flags on the device, without a host sync: a loss or slot gradient that is not finite. At the
accumulation boundary the step's sums of open windows are looked at as well, then one sum over the ranks says
whether any rank saw such a one, and whether any rank was asked to stop. A step that isn't fit is skipped on
every rank: weights, deltas, moments and windows stay as they are.
"""

from __future__ import annotations

from typing import Any

import torch

from seft_ds.distributed.collectives import Ranks
from seft_ds.zero.weight_state import WeightState

_SHOWN_TOKENS = 24  # of a bad batch: enough to find it in the data
_SHOWN_WEIGHTS = 3


class StepGuard:
    """The flags of one engine's current step."""

    def __init__(self, states: list[WeightState], ranks: Ranks):
        self.ranks = ranks
        self._states = states
        device = states[0].live_bits.device
        self._gradient = torch.zeros((), dtype=torch.bool, device=device)
        for state in states:  # one flag for all: SlotLinear sets it in backward
            state.not_finite = self._gradient
        self._inputs: torch.Tensor | None = None
        self._micro: list[tuple[torch.Tensor, torch.Tensor | None]] = []  # (bad loss, its input)
        self._overflowed: list[tuple[int, torch.Tensor]] = []  # a weight that is measured; (), bool
        self._bad = False

    def watch(self, engine: Any) -> None:
        """See each loss and its batch, through a hook on the model and the engine's `backward`."""
        engine.module.register_forward_pre_hook(self._note_inputs, with_kwargs=True)
        backward = engine.backward

        def checked_backward(loss: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            self._micro.append((~loss.detach().isfinite().all(), self._inputs))
            return backward(loss, *args, **kwargs)

        engine.backward = checked_backward

    def _note_inputs(self, module: Any, args: tuple, kwargs: dict) -> None:
        if torch.is_grad_enabled():
            found = kwargs.get("input_ids", args[0] if args else None)
            self._inputs = found if torch.is_tensor(found) else None

    def agree(self, wants_stop: bool) -> tuple[bool, bool]:
        """(skip this step, stop after it), the same on every rank. One sum, one host sync."""
        bad = self._gradient
        for loss, _ in self._micro:
            bad = bad | loss.to(bad.device)
        sums = [(i, x) for i, s in enumerate(self._states) for x in s.step_sums() if x.numel()]
        self._overflowed = [(i, ~torch.stack(x.aminmax()).isfinite().all()) for i, x in sums]
        bad = torch.stack([bad, *(flag for _, flag in self._overflowed)]).any()
        flags = torch.stack([bad, torch.tensor(wants_stop, device=bad.device)]).to(torch.int32)
        n_bad, n_stop = self.ranks.sum_(flags).tolist()
        self._bad = n_bad > 0
        return self._bad, n_stop > 0

    def bad_batches(self) -> list[dict[str, Any]]:
        """The batches whose loss was not finite, of all ranks; where none was, the gradients were not.

        A collective after a bad step, nothing after a good one.
        """
        if not self._bad:
            return []
        mine = []
        for i, (bad, inputs) in enumerate(self._micro):
            if bool(bad):
                batch: dict[str, Any] = {"rank": self.ranks.rank, "micro_batch": i}
                if inputs is not None:
                    batch["shape"] = list(inputs.shape)
                    batch["first"] = inputs.reshape(-1)[:_SHOWN_TOKENS].tolist()
                mine.append(batch)
        return [b for per_rank in self.ranks.gather_object(mine) for b in per_rank]

    def bad_weights(self) -> list[str]:
        """The weights whose dense gradients or curvature were not finite on some rank. A collective after a
        bad step, nothing after a good one."""
        if not self._bad:
            return []
        mine = [i for i, flag in self._overflowed if bool(flag)]
        found = {i for per_rank in self.ranks.gather_object(mine) for i in per_rank}
        return [self._states[i].target.name for i in sorted(found)]

    def reset(self) -> None:
        """Forget the step."""
        self._gradient.zero_()
        self._micro.clear()
        self._overflowed.clear()
        self._bad = False


def describe_batches(batches: list[dict[str, Any]], weights: list[str]) -> str:
    """One phrase for an error message."""
    if not batches:
        shown = ", ".join(weights[:_SHOWN_WEIGHTS])
        others = len(weights) - _SHOWN_WEIGHTS
        where = f" at {shown}" if weights else ""
        where += f" and {others} others" if others > 0 else ""
        return f"every loss was finite, so the gradient overflowed{where}"
    first = batches[0]
    text = f"micro-batch {first['micro_batch']} of rank {first['rank']}"
    if "first" in first:
        text += f", of shape {first['shape']}, which begins with the tokens {first['first']}"
    others = len(batches) - 1
    return text + (f" (and {others} others)" if others else "")
