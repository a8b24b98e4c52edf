"""The merged model out of a running engine: one weight at a time, whatever the ZeRO stage.

lora           live is what is not zero: the zeros that the merge left
spp, sqft      live is what was live in the pruned model
lora_pruned    live is what Wanda keeps (baselines/again.py), as many as before in every row
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from seft_ds.baselines.adapters import Adapter, Adapters, gather, plain_tensors
from seft_ds.baselines.again import live_again
from seft_ds.baselines.methods import find_method
from seft_ds.checkpoint.export import TargetInfo, TensorInfo, versions
from seft_ds.checkpoint.model import write_on_first
from seft_ds.checkpoint.model_files import ModelFiles
from seft_ds.checkpoint.origin import origin_of
from seft_ds.checkpoint.pruned import nonzero_live
from seft_ds.checkpoint.tokenizer_files import Changes
from seft_ds.distributed.collectives import Ranks
from seft_ds.errors import RunError
from seft_ds.naming import naming_of_model
from seft_ds.sparse import mask
from seft_ds.zero import shards


def save_merged(
    engine: Any,
    adapters: Adapters,
    ranks: Ranks,
    source_dir: str | Path,
    output_dir: str | Path,
    about: dict[str, Any],
    sums: dict[str, torch.Tensor] | None = None,
    tokenizer: Changes | None = None,
    files: ModelFiles | None = None,
) -> dict[str, Any]:
    """Write the model with its adapters merged; returns its sparsity record on every rank. A collective.

    Args:
        source_dir: where config and tokenizer come from.
        about: further entries for `sparsity.json`.
        sums: Σ x² of the inputs of each target, where the method prunes again.
        tokenizer: what the run changed of the source's tokenizer.
        files: of `source_dir`, matched with the model: the tensors keep the names that they have there.

    Raises:
        ValueError: `output_dir` holds a model already. RunError: a merged weight is not finite.
    """
    if files is None:
        files = ModelFiles(Path(source_dir), naming_of_model(engine.module), {}, torch.float32)
    in_files = files.naming.in_files
    named = {
        in_files(n): p
        for n, p in plain_tensors(engine.module, adapters).items()
        if n not in files.verbatim
    }
    by_name = {in_files(layer.target.weight_name): layer for layer in adapters.layers}
    layout = [TensorInfo(n, shards.shape_of(p), p.dtype) for n, p in named.items()]  # type: ignore[arg-type]
    layout += files.extra_layout(adapters.layers[0].module.weight.dtype)
    exact = find_method(adapters.method).adapter != "lora" or sums is not None
    targets = {
        name: TargetInfo(
            pattern=layer.target.pattern_text if exact else None,
            target_live=layer.target.target_live if exact else None,
        )
        for name, layer in by_name.items()
    }
    gathered = _gathered(named, by_name, ranks)
    merged = (_merge_one(piece, adapters, targets, sums) for piece in gathered)
    facts = about_adapters(adapters, source_dir) | about
    return write_on_first(
        ranks, gathered, files.with_extras(merged), output_dir, layout=layout, targets=targets,
        source_dir=source_dir, about=facts, tokenizer=tokenizer, untied=bool(files.untied),
    )  # fmt: skip


def about_adapters(adapters: Adapters, source_dir: str | Path) -> dict[str, Any]:
    """What the record of a merged model says of the run."""
    return {
        "method": adapters.method,
        **origin_of(source_dir),
        "events": 0,
        "scope": "layer",
        "trainable": adapters.n_trainable,
        "adapter": {"rank": adapters.rank, "scale": adapters.scale},
        "versions": versions(),
    }


_Piece = tuple[str, torch.Tensor, Adapter | None, tuple[torch.Tensor, ...]]


def _gathered(
    named: dict[str, torch.Tensor], by_name: dict[str, Adapter], ranks: Ranks
) -> Iterator[_Piece]:
    """(name, whole tensor, its adapter, whole A and B) one by one, on every rank."""
    for name, tensor in named.items():
        layer = by_name.get(name)
        whole = shards.gather_whole(tensor, ranks)  # type: ignore[arg-type]
        yield name, whole, layer, gather(layer, ranks) if layer is not None else ()


def _merge_one(
    piece: _Piece,
    adapters: Adapters,
    targets: dict[str, TargetInfo],
    sums: dict[str, torch.Tensor] | None,
) -> tuple[str, torch.Tensor]:
    """A tensor as it is written; what is known of a target only now goes into its entry of `targets`."""
    name, whole, layer, (*parts,) = piece
    if layer is None:
        return name, whole
    method, target, info = find_method(adapters.method), layer.target, targets[name]
    assert method.adapter is not None
    merged = adapters.merged(method.adapter, whole, *parts)
    if not bool(torch.isfinite(merged).all()):
        raise RunError(f"{name} is not finite after the training; lower the learning rate")
    before = nonzero_live(name, whole, target.pattern_text)
    if sums is not None:
        live = live_again(merged, before, sums[target.name], target.pattern, name)
    elif method.adapter == "lora":
        live = merged.to(whole.dtype) != 0
    else:
        live = before
    info.live_bits = mask.pack(live.view(-1))
    info.changed_positions = int((live != before).sum())
    return name, merged
