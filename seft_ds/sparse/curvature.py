"""What a single weight is worth to the loss, from two vectors a layer.

For y = x Wᵀ one token's gradient of w_ij is dy_i · x_j. Taking the two factors as independent, its mean
square is E[dy_i²] · E[x_j²]: the diagonal of a Kronecker-factored Fisher matrix (K-FAC, arXiv 1503.05671).
Removing a weight of value w costs about w² times that, but for a factor that is the same everywhere
(Optimal Brain Damage, LeCun et al. 1989, section 2), and a removed weight that comes back with the value
that it had saves as much. Wanda's score |w| · ‖x_j‖ is the root of it without the factor of the output,
and so can't compare rows or layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


class Curvature:
    """Means of dy² of each output and x² of each input of one layer over a step's tokens, summed over steps.

    dy is that of a token's own loss: from the mean over a rank's tokens comes a part of it, which is undone
    here. So a step weighs the same however many ranks share its tokens.

    Of a fused weight (`seft_ds.sparse.experts`) the outputs are those of all experts, one after the other,
    and every expert has inputs of its own: those of the tokens that reach it.

    `add` sums over this rank's micro-batches; `step_sums` is what the ranks then add up, in place, before
    `finish_step`. So `output` and `input` are the same on every rank.
    """

    def __init__(self, out_features: int, in_features: int, device: torch.device, experts: int = 0):
        n_inputs = in_features * max(1, experts)
        self._in_features = in_features
        self._step_sums: torch.Tensor | None = None  # between steps there are none
        self.output = torch.zeros(out_features, device=device)  # fp32 (out,)
        self.input = torch.zeros(n_inputs, device=device)  # fp32 (in,), or (experts · in,)
        self.steps = 0

    uses_product = False

    @property
    def step_sums(self) -> torch.Tensor:
        """Of this step: outputs, inputs, and behind them the number of rows of x."""
        if self._step_sums is None:
            n = self.output.numel() + self.input.numel() + 1
            self._step_sums = self.output.new_zeros(n)
        return self._step_sums

    def add(
        self,
        dy: torch.Tensor,
        x: torch.Tensor,
        ends: Sequence[int] | None = None,
        product: torch.Tensor | None = None,
    ) -> None:
        """One micro-batch. dy: (tokens, out); x: (tokens, in); ends: where each expert's tokens end."""
        split, sums = self.output.numel(), self.step_sums
        sums[-1] += len(x)
        if ends is None:
            sums[:split] += _sum_of_squares(dy)
            sums[split:-1] += _sum_of_squares(x)
            return
        output = sums[:split].view(len(ends), -1)
        input = sums[split:-1].view(len(ends), -1)
        begin = 0
        for expert, end in enumerate(ends):
            if end > begin:
                output[expert] += _sum_of_squares(dy[begin:end])
                input[expert] += _sum_of_squares(x[begin:end])
            begin = end

    def finish_step(self, ranks: int = 1) -> None:
        """Close one optimizer step, whose sums hold those of all ranks by now."""
        split, rows = self.output.numel(), self.step_sums[-1].clamp(min=1)
        # A rank's loss is the mean over rows / ranks of them: Σ (dy · rows / ranks)² / rows.
        self.output += self.step_sums[:split] * (rows / ranks**2)
        self.input += self.step_sums[split:-1] / rows
        self.steps += 1
        self._step_sums = None

    def mean_square_inputs(self) -> torch.Tensor:
        """fp32 (in,): mean of x² over the rows of all steps, and of all experts alike."""
        return self.input.view(-1, self._in_features).sum(0) / max(1, self.steps)

    def unfinished(self) -> list[torch.Tensor]:
        """What it has of the step that is not closed yet, of this rank."""
        return [] if self._step_sums is None else [self._step_sums]

    def tensors(self) -> list[torch.Tensor]:
        """What it holds between steps, whole on every rank."""
        return [self.output, self.input]

    def discard_step(self) -> None:
        """Forget the step: the optimizer skipped it."""
        self._step_sums = None


@dataclass(frozen=True)
class Factors:
    """The two vectors of one matrix whose first entry is at flat position `origin` of its weight."""

    origin: int
    output: torch.Tensor  # fp32 (out,)
    input: torch.Tensor  # fp32 (in,)

    def largest(self) -> torch.Tensor:
        """fp32 (): the largest product of the two. 0: nothing reached the matrix; not finite: an overflow."""
        return self.output.amax() * self.input.amax()

    def worth(self, weight: torch.Tensor, first: int, step: int = 1) -> torch.Tensor:
        """`worth` of values (n,) at the flat positions first, first + step, ..."""
        first -= self.origin
        if step == 1:
            return worth(weight, first, self.output, self.input)
        at = first + step * torch.arange(weight.numel(), device=weight.device)
        row = at.div(self.input.numel(), rounding_mode="floor")
        product = self.output[row] * self.input[at - row * self.input.numel()]
        value = weight.float()
        return product.mul_(value).mul_(value)


def _sum_of_squares(x: torch.Tensor) -> torch.Tensor:
    """fp32 (n,) over the rows of x (tokens, n), without an fp32 copy of it."""
    return torch.linalg.vector_norm(x, dim=0, dtype=torch.float32).square_()


def worth(weight: torch.Tensor, lo: int, output: torch.Tensor, input: torch.Tensor) -> torch.Tensor:
    """w² · output[row] · input[column] at the flat positions [lo, lo + n): fp32 (n,), at least 0.

    weight: (n,), values at these positions, of one expert if any; output: fp32 (out,); input: fp32 (in,).
    """
    columns, hi = input.numel(), lo + weight.numel()
    first, last = lo // columns, -(-hi // columns)
    product = torch.outer(output[first:last], input).view(-1)
    product = product[lo - first * columns : hi - first * columns]
    value = weight.float()
    return product.mul(value).mul_(value)
