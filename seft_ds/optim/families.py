"""What each optimizer keeps per entry, and what a fresh slot's state becomes.

A fresh slot has no history, but its window has measured the gradient there: mean g = G / window, mean g² =
Q / window. State repair gives the slot the state that it would have, had the gradient always been like
that. So late in a run its first step is about as long as the others'; for Adam-like optimizers it is always
under 2·lr. Early on it is shorter (0.3 to 0.8·lr), since bias correction goes by the shared step count.

| family   | state (name here) | of a fresh slot     | why                                              |
|----------|-------------------|---------------------|--------------------------------------------------|
| adam     | mean              | mean g              | with zeros the first step is 3.2 times a normal  |
|          | square            | mean g²             | (mean g)² would be far too small                 |
| lion     | mean              | mean g              | its sign is the step                             |
| ademamix | mean, square      | as adam             |                                                  |
|          | slow              | (1 - β₃ʷ) · mean g  | what the window's w steps alone would have put   |
|          |                   |                     | in; a mean of thousands it can't stand for       |
| adagrad  | total             | t · mean g²         | a sum over all t steps                           |

Names of the tensors: torch and DeepSpeed call them exp_avg, exp_avg_sq (Adagrad of torch: sum), bitsandbytes
state1 (of AdEMAMix: (2, n), fast and slow) and state2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from seft_ds.optim import blockwise8bit

MEAN, SLOW, SQUARE, TOTAL = "mean", "slow", "square", "total"

# Family: its moments, in the order in which the libraries' tensors hold them.
FAMILIES = {
    "adam": (MEAN, SQUARE),
    "lion": (MEAN,),
    "ademamix": (MEAN, SLOW, SQUARE),
    "adagrad": (TOTAL,),
}


def family_of(optimizer: Any) -> str | None:
    """The family of an optimizer object; None: one whose state we don't know how to repair."""
    if type(optimizer).__module__.startswith("bitsandbytes."):
        name = str(getattr(optimizer, "optimizer_name", ""))
        return name if name in ("adam", "lion", "ademamix") else None
    known = {
        "Adam": "adam", "AdamW": "adam", "FusedAdam": "adam", "DeepSpeedCPUAdam": "adam",
        "FusedLion": "lion", "DeepSpeedCPULion": "lion",
        "Adagrad": "adagrad", "DeepSpeedCPUAdagrad": "adagrad",
    }  # fmt: skip
    if any(group.get("amsgrad") for group in optimizer.param_groups):
        return None
    return known.get(type(optimizer).__name__)


def tensor_names(optimizer: Any) -> dict[str, str]:
    """Our name of each moment -> the library's, of the optimizers of torch and DeepSpeed."""
    if isinstance(optimizer, torch.optim.Adagrad):
        return {TOTAL: "sum"}
    names = {MEAN: "exp_avg", SQUARE: "exp_avg_sq", TOTAL: "exp_avg_sq"}
    return {moment: names[moment] for moment in FAMILIES[str(family_of(optimizer))]}


@dataclass
class Plain:
    """A moment of all entries of one flat tensor, as numbers."""

    values: torch.Tensor  # (n,) fp32 or bf16

    def read(self, lo: int, hi: int) -> torch.Tensor:
        """fp32 (hi - lo,); a view where the state is fp32."""
        return self.values[lo:hi].float()

    def at(self, index: torch.Tensor) -> torch.Tensor:
        """fp32 (m,): the entries at `index` (m,), int64."""
        return self.values[index].float()

    def put(self, index: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """Set the entries at `index` (m,), int64. Returns how many were cut, int64 ()."""
        self.values[index] = values.to(self.values.dtype)
        return torch.zeros((), dtype=torch.int64, device=self.values.device)

    def assign(self, values: torch.Tensor, absmax: torch.Tensor | None) -> None:
        """Set all entries, (n,)."""
        self.values.copy_(values)

    def tensors(self) -> list[torch.Tensor]:
        """What it takes in memory."""
        return [self.values]


@dataclass
class Blocks:
    """A moment of all entries of one flat tensor, in 8-bit blocks."""

    codes: torch.Tensor  # (n,) uint8
    absmax: torch.Tensor  # (ceil(n / 256),) fp32
    qmap: torch.Tensor  # (256,) fp32

    def read(self, lo: int, hi: int) -> torch.Tensor:
        return self.at(torch.arange(lo, hi, device=self.codes.device))

    def at(self, index: torch.Tensor) -> torch.Tensor:
        return blockwise8bit.read(self.codes, self.absmax, self.qmap, index)

    def put(self, index: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        return blockwise8bit.write(self.codes, self.absmax, self.qmap, index, values)

    def assign(self, values: torch.Tensor, absmax: torch.Tensor | None) -> None:
        """Set all entries, (n,). With the absmax that they were read with, the codes are the same again."""
        values = values.to(self.codes.device)
        if absmax is None:
            absmax = blockwise8bit.largest(values)
        self.absmax.copy_(absmax)
        every = torch.arange(values.numel(), device=values.device)
        blockwise8bit.write(self.codes, self.absmax, self.qmap, every, values)

    def tensors(self) -> list[torch.Tensor]:
        """What it takes in memory, but for the table that all tensors share."""
        return [self.codes, self.absmax]


Moment = Plain | Blocks


def moments_of(optimizer: Any, state: dict[str, Any]) -> dict[str, Moment]:
    """The moments in one flat tensor's optimizer state, by our names; empty before its first step."""
    family = family_of(optimizer)
    if family is None or not state:
        return {}
    if "state1" not in state:
        return {ours: Plain(state[name].view(-1)) for ours, name in tensor_names(optimizer).items()}
    first = [(MEAN, 0), (SLOW, 1)] if family == "ademamix" else [(MEAN, 0)]
    rows = len(first)
    moments = {name: _bnb(state, "1", row, rows) for name, row in first}
    if SQUARE in FAMILIES[family]:
        moments[SQUARE] = _bnb(state, "2", 0, 1)
    return moments


def _bnb(state: dict[str, Any], which: str, row: int, rows: int) -> Moment:
    """bitsandbytes keeps small tensors in fp32, and AdEMAMix's two means as two rows of one tensor."""
    values = state[f"state{which}"].view(rows, -1)[row]
    if values.dtype != torch.uint8:
        return Plain(values)
    absmax = state[f"absmax{which}"].view(rows, -1)[row]
    return Blocks(values, absmax, state[f"qmap{which}"])


def fresh(
    name: str, G: torch.Tensor, Q: torch.Tensor, window_steps: int, group: dict[str, Any], t: float
) -> torch.Tensor:
    """fp32 (m,): the moment `name` of fresh slots, from their window sums G, Q (m,).

    group: the optimizer's hyperparameters; t: the steps that it has taken.
    """
    if name == MEAN:
        return G / window_steps
    if name == SQUARE:
        return Q / window_steps
    if name == SLOW:
        return (1 - group["betas"][2] ** window_steps) * (G / window_steps)
    assert name == TOTAL, name
    return t * (Q / window_steps)


def place(
    moments: dict[str, Moment], index: torch.Tensor, values: dict[str, torch.Tensor]
) -> torch.Tensor:
    """Set the entries at `index` (m,) of all `moments` to `values`, fp32 (m,) each, keeping steps short.

    The length of a step is mean / sqrt(square). 8-bit state may hold less of the square than it should (cut
    to what its block holds, or rounded down); the means are then made smaller in proportion, so that the step
    does not become longer. Returns how many entries were cut, int64 ().
    """
    n_cut = torch.zeros((), dtype=torch.int64, device=index.device)
    shrink = None
    if SQUARE in moments:
        n_cut += moments[SQUARE].put(index, values[SQUARE])
        shrink = shrunk(values[SQUARE], moments[SQUARE].at(index))
    for name, moment in moments.items():
        if name != SQUARE:
            n_cut += moment.put(index, values[name] if shrink is None else values[name] * shrink)
    return n_cut


def shrunk(wanted: torch.Tensor, held: torch.Tensor) -> torch.Tensor:
    """What the means are multiplied by, (m,), where `held` is there of the squares that were `wanted`."""
    return torch.where(held < wanted, (held / wanted).sqrt(), 1.0)
