"""Between the tensors that a model holds and those in its files, where fused experts are one a matrix.

`seft_ds.naming` says what they are called. Everything else is the same tensor here and there, if under
another name.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from seft_ds.checkpoint.export import TargetInfo
from seft_ds.json_file import read_object, shown
from seft_ds.naming import WITH_EXPERTS, Naming, naming_of
from seft_ds.sparse import mask
from seft_ds.targets import Target
from seft_ds.tensor_files import TensorInfo


def naming_of_folder(folder: Path, targets: list[Target]) -> Naming:
    """The naming of a model folder that has these targets.

    Raises:
        ValueError: no or a damaged config.json, or of a family that has no experts though the targets do.
    """
    model_type = read_object(folder / "config.json").get("model_type")
    naming = naming_of(model_type)
    if not naming.matrices and any(t.experts for t in targets):
        raise ValueError(
            f"{folder} has model_type {shown(model_type)}, but the checkpoint is of a mixture of experts; "
            f"wanted {', '.join(WITH_EXPERTS)}: name the model that the run started from"
        )
    return naming


def stored_infos(
    naming: Naming, name: str, shape: tuple[int, ...], dtype: torch.dtype
) -> list[TensorInfo]:
    """What the files have of the model's tensor `name`."""
    if not naming.is_fused(name):
        return [TensorInfo(naming.in_files(name), shape, dtype)]
    parts = naming.part_names(name, shape[0])
    rows = shape[0] * shape[1] // len(parts)
    return [TensorInfo(part, (rows, shape[2]), dtype) for part in parts]


def stored_pieces(
    naming: Naming, name: str, tensor: torch.Tensor
) -> Iterator[tuple[str, torch.Tensor]]:
    """The model's tensor `name` as the files have it; a fused one, (experts, out, in), as views."""
    if not naming.is_fused(name):
        yield naming.in_files(name), tensor
        return
    parts = naming.part_names(name, tensor.shape[0])
    yield from zip(parts, tensor.view(len(parts), -1, tensor.shape[2]).unbind(), strict=True)


def fused_shape(target: Target) -> tuple[int, ...]:
    """A target's shape in the model: (out, in), of a fused weight (experts, out of one, in)."""
    if not target.experts:
        return target.shape
    return target.experts, target.shape[0] // target.experts, target.shape[1]


def target_infos(
    naming: Naming, target: Target, infos: list[TargetInfo]
) -> Iterator[tuple[str, TargetInfo]]:
    """The names in files of a target's parts, with what is known of each."""
    if not target.experts:
        yield naming.in_files(target.weight_name), infos[0]
        return
    yield from zip(naming.part_names(target.name, target.experts), infos, strict=True)


def part_bits(bits: torch.Tensor, target: Target) -> list[torch.Tensor]:
    """A packed mask of the whole weight, cut into packed masks of its parts."""
    n = target.part_numel
    return [mask.cut(bits, p * n, (p + 1) * n) for p in range(target.n_parts)]
