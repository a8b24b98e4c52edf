"""The page of families is what its benchmark found, and a family goes all the way as the page says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import families
from benchmarks.blocks import split_at_block


@pytest.fixture(scope="module")
def results() -> dict:
    return json.loads(families.RESULTS.read_text(encoding="utf-8"))


def test_the_page_has_the_results(results: dict) -> None:
    assert split_at_block(families.PAGE, "families")[1] == families.table(results)


def test_every_family_was_tried_and_none_fails(results: dict) -> None:
    rows = [families.Row(**row) for row in results["rows"]]
    assert [row.family for row in rows] == families.families()
    assert {row.result for row in rows} == {"works", "refused"}
    for row in rows:
        assert row.note or row.result == "works", row.family
        assert (row.tensors > 0 and 0 < row.share <= 1) or row.result == "refused", row.family


@pytest.mark.parametrize("kind", ["gemma", "gpt2"])
def test_a_family_goes_as_the_page_says(results: dict, kind: str, tmp_path: Path) -> None:
    [there] = [row for row in results["rows"] if row["family"] == kind]
    found = families.try_family(kind, tmp_path)
    assert (found.result, found.tensors, found.note) == (
        there["result"], there["tensors"], there["note"],
    )  # fmt: skip
