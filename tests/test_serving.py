"""The serving benchmarks time what they say: each form is the same layer; the 2:4 script finds its layers."""

from __future__ import annotations

import pytest
import torch

from benchmarks.semi_structured import layers_of_pattern
from benchmarks.serving_cpu import bytes_of, fastest, sparse_weight, ways_of
from tests.tiny import tiny_model


def test_every_form_is_the_same_layer() -> None:
    weight = sparse_weight(48, 40, 0.6)
    assert int(weight.count_nonzero()) == round(0.4 * weight.numel())
    for tokens in (1, 7):
        x = torch.randn(tokens, 40)
        ways, wanted = ways_of(weight, x), x @ weight.t()
        torch.testing.assert_close(ways["dense fp32"](), wanted)
        torch.testing.assert_close(ways["CSR fp32"]().t(), wanted)
        torch.testing.assert_close(ways["dense bf16"]().float(), wanted, rtol=0.05, atol=0.1)
        assert set(fastest(ways, rounds=2)) == set(ways) == set(bytes_of(weight))


def test_bytes_are_those_of_values_columns_and_rows() -> None:
    weight = sparse_weight(48, 40, 0.6)
    live = int(weight.count_nonzero())
    assert bytes_of(weight)["CSR fp32"] == 4 * live + 4 * live + 4 * 49


def test_the_layers_of_a_pattern_are_those_of_the_record() -> None:
    model = tiny_model("llama24")
    names = [n for n, m in model.named_modules() if n.endswith("_proj")]
    record = {"pattern": "mixed", "targets": {f"{n}.weight": {"pattern": "2:4"} for n in names[:3]}}
    record["targets"] |= {f"{n}.weight": {"pattern": None} for n in names[3:]}
    assert [n for n, _ in layers_of_pattern(model, record)] == names[:3]
    with pytest.raises(ValueError, match="no layer of this model is 2:4"):
        layers_of_pattern(model, {"pattern": "unstructured", "targets": {}})
