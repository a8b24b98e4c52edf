"""A sparse model from a checkpoint, without DeepSpeed and without the original ranks.

Memory: one weight at a time, in up to three copies while it is put together (its pieces, the whole, its
mask), whatever the size of the model.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from seft_ds.checkpoint.contents import check_contents, check_total
from seft_ds.checkpoint.export import TargetInfo, TensorInfo, about_run, write_sparse_model
from seft_ds.checkpoint.layout import CheckpointMeta, check_listed, find_tag, read_meta
from seft_ds.checkpoint.manifest import find_problems
from seft_ds.checkpoint.pieces import Pieces
from seft_ds.json_file import shown
from seft_ds.sparse import mask
from seft_ds.tensor_files import DTYPE_OF_CODE, INDEX_NAME, WEIGHTS_NAME, open_tensors, read_index
from seft_ds.zero.fingerprint import fingerprint


def export_checkpoint(
    checkpoint: Path, output_dir: Path, source_dir: str | None = None
) -> dict[str, Any]:
    """Write the model of a checkpoint; returns its sparsity record.

    source_dir: the pruned model that the run started from (default: where it was then). Config and
        tokenizer come from it; of its weights only a checkpoint with `checkpoint_base` "reference" needs
        any, and then they are compared with the fingerprints that the checkpoint holds.

    Raises:
        ValueError: no checkpoint there, a damaged one, no base model, or one that is not the run's.
    """
    tag = find_tag(checkpoint)
    problems = find_problems(tag)
    if problems:
        raise ValueError(f"the checkpoint {tag} is damaged: {'; '.join(problems[:3])}")
    meta = read_meta(tag)
    check_listed(tag, meta)
    source = Path(source_dir or meta.source_dir)
    if not os.path.isfile(source / "config.json"):
        raise ValueError(
            f"{shown(str(source))} has no config.json: name the pruned model that the run started from with "
            "--model_name_or_path"
        )
    pieces = Pieces(tag, meta)
    check_total(pieces, sum(check_contents(pieces)))
    base = BaseModel(source, meta) if meta.base == "reference" else None
    return write_sparse_model(
        output_dir,
        _tensors(pieces, base),
        layout=_layout(meta, base),
        targets=_target_infos(pieces, base),
        source_dir=source,
        about=about_run(source, meta.step, (meta.n_events, meta.n_exchanges), meta.config),
    )


class BaseModel:
    """The pruned model that a run started from, its weights as the run loaded them."""

    def __init__(self, folder: Path, meta: CheckpointMeta):
        self.meta = meta
        self.where = tensor_files(folder)
        self.folder = folder
        self._targets = {f"{t.name}.weight" for t in meta.targets}
        missing = sorted((self._targets | set(meta.fingerprints)) - set(self.where))
        if missing:
            raise ValueError(
                f"{folder} has no tensor {missing[0]}: it is not the model of this run"
            )

    def info(self, name: str) -> TensorInfo:
        with self._open(name) as file:
            part = file.get_slice(name)  # the header only
            return TensorInfo(name, tuple(part.get_shape()), self._dtype(part.get_dtype()))

    def _open(self, name: str) -> Any:
        """The file that holds a tensor. ValueError, naming it, if it doesn't."""
        file = open_tensors(self.where[name])
        if name not in file.keys():  # noqa: SIM118 (not a dict)
            raise ValueError(f"{self.where[name]} lacks {shown(name)}, which the index puts there")
        return file

    def tensor(self, name: str) -> torch.Tensor:
        """One weight in the run's dtype. ValueError if it is not the one that the run loaded."""
        with self._open(name) as file:
            code = file.get_slice(name).get_dtype()
            value = file.get_tensor(name).to(self._dtype(code)).contiguous()
        wanted = self.meta.fingerprints.get(name)
        if wanted is None:  # a buffer, or a copy of a tied weight
            return value
        # A run turns the -0.0 of linear layers into +0.0.
        for candidate in (value, value.masked_fill(value == 0, 0)):
            if f"{fingerprint(candidate.view(-1), 0):016x}" == wanted:
                return candidate
        raise ValueError(
            f"{name} of {self.folder} is not the weight that the checkpoint's run started from; name that "
            "model with --model_name_or_path"
        )

    def _dtype(self, code: str) -> torch.dtype:
        stored = DTYPE_OF_CODE.get(code)
        if stored is None:
            raise ValueError(f"{self.folder} holds a tensor in {code}, which can't be written")
        return getattr(torch, self.meta.dtype) if stored.is_floating_point else stored

    def others(self) -> list[str]:
        return [name for name in self.where if name not in self._targets]


def tensor_files(model_dir: Path) -> dict[str, Path]:
    """Which safetensors file of a model directory holds which tensor."""
    single = model_dir / WEIGHTS_NAME  # what transformers loads first
    if os.path.isfile(model_dir / INDEX_NAME) and not os.path.isfile(single):
        return {name: model_dir / file for name, file in read_index(model_dir).items()}
    files = sorted(path for path in model_dir.glob("*.safetensors") if os.path.isfile(path))
    files = [single] if single in files else files
    if not files:
        raise ValueError(
            f"{str(model_dir)!r} holds no *.safetensors; name the pruned model that the run started from "
            "with --model_name_or_path"
        )
    where: dict[str, Path] = {}
    for path in files:
        with open_tensors(path) as file:
            where |= dict.fromkeys(file.keys(), path)
    return where


def whole_weight(pieces: Pieces, base: BaseModel | None, i: int) -> torch.Tensor:
    """The effective weight of target i, (out, in)."""
    target = pieces.meta.targets[i]
    numel = target.shape[0] * target.shape[1]
    if base is None:
        return pieces.weight(i, 0, numel).view(target.shape)
    flat = base.tensor(f"{target.name}.weight").view(-1)
    if flat.numel() != numel:
        raise ValueError(f"{target.name} of {base.folder} has not the shape {target.shape}")
    position, value = pieces.touched(i, 0, numel)
    flat[position] = value
    return flat.view(target.shape)


def _target_infos(pieces: Pieces, base: BaseModel | None) -> dict[str, TargetInfo]:
    infos = {}
    for i, meta in enumerate(pieces.meta.targets):
        target = meta.target()
        live = pieces.bits(i, "live_bits", 0, target.numel)
        start = pieces.bits(i, "start_bits", 0, target.numel)
        infos[f"{target.name}.weight"] = TargetInfo(
            target.pattern_text,
            target.target_live if pieces.meta.config.get("adapt", True) else None,
            mask.count(live ^ start),
            partial(pieces.bits, i, "live_bits", 0, target.numel),  # read again, rather than kept
        )
    return infos


def _layout(meta: CheckpointMeta, base: BaseModel | None) -> list[TensorInfo]:
    dtype = getattr(torch, meta.dtype)
    targets = [TensorInfo(f"{t.name}.weight", tuple(t.shape), dtype) for t in meta.targets]
    if base is not None:
        return targets + [base.info(name) for name in base.others()]
    others = [TensorInfo(o.name, tuple(o.shape), getattr(torch, o.dtype)) for o in meta.others]
    return targets + others


def _tensors(pieces: Pieces, base: BaseModel | None) -> Iterator[tuple[str, torch.Tensor]]:
    for i, target in enumerate(pieces.meta.targets):
        yield f"{target.name}.weight", whole_weight(pieces, base, i)
    if base is not None:
        for name in base.others():
            yield name, base.tensor(name)
        return
    for k, other in enumerate(pieces.meta.others):
        yield other.name, pieces.other(k, 0, other.numel).view(other.shape)
