"""Every way in which a directory can stop holding is found, and named."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import launch.verify as command
from seft_ds.checkpoint.verify import groups_off_pattern, parse_pattern, verify
from tests.checkpoint.models import sparse_dir

DENSE = "model.layers.1.mlp.up_proj.weight"  # unstructured target
NM = "model.layers.0.self_attn.q_proj.weight"  # 2:4 target


@pytest.fixture
def model_dir(tmp_path):
    return sparse_dir(tmp_path, base_model="tiny")


def _edit(directory: Path, change) -> None:
    """Apply `change(tensors)` to the weights file."""
    tensors = load_file(directory / "model.safetensors")
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def _edit_record(directory: Path, change) -> None:
    record = json.loads((directory / "sparsity.json").read_text())
    change(record)
    (directory / "sparsity.json").write_text(json.dumps(record))


def _first(tensor: torch.Tensor, live: bool) -> int:
    return int((tensor.view(-1) != 0).eq(live).nonzero()[0])


def test_a_directory_as_written_holds(model_dir, capsys):
    result = verify(model_dir)
    assert result.ok and result.live == result.record["live"]
    assert len(result.targets) == 14 and result.total == result.record["total"]
    assert command.main([str(model_dir)]) == 0
    printed = capsys.readouterr().out
    assert "self_attn.q_proj" in printed and "model.layers" not in printed and "holds" in printed
    assert command.main([str(model_dir), "--all"]) == 0
    assert NM in capsys.readouterr().out


@pytest.mark.parametrize("to_zero", [True, False])
@pytest.mark.parametrize("name", [DENSE, NM])
def test_one_weight_changed_to_or_from_zero_is_named(model_dir, capsys, name, to_zero):
    def change(tensors):
        flat = tensors[name].view(-1)
        flat[_first(flat, live=to_zero)] = 0.0 if to_zero else 0.5

    live = verify(model_dir).record["targets"][name]["live"]
    _edit(model_dir, change)
    assert command.main([str(model_dir)]) == 1
    out = capsys.readouterr().out
    assert f"wrong: {name}: {live + (-1 if to_zero else 1)} live weights" in out
    wrong = [line for line in out.splitlines() if line.startswith("wrong")]
    assert all(name in line for line in wrong)


def test_a_moved_weight_keeps_the_count_but_not_the_digest(model_dir):
    def change(tensors):
        flat = tensors[DENSE].view(-1)
        dead, live = _first(flat, live=False), _first(flat, live=True)
        flat[dead], flat[live] = 0.5, 0.0

    _edit(model_dir, change)
    assert [p for p in verify(model_dir).problems if DENSE in p and "other positions" in p]


def test_negative_zero_at_a_dead_position_is_found(model_dir):
    def change(tensors):
        flat = tensors[DENSE].view(-1)
        flat[_first(flat, live=False)] = -0.0

    _edit(model_dir, change)
    assert verify(model_dir).problems == [f"{DENSE}: 1 dead positions hold -0.0 instead of +0.0"]


def test_a_broken_group_is_found_where_count_and_digest_agree(model_dir):
    # The record claims 2:4 of a weight that is unstructured: only the groups can tell.
    _edit_record(model_dir, lambda r: r["targets"][DENSE].update(pattern="2:4"))
    weight = load_file(model_dir / "model.safetensors")[DENSE]
    off = sum(int((g != 0).sum() != 2) for g in weight.reshape(-1, 4))
    assert off > 0
    assert verify(model_dir).problems == [
        f"{DENSE}: {off} groups of inputs without the pattern 2:4"
    ]


def test_groups_are_counted_along_the_inputs():
    live = torch.tensor([[1, 1, 0, 0, 1, 0, 1, 0], [1, 0, 0, 0, 1, 1, 1, 0]]).bool()
    assert groups_off_pattern(live, "2:4") == 2
    assert groups_off_pattern(live, "4:8") == 0
    assert groups_off_pattern(live[:, :6], "2:4") == 4  # 6 inputs are no whole groups
    assert parse_pattern("2:4") == (2, 4)
    for bad in ("4:2", "2", "0:4", "-1:4", "a:b", ""):
        with pytest.raises(ValueError, match="N:M"):
            parse_pattern(bad)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda t: t.pop(DENSE), f"{DENSE}: missing"),
        (lambda t: t.update(extra=torch.ones(2)), "extra: in the files, but not in"),
        (lambda t: t.update({DENSE: t[DENSE].t().contiguous()}), f"{DENSE}: shape"),
        (lambda t: t.update({DENSE: t[DENSE].float()}), f"{DENSE}: dtype F32"),
    ],
)
def test_missing_extra_and_changed_tensors_are_named(model_dir, change, expected):
    _edit(model_dir, change)
    assert any(expected in problem for problem in verify(model_dir).problems)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda r: r.update(live=r["live"] + 1), "live is"),
        (lambda r: r.update(total=r["total"] + 1), "total is"),
        (lambda r: r.update(sparsity=0.5), "sparsity is 0.5"),
        (lambda r: r.update(mask_digest="sha256:0"), "mask_digest is"),
        (lambda r: r["targets"][NM].update(target_live=1), f"{NM}: 128 live weights, target 1"),
        (lambda r: r["targets"][NM].update(mask_digest="sha256:0"), f"{NM}: 128 live weights"),
    ],
)
def test_a_record_that_says_otherwise_does_not_hold(model_dir, change, expected):
    _edit_record(model_dir, change)
    problems = verify(model_dir).problems
    assert len(problems) == 1 and expected in problems[0]


def test_a_weights_file_cut_short_does_not_hold(model_dir, capsys):
    path = model_dir / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert command.main([str(model_dir)]) == 1
    assert "wrong: model.safetensors: can't be read" in capsys.readouterr().out


def test_index_and_shards_have_to_agree(tmp_path):
    directory = sparse_dir(tmp_path, max_shard_bytes=3000)
    index_path = directory / "model.safetensors.index.json"
    index = json.loads(index_path.read_text())
    stray = directory / "model-00099-of-00099.safetensors"
    save_file({"x": torch.ones(1)}, stray)
    assert any(stray.name in p for p in verify(directory).problems)
    stray.unlink()
    gone = directory / index["weight_map"][DENSE]
    gone.rename(directory / "elsewhere.bin")
    assert any(p.startswith(f"{DENSE}: missing") for p in verify(directory).problems)
    (directory / "elsewhere.bin").rename(gone)
    assert verify(directory).ok
    name = "model.norm.weight"
    file = index["weight_map"].pop(name)
    index_path.write_text(json.dumps(index))
    assert f"{name}: in {file}, but not indexed" in verify(directory).problems


@pytest.mark.parametrize("outside", ["../dense/model.safetensors", "/etc/passwd", "..", 3])
def test_an_index_may_not_leave_its_directory(tmp_path, outside):
    directory = sparse_dir(tmp_path, max_shard_bytes=3000)
    path = directory / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"][DENSE] = outside
    path.write_text(json.dumps(index))
    with pytest.raises(ValueError, match="no file name"):
        verify(directory)


def _spoil(directory: Path, how: str) -> Path:
    if how == "no directory":
        return directory / "nowhere"
    record = directory / "sparsity.json"
    if how == "no record":
        record.unlink()
    elif how == "no weights":
        (directory / "model.safetensors").unlink()
    elif how == "cut record":
        record.write_text(record.read_text()[:200])
    elif how == "record is a list":
        record.write_text("[]")
    elif how == "binary record":
        record.write_bytes(b"\xff\xfe\x00")
    elif how == "live is text":
        _edit_record(directory, lambda r: r["targets"][NM].update(live="many"))
    elif how == "no target_live":
        _edit_record(directory, lambda r: r["targets"][NM].pop("target_live"))
    elif how == "target is null":
        _edit_record(directory, lambda r: r["targets"].update({NM: None}))
    else:
        raise AssertionError(how)
    return directory


@pytest.mark.parametrize(
    "how",
    [
        "no directory",
        "no record",
        "no weights",
        "cut record",
        "record is a list",
        "binary record",
        "live is text",
        "target is null",
        "no target_live",
    ],
)
def test_bad_input_is_one_error_line_and_status_two(model_dir, capsys, how):
    assert command.main([str(_spoil(model_dir, how))]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1


def test_the_script_runs_by_itself_from_anywhere(model_dir, tmp_path):
    script = Path(command.__file__).resolve()
    ran = subprocess.run(
        [sys.executable, str(script), str(model_dir)], cwd=tmp_path, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.rstrip().endswith("holds")


NORM, EMBEDDING = "model.norm.weight", "model.embed_tokens.weight"


def _with_value(name: str, value: float):
    def change(tensors):
        flat = tensors[name].view(-1)
        flat[_first(flat, live=True)] = value

    return change


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (_with_value(DENSE, float("nan")), f"{DENSE}: 1 entries are NaN or infinite"),
        (_with_value(NM, float("-inf")), f"{NM}: 1 entries are NaN or infinite"),
        (_with_value(NORM, float("inf")), f"{NORM}: 1 entries are NaN or infinite"),
        (lambda t: t[NORM].zero_(), f"{NORM}: other values than when"),
        (lambda t: t.update({NORM: t[NORM].view(2, 8)}), f"{NORM}: shape [2, 8]"),
        (lambda t: t.update({NORM: t[NORM].float()}), f"{NORM}: dtype F32"),
        (lambda t: t.update(renamed=t.pop(NORM)), f"{NORM}: missing from the model's files"),
        (
            lambda t: t.update(renamed=t.pop(NORM)),
            "renamed: in the files, but not in sparsity.json",
        ),
        (lambda t: t.update({EMBEDDING: t[EMBEDDING].flip(0)}), f"{EMBEDDING}: other values"),
    ],
)
def test_every_tensor_is_compared(model_dir, change, expected):
    _edit(model_dir, change)
    assert any(expected in problem for problem in verify(model_dir).problems)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda r: r.update(pattern="2:4"), "pattern is '2:4', recounted 'mixed'"),
        (lambda r: r.update(scope="global"), "scope is 'global', recounted 'layer'"),
        (lambda r: r["targets"][NM].update(target_live=None), f"{NM}: target_live is null"),
        (lambda r: r["config"].update(num_hidden_layers=3), "num_hidden_layers is 2, sparsity"),
    ],
)
def test_what_follows_from_other_fields_is_recounted(model_dir, change, expected):
    _edit_record(model_dir, change)
    problems = verify(model_dir).problems
    assert len(problems) == 1 and expected in problems[0]


def test_what_would_make_a_reader_load_something_else_is_named(model_dir):
    (model_dir / "adapter_config.json").write_text("{}")
    assert verify(model_dir).problems == [
        "adapter_config.json: an adapter, which readers put on top of the model"
    ]
    (model_dir / "adapter_config.json").unlink()
    path = model_dir / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"num_hidden_layers": 1, "quantization_config": {}}))
    assert verify(model_dir).problems == [
        "config.json: has a quantization_config, but the tensors are plain",
        "config.json: num_hidden_layers is 1, sparsity.json says 2",
    ]
    path.write_text(json.dumps(config | {"rope_theta": 1e6, "eos_token_id": [1, 2]}))
    assert verify(model_dir).ok  # what a user may well change


@pytest.mark.parametrize("key", ["others", "config"])
def test_a_record_without_its_parts_is_damaged(model_dir, key):
    _edit_record(model_dir, lambda r: r.pop(key))
    with pytest.raises(ValueError, match=f"{key} is None; the file is damaged"):
        verify(model_dir)


def test_records_of_earlier_versions_are_still_read(model_dir):
    def as_before(record):
        record.update(format="seft_ds-sparsity-1")
        record.pop("others"), record.pop("config")

    _edit_record(model_dir, as_before)
    assert verify(model_dir).ok
