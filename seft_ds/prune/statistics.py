"""What the calibration data says of the inputs of a block's linear layers, summed over all sequences.

The sequences are dealt out over the ranks, and yet the sums are the same to the last bit for every number of
ranks (with as many threads on each): every addition takes the same operands in the same order.

- Sums of squares are small: those of each sequence are gathered and added in the order of the sequences.
- A Gram matrix XᵀX is too large to gather one for each sequence. Instead the inputs X of each sequence are
  gathered, and a rank adds XᵀX of all sequences, in their order, to some columns of the matrix only. The
  columns come in strips of a fixed width, so that no product has a shape that depends on the ranks.
"""

from __future__ import annotations

import torch

from seft_ds.distributed.collectives import Ranks
from seft_ds.prune.blocks import Block
from seft_ds.prune.calls import Call, linear_inputs
from seft_ds.prune.wanda import square_sums

STRIP = 1024  # columns of a Gram matrix that are one product


def input_square_sums(
    block: Block, call: Call, hidden: list[torch.Tensor], ranks: Ranks
) -> dict[str, torch.Tensor]:
    """Per linear layer, float64 (in,): Σ x² of its inputs over the tokens of all sequences.

    `hidden` holds the block inputs, (1, tokens, hidden size) each, of the sequences rank, rank + ranks.size
    and so on; a rank may have none. Three collectives a block.
    """
    device = _device(block)
    groups: list[list[str]] = []
    rows = []
    for state in hidden:
        inputs = linear_inputs(block, call, state.to(device))
        groups = [names for names, _ in inputs]
        rows.append(torch.cat([square_sums(x) for _, x in inputs]))
    groups = ranks.gather_object(groups)[0]  # rank 0 always has a sequence
    widths = [block.linears[names[0]].in_features for names in groups]
    none = torch.empty(0, dtype=torch.float64, device=device)
    parts = [p.view(-1, sum(widths)) for p in ranks.gather(torch.cat(rows) if rows else none)]
    ordered = parts[0].new_empty(sum(len(p) for p in parts), sum(widths))
    for rank, part in enumerate(parts):
        ordered[rank :: ranks.size] = part
    sums = ordered.sum(dim=0).split(widths)
    return {name: total for names, total in zip(groups, sums) for name in names}


def input_grams(
    block: Block, call: Call, hidden: list[torch.Tensor], ranks: Ranks
) -> list[tuple[list[str], torch.Tensor]]:
    """(names of linear layers, fp32 (in, in)): 2/N Σ x xᵀ over the N tokens of all sequences.

    This is the H of arXiv 2301.00774, section 3.1; layers with the same input share one. `hidden` is as in
    `input_square_sums`. Collectives: the inputs of all sequences once, and each matrix once.
    """
    device = _device(block)
    dealt = ranks.gather_object((len(hidden), hidden[0].shape[1] if hidden else 0))
    tokens = dealt[0][1]  # rank 0 always has a sequence, and all are of the same length
    groups: list[list[str]] = []
    grams: list[torch.Tensor] = []
    for turn in range(dealt[0][0]):
        mine = linear_inputs(block, call, hidden[turn].to(device)) if turn < len(hidden) else []
        if turn == 0:
            groups = ranks.gather_object([names for names, _ in mine])[0]
            widths = [block.linears[names[0]].in_features for names in groups]
            grams = [torch.zeros(n, n, dtype=torch.float32, device=device) for n in widths]
        for i, gram in enumerate(grams):
            like = block.linears[groups[i][0]].weight
            x = mine[i][1] if mine else like.new_empty(0, len(gram))
            rows = [tokens if turn < count else 0 for count, _ in dealt]
            for one in _everyones(x, rows, ranks):
                # A copy, for its alignment, on which a product's last bits may depend.
                _add_strips(gram, one.to(torch.float32, copy=True), ranks)
    for gram in grams:
        spread_(gram, ranks)
        gram *= 2 / (tokens * sum(count for count, _ in dealt))
    return list(zip(groups, grams))


def spread_(tensor: torch.Tensor, ranks: Ranks) -> None:
    """Fill a contiguous `tensor` in on all ranks, of which each holds some part and zeros elsewhere.

    A sum of bytes, of which all but one are 0, is a copy: nothing is rounded. One collective.
    """
    ranks.sum_(tensor.view(-1).view(torch.uint8))


def _everyones(x: torch.Tensor, rows: list[int], ranks: Ranks) -> list[torch.Tensor]:
    """The (rows[rank], in) matrices of the ranks that have one, in rank order; `x` is this rank's."""
    row_bytes = x.shape[1] * x.dtype.itemsize
    sent = x.contiguous().view(-1).view(torch.uint8)
    parts = ranks.gather_known(sent, [n * row_bytes for n in rows])
    return [p.view(x.dtype).view(-1, x.shape[1]) for p in parts if len(p)]


def _add_strips(gram: torch.Tensor, x: torch.Tensor, ranks: Ranks) -> None:
    """Add xᵀx of `x` fp32 (tokens, in) to this rank's strips of columns of `gram` (in, in)."""
    for lo in range(ranks.rank * STRIP, x.shape[1], ranks.size * STRIP):
        gram[:, lo : lo + STRIP] += x.t() @ x[:, lo : lo + STRIP]


def _device(block: Block) -> torch.device:
    return next(block.module.parameters()).device
