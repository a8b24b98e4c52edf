"""Folders whose files are not those of the model, each way of it, and names that transformers changes."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from seft_ds import naming
from seft_ds.checkpoint.load import check_loaded_values, load_causal_lm
from seft_ds.checkpoint.model_files import (
    ModelFiles,
    compare,
    load_config,
    open_model_files,
    read_converted,
)
from seft_ds.console import model_folder
from seft_ds.tensor_files import stored_tensors
from tests.ranks import run_threads

SIZES = dict(
    vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
    max_position_embeddings=32, bos_token_id=1, eos_token_id=1, pad_token_id=1,
)  # fmt: skip
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
DOWN = "model.layers.1.mlp.down_proj.weight"


def made(folder: Path, kind: str = "llama", dtype: torch.dtype = torch.float32, **settings):
    """A random model of the family and its folder."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SIZES, **settings))
    model = model.to(dtype).eval()
    model.save_pretrained(folder)
    return model


def change_tensors(folder: Path, change) -> None:
    path = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    save_file(change(tensors) or tensors, path, {"format": "pt"})


def change_config(folder: Path, **entries) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def without(*names: str):
    return lambda tensors: {n: t for n, t in tensors.items() if n not in names}


@pytest.mark.parametrize(
    ("gone", "layers", "named"),
    [((HEAD,), 2, HEAD), ((DOWN,), 2, DOWN), ((), 3, "model.layers.2.")],
    ids=["head", "tensor", "layer"],
)
def test_what_the_files_lack_is_named(tmp_path, gone, layers, named):
    made(tmp_path, tie_word_embeddings=False)
    change_tensors(tmp_path, without(*gone))
    change_config(tmp_path, num_hidden_layers=layers)
    with pytest.raises(ValueError, match=f"{re.escape(named)}.* missing from the files"):
        open_model_files(tmp_path)


def test_what_the_model_has_no_place_for_is_named(tmp_path):
    made(tmp_path)
    change_config(tmp_path, num_hidden_layers=1)
    with pytest.raises(ValueError, match=r"model.layers.1.* in the files are not in Llama"):
        open_model_files(tmp_path)


def test_a_head_that_config_ties_is_kept_where_the_files_have_another(tmp_path):
    made(tmp_path, tie_word_embeddings=False)
    change_config(tmp_path, tie_word_embeddings=True)
    files = open_model_files(tmp_path)
    assert files.untied == (HEAD,) and HEAD in files.stored and not files.copies
    assert load_config(tmp_path, files).tie_word_embeddings is False
    assert "it is kept" in " ".join(files.notes())
    change_tensors(tmp_path, lambda ts: ts | {HEAD: ts[EMBEDDING].clone()})
    files = open_model_files(tmp_path)
    assert files.copies == {HEAD: EMBEDDING} and not files.untied and not files.notes()
    # What is written has both again, with the same values.
    written = list(files.with_extras([(EMBEDDING, torch.ones(3))]))
    assert [n for n, _ in written] == [EMBEDDING, HEAD] and written[1][1] is written[0][1]
    assert [(i.name, i.shape) for i in files.extra_layout(torch.bfloat16)] == [(HEAD, (32, 16))]
    change_tensors(tmp_path, without(EMBEDDING))  # the copy alone stands for the original
    assert open_model_files(tmp_path).naming.in_files(EMBEDDING) == HEAD


def test_names_that_transformers_changes_stay_those_of_the_files(tmp_path):
    made(tmp_path, "gpt_neox", tie_word_embeddings=False)
    assert "embed_out.weight" in load_file(tmp_path / "model.safetensors")
    naming = open_model_files(tmp_path).naming
    assert naming.in_files(HEAD) == "embed_out.weight"
    assert naming.in_model("embed_out.weight") == HEAD
    # A file that has the model's own name, as other tools write it, keeps that one.
    change_tensors(
        tmp_path, lambda ts: {n.replace("embed_out", "lm_head"): t for n, t in ts.items()}
    )
    assert open_model_files(tmp_path).naming.in_files(HEAD) == HEAD


def test_a_base_models_names_lack_the_prefix_and_go_on_lacking_it(tmp_path):
    made(tmp_path, tie_word_embeddings=True)
    change_tensors(tmp_path, lambda ts: {n.removeprefix("model."): t for n, t in ts.items()})
    naming = open_model_files(tmp_path).naming
    assert naming.in_files(DOWN) == DOWN.removeprefix("model.")


def test_tensors_that_transformers_puts_together_are_copied_as_they_are(tmp_path, monkeypatch):
    monkeypatch.setitem(naming._OF_MODEL_TYPE, "olmoe", naming.PLAIN)  # a family without a row
    model = made(tmp_path, "olmoe", num_experts=12, num_experts_per_tok=2)
    files, on_disk = open_model_files(tmp_path), load_file(tmp_path / "model.safetensors")
    state = model.state_dict()
    assert {n for n in state if "experts" in n} == files.verbatim and len(files.verbatim) == 4
    for group in files.converted:
        for name, value in read_converted(group, on_disk.__getitem__, model).items():
            assert torch.equal(value, state[name]), name
    written = dict(files.with_extras((n, t) for n, t in state.items() if n not in files.verbatim))
    assert written.keys() == on_disk.keys()
    assert all(torch.equal(written[n], on_disk[n]) for n in on_disk)


def test_dtypes_are_those_of_the_files(tmp_path):
    made(tmp_path, dtype=torch.bfloat16)
    change_config(tmp_path, dtype="float32", torch_dtype=None)
    assert open_model_files(tmp_path).dtype == torch.bfloat16
    change_tensors(tmp_path, lambda ts: ts | {"model.norm.weight": torch.ones(16)})
    files = open_model_files(tmp_path)
    assert files.other_dtypes == ("model.norm.weight",)
    assert "bfloat16, model.norm.weight otherwise" in files.notes()[0]


def test_a_quantization_config_of_plain_tensors_is_ignored_and_said(tmp_path):
    made(tmp_path)
    leftover = {"quant_method": "compressed-tensors", "format": "dense", "config_groups": {}}
    change_config(tmp_path, quantization_config=leftover)
    files = open_model_files(tmp_path)
    assert "compressed-tensors" in files.notes()[0] and "ignored" in files.notes()[0]
    assert not hasattr(load_config(tmp_path, files), "quantization_config")
    change_tensors(tmp_path, lambda ts: ts | {DOWN + "_scale": torch.ones(1)})
    with pytest.raises(ValueError, match=r"_scale.*quantization_config \(compressed-tensors\)"):
        open_model_files(tmp_path)


def test_known_leftovers_are_left_out_and_said(tmp_path):
    made(tmp_path)
    old = "model.layers.0.self_attn.rotary_emb.inv_freq"
    change_tensors(tmp_path, lambda ts: ts | {old: torch.ones(4)})
    files = open_model_files(tmp_path)
    assert files.left_out == (old,) and old not in files.stored and old in files.notes()[0]


def test_an_adapter_beside_the_model_is_refused(tmp_path):
    made(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    for look in (model_folder, lambda name: open_model_files(Path(name))):
        with pytest.raises(ValueError, match="adapter_config.json.*merge"):
            look(str(tmp_path))


def test_an_interrupted_copy_is_told_by_the_file(tmp_path):
    made(tmp_path).save_pretrained(tmp_path / "m", max_shard_size="3KB")
    shards = sorted((tmp_path / "m").glob("model-*.safetensors"))
    shards[1].unlink()
    with pytest.raises(ValueError, match=rf"names {shards[1].name}, which is not there \(1 of"):
        open_model_files(tmp_path / "m")
    (tmp_path / "m" / "model.safetensors.index.json").unlink()
    with pytest.raises(ValueError, match="index.json is missing"):
        open_model_files(tmp_path / "m")


def test_a_pickled_model_is_compared_too(tmp_path):
    model = made(tmp_path, tie_word_embeddings=False)
    state = dict(model.state_dict())
    (tmp_path / "model.safetensors").unlink()
    torch.save(state, tmp_path / "pytorch_model.bin")
    files = open_model_files(tmp_path)
    assert set(files.stored) == set(state)
    assert torch.equal(files.stored[DOWN].read_flat(7, 90), state[DOWN].view(-1)[7:90])
    with pytest.raises(ValueError, match="convert it once"):
        open_model_files(tmp_path, pickles=False)
    torch.save({n: t for n, t in state.items() if n != DOWN}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=f"{re.escape(DOWN)}.*missing"):
        open_model_files(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"PK\x03\x04 cut")
    with pytest.raises(ValueError, match="cut short or damaged"):
        open_model_files(tmp_path)


def test_values_that_were_loaded_otherwise_are_named(tmp_path):
    model = made(tmp_path, "mixtral", num_local_experts=3, num_experts_per_tok=2)
    files = open_model_files(tmp_path)

    def look(model, files: ModelFiles) -> None:
        run_threads(2, lambda ranks: check_loaded_values(model, files, ranks))

    look(model, files)
    fused = model.get_parameter("model.layers.1.mlp.experts.down_proj")
    with torch.no_grad():
        fused.view(-1)[-1] += 1  # of the last expert
    with pytest.raises(ValueError, match=r"experts.down_proj was loaded.*experts.2.w2.weight"):
        look(model, files)


def test_a_model_that_was_changed_after_it_was_loaded_is_refused(tmp_path):
    model = made(tmp_path)
    model.resize_token_embeddings(40, mean_resizing=False)
    with pytest.raises(ValueError, match=r"\(32, 16\), the model has \(40, 16\).*save it"):
        compare(model, tmp_path, stored_tensors(tmp_path))


def test_a_padding_row_that_transformers_sets_to_zero_is_that_of_the_files(tmp_path):
    from benchmarks.family_models import make_model

    make_model("youtu", tmp_path)
    files = open_model_files(tmp_path)
    wanted = load_file(tmp_path / "model.safetensors")[EMBEDDING]
    (model,) = run_threads(1, lambda ranks: load_causal_lm(files, torch.float32, ranks))
    embedding = model.get_input_embeddings()
    assert embedding.padding_idx == 2 and wanted[2].any()
    assert torch.equal(embedding.weight, wanted)
