from __future__ import annotations

import json
from pathlib import Path

import pytest
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

from seft_ds.config import (
    _ZERO_NAMES,
    check_batch_sizes,
    load_deepspeed_config,
    parse_seft,
    reference_table,
    with_overrides,
)

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize(
    "block, said",
    [
        ({"intervall": 3}, "did you mean 'interval'"),
        ({"zzz": 3}, "known: targets"),
        ({"density": 0}, "density = 0"),
        ({"density": 1.5}, "density = 1.5"),
        ({"interval": 1}, "interval 1 is shorter than window 2"),
        ({"interval": "often"}, "interval = 'often'"),
        ({"window": 0}, "window = 0"),
        ({"scope": "globl"}, "'layer' or 'global'"),
        ({"scope": "global", "waves": True}, "set waves to false"),
        ({"trainable": "rank=0"}, "rank=8"),
        ({"trainable": 100, "density": 0.1}, "give one of them"),
        ({"pattern": "4:2"}, "wanted N:M"),
        ({"drop_fraction": -0.1}, "drop_fraction = -0.1"),
        ({"grow": "magic"}, "'consistency', 'gain' or 'random'"),
        ({"window": True}, "not true or false"),
        ({"window": 10**9}, "window = 1000000000"),  # a run would loop over it
        ({"seed": 2**70}, "seed = "),
        ({"trainable": 10**400}, "trainable = "),
        ({"density": float("nan")}, "density = nan"),
        ({"targets": [[[[]]]]}, "targets"),
        ({"x" * 10**6: 1}, "unknown setting"),
        ({"grow": "x" * 10**6}, "'consistency', 'gain' or 'random'"),
        ("on", "must be an object"),
    ],
)
def test_bad_blocks_say_what_to_change(block, said: str) -> None:
    with pytest.raises(ValueError) as error:
        parse_seft(block)
    assert said in str(error.value) and len(str(error.value)) < 1000


def test_defaults_and_overrides() -> None:
    config = {"zero_optimization": {"stage": 3}, "seft": {"interval": 20}}
    merged = with_overrides(config, {"interval": 60, "release": "revert"})
    seft = parse_seft(merged["seft"])
    assert (seft.interval, seft.release, seft.window) == (60, "revert", 2)
    assert config["seft"] == {"interval": 20}
    by_count = with_overrides({**config, "seft": {"density": 0.02}}, {"trainable": "rank=4"})
    assert by_count["seft"] == {"trainable": "rank=4"}
    assert parse_seft({}).in_waves and not parse_seft({"scope": "global"}).in_waves


def test_deepspeed_config_without_zero_or_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match='no "zero_optimization" section'):
        load_deepspeed_config({"seft": {}})
    with pytest.raises(ValueError, match="no such file"):
        load_deepspeed_config(tmp_path / "none.json")
    (tmp_path / "torn.json").write_text('{"zero')
    with pytest.raises(ValueError, match="is not JSON"):
        load_deepspeed_config(tmp_path / "torn.json")


@pytest.mark.parametrize(
    "text, said",
    [
        ("[]", "JSON object"),
        ('["zero_optimization"]', "JSON object"),
        ('{"zero_optimization": 5}', '"zero_optimization" = 5'),
        ('{"zero_optimization": {"stage": "3"}}', "'3'"),
        ('{"zero_optimization": {"stage": true}}', "True"),
        ('{"zero_optimization": {"stage": 3}, "zero_optimization": {}}', "twice"),
        ('{"zero_optimization": {"stage": 3, "overlap_com": true}}', "did you mean 'overlap_comm'"),
        (
            '{"zero_optimization": {"stage": 3, "stage3_prefetch_bucket": 1}}',
            "stage3_prefetch_bucket_size",
        ),
        ('{"zero_optimization": {}, "gradient_clipping": NaN}', "NaN"),
        ("[" * 100_000, "not JSON"),
    ],
)
def test_bad_deepspeed_configs(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "c.json").write_text(text)
    with pytest.raises(ValueError) as error:
        load_deepspeed_config(tmp_path / "c.json")
    assert said in str(error.value)


def test_the_known_zero_names_are_those_of_deepspeed() -> None:
    fields = DeepSpeedZeroConfig.model_fields
    assert DeepSpeedZeroConfig.model_config["populate_by_name"]  # it takes both of a name
    assert set(_ZERO_NAMES) == {*fields, *(field.alias for field in fields.values() if field.alias)}
    for name in _ZERO_NAMES:
        load_deepspeed_config({"zero_optimization": {"stage": 3, name: 3}})


@pytest.mark.parametrize("value", [object(), {1: {2}}, float, b"x"])
def test_a_dict_that_is_no_json(value) -> None:
    with pytest.raises(ValueError, match="DeepSpeed config"):
        load_deepspeed_config({"zero_optimization": {"stage": 3}, "x": value})


@pytest.mark.parametrize("value", [0, -2, 1.5, "8", True, [], {}])
def test_batch_sizes_are_whole_numbers(value) -> None:
    for name in (
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "gradient_accumulation_steps",
    ):
        with pytest.raises(ValueError, match=name):
            check_batch_sizes({name: value}, 1)


@pytest.mark.parametrize("path", sorted((ROOT / "ds_configs").glob("*.json")), ids=lambda p: p.name)
def test_shipped_configs_are_complete(path: Path) -> None:
    config = load_deepspeed_config(path)
    parse_seft(config["seft"])
    assert config["zero_optimization"]["stage"] in (0, 1, 2, 3)
    assert json.loads(path.read_text()) == config


def test_the_documented_reference_is_the_code() -> None:
    assert reference_table() in (ROOT / "docs/configuration.md").read_text()


@pytest.mark.parametrize(
    "total, micro, steps, ranks, fits",
    [(8, 2, 2, 2, True), (8, 2, 2, 3, False), (8, 2, None, 4, True), (8, 2, None, 3, False),
     (9, None, None, 2, False), ("auto", 2, 2, 3, True), (None, 2, 2, 5, True)],
)  # fmt: skip
def test_batch_sizes_that_the_ranks_cannot_make(total, micro, steps, ranks, fits) -> None:
    config = {
        "train_batch_size": total,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": steps,
    }
    if fits:
        check_batch_sizes(config, ranks)
    else:
        with pytest.raises(ValueError, match=f"can't be had on {ranks} ranks"):
            check_batch_sizes(config, ranks)


def test_every_score_can_be_chosen_and_every_choice_is_a_score() -> None:
    import typing

    from seft_ds.config import SeftConfig
    from seft_ds.sparse.scores import GROW, PRUNE

    for field, scores in (("grow", GROW), ("prune", PRUNE)):
        assert set(typing.get_args(SeftConfig.model_fields[field].annotation)) == set(scores)
