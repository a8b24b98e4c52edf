"""How long a step will take on this device: a short measurement of one and of two blocks of the model.

Blocks are alike, so a model of n of them takes (time of two - time of one) a block, and what is left of the
time of one for embedding, head and loss. Weights are random and stay on this device; nothing is downloaded.
What a rank does besides (sums over ranks, optimizer, write-through) is not in it.
"""

from __future__ import annotations

import copy
import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from seft_ds.sparse.kernel_costs import KernelCosts, Problem, known_costs
from seft_ds.sparse.linear import SeftLinear, add_slots
from seft_ds.targets import Target
from seft_ds.train.planning import Work

_ROUNDS = 5


@dataclass(frozen=True)
class Probe:
    """Seconds of forward and backward on one rank, for one micro-batch."""

    block: float
    rest: float  # embedding, head and loss
    blocks: int

    @property
    def step(self) -> float:
        return self.rest + self.blocks * self.block


@dataclass
class _Runtime:
    """What `SeftLinear` asks for while it trains, outside of an engine."""

    problem: Problem
    costs: KernelCosts
    device: torch.device
    not_finite: torch.Tensor | None = None

    def open_sinks(self) -> list:
        return []

    def kernel(self, tokens: int) -> str:
        return self.costs.fastest(self.problem, tokens, self.device)


def problems_of(targets: list[Target], dtype: torch.dtype) -> list[Problem]:
    """The different slot gradients of a model."""
    return list(dict.fromkeys(Problem.of(t.shape, t.n_slots, dtype) for t in targets))


def probe(
    config: Any, targets: list[Target], work: Work, dtype: torch.dtype, device: torch.device
) -> Probe:
    """Measure; takes some seconds, and the memory of two blocks, embedding and head.

    config: of transformers. targets: of the whole model, with their slots.

    Raises:
        ValueError: a mixture of experts, whose blocks are not alike.
    """
    if any(t.experts for t in targets):
        raise ValueError(
            "--probe takes all blocks for alike, and those of a mixture of experts are not: leave it out"
        )
    costs = known_costs(problems_of(targets, dtype), device)
    slots = {t.name: t.n_slots for t in targets}
    one, two = (_seconds(config, n, slots, costs, work, dtype, device) for n in (1, 2))
    block = max(two - one, 0.0)
    return Probe(block, max(one - block, 0.0), int(config.get_text_config().num_hidden_layers))


def _seconds(
    config: Any,
    blocks: int,
    slots: dict[str, int],
    costs: KernelCosts,
    work: Work,
    dtype: torch.dtype,
    device: torch.device,
) -> float:
    """Median seconds of forward and backward of the first `blocks` blocks."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    text.num_hidden_layers = blocks
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:blocks]
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.requires_grad_(False)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name in slots:
            position = torch.randperm(module.weight.numel(), device=device)[: slots[name]]
            add_slots(
                module, position.to(torch.int32 if module.weight.numel() < 2**31 else torch.int64)
            )
            assert isinstance(module, SeftLinear)
            shape = (module.out_features, module.in_features)
            problem = Problem.of(shape, slots[name], dtype)
            module.seft_runtime = _Runtime(problem, costs, device)
    model.enable_input_require_grads()
    model.train()
    if work.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    size = (work.micro_batch, work.length_tokens)
    rows = torch.randint(0, int(text.vocab_size), size, device=device)
    times = []
    for _ in range(_ROUNDS + 1):  # the first warms up
        _wait(device)
        started = time.perf_counter()
        model(input_ids=rows, labels=rows, use_cache=False).loss.backward()
        _wait(device)
        times.append(time.perf_counter() - started)
        model.zero_grad()
    return statistics.median(times[1:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
