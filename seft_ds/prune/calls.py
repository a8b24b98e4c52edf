"""How a model calls its blocks, recorded without running them, and those calls again.

A block is replayed with the very arguments that the model gave it: masks, position embeddings, whatever a
family passes, and not the same for every block where attention is mixed. To learn them the model's own
forward pass runs with blocks that hand their hidden states on unchanged; nothing but what stands before the
blocks has to hold values, and whatever comes after the last block is never reached.

All sequences have the same length and no padding, so what is recorded for one holds for all; models that
break this (arguments made from the tokens themselves) are found out and refused, and so are models that
change the hidden states between two blocks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from seft_ds.prune.blocks import Block
from seft_ds.sparse.experts import experts_forward, grouped


@dataclass
class Call:
    """The arguments of one call of a block, its hidden states taken out."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def replay(self, block: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        """The block's output hidden states for `hidden`, both (1, tokens, hidden size)."""
        out = block(hidden, *self.args, **self.kwargs)
        return out if isinstance(out, torch.Tensor) else out[0]


class _Reached(Exception):
    """The last block was called: the forward pass has told all that is wanted."""


class _NotHandedOn(Exception):
    """A block did not get what the block before it returned."""


def record_calls(model: nn.Module, blocks: list[Block], sequences: torch.Tensor) -> list[Call]:
    """How the model calls each block for the first of `sequences` (sequences, tokens).

    A second sequence, if there is one, checks that the arguments do not depend on the tokens.

    Raises:
        ValueError: they do, or see `enter`.
    """
    _, calls = enter(model, blocks, sequences[0])
    if len(sequences) > 1:
        _, others = enter(model, blocks, sequences[1])
        for index, (one, other) in enumerate(zip(calls, others)):
            if not _same(one.args, other.args) or not _same(one.kwargs, other.kwargs):
                raise ValueError(
                    f"{type(model).__name__} gives block {index} arguments that depend on the tokens, "
                    "which the block-by-block walk cannot replay; use --method magnitude"
                )
    return calls


def enter(
    model: nn.Module, blocks: list[Block], sequence: torch.Tensor
) -> tuple[torch.Tensor, list[Call]]:
    """The hidden states (1, tokens, hidden size) that enter the first block, and every block's call.

    sequence: int64 (tokens,), on the device of what stands before the blocks.

    Raises:
        ValueError: the model changes the hidden states between its blocks, or does not call each once.
    """
    # A block gives back a tensor or, in older models, a tuple; which one shows in what the next one gets.
    failures: list[Exception] = []
    for wrap in (
        lambda hidden: hidden,
        lambda hidden: (hidden,),
        lambda hidden: (hidden, None),
        lambda hidden: (hidden, None, None),
    ):
        try:
            return _pass_through(model, blocks, sequence, wrap)
        except Exception as error:  # what a model does with the wrong kind may be anything
            failures.append(error)
    if not isinstance(failures[0], _NotHandedOn):
        raise failures[0]
    raise ValueError(
        f"{type(model).__name__} changes the hidden states between its blocks, or calls them in another "
        "order, which the block-by-block walk cannot replay; use --method magnitude"
    )


def _pass_through(
    model: nn.Module,
    blocks: list[Block],
    sequence: torch.Tensor,
    wrap: Callable[[torch.Tensor], Any],
) -> tuple[torch.Tensor, list[Call]]:
    calls: list[Call] = []
    states: list[torch.Tensor] = []

    def stub_of(index: int) -> Callable[..., Any]:
        def stub(*args: Any, **kwargs: Any) -> Any:
            hidden, call = _split_hidden(args, kwargs)
            if len(calls) != index or (states and hidden is not states[0]):
                raise _NotHandedOn
            calls.append(call)
            states.append(hidden)
            if index == len(blocks) - 1:
                raise _Reached
            return wrap(hidden)

        return stub

    stubs = {block.module: stub_of(index) for index, block in enumerate(blocks)}.__getitem__
    with _replaced([block.module for block in blocks], stubs):
        try:
            # Without a cache: a replayed block must not append to keys of an earlier call.
            model(input_ids=sequence.unsqueeze(0), use_cache=False)
        except _Reached:
            return states[0], calls
    raise _NotHandedOn


@contextmanager
def _replaced(
    modules: list[nn.Module], forward_of: Callable[[nn.Module], Callable[..., Any]]
) -> Iterator[None]:
    """Every module's `forward` is another one; its hooks and its class stay as they are."""
    # An own `forward`, as accelerate's hooks put there, has to come back.
    own = [module.__dict__.get("forward") for module in modules]
    try:
        for module in modules:
            module.__dict__["forward"] = forward_of(module)
        yield
    finally:
        for module, forward in zip(modules, own):
            module.__dict__.pop("forward", None)
            if forward is not None:
                module.__dict__["forward"] = forward


def linear_inputs(
    block: Block, call: Call, hidden: torch.Tensor
) -> list[tuple[list[str], torch.Tensor]]:
    """(names of matrices, their common input (tokens, in)) for one sequence, in running order.

    Layers that read the very same tensor (q, k and v; gate and up) share an entry. Every expert has one for
    its gate and up and one for its down projection, with the tokens that reach it: possibly none.
    hidden: (1, tokens, hidden size), what enters the block.

    Raises:
        ValueError: a layer did not run, or ran twice.
    """
    # Every input stays referenced until the end, so that no later tensor can pass for it.
    found: list[tuple[list[str], torch.Tensor]] = []
    ran: list[str] = []

    def note(name: str, x: torch.Tensor) -> None:
        ran.append(name)
        for names, before in found:
            if before is x:
                names.append(name)
                return
        found.append(([name], x))

    def noting(name: str) -> Callable[[nn.Module, tuple], None]:
        return lambda module, args: note(name, args[0])

    handles = [m.register_forward_pre_hook(noting(name)) for name, m in block.linears.items()]

    def noting_experts(module: nn.Module) -> Callable[..., torch.Tensor]:
        def product(parameter: str, x: torch.Tensor, ends: list[int]) -> torch.Tensor:
            pruned = block.experts[module].get(parameter)  # of two weights one may be left dense
            if pruned is not None:
                for names, part in zip(pruned, _split(x, ends), strict=True):
                    ran.extend(names)
                    found.append((list(names), part))
            weight = module._parameters[parameter]
            assert weight is not None
            return grouped(x.to(weight.dtype), weight, ends)

        return lambda hidden_states, top_k_index, top_k_weights: experts_forward(
            module, hidden_states, top_k_index, top_k_weights, product
        )

    try:
        with _replaced(list(block.experts), noting_experts):
            call.replay(block.module, hidden)
    finally:
        for handle in handles:
            handle.remove()
    odd = sorted(block.matrices.keys() - {n for n, k in Counter(ran).items() if k == 1})
    if odd:
        raise ValueError(
            f"{odd[0]} ran {ran.count(odd[0])} times in one pass of its block, so it has no single input "
            "to be calibrated with; use --method magnitude"
        )
    return [(names, x.detach().reshape(-1, x.shape[-1])) for names, x in found]


def _split(x: torch.Tensor, ends: list[int]) -> list[torch.Tensor]:
    """Each expert's rows of x (rows, in): copies, so that no product's last bits depend on where they lay."""
    return [x[lo:hi].clone() for lo, hi in zip([0, *ends[:-1]], ends, strict=True)]


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
