"""Prune a model block by block, each with the inputs that the already pruned blocks before it give.

The order of the papers' code (arXiv 2306.11695, section 3; arXiv 2301.00774, section 3): run the calibration
sequences through block b, prune b, run them again, and take the new outputs as the inputs of block b + 1.
Only one block works at a time, and what is kept between blocks is one hidden state per token, on the host.

A `Source` says where a block's tensors are while it works: in the module all the time (`InMemory`), or read
from the model's files for as long as the block is open (prune/source.py).

Ranks: the sequences are dealt out round robin; sums over them do not depend on that (prune/statistics.py), so
that every rank ends with the same masks and weights, whatever their number. For SparseGPT the layers of a
block are dealt out too, and the results handed round.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import nn

from seft_ds.bars import with_progress
from seft_ds.distributed.agreement import all_or_none
from seft_ds.distributed.collectives import Ranks
from seft_ds.prune.blocks import Block, decoder_blocks, uniform_quotas
from seft_ds.prune.calls import Call, enter, record_calls
from seft_ds.prune.choose import Budget, Quota, zero_
from seft_ds.prune.magnitude import magnitude_dead
from seft_ds.prune.sparsegpt import inverse_factor, sparsegpt
from seft_ds.prune.statistics import FEW_TOKENS, input_grams, input_square_sums, spread_
from seft_ds.prune.wanda import wanda_dead

Deaths = dict[str, torch.Tensor]  # weight name -> bool (out, in), what died


@dataclass
class Pruned:
    """What happened to a block."""

    deaths: Deaths
    # Weights of experts that too few tokens reached, and that were pruned by |w| for it.
    by_magnitude: list[str] = field(default_factory=list)


# Prunes an open block in place, given its call and this rank's hidden states.
PruneBlock = Callable[[Block, Call, list[torch.Tensor]], Pruned]


class Source(Protocol):
    """Where the tensors of a model's blocks come from and go to."""

    model: nn.Module
    blocks: list[Block]
    device: torch.device  # where open blocks compute

    def entrance(self) -> AbstractContextManager[None]:
        """What stands before the blocks holds its values inside."""
        ...

    def opened(self, index: int) -> AbstractContextManager[Block]:
        """The block holds its values inside: the pruned ones if it is finished."""
        ...

    def finished(self, index: int) -> bool:
        """Whether the block was pruned before, by a run that this one goes on with."""
        ...

    def keep(self, index: int, pruned: Pruned) -> None:
        """The open block has been pruned."""
        ...


class InMemory:
    """A model that is whole in memory and is pruned in place."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.blocks = model, decoder_blocks(model)
        self.device = next(model.parameters()).device

    def entrance(self) -> AbstractContextManager[None]:
        return nullcontext()

    def opened(self, index: int) -> AbstractContextManager[Block]:
        return nullcontext(self.blocks[index])

    def finished(self, index: int) -> bool:
        return False

    def keep(self, index: int, pruned: Pruned) -> None:
        pass


# --- a whole model in memory


@torch.no_grad()
def prune_by_magnitude(
    model: nn.Module, budget: Budget, *, progress: bool = False
) -> dict[str, str | None]:
    """Prune every linear weight inside the decoder blocks by |w|, in place.

    Returns:
        The full names of the pruned tensors with their pattern (None without one).

    Raises:
        ValueError: see `decoder_blocks`, `check_pattern_fits` and `magnitude_dead`.
    """
    source = InMemory(model)
    quotas = uniform_quotas(source.blocks, budget, by_row=False)
    by_magnitude(source, quotas, range(len(source.blocks)), progress=progress)
    return dict.fromkeys(quotas, budget.pattern)


@torch.no_grad()
def prune_by_wanda(
    model: nn.Module,
    budget: Budget,
    sequences: torch.Tensor,  # (sequences, tokens) int64, the same on every rank
    ranks: Ranks,
    *,
    progress: bool = False,
) -> dict[str, str | None]:
    """Prune every linear weight inside the decoder blocks by |w|·||x||, row by row, in place and walking.

    Collectives: three a block, in the same order on all ranks.

    Returns:
        The full names of the pruned tensors with their pattern (None without one).

    Raises:
        ValueError: see `decoder_blocks`, `check_pattern_fits`, `record_calls` and `wanda_dead`.
    """
    source = InMemory(model)
    quotas = uniform_quotas(source.blocks, budget, by_row=True)
    with _evaluating(model):
        walk(source, sequences, wanda_block(quotas, ranks), ranks, progress=progress)
    return dict.fromkeys(quotas, budget.pattern)


@torch.no_grad()
def prune_by_sparsegpt(
    model: nn.Module,
    budget: Budget,
    sequences: torch.Tensor,  # (sequences, tokens) int64, the same on every rank
    ranks: Ranks,
    *,
    progress: bool = False,
) -> dict[str, str | None]:
    """Prune every linear weight inside the decoder blocks by SparseGPT, in place and walking.

    Live entries that have become 0 can't be told from dead ones in the returned model.

    Returns:
        The full names of the pruned tensors with their pattern (None without one).

    Raises:
        ValueError: see `decoder_blocks`, `check_pattern_fits`, `record_calls` and `sparsegpt`.
    """
    source = InMemory(model)
    quotas = uniform_quotas(source.blocks, budget, by_row=False)
    with _evaluating(model):
        walk(source, sequences, sparsegpt_block(quotas, ranks), ranks, progress=progress)
    return dict.fromkeys(quotas, budget.pattern)


# --- the walk


def by_magnitude(
    source: Source, quotas: dict[str, Quota], indices: range, *, progress: bool = False
) -> None:
    """Prune the blocks of these `indices` by |w|; every block stands by itself. No collective."""
    for index in with_progress(indices, "pruning", "block", progress):
        if source.finished(index):
            continue
        with source.opened(index) as block:
            deaths = {}
            for name, weight in weights_of(block).items():
                deaths[name] = magnitude_dead(weight, quotas[name], name)
                zero_(weight, deaths[name])
            source.keep(index, Pruned(deaths))


def walk(
    source: Source,
    sequences: torch.Tensor,  # (sequences, tokens) int64, the same on every rank
    prune_block: PruneBlock,
    ranks: Ranks,
    *,
    progress: bool = False,
    what: str = "pruning",
) -> None:
    """Take the sequences through all blocks, pruning each before they go on. Collectives of `prune_block`.

    Finished blocks are passed as they are: that is how a run goes on where another one ended.

    Raises:
        ValueError: see `enter` and `record_calls`, and whatever `prune_block` raises.
    """
    to_do = [index for index in range(len(source.blocks)) if not source.finished(index)]
    if not to_do:
        return
    last = to_do[-1]  # nobody wants its outputs
    calls, hidden = states_before_blocks(source, sequences, ranks)
    for index in with_progress(range(last + 1), what, "block", progress):
        with source.opened(index) as block:
            if not source.finished(index):
                prunes = bool(block.matrices)  # or all of its layers are left dense
                done = prune_block(block, calls[index], hidden) if prunes else Pruned({})
                source.keep(index, done)
            if index < last:
                advance(block, calls[index], hidden, source.device)


def states_before_blocks(
    source: Source, sequences: torch.Tensor, ranks: Ranks
) -> tuple[list[Call], list[torch.Tensor]]:
    """Every block's call, and what enters the first one for this rank's sequences, on the host."""
    with source.entrance():
        sequences = sequences.to(source.device)
        calls = record_calls(source.model, source.blocks, sequences)
        mine = sequences[ranks.rank :: ranks.size]
        return calls, [enter(source.model, source.blocks, s)[0].cpu() for s in mine]


def advance(block: Block, call: Call, hidden: list[torch.Tensor], device: torch.device) -> None:
    """Replace the block's inputs by its outputs, one by one, so that never all of both are held."""
    for i, state in enumerate(hidden):
        hidden[i] = call.replay(block.module, state.to(device)).cpu()


def wanda_block(quotas: dict[str, Quota], ranks: Ranks) -> PruneBlock:
    """Wanda for one block; every rank does all of it with the common statistics."""

    def prune(block: Block, call: Call, hidden: list[torch.Tensor]) -> Pruned:
        inputs = input_square_sums(block, call, hidden, ranks)
        done = Pruned({})
        for name, weight in weights_of(block).items():
            sums, tokens = inputs[name.removesuffix(".weight")]
            if _too_few(block, name, tokens):
                done.by_magnitude.append(name)
                dead = magnitude_dead(weight, quotas[name], name)
            else:
                dead = wanda_dead(weight, sums, quotas[name], name)
            zero_(weight, dead)
            done.deaths[name] = dead
        return done

    return prune


def sparsegpt_block(quotas: dict[str, Quota], ranks: Ranks) -> PruneBlock:
    """SparseGPT for one block: each layer is solved by one rank, and all get its weight and mask."""

    def prune(block: Block, call: Call, hidden: list[torch.Tensor]) -> Pruned:
        grams = input_grams(block, call, hidden, ranks)
        weights = weights_of(block)
        few = [
            name
            for names, _, tokens in grams
            for name in (f"{n}.weight" for n in names)
            if _too_few(block, name, tokens)
        ]
        owners = deal({n: w.shape[0] * w.shape[1] ** 2 for n, w in weights.items()}, ranks.size)
        mine = {n: w for n, w in weights.items() if owners[n] == ranks.rank}
        solved = all_or_none(ranks, lambda: _solve(grams, mine, quotas, set(few)))
        deaths = {}
        for name, weight in weights.items():
            if name in solved:
                new, dead = solved.pop(name)
            else:
                new = torch.zeros(weight.shape, dtype=weight.dtype, device=weight.device)
                dead = torch.zeros(weight.shape, dtype=torch.bool, device=weight.device)
            spread_(new, ranks)
            spread_(dead, ranks)
            weight.copy_(new)
            deaths[name] = dead
        return Pruned(deaths, few)

    return prune


def _too_few(block: Block, name: str, tokens: int) -> bool:
    """Whether too few tokens reached the expert whose weight this is."""
    return block.matrices[name.removesuffix(".weight")].is_expert and tokens < FEW_TOKENS


def _solve(
    grams: list[tuple[list[str], torch.Tensor, int]],
    weights: dict[str, torch.Tensor],
    quotas: dict[str, Quota],
    by_magnitude: set[str],
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """(new weight in the weight's dtype, bool what died) of each of `weights`. Uses up the `grams`."""
    solved = {}
    for name in by_magnitude & weights.keys():
        dead = magnitude_dead(weights[name], quotas[name], name)
        solved[name] = (zero_(weights[name].clone(), dead), dead)
    while grams:
        layers, gram, _ = grams.pop()
        names = [name for layer in layers if (name := f"{layer}.weight") in weights]
        names = [name for name in names if name not in by_magnitude]
        if not names:
            continue
        factor = inverse_factor(gram, names[0])
        for name in names:
            weight = weights[name]
            new, dead = sparsegpt(weight, gram, factor, quotas[name], name)
            solved[name] = (zero_(new.to(weight.dtype), dead), dead)
    return solved


def deal(costs: dict[str, int], size: int) -> dict[str, int]:
    """Which of `size` ranks takes which job: the largest first, each to the rank with least so far."""
    loads = [0] * size
    takers = {}
    for name in sorted(costs, key=lambda name: (-costs[name], name)):
        taker = min(range(size), key=lambda rank: loads[rank])
        loads[taker] += costs[name]
        takers[name] = taker
    return takers


def weights_of(block: Block) -> dict[str, torch.Tensor]:
    """The matrices (out, in) of an open block, views of its parameters, by their full names."""
    return {f"{name}.weight": matrix.value() for name, matrix in block.matrices.items()}


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Without dropout for as long as the walk takes."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
