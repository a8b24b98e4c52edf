"""A model folder in, a pruned model folder out, one block in memory at a time.

The phases, each of which leaves something in the work folder (prune/work.py) that a later start goes on with:

1. quotas: how many entries each weight gives up; takes a pass over the model for owl and for a global budget
2. blocks: prune them one after the other
3. assemble: stream everything into an ordinary model folder, which is read back and recounted
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from seft_ds.checkpoint.export import TargetInfo, versions, write_sparse_model
from seft_ds.distributed.agreement import folder_facts
from seft_ds.distributed.collectives import Ranks
from seft_ds.prune.blocks import uniform_quotas, weight_shapes
from seft_ds.prune.choose import Quota, dead_count
from seft_ds.prune.magnitude import global_quotas
from seft_ds.prune.owl import measured_quotas
from seft_ds.prune.recipe import Recipe
from seft_ds.prune.source import FromFiles
from seft_ds.prune.walk import by_magnitude, sparsegpt_block, walk, wanda_block
from seft_ds.prune.work import Work


def settings_of(
    recipe: Recipe,
    folder: Path,
    dtype: torch.dtype,
    sequences: torch.Tensor | None,
    targets: list[str] | None = None,
) -> dict[str, Any]:
    """Everything that decides about the result, as plain values: two runs with the same give the same.

    targets: the layers that are pruned, if not all are. Large weights files are digested in part
    (`folder_facts`).
    """
    facts = folder_facts(folder)
    files = {n: f for n, f in facts.items() if n == "config.json" or n.endswith(".safetensors")}
    text = None
    if sequences is not None:
        digest = hashlib.sha256(sequences.numpy().tobytes()).hexdigest()[:16]
        text = f"{tuple(sequences.shape)} tokens, sha256 {digest}"
    owl = recipe.owl
    return {
        "method": recipe.method,
        "sparsity": recipe.budget.sparsity,
        "pattern": recipe.budget.pattern,
        "budget": recipe.unit,
        "targets": targets,
        "layerwise": "uniform" if owl is None else "owl",
        "owl": None if owl is None else [owl.outlier_factor, owl.density_range],
        "dtype": str(dtype).removeprefix("torch."),
        "calibration": text,
        "model": hashlib.sha256(repr(sorted(files.items())).encode()).hexdigest()[:16],
        "versions": {
            n: v for n, v in versions().items() if n in ("seft-ds", "torch", "transformers")
        },
    }


@torch.no_grad()
def find_quotas(
    source: FromFiles,
    recipe: Recipe,
    sequences: torch.Tensor | None,
    ranks: Ranks,
    *,
    progress: bool = False,
) -> dict[str, Quota]:
    """How many entries each weight gives up, by the tensor's name. Phase 1; collective.

    Raises:
        ValueError: see `check_pattern_fits`, `densities` and `global_quotas`.
    """
    quotas = uniform_quotas(source.blocks, recipe.budget, by_row=recipe.unit == "row")
    sparsity = recipe.budget.sparsity
    if recipe.owl is not None:
        assert sequences is not None and sparsity is not None
        return measured_quotas(
            source, sequences, quotas, sparsity, recipe.owl, ranks, progress=progress
        )
    if recipe.unit == "global":
        assert sparsity is not None
        total = sum(out * inputs for out, inputs in weight_shapes(source.blocks).values())
        return global_quotas(list(quotas), source.read, dead_count(sparsity, total), ranks)
    return quotas


@torch.no_grad()
def prune_blocks(
    source: FromFiles,
    recipe: Recipe,
    quotas: dict[str, Quota],
    sequences: torch.Tensor | None,
    ranks: Ranks,
    *,
    progress: bool = False,
) -> None:
    """Prune every block that is not finished. Phase 2; collective.

    Raises:
        ValueError: see `walk`, `wanda_dead`, `sparsegpt` and `magnitude_dead`.
    """
    if recipe.method == "magnitude":  # every block for itself, so that ranks share the blocks
        mine = range(ranks.rank, len(source.blocks), ranks.size)
        by_magnitude(source, quotas, mine, progress=progress)
        ranks.barrier()
        return
    assert sequences is not None
    make = wanda_block if recipe.method == "wanda" else sparsegpt_block
    walk(source, sequences, make(quotas, ranks), ranks, progress=progress)


def assemble(
    source: FromFiles,
    work: Work,
    quotas: dict[str, Quota],
    base: Path,
    output: Path,
    about: dict[str, Any],
    max_shard_bytes: int = 5 * 2**30,
) -> dict[str, Any]:
    """Write the model folder, tensor by tensor; returns its sparsity record. Phase 3; on one rank.

    What is live is what did not die: a live weight that has become 0 is written as the smallest normal number
    (checkpoint/export.py), so that the zeros on disk are exactly the quotas.

    Raises:
        ValueError: `output` holds a model.
        RuntimeError: the files read back differ.
    """
    place = {
        f"{name}.weight": index for index, b in enumerate(source.blocks) for name in b.matrices
    }
    layout, shapes = source.layout(), weight_shapes(source.blocks)
    targets = {
        name: TargetInfo(
            pattern=quota.pattern,
            target_live=math.prod(shapes[name]) - quota.dead,
            live_bits=partial(work.live_bits, place[name], name),
        )
        for name, quota in quotas.items()
    }

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        for info in layout:
            if info.name in quotas:
                yield info.name, work.read(place[info.name], info.name)
            else:
                yield info.name, source.read(source.original_of(info.name), torch.device("cpu"))

    return write_sparse_model(
        output,
        tensors(),
        layout=layout,
        targets=targets,
        source_dir=base,
        about=about,
        max_shard_bytes=max_shard_bytes,
    )
