"""The plan of memory against what is known of a model, and against a run."""

from __future__ import annotations

import pytest
import torch

from seft_ds.prune.calls import enter, linear_inputs
from seft_ds.prune.empty import empty_model
from seft_ds.prune.plan import input_groups, pruning_plan
from seft_ds.prune.walk import InMemory
from tests.prune.models import KINDS, saved, tiny_model, tokens


@pytest.mark.parametrize("kind", KINDS)
def test_groups_by_name_are_those_of_the_tensors(kind):
    model = tiny_model(kind)
    source = InMemory(model)
    with torch.no_grad():
        hidden, calls = enter(model, source.blocks, tokens(1, 6)[0])
        seen = linear_inputs(source.blocks[0], calls[0], hidden)
    assert sorted(map(sorted, input_groups(source.blocks[0]))) == sorted(
        sorted(names) for names, _ in seen
    )


def test_the_parts_are_what_they_say(tmp_path):
    model = empty_model(saved(tiny_model(), tmp_path / "m"), torch.bfloat16, torch.device("cpu"))
    settings = dict(sequences=5, length_tokens=12, dtype=torch.bfloat16)
    plan = pruning_plan(model, "sparsegpt", **settings, ranks=2)
    run = plan.stages["run a block"]
    block = 2 * 16 * 16 + 2 * 8 * 16 + 3 * 16 * 24 + 2 * 16
    assert plan.block_bytes == run["block"] == 2 * block
    assert run["hidden states"] == 3 * 12 * 16 * 2  # of 5 sequences, 3 on this rank
    assert run["statistics"] == 4 * (3 * 16 * 16 + 24 * 24)
    assert plan.stages["read the embedding"]["embedding"] == 2 * 64 * 16 * 2
    assert plan.peak_bytes == max(sum(parts.values()) for parts in plan.stages.values())
    assert plan.device_bytes < plan.peak_bytes
    assert any("one block's weights" in line for line in plan.lines())
    assert "hidden states" not in str(pruning_plan(model, "magnitude", **settings).stages)


def test_what_it_grows_with(tmp_path):
    model = tiny_model()
    base = dict(sequences=64, length_tokens=128, dtype=torch.float32)

    def peak(method="wanda", **changes):
        return pruning_plan(model, method, **(base | changes)).peak_bytes

    assert peak(sequences=128) > 1.5 * peak()
    assert peak(dtype=torch.bfloat16) < 0.7 * peak()
    assert peak(ranks=4) < 0.5 * peak()
    assert peak("magnitude", sequences=9999) == peak("magnitude")
