"""Prune a model block by block, each with the inputs that the already pruned blocks before it give.

The order of the paper's code (arXiv 2306.11695, section 3): run the calibration sequences through block
b, prune b, run them again, and take the new outputs as the inputs of block b + 1. Only one block works
at a time, and what is kept between blocks is one hidden state per token.

Ranks: the sequences are dealt out round robin and the sums of squares are added over the ranks, so that
the statistics are those of all sequences and every rank computes the same masks. Every rank holds the
whole model; a model that needs sharding to fit is not served by this walk.

Replay: a block is called with the very arguments that the model gave it. They are recorded in one full
forward pass, block by block, since models with mixed attention hand different masks to different
blocks. All sequences have the same length and no padding, so what is recorded for one holds for all;
models that break this (arguments made from the tokens themselves) are detected and refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from seft_ds.distributed.collectives import Ranks
from seft_ds.prune.choose import Budget, zero_
from seft_ds.prune.magnitude import magnitude_dead
from seft_ds.prune.wanda import square_sums, wanda_dead
from seft_ds.targets import parse_pattern


@dataclass
class Block:
    """One decoder block and the linear layers in it, by their full names in the model."""

    module: nn.Module
    linears: dict[str, nn.Linear]  # "model.layers.0.self_attn.q_proj" -> layer


@dataclass
class Call:
    """The arguments of one call of a block, its hidden states taken out."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def replay(self, block: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        """The block's output hidden states for `hidden`, both (1, tokens, hidden size)."""
        out = block(hidden, *self.args, **self.kwargs)
        return out if isinstance(out, torch.Tensor) else out[0]


class _StopForward(Exception):
    """Raised by a hook to leave the model's forward pass before its first block."""


def decoder_blocks(model: nn.Module) -> list[Block]:
    """The decoder blocks of a causal language model, in order.

    Raises:
        ValueError: no list of `config.num_hidden_layers` blocks, no linear layers in them, or weights
            that are stacked per expert.
    """
    depth = int(model.config.num_hidden_layers)  # type: ignore[union-attr, arg-type]
    for prefix, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            blocks = [_block(f"{prefix}.{i}", child) for i, child in enumerate(module)]
            if all(block.linears for block in blocks):
                return blocks
    raise ValueError(
        f"found no list of {depth} decoder blocks with linear layers in {type(model).__name__}; "
        "wanted a decoder-only model such as LLaMA, Mistral or Qwen2"
    )


def _block(prefix: str, module: nn.Module) -> Block:
    for name, parameter in module.named_parameters():
        if parameter.ndim > 2:
            raise ValueError(
                f"{prefix}.{name} has shape {tuple(parameter.shape)}: experts stacked in one tensor "
                "are not supported; prune a dense model"
            )
    linears = {
        f"{prefix}.{name}": child
        for name, child in module.named_modules()
        if isinstance(child, nn.Linear)
    }
    return Block(module, linears)


def check_pattern_fits(blocks: list[Block], budget: Budget) -> None:
    """Refuse, before any time is spent, a pattern that some weight cannot hold.

    Raises:
        ValueError: M does not divide the inputs of a weight, which is named.
    """
    if budget.pattern is None:
        return
    _, group = parse_pattern(budget.pattern)
    for block in blocks:
        for name, linear in block.linears.items():
            if linear.in_features % group:
                raise ValueError(
                    f"{name}.weight has {linear.in_features} inputs, which {budget.pattern} cannot "
                    f"divide into groups of {group}; choose another pattern, or --sparsity"
                )


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
    blocks = decoder_blocks(model)
    check_pattern_fits(blocks, budget)
    for block in tqdm(blocks, desc="pruning", unit="block", disable=not progress):
        for name, linear in block.linears.items():
            zero_(linear.weight.data, magnitude_dead(linear.weight, budget, f"{name}.weight"))
    return _targets(blocks, budget)


@torch.no_grad()
def prune_by_wanda(
    model: nn.Module,
    budget: Budget,
    sequences: torch.Tensor,  # (sequences, tokens) int64, the same on every rank
    ranks: Ranks,
    *,
    progress: bool = False,
) -> dict[str, str | None]:
    """Prune every linear weight inside the decoder blocks by |w|·||x||, in place and walking.

    Collectives: one sum over the ranks per linear layer, in the same order on all of them.

    Returns:
        The full names of the pruned tensors with their pattern (None without one).

    Raises:
        ValueError: see `decoder_blocks`, `check_pattern_fits`, `record_calls` and `wanda_dead`.
    """
    blocks = decoder_blocks(model)
    check_pattern_fits(blocks, budget)
    sequences = sequences.to(next(model.parameters()).device)
    with _evaluating(model):
        calls = record_calls(model, blocks, sequences)
        hidden = [
            first_hidden(model, blocks[0], sequence)
            for sequence in sequences[ranks.rank :: ranks.size]
        ]
        bar = tqdm(blocks, desc="pruning", unit="block", disable=not progress)
        for block, call in zip(bar, calls):
            sums = input_square_sums(block, call, hidden, ranks)
            for name, linear in block.linears.items():
                dead = wanda_dead(linear.weight, sums[name], budget, f"{name}.weight")
                zero_(linear.weight.data, dead)
            # Again, now through the pruned weights: what block b + 1 will really see. One by one,
            # so that the states before and after a block are never all held at once.
            for i, state in enumerate(hidden):
                hidden[i] = call.replay(block.module, state)
    return _targets(blocks, budget)


def record_calls(model: nn.Module, blocks: list[Block], sequences: torch.Tensor) -> list[Call]:
    """How the model calls each block, from one full forward pass of the first of `sequences`.

    A second sequence, if there is one, checks that the arguments do not depend on the tokens.

    Raises:
        ValueError: they do.
    """
    calls = _record(model, blocks, sequences[0])
    if len(sequences) > 1:
        for index, (one, other) in enumerate(zip(calls, _record(model, blocks, sequences[1]))):
            if not _same(one.args, other.args) or not _same(one.kwargs, other.kwargs):
                raise ValueError(
                    f"{type(model).__name__} gives block {index} arguments that depend on the tokens, "
                    "which the block-by-block walk cannot replay; use --method magnitude"
                )
    return calls


def _record(model: nn.Module, blocks: list[Block], sequence: torch.Tensor) -> list[Call]:
    calls: list[Call] = []

    def note(module: nn.Module, args: tuple, kwargs: dict) -> None:
        _, call = _split_hidden(args, kwargs)
        calls.append(call)

    handles = [b.module.register_forward_pre_hook(note, with_kwargs=True) for b in blocks]
    try:
        # Without a cache: a replayed block must not append to keys of an earlier call.
        model(input_ids=sequence.unsqueeze(0), use_cache=False, logits_to_keep=1)
    finally:
        for handle in handles:
            handle.remove()
    assert len(calls) == len(blocks), "every block runs once in a forward pass"
    return calls


def first_hidden(model: nn.Module, block: Block, sequence: torch.Tensor) -> torch.Tensor:
    """The hidden states (1, tokens, hidden size) that enter the first `block` for `sequence` (tokens,)."""
    caught: list[torch.Tensor] = []

    def catch(module: nn.Module, args: tuple, kwargs: dict) -> None:
        caught.append(_split_hidden(args, kwargs)[0])
        raise _StopForward

    handle = block.module.register_forward_pre_hook(catch, with_kwargs=True)
    try:
        model(input_ids=sequence.unsqueeze(0), use_cache=False)
    except _StopForward:
        pass
    finally:
        handle.remove()
    return caught[0]


def input_square_sums(
    block: Block, call: Call, hidden: list[torch.Tensor], ranks: Ranks
) -> dict[str, torch.Tensor]:
    """Per linear layer, float64 (in,): Σ x² of its inputs over the tokens of all ranks.

    `hidden` holds this rank's block inputs, (1, tokens, hidden size) each; it may be empty.
    One collective per linear layer.
    """
    sums = {
        name: torch.zeros(linear.in_features, dtype=torch.float64, device=linear.weight.device)
        for name, linear in block.linears.items()
    }

    def adder(total: torch.Tensor) -> Callable[[nn.Module, tuple], None]:
        def add(module: nn.Module, args: tuple) -> None:
            total.add_(square_sums(args[0]))

        return add

    handles = [
        linear.register_forward_pre_hook(adder(sums[name]))
        for name, linear in block.linears.items()
    ]
    try:
        for state in hidden:
            call.replay(block.module, state)
    finally:
        for handle in handles:
            handle.remove()
    return {name: ranks.sum_(total) for name, total in sums.items()}


def _split_hidden(args: tuple, kwargs: dict) -> tuple[torch.Tensor, Call]:
    """The hidden states of a block's call, and the rest of its arguments."""
    if args:
        return args[0], Call(tuple(args[1:]), dict(kwargs))
    rest = dict(kwargs)
    return rest.pop("hidden_states"), Call((), rest)


def _same(one: Any, other: Any) -> bool:
    """Whether two arguments are equal, looking into tuples, lists and dicts of tensors."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(one[k], other[k]) for k in one)
    if isinstance(one, (tuple, list)):
        return len(one) == len(other) and all(_same(a, b) for a, b in zip(one, other))
    return type(one) is type(other)  # settings and helper objects: made anew in every call


def _targets(blocks: list[Block], budget: Budget) -> dict[str, str | None]:
    return {f"{name}.weight": budget.pattern for block in blocks for name in block.linears}


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Without dropout for as long as the walk takes."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
