"""What is written: exact zeros, raised live zeros, shards, side files, nothing half-written."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from seft_ds.checkpoint import export
from seft_ds.checkpoint.export import (
    TargetInfo,
    TensorInfo,
    exact_zeros,
    write_sparse_model,
)
from seft_ds.checkpoint.pruned import nonzero_live, save_pruned
from seft_ds.checkpoint.shard_files import ShardWriter, plan_shards
from seft_ds.sparse import mask
from tests.checkpoint.models import dense_dir, pruned_model, sparse_dir

TINY = torch.finfo(torch.bfloat16).tiny


def _one_weight(tmp_path, weight, target, dtype=torch.bfloat16, **about):
    """Write a model of one target "w" and return (its record, the tensor on disk)."""
    source = tmp_path / "source"
    source.mkdir(exist_ok=True)
    (source / "config.json").write_text('{"model_type": "llama"}')
    layout = [TensorInfo("w", tuple(weight.shape), dtype)]
    record = write_sparse_model(
        tmp_path / "out",
        [("w", weight)],
        layout=layout,
        targets={"w": target},
        source_dir=source,
        about=about,
    )
    return record, load_file(tmp_path / "out" / "model.safetensors")["w"]


def test_loads_with_identical_logits_and_exact_zeros(tmp_path):
    source = dense_dir(tmp_path / "dense")
    model, targets = pruned_model(source)
    record = save_pruned(model, source, tmp_path / "out", targets, {"method": "wanda"})
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    ids = torch.arange(12).view(2, 6)
    assert loaded.dtype == torch.bfloat16
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    state = loaded.state_dict()
    for name, entry in record["targets"].items():
        assert int((state[name] != 0).sum()) == entry["live"] == entry["target_live"]
        assert entry["shape"] == list(state[name].shape)
    assert record["live"] == sum(int((state[n] != 0).sum()) for n in targets)
    assert record["total"] == sum(state[n].numel() for n in targets)
    assert record["pattern"] == "mixed" and record["method"] == "wanda"
    assert json.loads((tmp_path / "out" / "sparsity.json").read_text()) == record


def test_many_shards_hold_the_same_as_one(tmp_path):
    one = sparse_dir(tmp_path / "a")
    many = sparse_dir(tmp_path / "b", max_shard_bytes=3000)
    index = json.loads((many / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 3 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    whole, parts = load_file(one / "model.safetensors"), {}
    for file in files:
        parts |= load_file(many / file)
        with safe_open(many / file, framework="pt") as opened:
            assert opened.metadata() == {"format": "pt"}
    assert parts.keys() == whole.keys() == index["weight_map"].keys()
    assert all(torch.equal(parts[name], whole[name]) for name in whole)
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in whole.values())
    digests = [json.loads((d / "sparsity.json").read_text())["mask_digest"] for d in (one, many)]
    assert digests[0] == digests[1]


def test_live_zeros_are_raised_with_their_sign_and_dead_ones_are_positive(tmp_path):
    # positions: live zero, live -0.0, live too small for bf16, dead value, dead -0.0, live 1
    weight = torch.tensor([[0.0, -0.0, -1e-45, 5.0, -0.0, 1.0]])
    live = torch.tensor([True, True, True, False, False, True])
    record, written = _one_weight(tmp_path, weight, TargetInfo(None, 4, 3, mask.pack(live)))
    assert written.tolist() == [[TINY, -TINY, -TINY, 0.0, 0.0, 1.0]]
    assert torch.signbit(written).tolist() == [[False, True, True, False, False, False]]
    assert record["live_zeros_raised"] == 3 and record["live"] == 4
    assert record["targets"]["w"]["changed_positions"] == 3
    assert record["sparsity"] == 1 - 4 / 6


def test_without_bits_the_nonzero_entries_are_live(tmp_path):
    record, written = _one_weight(
        tmp_path, torch.tensor([[-0.0, 2.0, 1e-44]]), TargetInfo(target_live=2)
    )
    assert written.tolist() == [[0.0, 2.0, TINY]] and not torch.signbit(written).any()
    assert record["targets"]["w"]["live"] == 2 and record["pattern"] == "unstructured"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_exact_zeros_leaves_other_values_alone(dtype):
    torch.manual_seed(0)
    weight, live = torch.randn(7, 9), torch.rand(7, 9) < 0.4
    out, raised = exact_zeros(weight, live, dtype)
    assert raised == 0
    assert torch.equal(out[live], weight.to(dtype)[live])
    assert torch.equal(out != 0, live)


def test_a_wrong_target_count_is_refused_and_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError, match="w: 2 live weights, target 3"):
        _one_weight(tmp_path, torch.tensor([[1.0, 2.0, 0.0]]), TargetInfo(target_live=3))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source"]


def test_with_global_scope_only_the_sum_has_a_target(tmp_path):
    source = dense_dir(tmp_path / "dense")
    names = ["a", "b"]
    layout = [TensorInfo(n, (2, 4), torch.float32) for n in names]
    tensors = {"a": torch.ones(2, 4), "b": torch.zeros(2, 4)}
    targets = {n: TargetInfo(target_live=4) for n in names}
    common = {"layout": layout, "targets": targets, "source_dir": source}
    by_sum = {"scope": "global", "seft": {"scope": "global"}}
    write_sparse_model(tmp_path / "g", tensors.items(), about=by_sum, **common)
    with pytest.raises(RuntimeError, match="a: 8 live weights, target 4"):
        write_sparse_model(tmp_path / "l", tensors.items(), about={"scope": "layer"}, **common)


def test_reading_back_catches_a_writer_that_writes_something_else(tmp_path, monkeypatch):
    def spoil(self, name, tensor, write=ShardWriter.write):
        write(self, name, torch.ones_like(tensor) if name == "w" else tensor)

    monkeypatch.setattr(ShardWriter, "write", spoil)
    with pytest.raises(RuntimeError, match="w: 3 live weights, sparsity.json says 2"):
        _one_weight(tmp_path, torch.tensor([[1.0, 2.0, 0.0]]), TargetInfo())
    assert not (tmp_path / "out").exists()


def test_tied_head_is_written_once(tmp_path):
    source = dense_dir(tmp_path / "dense", tied=True)
    model, targets = pruned_model(source)
    save_pruned(model, source, tmp_path / "out", targets, {})
    names = set(load_file(tmp_path / "out" / "model.safetensors"))
    assert "model.embed_tokens.weight" in names and "lm_head.weight" not in names
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    ids = torch.arange(5)[None]
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_of_shared_tensors_the_one_that_others_tie_to_is_written(tmp_path):
    model = torch.nn.ModuleDict({"head": torch.nn.Linear(4, 3, bias=False)})
    model["table"] = torch.nn.Embedding(3, 4)
    model["table"].weight = model["head"].weight
    model["w"] = torch.nn.Linear(4, 3, bias=False)
    model.all_tied_weights_keys = {"head.weight": "table.weight"}
    (tmp_path / "config.json").write_text("{}")
    save_pruned(model, tmp_path, tmp_path / "out", {"w.weight": None}, {})
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert set(written) == {"table.weight", "w.weight"}


def test_side_files_come_along_and_the_config_fits_plain_tensors(tmp_path):
    source = dense_dir(tmp_path / "dense", dtype=torch.float32)
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = {"sparsity_config": {"format": "sparse-bitmask"}}
    config["text_config"] = {"dtype": "float32", "compression_config": {}}
    (source / "config.json").write_text(json.dumps(config))
    export.copy_side_files(source, tmp_path, torch.bfloat16)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["dtype"] == "bfloat16" and written["text_config"] == {"dtype": "bfloat16"}
    assert "quantization_config" not in written
    files = {p.name for p in tmp_path.iterdir() if p.is_file()}
    assert files == {
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "chat_template.jinja",
        "LICENSE",
    }


def test_other_files_of_a_run_stay_and_a_model_is_not_overwritten(tmp_path):
    source = dense_dir(tmp_path / "dense")
    model, targets = pruned_model(source)
    run = tmp_path / "run"
    run.mkdir()
    (run / "journal.jsonl").write_text("{}\n")
    save_pruned(model, source, run, targets, {})
    assert (run / "journal.jsonl").read_text() == "{}\n" and (run / "sparsity.json").is_file()
    with pytest.raises(ValueError, match="holds a model already"):
        save_pruned(model, source, run, targets, {})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dense", "run"]


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ([], "1 tensors never came"),
        ([("w", torch.ones(1, 3)), ("w", torch.ones(1, 3))], "came twice"),
        ([("x", torch.ones(1, 3))], "not in the layout"),
        ([("w", torch.ones(3, 1))], "came in shape"),
    ],
)
def test_tensors_that_do_not_fit_the_layout_are_refused(tmp_path, tensors, message):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=message):
        write_sparse_model(
            tmp_path / "out",
            tensors,
            layout=[TensorInfo("w", (1, 3), torch.float32)],
            targets={"w": TargetInfo()},
            source_dir=tmp_path,
            about={},
        )
    assert not (tmp_path / "out").exists()


def test_about_may_not_pose_as_a_count(tmp_path):
    with pytest.raises(ValueError, match="live"):
        _one_weight(tmp_path, torch.ones(1, 3), TargetInfo(), live=7)


def test_groups_short_of_the_pattern_are_filled_and_full_ones_kept():
    weight = torch.tensor([[0.0, 0.0, 0.0, 0.0, 0.0, 3.0, 0.0, 0.0, 0.0, 0.0, 1.0, 2.0]])
    live = nonzero_live("w", weight, "2:4").view(-1, 4)
    assert live.tolist() == [
        [True, True, False, False],
        [True, True, False, False],
        [False, False, True, True],
    ]
    with pytest.raises(ValueError, match="w is not 2:4: 1 groups"):
        nonzero_live("w", torch.ones(1, 4), "2:4")
    with pytest.raises(ValueError, match="can't have the pattern"):
        nonzero_live("w", torch.ones(1, 6), "2:4")


def test_shards_are_filled_in_order_and_a_large_tensor_has_its_own():
    layout = [TensorInfo(n, (size,), torch.uint8) for n, size in zip("abcd", (4, 4, 30, 4))]
    shards = plan_shards(layout, 8)
    assert [[i.name for i in infos] for infos in shards.values()] == [["a", "b"], ["c"], ["d"]]
    assert list(plan_shards(layout, 42)) == ["model.safetensors"]


def test_mixed_dtypes_and_any_order_survive_the_file_format(tmp_path):
    torch.manual_seed(0)
    tensors = {
        "b": torch.tensor([True, False, True]),
        "h": torch.randn(3, 1).to(torch.bfloat16),
        "e": torch.empty(0, 4),
        "s": torch.tensor(3.5, dtype=torch.float64),
        "t": torch.randn(4, 3).t(),  # not contiguous
    }
    layout = [TensorInfo(n, tuple(t.shape), t.dtype) for n, t in tensors.items()]
    with ShardWriter(tmp_path, {"f.safetensors": layout}) as writer:
        for name in reversed(tensors):
            writer.write(name, tensors[name])
    assert not writer.missing
    read = load_file(tmp_path / "f.safetensors")
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[n], t) and read[n].dtype == t.dtype for n, t in tensors.items())
    # Readers that map the file need every tensor aligned to its own item size.
    content = (tmp_path / "f.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    for name, tensor in tensors.items():
        assert (8 + length + header[name]["data_offsets"][0]) % tensor.element_size() == 0
