"""A sparse model from a checkpoint, without DeepSpeed and without the original ranks."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from seft_ds.checkpoint.export import TargetInfo, TensorInfo, about_run, write_sparse_model
from seft_ds.checkpoint.shard_files import DTYPE_OF_CODE
from seft_ds.checkpoint.state import find_tag, read_meta, whole_weights


def export_checkpoint(
    checkpoint: Path, output_dir: Path, source_dir: str | None = None
) -> dict[str, Any]:
    """Write the model of a checkpoint; returns its sparsity record.

    The target weights come from the checkpoint; all others are frozen in a SEFT run, so they are read from
    the pruned model that the run started from (`source_dir`, default: where it was then).

    Raises:
        ValueError: no checkpoint there, no base model, or one that doesn't fit.
    """
    tag = find_tag(checkpoint)
    meta = read_meta(tag)
    source = Path(source_dir or meta["source_dir"])
    where = tensor_files(source)
    targets = {f"{t['name']}.weight": t for t in meta["targets"]}
    missing = sorted(set(targets) - set(where))
    if missing:
        raise ValueError(f"{source} has no tensor {missing[0]}: it is not the model of this run")
    infos: dict[str, TargetInfo] = {}
    dtypes: dict[str, torch.dtype] = {}
    for target, weight, bits, changed in whole_weights(tag):
        name = f"{target['name']}.weight"
        pattern = ":".join(str(n) for n in target["pattern"]) if target["pattern"] else None
        infos[name] = TargetInfo(pattern, target["target_live"], changed, bits)
        dtypes[name] = weight.dtype
    trained_dtype = next(iter(dtypes.values()))
    layout = [
        TensorInfo(name, shape, trained_dtype if dtype.is_floating_point else dtype)
        for name, shape, dtype in _shapes(where)
    ]
    about = about_run(source, meta["step"], meta["counters"][0], meta["config"])
    return write_sparse_model(
        output_dir,
        _tensors(tag, where, set(targets)),
        layout=layout,
        targets=infos,
        source_dir=source,
        about=about,
    )


def tensor_files(model_dir: Path) -> dict[str, Path]:
    """Which safetensors file of a model directory holds which tensor."""
    files = sorted(model_dir.glob("*.safetensors"))
    if not files:
        raise ValueError(
            f"{str(model_dir)!r} holds no *.safetensors; name the pruned model that the run started from "
            "with --model_name_or_path"
        )
    index = model_dir / "model.safetensors.index.json"
    if index.is_file():
        names = json.loads(index.read_text())["weight_map"]
        return {n: model_dir / Path(f).name for n, f in names.items()}
    where: dict[str, Path] = {}
    for path in files:
        with safe_open(path, framework="pt") as file:
            where |= dict.fromkeys(file.keys(), path)
    return where


def _shapes(where: dict[str, Path]) -> Iterator[tuple[str, tuple[int, ...], torch.dtype]]:
    for name, path in where.items():
        with safe_open(path, framework="pt") as file:
            part = file.get_slice(name)  # the header only
            yield name, tuple(part.get_shape()), DTYPE_OF_CODE[part.get_dtype()]


def _tensors(
    tag: Path, where: dict[str, Path], targets: set[str]
) -> Iterator[tuple[str, torch.Tensor]]:
    for target, weight, _, _ in whole_weights(tag):
        yield f"{target['name']}.weight", weight
    for name, path in where.items():
        if name not in targets:
            with safe_open(path, framework="pt") as file:
                yield name, file.get_tensor(name)
