"""Measured costs of kernels: what is chosen, what is kept, and that nothing breaks over the file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from seft_ds.sparse import kernel_costs, slot_grad
from seft_ds.sparse.kernel_costs import KernelCosts, Problem, known_costs, predict

CPU = torch.device("cpu")
LARGE = Problem(512, 512, 2621, "float32")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(kernel_costs.CACHE_VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache" / "kernels.json"


def test_the_choice_follows_the_line_through_both_measurements() -> None:
    assert predict([1.0, 4.0], 640) == 2.5
    assert predict([1.0, 4.0], 0) == 0.0  # never less
    costs = KernelCosts({LARGE.key: {"sampled": [1.0, 4.0], "dense": [1.5, 2.0]}})
    assert costs.fastest(LARGE, 256, CPU) == "sampled"
    assert costs.fastest(LARGE, 2048, CPU) == "dense"
    assert "sampled 1000.00 and 4000.00 ms" in costs.lines()[0]
    unknown = Problem(64, 64, 41, "bfloat16")
    assert (
        costs.fastest(unknown, 256, CPU)
        == "dense"
        == slot_grad.by_rule(torch.bfloat16, CPU, 41, 4096)
    )


def test_what_is_measured_is_kept_and_not_measured_again(own_cache: Path, monkeypatch) -> None:
    small = Problem(64, 64, 41, "float32")
    first = known_costs([LARGE, small], CPU)
    assert set(first.seconds) == {LARGE.key}
    assert all(s > 0 for pair in first.seconds[LARGE.key].values() for s in pair)
    monkeypatch.setattr(kernel_costs, "measure", None)
    assert known_costs([LARGE], CPU) == first
    machines = json.loads(own_cache.read_text())
    assert list(machines) == [kernel_costs.machine_name(CPU)]


def test_other_problems_are_added_to_the_file(own_cache: Path) -> None:
    other = Problem(512, 600, 3000, "bfloat16")
    first = known_costs([LARGE], CPU)
    both = known_costs([LARGE, other], CPU)
    assert both.seconds[LARGE.key] == first.seconds[LARGE.key] and other.key in both.seconds
    assert len(next(iter(json.loads(own_cache.read_text()).values()))) == 2


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[1]",
        '{"m": 3}',
        '{"m": {"k": {"sampled": [1]}}}',
        '{"m": {"k": {"other": [1, 2]}}}',
    ],
)
def test_a_file_that_makes_no_sense_is_measured_anew(own_cache: Path, text: str) -> None:
    own_cache.parent.mkdir()
    own_cache.write_text(text)
    assert LARGE.key in known_costs([LARGE], CPU).seconds
    assert kernel_costs.machine_name(CPU) in json.loads(own_cache.read_text())


def test_a_folder_that_cannot_be_written_costs_a_warning(
    monkeypatch, tmp_path: Path, caplog
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(kernel_costs.CACHE_VARIABLE, str(tmp_path / "file" / "cache"))
    assert LARGE.key in known_costs([LARGE], CPU).seconds
    assert "can't be kept" in caplog.text


def test_off_measures_nothing(monkeypatch) -> None:
    monkeypatch.setenv(kernel_costs.CACHE_VARIABLE, "off")
    assert known_costs([LARGE], CPU) == KernelCosts()
