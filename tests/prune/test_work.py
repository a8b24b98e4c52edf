"""Runs that are killed, and go on."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch

from seft_ds.checkpoint import export
from seft_ds.prune import folder as folder_of
from seft_ds.prune import work as work_of
from seft_ds.prune.choose import Quota
from seft_ds.prune.work import FOLDER_NAME, Work, is_resumable
from seft_ds.sparse import mask
from tests.prune import forks
from tests.prune.models import WORDS, saved, tiny_model


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> list[object]:
    """Flags that name a dense model of 3 blocks and a text."""
    home = tmp_path_factory.mktemp("inputs")
    (home / "text.txt").write_text("\n".join(" ".join(WORDS[i:] + WORDS[:i]) for i in range(9)))
    saved(tiny_model(dtype=torch.bfloat16), home / "tiny", max_shard_size="8KB")
    return [
        "--model_name_or_path", home / "tiny", "--calibration_file", home / "text.txt",
        "--calibration_samples", 3, "--max_length", 16, "--sparsity", 0.6,
    ]  # fmt: skip


def digests(folder: Path) -> dict[str, str]:
    """Of the files in a folder; those of an unfinished run are not among them."""
    return {
        p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir() if p.is_file()
    }


def dies_while_writing_block(index: int):
    """The process ends when the block's file is written, but does not have its name yet."""

    def patch() -> None:
        rename = work_of.os.replace

        def replace(source, target):
            if Path(target).name == f"block-{index:05d}.safetensors":
                forks.die()
            rename(source, target)

        work_of.os.replace = replace

    return patch


def dies_while_verifying() -> None:
    export.verify = lambda directory: forks.die()


def dies_while_moving() -> None:
    """The model is moved into place file by file; the process ends after the first weights file."""

    def move(aside: Path, output: Path) -> None:
        for path in sorted(aside.iterdir()):
            path.rename(output / path.name)
            if path.suffix == ".safetensors":
                forks.die()

    export._move_into = move


def nothing_measured_again() -> None:
    def refuse(*args, **kwargs):
        raise AssertionError("the outliers were measured by the first start")

    folder_of.measured_quotas = refuse


@pytest.mark.parametrize("method", ["sparsegpt", "owl"])
def test_a_killed_run_goes_on_and_writes_the_same_bits(tmp_path, inputs, method):
    flags = ["--method", "wanda", "--layerwise", "owl"] if method == "owl" else ["--method", method]
    command = [*inputs, *flags]
    log, whole, out = tmp_path / "log", tmp_path / "whole", tmp_path / "out"
    assert forks.run(log, [*command, "--output_dir", whole])[0] == 0
    command += ["--output_dir", out]
    assert forks.run(log, command, dies_while_writing_block(1))[0] == -9
    assert (
        Work(out).finished() == {0}
        and (out / FOLDER_NAME / ".block-00001.safetensors.writing").is_file()
    )
    assert is_resumable(out)
    # Killed twice more: while the next block is done, and when the model is nearly in place.
    status, said = forks.run(log, command, dies_while_writing_block(2))
    assert status == -9 and "going on with an earlier run: 1 of 3 blocks" in said
    for death in (dies_while_verifying, dies_while_moving):
        status, said = forks.run(log, command, death)
        assert status == -9
    assert (out / "config.json").is_file() and not (out / "sparsity.json").exists()
    status, said = forks.run(log, command, nothing_measured_again)
    assert status == 0 and "going on with an earlier run: 3 of 3 blocks" in said
    assert digests(out) == digests(whole)


def test_other_settings_are_refused_and_overwrite_begins_anew(tmp_path, inputs):
    log, out = tmp_path / "log", tmp_path / "out"
    command = [*inputs, "--output_dir", out]
    assert forks.run(log, command, dies_while_writing_block(2))[0] == -9
    changed = [0.5 if flag == 0.6 else flag for flag in command]
    status, said = forks.run(log, changed)
    assert status == 2 and "sparsity was 0.6, is 0.5" in said and "--overwrite" in said
    assert Work(out).finished() == {0, 1}
    log.unlink()
    status, said = forks.run(log, [*changed, "--overwrite"])
    assert status == 0 and "going on" not in said
    assert "sparsity 49.9" in said or "sparsity 50.0" in said


def test_a_model_that_is_replaced_stays_until_the_new_one_is_whole(tmp_path, inputs):
    log, out = tmp_path / "log", tmp_path / "out"
    command = [*inputs, "--output_dir", out, "--overwrite"]
    assert forks.run(log, command)[0] == 0
    before = digests(out)
    changed = [0.5 if flag == 0.6 else flag for flag in command]
    assert forks.run(log, changed, dies_while_writing_block(1))[0] == -9
    assert digests(out) == before
    assert forks.run(log, changed, dies_while_moving)[0] == -9
    assert digests(tmp_path / ".out.replaced") == before
    status, said = forks.run(log, changed)
    assert status == 0 and "going on with an earlier run: 3 of 3" in said
    assert sorted(p.name for p in tmp_path.iterdir()) == ["log", "out"]
    assert digests(out).keys() == before.keys() and digests(out) != before


def test_what_is_kept_comes_back(tmp_path):
    work = Work(tmp_path)
    assert work.begin({"sparsity": 0.5, "shape": (1, 2)}, overwrite=False) == set()
    weight, dead = torch.randn(3, 5).bfloat16(), torch.rand(3, 5) > 0.5
    work.keep(7, {"a.weight": weight}, {"a.weight": dead})
    assert work.names(7) == {"a.weight"} and torch.equal(work.read(7, "a.weight"), weight)
    assert torch.equal(mask.unpack(work.live_bits(7, "a.weight"), 15).view(3, 5), ~dead)
    assert work.quotas() is None
    quotas = {"a.weight": Quota(5, by_row=True), "b": Quota(6, pattern="2:4")}
    work.keep_quotas(quotas)
    again = Work(tmp_path)
    assert again.begin({"sparsity": 0.5, "shape": (1, 2)}, overwrite=False) == {7}
    assert again.quotas() == quotas
    with pytest.raises(ValueError, match=r"sparsity was 0.5, is 0.6; seed was null, is 1"):
        again.begin({"sparsity": 0.6, "shape": (1, 2), "seed": 1}, overwrite=False)
    assert again.begin({"sparsity": 0.6}, overwrite=True) == set() and again.quotas() is None


def test_folders_with_anything_else_in_them_are_not_ours(tmp_path):
    assert not is_resumable(tmp_path)
    Work(tmp_path).begin({}, overwrite=False)
    assert is_resumable(tmp_path)
    (tmp_path / "thesis.tex").write_text("x")
    assert not is_resumable(tmp_path)
