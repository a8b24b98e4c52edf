"""Between the model's fused weights and the tensors of its files, and what a checkpoint says of parts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from seft_ds.checkpoint.contents import _slots_in_parts
from seft_ds.checkpoint.layout import TargetMeta
from seft_ds.checkpoint.parts import (
    fused_shape,
    naming_of_folder,
    part_bits,
    stored_infos,
    stored_pieces,
)
from seft_ds.naming import naming_of
from seft_ds.sparse import mask
from seft_ds.targets import Target

NAME = "model.layers.0.mlp.experts.gate_up_proj"
TARGET = Target(NAME, (12, 5), 30, None, 9, 3, [5, 5, 5, 5, 5, 5], [1, 1, 1, 2, 2, 2])


def test_the_parts_of_a_fused_weight_are_the_experts_matrices() -> None:
    naming, fused = naming_of("deepseek_v3"), torch.arange(60.0).view(3, 4, 5)
    pieces = dict(stored_pieces(naming, NAME, fused))
    infos = stored_infos(naming, NAME, tuple(fused.shape), fused.dtype)
    assert [info.name for info in infos] == list(pieces) and {i.shape for i in infos} == {(2, 5)}
    up = pieces["model.layers.0.mlp.experts.1.up_proj.weight"]
    assert torch.equal(up, fused[1, 2:])
    assert fused_shape(TARGET) == (3, 4, 5)
    plain = stored_infos(naming, "lm_head.weight", (4, 5), fused.dtype)
    assert [(i.name, i.shape) for i in plain] == [("lm_head.weight", (4, 5))]


def test_a_mask_by_parts() -> None:
    live = torch.rand(60) < 0.5
    for p, bits in enumerate(part_bits(mask.pack(live), TARGET)):
        assert torch.equal(bits, mask.pack(live[10 * p : 10 * p + 10]))


@pytest.mark.parametrize(
    "changes, problem",
    [
        ({}, None),
        ({"experts": 0}, "6 parts of a weight without experts"),
        ({"experts": 4}, "6 parts of 4 experts"),
        ({"part_live": [5] * 5}, "5 parts of 3 experts"),
        ({"part_slots": [1] * 5}, "5 with slots"),
        ({"target_live": 31}, "don't add up"),
        ({"part_live": [11, 0, 5, 5, 5, 4]}, "too many"),
        ({"part_slots": [6, 0, 0, 1, 1, 1]}, "too many"),
    ],
)
def test_parts_that_do_not_fit_together_are_named(changes: dict, problem: str | None) -> None:
    plain = {
        "name": NAME, "shape": [12, 5], "target_live": 30, "pattern": None, "n_slots": 9, "experts": 3,
        "part_live": [5] * 6, "part_slots": [1, 1, 1, 2, 2, 2],
    }  # fmt: skip
    found = TargetMeta.model_validate(plain | changes).problem_of_parts()
    assert found is None if problem is None else problem in str(found)
    if problem is None:
        assert TargetMeta.model_validate(plain).target() == TARGET


def test_a_slot_in_anothers_part_is_found() -> None:
    position = torch.tensor([3, 14, 25, 36, 31, 47, 48, 59, 50])
    assert _slots_in_parts(TARGET, position)
    assert not _slots_in_parts(TARGET, position.flip(0))


def test_a_folder_of_another_family_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    assert not naming_of_folder(tmp_path, []).matrices
    with pytest.raises(ValueError, match="'llama', but the checkpoint is of a mixture of experts"):
        naming_of_folder(tmp_path, [TARGET])
