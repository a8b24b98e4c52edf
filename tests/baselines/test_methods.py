"""What each method fixes, and what it refuses; how flags, a recipe and the DeepSpeed config meet."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from seft_ds.baselines.methods import METHODS, fixed_settings, rank_of
from seft_ds.config import parse_seft
from seft_ds.train.arguments import Arguments, parse


def test_every_methods_settings_are_a_seft_block() -> None:
    for name, method in METHODS.items():
        assert parse_seft(fixed_settings(name, {})), name
        assert method.about
        if method.adapter:
            assert not method.settings
    assert not parse_seft(METHODS["spiel"].settings).adapt


@pytest.mark.parametrize(
    "name, chosen, said",
    [
        ("fixed", {"drop_fraction": 0.2}, "means drop_fraction = 0.0"),
        ("random_grow", {"grow": "magnitude"}, "means grow = random"),
        ("spiel", {"release": "fold"}, "means release = revert"),
        ("masked_full", {"density": 0.1}, "trains every live weight"),
        ("masked_full", {"trainable": "rank=4"}, "means trainable = live"),
        ("fixed", {"dense_model": "dense"}, "means dense_model = None"),
        ("lora", {"interval": 20}, "has no slots"),
        ("spp", {"density": 0.1}, "has no slots"),
        ("adalora", {}, "wanted one of"),
    ],
)
def test_contradictions_are_refused(name: str, chosen: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        fixed_settings(name, chosen)


def test_what_agrees_is_not_refused() -> None:
    fixed = fixed_settings("fixed", {"drop_fraction": 0, "window": 3})
    assert fixed == {"drop_fraction": 0.0, "dense_model": None}
    assert fixed_settings("lora", {"trainable": "rank=4", "targets": ["q_proj"]}) == {}


@pytest.mark.parametrize("trainable", [None, 500, "live", "rank=0", "rank=x"])
def test_an_adapter_needs_a_rank(trainable: Any) -> None:
    with pytest.raises(ValueError, match="--trainable rank=8"):
        rank_of(trainable, "lora")
    assert rank_of("rank=16", "lora") == 16


def parsed(folder: Path, *flags: str, seft: dict | None = None, recipe: str = "") -> Arguments:
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    (folder / "text.txt").write_text("a text\n")
    (folder / "model").mkdir(exist_ok=True)
    (folder / "model" / "config.json").write_text("{}")
    save_file({"w": torch.ones(2)}, folder / "model" / "model.safetensors")
    (folder / "r.yaml").write_text(recipe)
    config = {"zero_optimization": {"stage": 2}, "bf16": {"enabled": "auto"}, "seft": seft or {}}
    (folder / "ds.json").write_text(json.dumps(config))
    try:
        return parse(
            ["--config", str(folder / "r.yaml"), "--model_name_or_path", str(folder / "model"),
             "--train_file", str(folder / "text.txt"), "--output_dir", str(folder / "out"),
             "--deepspeed", str(folder / "ds.json"), *flags]
        )  # fmt: skip
    finally:
        unset_hf_deepspeed_config()


def test_the_method_stands_in_the_seft_block(tmp_path: Path) -> None:
    recipe = "seft:\n  density: 0.0115\n  drop_fraction: 0.1\n"
    arguments = parsed(tmp_path, "--method", "fixed", "--trainable", "rank=4", recipe=recipe)
    assert arguments.deepspeed["seft"] == {
        "drop_fraction": 0.0,
        "trainable": "rank=4",
        "dense_model": None,
    }
    assert arguments.method.method == "fixed"
    arguments = parsed(tmp_path, "--method=masked_full", recipe=recipe, seft={"density": 0.3})
    assert arguments.deepspeed["seft"] == METHODS["masked_full"].settings
    arguments = parsed(tmp_path, "--method", "lora", "--trainable", "rank=4", recipe=recipe)
    assert arguments.deepspeed["seft"] == {"drop_fraction": 0.1, "trainable": "rank=4"}
    assert parsed(tmp_path, recipe=recipe).method.method == "seft"
    spiel = parsed(tmp_path, recipe="method: spiel\ntrainable: rank=2\n").deepspeed["seft"]
    assert spiel == {**METHODS["spiel"].settings, "trainable": "rank=2"}


@pytest.mark.parametrize(
    "flags, recipe, said",
    [
        (["--method", "fixed", "--seft.drop_fraction", "0.2"], "", "means drop_fraction"),
        ([], "method: fixed\nseft:\n  drop_fraction: 0.2\n", "means drop_fraction"),
        (["--method", "lora"], "", "needs the rank"),
        (["--method", "lora", "--trainable", "500"], "", "needs the rank"),
        (["--method", "lora", "--trainable", "rank=2", "--resume", "auto"], "", "is not resumed"),
        (["--method", "spp", "--trainable", "rank=2", "--save_strategy", "steps"], "", "not resumed"),
        (["--method", "sqft", "--trainable", "rank=2", "--lora_dropout", "1"], "", "--lora_dropout"),
        (["--method", "sqft", "--trainable", "rank=2", "--lora_alpha", "0"], "", "--lora_alpha"),
        (["--lora_alpha", "8"], "", "--method seft has none"),
        (["--trainable", "rank=2", "--seft.trainable", "rank=3"], "", "give one of them"),
        (["--trainable", "rank=2", "--seft.density", "0.1"], "", "give one of them"),
        (["--trainable", "rank"], "", "wanted a count"),
        (["--method", "x"], "", "wanted one of"),
        (["--distill", "model", "--distill_weight", "0"], "", "--distill_weight 0.0"),
        (["--distill", "model", "--loss_type", "dft"], "", "mixes its own loss"),
        (["--seft.adapt", "false"], "", 'set pattern to "none"'),
        (["--trainable", "live"], "", "set drop_fraction to 0"),
    ],
)  # fmt: skip
def test_arguments_that_contradict_each_other(
    tmp_path: Path, flags: list[str], recipe: str, said: str
) -> None:
    with pytest.raises(ValueError) as caught:
        parsed(tmp_path, *flags, recipe=recipe)
    assert said in str(caught.value)
