"""OWL (Yin et al., arXiv 2310.05175): blocks with more outliers keep more weights.

D_b, the share of a block's entries whose Wanda score |w|·||x|| is more than M times the block's mean, says
how much it would suffer (section 3, layerwise outlier distribution; M = 5). The blocks' densities are D_b
stretched to a range of 2λ around the wanted mean density (λ = 0.08), so that no block is further than 2λ
from another. The statistics are those of the dense model, in one pass over all blocks before any is pruned.

The paper's densities hold up to rounding. Here the blocks' dead counts add up to exactly what the same
sparsity for every block would have pruned.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch

from seft_ds.distributed.collectives import Ranks
from seft_ds.prune.blocks import Block, weight_shapes
from seft_ds.prune.calls import Call
from seft_ds.prune.choose import Quota, apportion
from seft_ds.prune.statistics import input_square_sums
from seft_ds.prune.walk import Pruned, Source, walk, weights_of
from seft_ds.prune.wanda import wanda_scores


@dataclass(frozen=True)
class OwlSettings:
    """M and λ of the paper."""

    outlier_factor: float = 5.0
    density_range: float = 0.08

    def __post_init__(self) -> None:
        if self.outlier_factor <= 0 or not 0 <= self.density_range < 0.5:
            raise ValueError(
                f"got --owl_m {self.outlier_factor} and --owl_lambda {self.density_range}; wanted a number "
                "above 0 and one from 0 to below 0.5 (the paper has 5 and 0.08)"
            )


def outlier_share(pairs: list[tuple[torch.Tensor, torch.Tensor]], factor: float) -> float:
    """D_b: the share of a block's scores that exceed `factor` times their mean, from 0 to 1.

    pairs: the weights (out, in) of the block, each with its inputs' sums of squares, float64 (in,).
    """
    numel = sum(weight.numel() for weight, _ in pairs)
    total = sum(float(wanda_scores(w, s).sum(dtype=torch.float64)) for w, s in pairs)
    limit = factor * total / numel
    return sum(int((wanda_scores(w, s) > limit).sum()) for w, s in pairs) / numel


def densities(shares: list[float], sparsity: float, density_range: float) -> list[float]:
    """The density of each block, of their outlier shares: their mean is 1 - sparsity.

    Raises:
        ValueError: a block would have to keep more than all of its weights, or none.
    """
    low, high = min(shares), max(shares)
    span = high - low or 1.0  # all alike: every block gets the same
    stretched = [(share - low) / span * 2 * density_range for share in shares]
    mean = sum(stretched) / len(stretched)
    found = [x - mean + 1 - sparsity for x in stretched]
    if not (min(found) > 0 and max(found) < 1):
        raise ValueError(
            f"with sparsity {sparsity} and --owl_lambda {density_range} the blocks' densities would lie "
            f"between {min(found):.3f} and {max(found):.3f}; lower --owl_lambda, or choose another sparsity"
        )
    return found


def owl_quotas(
    blocks: list[dict[str, Quota]],  # each block's weights by name, with the uniform quotas
    shapes: dict[str, tuple[int, int]],
    density: list[float],
) -> dict[str, Quota]:
    """The uniform quotas' total, split over the blocks by their `density` and within them by size."""
    total = sum(quota.dead for block in blocks for quota in block.values())
    sizes = [sum(shapes[name][0] * shapes[name][1] for name in block) for block in blocks]
    of_block = apportion(total, [(1 - d) * size for d, size in zip(density, sizes)])
    found = {}
    for block, dead in zip(blocks, of_block):
        parts = apportion(dead, [float(shapes[name][0] * shapes[name][1]) for name in block])
        for (name, quota), part in zip(block.items(), parts):
            found[name] = Quota(part, by_row=quota.by_row)
    return found


def measured_quotas(
    source: Source,
    sequences: torch.Tensor,
    quotas: dict[str, Quota],
    sparsity: float,
    settings: OwlSettings,
    ranks: Ranks,
    *,
    progress: bool = False,
) -> dict[str, Quota]:
    """The uniform `quotas` redistributed over the blocks as OWL does. Goes through the dense model once.

    Raises:
        ValueError: see `densities`.
    """
    shares = []

    def measure(block: Block, call: Call, hidden: list[torch.Tensor]) -> Pruned:
        inputs = input_square_sums(block, call, hidden, ranks)
        pairs = [(w, inputs[n.removesuffix(".weight")][0]) for n, w in weights_of(block).items()]
        shares.append(outlier_share(pairs, settings.outlier_factor))
        return Pruned({})

    walk(_Dense(source), sequences, measure, ranks, progress=progress, what="outliers")
    density = densities(shares, sparsity, settings.density_range)
    grouped = [{n: quotas[n] for n in weights_of(block)} for block in source.blocks]
    return owl_quotas(grouped, weight_shapes(source.blocks), density)


class _Dense:
    """A source whose blocks are left as they are."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self.model, self.blocks, self.device = source.model, source.blocks, source.device

    def entrance(self) -> AbstractContextManager[None]:
        return self._source.entrance()

    def opened(self, index: int) -> AbstractContextManager[Block]:
        assert not self._source.finished(index), "measured before anything is pruned"
        return self._source.opened(index)

    def finished(self, index: int) -> bool:
        return False

    def keep(self, index: int, pruned: Pruned) -> None:
        pass
