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


FEW_TOKENS = 16  # below: an expert's inputs say less of it than its weights do (docs/pruning.md)


def input_square_sums(
    block: Block, call: Call, hidden: list[torch.Tensor], ranks: Ranks
) -> dict[str, tuple[torch.Tensor, int]]:
    """Per matrix: Σ x² of its inputs over all tokens that reach it, float64 (in,), and how many those are.

    `hidden` holds the block inputs, (1, tokens, hidden size) each, of the sequences rank, rank + ranks.size
    and so on; a rank may have none. Three collectives a block.
    """
    device = _device(block)
    groups: list[list[str]] = []
    rows = []
    for state in hidden:
        inputs = linear_inputs(block, call, state.to(device))
        groups = [names for names, _ in inputs]
        rows.append(torch.cat([_sums_and_tokens(x) for _, x in inputs]))
    groups = ranks.gather_object(groups)[0]  # rank 0 always has a sequence
    widths = [block.matrices[names[0]].shape[1] + 1 for names in groups]
    none = torch.empty(0, dtype=torch.float64, device=device)
    parts = [p.view(-1, sum(widths)) for p in ranks.gather(torch.cat(rows) if rows else none)]
    ordered = parts[0].new_empty(sum(len(p) for p in parts), sum(widths))
    for rank, part in enumerate(parts):
        ordered[rank :: ranks.size] = part
    sums = ordered.sum(dim=0).split(widths)
    counts = torch.stack([total[-1] for total in sums]).tolist()
    return {
        name: (total[:-1], int(tokens))
        for names, total, tokens in zip(groups, sums, counts)
        for name in names
    }


def _sums_and_tokens(x: torch.Tensor) -> torch.Tensor:
    """float64 (in + 1,): Σ x² over the rows of x (tokens, in), and how many rows there are."""
    return torch.cat(
        [square_sums(x), torch.full((1,), len(x), dtype=torch.float64, device=x.device)]
    )


def input_grams(
    block: Block, call: Call, hidden: list[torch.Tensor], ranks: Ranks
) -> list[tuple[list[str], torch.Tensor, int]]:
    """(names of matrices, fp32 (in, in): 2/N Σ x xᵀ over the N tokens that reach them, N).

    This is the H of arXiv 2301.00774, section 3.1; matrices with the same input share one. `hidden` is as in
    `input_square_sums`. Collectives: the inputs of all sequences once, and each matrix once.
    """
    device = _device(block)
    most = ranks.gather_object(len(hidden))[0]  # rank 0 always has the most sequences
    groups: list[list[str]] = []
    grams: list[torch.Tensor] = []
    tokens: list[int] = []
    for turn in range(most):
        mine = linear_inputs(block, call, hidden[turn].to(device)) if turn < len(hidden) else []
        if turn == 0:
            groups = ranks.gather_object([names for names, _ in mine])[0]
            widths = [block.matrices[names[0]].shape[1] for names in groups]
            grams = [torch.zeros(n, n, dtype=torch.float32, device=device) for n in widths]
            tokens = [0] * len(groups)
        rows = ranks.gather_object([len(x) for _, x in mine])
        for i, gram in enumerate(grams):
            like = block.matrices[groups[i][0]].value()
            x = mine[i][1] if mine else like.new_empty(0, len(gram))
            counts = [each[i] if each else 0 for each in rows]
            tokens[i] += sum(counts)
            for one in _everyones(x, counts, ranks):
                # A copy, for its alignment, on which a product's last bits may depend.
                _add_strips(gram, one.to(torch.float32, copy=True), ranks)
    for gram, n in zip(grams, tokens):
        spread_(gram, ranks)
        gram *= 2 / max(n, 1)
    return list(zip(groups, grams, tokens))


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
