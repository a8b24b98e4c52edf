"""Models in files, pruned one block at a time, against the same models whole in memory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from seft_ds.checkpoint.model_files import main_dtype, open_model_files
from seft_ds.prune import statistics, walk
from seft_ds.prune.choose import Budget, quota_of
from seft_ds.prune.empty import empty_model
from seft_ds.prune.folder import assemble, find_quotas, prune_blocks
from seft_ds.prune.recipe import Recipe, recipe_of
from seft_ds.prune.source import FromFiles
from seft_ds.prune.work import Work
from seft_ds.tensor_files import stored_tensors
from tests.prune.models import KINDS, saved, tiny_model, tokens
from tests.prune.test_walk import slow_wanda
from tests.ranks import run_processes, run_threads

CPU = torch.device("cpu")


def open_folder(
    folder: Path, output: Path, dtype: torch.dtype = torch.float32, **settings
) -> FromFiles:
    files = open_model_files(folder)
    work = Work(output)
    work.folder.mkdir(parents=True, exist_ok=True)
    model = empty_model(folder, dtype, CPU, files)
    return FromFiles(model, files, work, dtype, CPU, **settings)


def prune_folder(
    folder: Path, output: Path, recipe: Recipe, sequences, size: int = 1, dtype=torch.float32
):
    """Over thread ranks; rank 0's record."""
    # Not in the threads: accelerate replaces a method of all modules while it makes one.
    sources = [
        open_folder(folder, output, dtype, writes=rank == 0 or recipe.method == "magnitude")
        for rank in range(size)
    ]
    return run_threads(
        size, lambda r: phases(sources[r.rank], folder, output, recipe, sequences, r)
    )[0]


def phases(source: FromFiles, folder: Path, output: Path, recipe: Recipe, sequences, ranks):
    """The three phases, as the launch script runs them; the record on rank 0."""
    quotas = find_quotas(source, recipe, sequences, ranks)
    prune_blocks(source, recipe, quotas, sequences, ranks)
    ranks.barrier()
    assert all(p.device.type == "meta" for p in source.model.parameters())
    if ranks.rank > 0:
        return None
    return assemble(source, source._work, quotas, folder, output, {})


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return {k: t for f in folder.glob("*.safetensors") for k, t in load_file(f).items()}


IN_MEMORY = {"wanda": walk.prune_by_wanda, "sparsegpt": walk.prune_by_sparsegpt}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", IN_MEMORY)
def test_block_by_block_is_what_the_whole_model_gives(tmp_path, kind, method):
    model, sequences, budget = tiny_model(kind), tokens(5, 12), Budget(sparsity=0.5)
    folder = saved(model, tmp_path / "dense", max_shard_size="8KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    recipe = recipe_of(method, budget)
    record = prune_folder(folder, tmp_path / "out", recipe, sequences)
    run_threads(1, lambda r: IN_MEMORY[method](model, budget, sequences, r))
    written, state = weights_of(tmp_path / "out"), model.state_dict()
    assert set(written) == set(state) - set(model.all_tied_weights_keys)
    for name in written:
        assert torch.equal(written[name], state[name]), name
    assert len(record["targets"]) == 21 and record["live_zeros_raised"] == 0


@pytest.mark.parametrize("recipe", [
    recipe_of("wanda", Budget(sparsity=0.6)), recipe_of("sparsegpt", Budget(sparsity=0.6)),
    recipe_of("wanda", Budget(sparsity=0.6), layerwise="owl"),
    recipe_of("sparsegpt", Budget(pattern="2:4")),
    recipe_of("magnitude", Budget(sparsity=0.6), "global"),
], ids=lambda r: f"{r.method}-{r.unit}-{r.owl is not None}")  # fmt: skip
def test_any_number_of_ranks_writes_the_same_model(tmp_path, monkeypatch, recipe):
    monkeypatch.setattr(statistics, "STRIP", 5)
    folder = saved(tiny_model(dtype=torch.bfloat16), tmp_path / "dense")
    sequences, records = tokens(5, 12), []
    for size in (1, 2, 4):
        output = tmp_path / f"out{size}"
        records.append(prune_folder(folder, output, recipe, sequences, size, torch.bfloat16))
    one = weights_of(tmp_path / "out1")
    for size in (2, 4):
        other = weights_of(tmp_path / f"out{size}")
        assert all(torch.equal(one[name], other[name]) for name in one)
    assert records[0] == records[1] == records[2]


def in_process(folder: Path, output: Path) -> None:
    from seft_ds.distributed.collectives import init_ranks

    recipe, ranks = recipe_of("sparsegpt", Budget(sparsity=0.6)), init_ranks()
    source = open_folder(folder, output, torch.bfloat16, writes=ranks.rank == 0)
    phases(source, folder, output, recipe, tokens(5, 12), ranks)


def test_processes_as_ranks_write_the_same_model(tmp_path, monkeypatch):
    import deepspeed  # noqa: F401 (paid for once, before the forks)

    monkeypatch.setattr(statistics, "STRIP", 5)
    folder = saved(tiny_model(dtype=torch.bfloat16), tmp_path / "dense")
    run_processes(2, in_process, folder, tmp_path / "two")
    recipe = recipe_of("sparsegpt", Budget(sparsity=0.6))
    prune_folder(folder, tmp_path / "one", recipe, tokens(5, 12), 1, torch.bfloat16)
    one, two = weights_of(tmp_path / "one"), weights_of(tmp_path / "two")
    assert all(torch.equal(one[name], two[name]) for name in one) and len(one) == len(two)


@pytest.mark.parametrize("unit", ["weight", "row", "global"])
def test_magnitude_budgets(tmp_path, unit):
    model = tiny_model()
    folder = saved(model, tmp_path / "dense")
    recipe = recipe_of("magnitude", Budget(sparsity=0.35), unit)
    record = prune_folder(folder, tmp_path / "out", recipe, None)
    written = weights_of(tmp_path / "out")
    targets = {n: written[n] for n in record["targets"]}
    for name, weight in targets.items():
        dense = model.get_parameter(name)
        if unit == "row":
            assert ((weight == 0).sum(dim=1) == int(0.35 * weight.shape[1])).all()
        elif unit == "weight":
            quota = quota_of(Budget(sparsity=0.35), tuple(weight.shape), by_row=False)
            assert int((weight == 0).sum()) == quota.dead
        assert dense[weight == 0].abs().max() <= dense.abs().max()
    if unit == "global":
        total = sum(w.numel() for w in targets.values())
        assert record["live"] == total - total * 35 // 100
        dying = torch.cat([model.get_parameter(n)[w == 0].abs() for n, w in targets.items()])
        living = torch.cat([model.get_parameter(n)[w != 0].abs() for n, w in targets.items()])
        assert dying.max() <= living.min()


def test_owl_keeps_the_total_and_moves_it_between_blocks(tmp_path):
    folder = saved(tiny_model(), tmp_path / "dense")
    records = {}
    for layerwise in ("uniform", "owl"):
        recipe = recipe_of("wanda", Budget(sparsity=0.7), layerwise=layerwise)
        records[layerwise] = prune_folder(folder, tmp_path / layerwise, recipe, tokens(4, 12))
    assert records["owl"]["live"] == records["uniform"]["live"]
    live = {
        kind: [
            sum(t["live"] for n, t in record["targets"].items() if f"layers.{i}." in n)
            for i in range(3)
        ]
        for kind, record in records.items()
    }
    assert len(set(live["uniform"])) == 1 and len(set(live["owl"])) > 1


def test_a_live_weight_that_became_zero_stays_live(tmp_path):
    model = tiny_model()
    with torch.no_grad():  # inputs 3 and 7 of the first attention are always 0
        model.model.layers[0].input_layernorm.weight[[3, 7]] = 0.0
    folder = saved(model, tmp_path / "dense")
    recipe = recipe_of("sparsegpt", Budget(sparsity=0.05))
    record = prune_folder(folder, tmp_path / "out", recipe, tokens(3, 12))
    assert record["live_zeros_raised"] > 0
    for name, target in record["targets"].items():
        numel = torch.Size(target["shape"]).numel()
        assert target["live"] == numel - numel * 5 // 100
        weight = weights_of(tmp_path / "out")[name]
        assert int((weight != 0).sum()) == target["live"]


def test_only_one_block_is_there_at_a_time(tmp_path):
    source = open_folder(saved(tiny_model("gemma"), tmp_path / "dense"), tmp_path / "out")

    def real() -> set[str]:
        return {n for n, p in source.model.named_parameters() if p.device.type != "meta"}

    assert real() == set()
    with source.opened(1) as block:
        assert real() == {n for n, _ in source.model.named_parameters() if ".layers.1." in n}
        assert block is source.blocks[1]
    with source.entrance():
        walk.record_calls(source.model, source.blocks, tokens(1, 6))
        assert real() == {"model.embed_tokens.weight"}
    assert real() == set()


# --- names, and files that are not what they should be


def renamed(folder: Path, change) -> Path:
    """The folder, its one weights file replaced by `change(tensors)`."""
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path, {"format": "pt"})
    return folder


def names_found(folder: Path) -> dict[str, str]:
    """Name in the model -> name in the files."""
    files = open_model_files(folder)
    return {files.naming.in_model(key): key for key in files.stored}


def test_a_base_models_names_lack_the_prefix(tmp_path):
    folder = saved(tiny_model("gemma"), tmp_path / "m")
    expected = names_found(folder)
    renamed(folder, lambda ts: {n.removeprefix("model."): t for n, t in ts.items()})
    found = names_found(folder)
    assert found.keys() == expected.keys() and "layers.0.mlp.up_proj.weight" in found.values()


def test_tied_copies_are_taken_once_and_kept_apart_where_they_differ(tmp_path):
    folder = saved(tiny_model("gemma"), tmp_path / "m")
    embed, head = "model.embed_tokens.weight", "lm_head.weight"
    renamed(folder, lambda ts: ts | {head: ts[embed].clone()})
    assert head not in names_found(folder)
    renamed(folder, lambda ts: ts | {head: ts[embed] + 1})
    assert head in names_found(folder)
    renamed(folder, lambda ts: {n: t for n, t in ts.items() if n != embed})
    assert names_found(folder)[embed] == head


def test_buffers_of_old_files_are_passed_over(tmp_path):
    folder = saved(tiny_model(), tmp_path / "m")
    expected = names_found(folder)
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)}
    renamed(folder, lambda ts: ts | extra)
    assert names_found(folder) == expected


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda ts: ts | {"vision.w": torch.ones(2)}, "vision.w in .*is not in LlamaForCausalLM"),
        (lambda ts: {n: t for n, t in ts.items() if "norm" not in n}, "norm.*missing from"),
        (lambda ts: {n: t for n, t in ts.items() if n != "lm_head.weight"}, "lm_head.weight"),
        (lambda ts: ts | {"lm_head.weight": torch.ones(3, 16)}, r"shape \(3, 16\), the model has"),
    ],
)
def test_files_that_do_not_fit_the_config_are_refused(tmp_path, change, message):
    folder = renamed(saved(tiny_model(), tmp_path / "m"), change)
    with pytest.raises(ValueError, match=message):
        names_found(folder)


def test_other_formats_and_quantised_models_are_refused(tmp_path):
    folder = saved(tiny_model(), tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    quantised = {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    (folder / "config.json").write_text(json.dumps(config | quantised))
    renamed(folder, lambda ts: ts | {"model.layers.0.mlp.up_proj.g_idx": torch.ones(2)})
    with pytest.raises(ValueError, match=r"g_idx.*quantization_config \(gptq\).*bf16 or fp32"):
        open_model_files(folder)
    path = folder / "model.safetensors"
    save_file({"a": torch.ones(2).to(torch.float8_e4m3fn)}, path)
    with pytest.raises(ValueError, match="F8_E4M3.*quantised"):
        stored_tensors(folder)
    path.rename(folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="convert it once.*save_pretrained"):
        stored_tensors(folder)


def test_the_main_dtype_is_what_most_numbers_have(tmp_path):
    folder = tmp_path / "m"
    folder.mkdir()
    many, few = torch.ones(9, dtype=torch.bfloat16), torch.ones(2)
    save_file({"a": many, "b": few, "c": torch.arange(99)}, folder / "model.safetensors")
    assert main_dtype(stored_tensors(folder)) == torch.bfloat16


def test_a_family_without_a_causal_model_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(ValueError, match="no model that can be pruned"):
        empty_model(tmp_path, torch.float32, CPU)
    (tmp_path / "config.json").write_text('{"model_type": "what"}')
    with pytest.raises(ValueError, match="cannot be used"):
        empty_model(tmp_path, torch.float32, CPU)


def test_models_with_hidden_states_changed_between_blocks_are_refused():
    model = tiny_model()
    blocks = walk.decoder_blocks(model)
    model.model.layers[1].register_forward_pre_hook(lambda module, args: (args[0] + 1, *args[1:]))
    with pytest.raises(ValueError, match="changes the hidden states between its blocks"):
        walk.record_calls(model, blocks, tokens(1, 4))


class Older(torch.nn.Module):
    """A model whose blocks return tuples, as those of transformers 4 did."""

    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = torch.nn.Linear(8, 12), torch.nn.Linear(12, 8)

        def forward(self, hidden, scale):
            return (hidden + self.down(self.up(hidden).relu()) * scale, "cache")

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.layers = torch.nn.Embedding(64, 8), torch.nn.ModuleList()
        self.layers.extend(self.Block() for _ in range(3))
        self.config = type("Config", (), {"num_hidden_layers": 3})

    def forward(self, input_ids, use_cache=False):
        hidden = self.embed(input_ids)
        for layer in self.layers:
            hidden, _ = layer(hidden, scale=0.5)
        return hidden


def test_blocks_that_return_tuples_are_followed():
    model, slow, budget = Older(), Older(), Budget(sparsity=0.5)
    run_threads(1, lambda r: walk.prune_by_wanda(model, budget, tokens(3, 8), r))
    slow_wanda(slow, budget, tokens(3, 8))
    assert all(torch.equal(t, slow.state_dict()[n]) for n, t in model.state_dict().items())
    assert int((model.layers[2].down.weight == 0).sum()) == 8 * 6
