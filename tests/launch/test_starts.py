"""The scripts as launchers start them that speak another language than torch's, and starts that fail."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests import forked
from tests.train.test_finetune import make_models

CPU = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
# What a former test of this process may have set.
UNSET = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("starts")
    make_models(folder)
    return folder


def started(script: str, argv: list[str], home: Path, env: dict[str, str]) -> forked.Forked:
    """A script with these variables and none of another launcher's."""

    def clear() -> None:
        for name in set(UNSET) - set(env):
            os.environ.pop(name, None)

    return forked.start(script, argv, home, CPU | env, before=clear)


def mpirun(script: str, argv: list[str], home: Path, **more: str) -> list[forked.Forked]:
    """Two processes as Open MPI's mpirun starts them: nothing tells torch that they belong together."""
    ranks = []
    for rank in range(2):
        names = {"RANK": rank, "SIZE": 2, "LOCAL_RANK": rank, "LOCAL_SIZE": 2}
        env = {f"OMPI_COMM_WORLD_{name}": str(value) for name, value in names.items()}
        ranks.append(started(script, argv, home, env | {"PMIX_NAMESPACE": home.name} | more))
    return ranks


MEASURE = ["--model_name_or_path", "pruned", "--text_file", "text.txt", "--max_length", "16"]


def test_two_processes_of_mpirun_are_two_ranks_of_one_run(home: Path) -> None:
    ranks = mpirun("evaluate", [*MEASURE, "--output_path", "both.json"], home)
    assert [rank.wait(120) for rank in ranks] == [0, 0], [rank.said() for rank in ranks]
    said = [rank.finish(1).stdout for rank in ranks]
    assert said[0].count("perplexity") == 1 and said[1] == ""
    measured = json.loads((home / "both.json").read_text())["perplexity"]
    assert f"{measured['windows']} windows" in said[0]  # not each rank its half, and both


def test_processes_that_would_each_be_alone_are_refused(home: Path) -> None:
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    ranks = mpirun("evaluate", [*MEASURE, "--output_path", "none.json"], home, **alone)
    assert [rank.wait(60) for rank in ranks] == [2, 2], [rank.said() for rank in ranks]
    assert [rank.said().count("\n") for rank in ranks] == [1, 0]
    assert "WORLD_SIZE is 1, but Open MPI's mpirun started 2" in ranks[0].said()
    assert not (home / "none.json").exists()
