"""The sparse model out of a running engine: one weight at a time, whatever the ZeRO stage."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from seft_ds.checkpoint.export import TargetInfo, about_run, write_sparse_model
from seft_ds.checkpoint.model_files import ModelFiles, compare
from seft_ds.checkpoint.parts import part_bits, stored_infos, stored_pieces, target_infos
from seft_ds.checkpoint.tokenizer_files import Changes
from seft_ds.console import has_weights, local_folder
from seft_ds.distributed.agreement import all_or_none
from seft_ds.distributed.collectives import Ranks
from seft_ds.naming import Naming, naming_of_model
from seft_ds.sparse.linear import is_slot_parameter
from seft_ds.tensor_files import stored_tensors
from seft_ds.zero import shards
from seft_ds.zero.engine import SparseEvolution


def save_model(
    engine: Any,
    source_dir: str | Path,
    output_dir: str | Path,
    about: dict[str, Any] | None = None,
    tokenizer: Changes | None = None,
    files: ModelFiles | None = None,
) -> dict[str, Any]:
    """Write the trained model of `engine` to `output_dir`; returns its sparsity record on every rank.

    A collective: every rank gathers each weight (one in memory at a time), rank 0 writes. The forward
    pass's weights are the effective ones, so nothing has to be merged.

    The tensors have the names that they have in the files of `source_dir`.

    Args:
        source_dir: where config and tokenizer come from.
        about: further entries for `sparsity.json`.
        tokenizer: what the run changed of the source's tokenizer.
        files: of `source_dir`, if they have been compared with the model already.

    Raises:
        ValueError: `output_dir` holds a model already, or `source_dir` is no longer the model's folder.
            RuntimeError: an invariant or the files don't hold.
    """
    seft: SparseEvolution = engine.seft
    seft.check()
    if files is None:
        files = all_or_none(seft.ranks, lambda: files_of(engine.module, source_dir))
    named = {n: p for n, p in model_tensors(engine.module) if n not in files.verbatim}
    naming = files.naming
    layout = [
        info
        for n, p in named.items()
        for info in stored_infos(naming, n, shards.shape_of(p), p.dtype)
    ]
    layout += files.extra_layout(seft.states[0].weight.dtype)
    targets = _target_infos(seft, naming)
    facts = about_run(
        source_dir, seft.step, (seft.n_events, seft.n_exchanges), seft.config.model_dump()
    ) | (about or {})
    gathered = (
        piece
        for n, p in named.items()
        for piece in stored_pieces(naming, n, shards.gather_whole(p, seft.ranks))
    )
    return write_on_first(
        seft.ranks, gathered, files.with_extras(gathered), output_dir, layout=layout, targets=targets,
        source_dir=source_dir, about=facts, tokenizer=tokenizer, untied=bool(files.untied),
    )  # fmt: skip


def files_of(model: nn.Module, source_dir: str | Path) -> ModelFiles:
    """The files of the folder that a model was loaded from, matched with it; where there is none, none.

    Raises:
        ValueError: the folder holds another model.
    """
    folder = local_folder(str(source_dir))
    if folder is None or not (folder / "config.json").is_file() or not has_weights(folder):
        return ModelFiles(Path(source_dir), naming_of_model(model), {}, torch.float32)
    return compare(model, folder, stored_tensors(folder, pickles=True))


def write_on_first(
    ranks: Ranks,
    gathered: Iterator[Any],
    tensors: Iterator[tuple[str, torch.Tensor]],
    output_dir: str | Path,
    **what: Any,
) -> dict[str, Any]:
    """`write_sparse_model(output_dir, tensors, **what)` on rank 0; its record on every rank. A collective.

    Args:
        gathered: whole tensors, each by a collective; every rank draws all of them.
        tensors: the same, or made of them by rank 0 alone: not a collective of its own.

    Raises:
        ValueError, RuntimeError, OSError: of rank 0, on every rank.
    """
    outcome: Any = None
    if ranks.rank == 0:
        try:
            outcome = write_sparse_model(output_dir, tensors, **what)
        except (ValueError, RuntimeError, OSError) as error:
            outcome = error
    for _ in gathered:  # the other ranks' half of each gather; also after an error on rank 0
        pass
    outcome = ranks.gather_object(outcome)[0]
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


def model_tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of everything a saved model holds: tied ones once, no slots, no derived buffers."""
    for name, param in model.named_parameters():
        if not is_slot_parameter(name):
            yield name, param
    for prefix, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                yield f"{prefix}.{name}" if prefix else name, buffer


def _target_infos(seft: SparseEvolution, naming: Naming) -> dict[str, TargetInfo]:
    infos: dict[str, TargetInfo] = {}
    changed, idle = iter(seft.changed_positions()), seft.unreached()
    for i, target in enumerate(s.target for s in seft.states):
        bits = seft.live_bits(i)  # a collective; only the rank that writes keeps it
        kept = part_bits(bits, target) if seft.ranks.rank == 0 else [None] * target.n_parts
        parts = [
            # Without `adapt` the count is a result, and nothing was aimed at.
            TargetInfo(
                target.pattern_text, live if seft.config.adapt else None, next(changed), part, off
            )
            for live, part, off in zip(target.live_by_part, kept, idle[i], strict=True)
        ]
        infos |= target_infos(naming, target, parts)
    return infos
