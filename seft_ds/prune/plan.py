"""How much memory pruning takes on one rank, predicted from the model's shapes.

A run goes through stages, and its peak is that of the largest one. Bytes are those of tensors. What Python,
torch and a GPU's context take comes on top (some 0.5 GB), and buffers of the libraries that compute (MKL,
oneDNN: some 0.1 GB). On a GPU the hidden states and the assembly of the model are on the host, everything
else on the device. benchmarks/pruning.py measures against it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from seft_ds.prune.blocks import Block, Matrix, decoder_blocks
from seft_ds.prune.choose import SCORES_AT_ONCE
from seft_ds.prune.statistics import STRIP

HIDDEN = "hidden states"
_HOST_STAGES = ("assemble the model",)
_FACTOR_BYTES = 28  # an entry of H, while it is factorised: three matrices in float64, one in fp32
_UPDATE_BYTES = 18  # an entry of a weight that is being updated: it, a product, the result, flags
_RANKING_BYTES = 18  # a score that is being ranked: a copy, indices, flags


@dataclass(frozen=True)
class PruningPlan:
    """Bytes by stage and part."""

    stages: dict[str, dict[str, int]]
    block_bytes: int  # the weights of the largest block

    @property
    def peak_stage(self) -> str:
        """The stage that needs most."""
        return max(self.stages, key=lambda stage: sum(self.stages[stage].values()))

    @property
    def peak_bytes(self) -> int:
        """Host and device together: the peak of a run on the CPU."""
        return sum(self.stages[self.peak_stage].values())

    @property
    def device_bytes(self) -> int:
        """What of it is on the device, if that is a GPU."""
        on_device = (s for name, s in self.stages.items() if name not in _HOST_STAGES)
        return max(sum(parts.values()) - parts.get(HIDDEN, 0) for parts in on_device)

    def lines(self) -> list[str]:
        """The plan as a small table: every stage with its sum, the largest one by parts."""
        rows = [f"memory of a rank while pruning: {_mib(self.peak_bytes)}, of which one block's weights "
                f"are {_mib(self.block_bytes)}; on a GPU {_mib(self.device_bytes)} of it"]  # fmt: skip
        for stage, parts in self.stages.items():
            rows.append(f"  {stage:<24}{_mib(sum(parts.values())):>12}")
            if stage == self.peak_stage:
                rows += [f"    {part:<22}{_mib(size):>12}" for part, size in parts.items()]
        return rows


def pruning_plan(
    model: Any,
    method: str,
    *,
    sequences: int,
    length_tokens: int,
    dtype: torch.dtype,
    ranks: int = 1,
    targets: Sequence[str] | str = "auto",
) -> PruningPlan:
    """The memory that pruning `model` takes on each of `ranks`.

    model: only its shapes count, so that one on the meta device will do (`empty_model`). sequences: over all
    ranks. method: magnitude, wanda or sparsegpt. targets: the layers that are pruned (`decoder_blocks`).

    Raises:
        ValueError: see `decoder_blocks`.
    """
    blocks = decoder_blocks(model, targets=targets)
    block = max(blocks, key=lambda block: (bool(block.matrices), _numel(block)))
    size = dtype.itemsize
    block_bytes = _numel(block) * size
    shapes = {name: m.shape for name, m in block.matrices.items()}
    largest = max(math.prod(shape) for shape in shapes.values())
    embedding_bytes = model.get_input_embeddings().weight.numel() * size
    # Reading: the mapped file beside the copy. Writing: the weight, its mask, the weight with exact zeros.
    stages = {
        "assemble the model": {
            "one tensor": max(2 * embedding_bytes, largest * (3 * size + 4)),
        }
    }
    masks = sum(math.prod(shape) for shape in shapes.values())
    ranking = largest * 9 + min(largest, SCORES_AT_ONCE) * _RANKING_BYTES
    if method == "magnitude":
        parts = {"block": block_bytes, "masks": masks, "scores": ranking}
        return PruningPlan({"prune a block": parts, **stages}, block_bytes)
    width = model.get_input_embeddings().weight.shape[1]
    hidden = {HIDDEN: math.ceil(sequences / ranks) * length_tokens * width * size}
    groups = input_groups(block)
    inputs = [shapes[names[0]][1] for names in groups]
    # An expert sees its share of the tokens on average.
    share = {name: _share_of_tokens(model, m) for name, m in block.matrices.items()}
    passing = sum(share[names[0]] * n for names, n in zip(groups, inputs))
    passing += sum(share[name] * shape[0] for name, shape in shapes.items())
    # Norms run in fp32.
    running = math.ceil(length_tokens * (size * passing + width * (2 * size + 12)))
    held = {"block": block_bytes, **hidden}
    stages = {
        "read the embedding": {"embedding": 2 * embedding_bytes},
        "make hidden states": {"embedding": embedding_bytes, **hidden},
        **stages,
    }
    if method == "wanda":
        sums = 3 * sequences * sum(inputs) * 8
        stages |= {
            "run a block": held | {"one sequence in it": running, "statistics": sums},
            "prune a block": held | {"masks": masks, "scores": ranking},
        }
        return PruningPlan(stages, block_bytes)
    grams = sum(n * n for n in inputs) * 4
    widest = max(inputs)
    gathered = (ranks + 1) * length_tokens * widest * size + length_tokens * widest * 4
    product = widest * min(STRIP, widest) * 4
    stages |= {
        "run a block": held
        | {"statistics": grams, "one sequence in it": running, "adding it": gathered + product},
        "prune a block": held
        | {"statistics": grams, "masks": masks, "new weights": block_bytes}
        | {"solving": max(_FACTOR_BYTES * widest**2, 4 * widest**2 + largest * _UPDATE_BYTES)},
    }
    return PruningPlan(stages, block_bytes)


def input_groups(block: Block) -> list[list[str]]:
    """The linear layers of a block by common input, from their names alone.

    Within attention and within the MLP all layers read the same, but for the last, which reads what they
    make. What a run does is seen in the tensors themselves (`linear_inputs`).
    """
    by_parent: dict[str, list[str]] = {}
    for name in block.matrices:
        by_parent.setdefault(name.rpartition(".")[0], []).append(name)
    groups = []
    for names in by_parent.values():
        groups += [group for group in (names[:-1], names[-1:]) if group]
    return groups


def _share_of_tokens(model: Any, matrix: Matrix) -> float:
    """The share of all tokens that reach a matrix, if experts are used alike."""
    if not matrix.is_expert:
        return 1.0
    experts = matrix.module._parameters[matrix.parameter].shape[0]  # type: ignore[union-attr]
    return float(getattr(model.config, "num_experts_per_tok", experts)) / experts


def _numel(block: Block) -> int:
    return sum(p.numel() for p in block.module.parameters())


def _mib(size_bytes: int) -> str:
    return f"{size_bytes / 2**20:,.0f} MiB"
