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
from seft_ds.checkpoint.model_files import ModelFiles, open_model_files
from seft_ds.checkpoint.parts import (
    fused_shape,
    naming_of_folder,
    stored_infos,
    stored_pieces,
    target_infos,
)
from seft_ds.checkpoint.pieces import Pieces
from seft_ds.checkpoint.tokenizer_files import read_changes
from seft_ds.console import has_weights
from seft_ds.json_file import shown
from seft_ds.naming import FUSED, Naming
from seft_ds.sparse import mask
from seft_ds.tensor_files import Stored
from seft_ds.zero.fingerprint import fingerprint
from seft_ds.zero.weight_state import never_moved


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
    files = _files_of(source, meta)
    base = BaseModel(files, meta) if meta.base == "reference" else None
    return write_sparse_model(
        output_dir,
        files.with_extras(_tensors(pieces, base, files)),
        layout=_layout(meta, base, files) + files.extra_layout(getattr(torch, meta.dtype)),
        targets=_target_infos(pieces, files.naming),
        source_dir=source,
        about=about_run(source, meta.step, (meta.n_events, meta.n_exchanges), meta.config),
        tokenizer=read_changes(tag.parent),
        untied=bool(files.untied),
    )


def _files_of(source: Path, meta: CheckpointMeta) -> ModelFiles:
    """The files of the run's pruned model; of a folder without weights only the family's names."""
    naming = naming_of_folder(source, [t.target() for t in meta.targets])
    if has_weights(source):
        return open_model_files(source)
    if meta.base == "reference":
        raise ValueError(
            f"{str(source)!r} holds no *.safetensors; name the pruned model that the run started from with "
            "--model_name_or_path"
        )
    return ModelFiles(source, naming, {}, torch.float32)


class BaseModel:
    """The pruned model that a run started from, its weights as the run loaded them, by their names in the
    model: what the files have of fused experts is put together."""

    def __init__(self, files: ModelFiles, meta: CheckpointMeta):
        self.meta, self.folder, self.naming = meta, files.folder, files.naming
        self._files = files.stored
        targets = [t.target() for t in meta.targets]
        parts = {key for group in files.converted for key, _ in group.parts}
        self._stored: dict[str, list[str]] = {}  # name in the model -> those in the files
        for key in self._files.keys() - parts:
            name = self.naming.fused_name(key) or self.naming.in_model(key)
            self._stored.setdefault(name, []).append(key)
        self._targets = {t.weight_name for t in targets}
        self._buffers = {o.name: getattr(torch, o.dtype) for o in meta.others if o.buffer}
        wanted = (self._targets | set(meta.fingerprints)) - files.verbatim
        missing = sorted(wanted - set(self._stored))
        if missing:
            raise ValueError(
                f"{self.folder} has no tensor {missing[0]}: it is not the model of this run"
            )

    def infos(self, name: str) -> list[TensorInfo]:
        """What the files have of one weight."""
        return [
            TensorInfo(key, self._files[key].shape, self._dtype(self._files[key]))
            for key in sorted(self._stored[name])
        ]

    def _read(self, key: str) -> torch.Tensor:
        stored = self._files[key]
        return stored.read().to(self._dtype(stored)).contiguous()

    def tensor(self, name: str) -> torch.Tensor:
        """One weight in the run's dtype and the model's shape. ValueError if it is not the one that the run
        loaded."""
        if self.naming.is_fused(name):
            value = self._fused(name)
        else:
            value = self._read(self._stored[name][0])
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

    def _fused(self, name: str) -> torch.Tensor:
        """(experts, out, in) of a fused weight's matrices."""
        keys = self._stored[name]
        experts = len(keys) // FUSED[name.rpartition(".")[2]]
        parts = self.naming.part_names(name, experts)
        if set(parts) != set(keys):
            missing = min(set(parts) ^ set(keys))
            raise ValueError(f"{self.folder}: {missing} is missing or one too many of {name}")
        matrices = [self._read(key) for key in parts]
        if any(m.shape != matrices[0].shape or m.dim() != 2 for m in matrices):
            raise ValueError(f"{self.folder}: the experts of {name} are of different shapes")
        return torch.cat(matrices).view(experts, -1, matrices[0].shape[1])

    def _dtype(self, stored: Stored) -> torch.dtype:
        """What a tensor was in the run: weights are in the run's dtype, buffers have their own."""
        plain = stored.dtype.is_floating_point
        weights = getattr(torch, self.meta.dtype) if plain else stored.dtype
        return self._buffers.get(self.naming.in_model(stored.key), weights)

    def others(self) -> list[str]:
        return sorted(name for name in self._stored if name not in self._targets)


def whole_weight(pieces: Pieces, base: BaseModel | None, i: int) -> torch.Tensor:
    """The effective weight of target i, in the model's shape."""
    target = pieces.meta.targets[i].target()
    shape = fused_shape(target)
    if base is None:
        return pieces.weight(i, 0, target.numel).view(shape)
    flat = base.tensor(target.weight_name).view(-1)
    if flat.numel() != target.numel:
        raise ValueError(f"{target.name} of {base.folder} has not the shape {shape}")
    position, value = pieces.touched(i, 0, target.numel)
    flat[position] = value
    return flat.view(shape)


def _target_infos(pieces: Pieces, naming: Naming) -> dict[str, TargetInfo]:
    infos: dict[str, TargetInfo] = {}
    adapt = pieces.meta.config.get("adapt", True)
    for i, meta in enumerate(pieces.meta.targets):
        target = meta.target()
        ranges = [
            (p * target.part_numel, (p + 1) * target.part_numel) for p in range(target.n_parts)
        ]
        changed = [
            mask.count(pieces.bits(i, "live_bits", *at) ^ pieces.bits(i, "start_bits", *at))
            for at in ranges
        ]
        if pieces.meta.base == "reference":
            touched = [mask.count(pieces.bits(i, "touched_bits", *at)) for at in ranges]
        else:  # not noted; a weight that tokens reached has slots that moved
            touched = [n + c for n, c in zip(target.slots_by_part, changed, strict=True)]
        delta = pieces.by_slot(i, "delta", 0, target.n_slots)
        idle = never_moved(delta, target.slots_by_part, touched)
        parts = [
            TargetInfo(
                target.pattern_text,
                wanted if adapt else None,
                moved,
                partial(pieces.bits, i, "live_bits", *at),  # read again, rather than kept
                off,
            )
            for at, wanted, moved, off in zip(
                ranges, target.live_by_part, changed, idle, strict=True
            )
        ]
        infos |= target_infos(naming, target, parts)
    return infos


def _layout(meta: CheckpointMeta, base: BaseModel | None, files: ModelFiles) -> list[TensorInfo]:
    dtype = getattr(torch, meta.dtype)
    shapes = [
        (t.weight_name, fused_shape(t), dtype) for t in (meta.target() for meta in meta.targets)
    ]
    if base is None:
        shapes += [
            (o.name, tuple(o.shape), getattr(torch, o.dtype))
            for o in meta.others
            if o.name not in files.verbatim
        ]
    found = [info for each in shapes for info in stored_infos(files.naming, *each)]
    if base is not None:
        found += [info for name in base.others() for info in base.infos(name)]
    return found


def _tensors(
    pieces: Pieces, base: BaseModel | None, files: ModelFiles
) -> Iterator[tuple[str, torch.Tensor]]:
    naming = files.naming
    for i, target in enumerate(pieces.meta.targets):
        name = target.target().weight_name
        yield from stored_pieces(naming, name, whole_weight(pieces, base, i))
    if base is not None:
        for name in base.others():
            yield from stored_pieces(naming, name, base.tensor(name))
        return
    for k, other in enumerate(pieces.meta.others):
        if other.name in files.verbatim:
            continue
        value = pieces.other(k, 0, other.numel).view(other.shape)
        yield from stored_pieces(naming, other.name, value)
