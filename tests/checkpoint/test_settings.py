"""The settings that a checkpoint records are read back, whatever was given and whatever followed from it."""

from __future__ import annotations

import pytest

from seft_ds.checkpoint.layout import CheckpointMeta
from seft_ds.config import parse_seft


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"interval": 20, "window": 5},
        # As `make quickstart ARGS=--smoke` gives them: what is given is the default without a dense model.
        {"dense_model": "dense", "interval": 2, "window": 2},
        {"dense_model": "dense", "scope": "layer", "drop_fraction": 0.1, "window": 2},
        {"dense_model": "dense", "interval": 20, "exchanges": 2},
        {"trainable": "rank=8"},
    ],
)
def test_the_recorded_settings_are_no_damage(given: dict) -> None:
    config = parse_seft(given).model_dump()
    assert CheckpointMeta.model_construct(config=config)._problem_of_settings() is None


def test_a_damaged_setting_is_seen() -> None:
    config = parse_seft({"dense_model": "dense"}).model_dump() | {"interval": 3}
    assert "shorter than window 10" in str(
        CheckpointMeta.model_construct(config=config)._problem_of_settings()
    )
