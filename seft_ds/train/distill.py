"""Distillation: the repaired model also learns from the dense one, token by token.

    loss = (1 - w) · NLL(labels) + w · KL(dense ‖ sparse)

Both are sums over the tokens that count in the loss, divided by the same number, so that w = 0 is ordinary
training. Temperature 1. Both models' logits are whole in memory, (rows, tokens, vocabulary), where ordinary
training never forms them (TRL fuses the head with the loss): the price is two such tensors in fp32 and the
dense model's forward pass.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from trl.models.utils import prepare_deepspeed

from seft_ds.checkpoint.load import load_causal_lm
from seft_ds.checkpoint.model_files import ModelFiles
from seft_ds.distributed.collectives import Ranks
from seft_ds.json_file import read_object, shown


def check_teacher(folder: Path, student: Path) -> None:
    """Can the model in `folder` teach the one in `student`?

    Raises:
        ValueError: their vocabularies differ in size, so that their logits can't be compared.
    """
    sizes = [read_object(f / "config.json").get("vocab_size") for f in (folder, student)]
    if sizes[0] != sizes[1] or not isinstance(sizes[0], int):
        raise ValueError(
            f"--distill {folder} has a vocabulary of {shown(sizes[0])}, the model to train one of "
            f"{shown(sizes[1])}; give the dense model that it was pruned from"
        )


def load_teacher(files: ModelFiles, dtype: torch.dtype, accelerator: Any, ranks: Ranks) -> Any:
    """The dense model, frozen, ready to be called on this rank. A collective.

    Under ZeRO-3 it is partitioned like the model that trains, in an engine without an optimizer; otherwise it
    is whole on every rank.
    """
    model = load_causal_lm(files, dtype, ranks)
    model.requires_grad_(False)
    stage = accelerator.state.deepspeed_plugin.deepspeed_config["zero_optimization"]["stage"]
    if stage == 3:
        return prepare_deepspeed(model, accelerator)
    return model.to(accelerator.device).eval()


def token_losses(
    logits: torch.Tensor,  # (rows, tokens, vocabulary) of the model that trains
    teacher_logits: torch.Tensor,  # the same shape
    labels: torch.Tensor,  # (rows, tokens) int64; -100: doesn't count
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(Σ NLL, Σ KL(teacher ‖ student), how many tokens count): fp32 scalars with a graph, and a count.

    Position t predicts the label at t + 1. Only the rows of the logits that count are turned into fp32.
    """
    wanted = labels[:, 1:]
    counts = wanted != -100
    ours = logits[:, :-1][counts].float().log_softmax(dim=-1)
    theirs = teacher_logits[:, :-1][counts].float().log_softmax(dim=-1)
    nll = -ours.gather(1, wanted[counts].unsqueeze(1)).sum()
    kl = (theirs.exp() * (theirs - ours)).sum()
    return nll, kl, counts.sum()
