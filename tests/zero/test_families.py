"""Which models are repaired, and what is said of those that are not: one rule with pruning and planning."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import nn

from seft_ds.config import parse_seft
from seft_ds.prune.blocks import decoder_blocks, left_dense
from seft_ds.train.planning import shapes_of_model
from seft_ds.zero.attach import attach_slots
from tests.ranks import run_threads

SIZES = {
    "vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 24, "num_key_value_heads": 2, "max_position_embeddings": 32,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "falcon": {k: v for k, v in SIZES.items() if k != "num_key_value_heads"},
    "gpt2": {"vocab_size": 64, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32},
    "gpt_oss": {**SIZES, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
    "lfm2": {**SIZES, "layer_types": ["conv", "full_attention"]},
}


def dense(kind: str) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **FAMILIES[kind]))


def zero_(model: nn.Module, pattern: str) -> Any:
    """Set half of every weight to 0 whose name a pattern finds; the model."""
    for name, p in model.named_parameters():
        if p.dim() > 1 and re.search(pattern, name):
            p.data.view(-1)[::2] = 0
    return model


def attach(model: nn.Module, **seft: Any) -> list[str]:
    """The names of the targets."""
    config = parse_seft({"density": 0.05, **seft})
    (attached,) = run_threads(1, lambda ranks: attach_slots(model, config, ranks))
    return [a.target.name for a in attached]


def refused(model: nn.Module, **seft: Any) -> str:
    with pytest.raises(ValueError) as said:
        attach(model, **seft)
    return str(said.value)


def planned(model: nn.Module, **seft: Any) -> list[str]:
    config = parse_seft({"density": 0.05, **seft})
    return [t.name for t in shapes_of_model(model, config, 0.5).targets]


def pruned(model: nn.Module, targets: Any = "auto") -> list[str]:
    return [name for block in decoder_blocks(model, targets=targets) for name in block.matrices]


def test_subclasses_of_linear_are_pruned_planned_and_repaired() -> None:
    names = pruned(dense("falcon"))
    assert len(names) == 8 and names == planned(dense("falcon"))
    model = zero_(dense("falcon"), r"\.h\.\d")
    before = model(torch.arange(9)[None]).logits
    assert attach(model) == names
    layer = model.transformer.h[0].mlp.dense_h_to_4h
    assert type(layer).__mro__[2].__name__ == "FalconLinear", "what looks for its class finds it"
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(torch.arange(9)[None]).logits, before)


def test_a_transposed_weight_is_refused_by_name_everywhere() -> None:
    said = "Conv1D keeps its weight transposed"
    for model in (dense("gpt2"), zero_(dense("gpt2"), r"\.h\.\d")):
        message = refused(model)
        assert said in message and "rune the model first" not in message
    for use in (pruned, planned):
        with pytest.raises(ValueError, match=said):
            use(dense("gpt2"))


def test_experts_that_are_not_supported_matter_only_if_they_are_pruned() -> None:
    """gpt-oss's have biases. Attention alone is pruned, planned and repaired; its experts are not."""
    attention = ["q_proj", "k_proj", "v_proj", "o_proj"]
    names = [f"model.layers.{i}.self_attn.{n}" for i in (0, 1) for n in attention]
    assert attach(zero_(dense("gpt_oss"), "self_attn")) == names
    message = refused(zero_(dense("gpt_oss"), "self_attn|experts"))
    assert "experts.gate_up_proj has 50% zeros, as 3 others have" in message
    assert message.endswith(
        "experts with biases are not supported. To repair the other pruned layers only, name them: "
        '"targets": ["q_proj", "k_proj", "v_proj", "o_proj"]'
    )
    assert attach(zero_(dense("gpt_oss"), "self_attn|experts"), targets=attention) == names
    assert "leave it out of" in refused(zero_(dense("gpt_oss"), "."), targets=["down_proj"])
    with pytest.raises(ValueError, match='"targets": .*q_proj'):
        planned(dense("gpt_oss"))
    assert planned(dense("gpt_oss"), targets=attention) == names
    with pytest.raises(ValueError, match=r"--targets q_proj k_proj v_proj o_proj$"):
        pruned(dense("gpt_oss"))
    assert pruned(dense("gpt_oss"), attention) == names
    with pytest.raises(ValueError, match="--targets up_proj: no layer"):
        pruned(dense("gpt_oss"), ["up_proj"])


def test_convolutions_are_left_dense_and_said_so() -> None:
    model = dense("lfm2")
    names = pruned(model)
    assert sum("conv.conv" in n for n in names) == 0 and len(names) == 12
    assert left_dense(decoder_blocks(model)) == (0.0, [])  # a filter a channel is no matrix
    blocks = decoder_blocks(model, targets=["q_proj"])
    assert [list(b.matrices) for b in blocks] == [[], ["model.layers.1.self_attn.q_proj"]]
    share, kinds = left_dense(blocks)
    weights = [p for n, p in model.named_parameters() if "layers." in n and p.dim() == 2]
    assert share == pytest.approx(1 - 16 * 16 / sum(p.numel() for p in weights))
    assert "conv.in_proj.weight" in kinds and "self_attn.q_proj.weight" not in kinds


def test_quantised_layers_are_refused_by_name() -> None:
    model = zero_(dense("falcon"), r"\.h\.\d")
    layer = model.transformer.h[1].mlp.dense_h_to_4h
    layer.weight = nn.Parameter(layer.weight.data.to(torch.int8), requires_grad=False)
    assert "quantised (FalconLinear, torch.int8)" in refused(model)
