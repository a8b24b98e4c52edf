"""What a checkpoint directory is: complete or absent, exportable by itself, refused where it doesn't fit."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from seft_ds.checkpoint.from_checkpoint import export_checkpoint
from seft_ds.checkpoint.manifest import find_problems
from seft_ds.checkpoint.pruned import save_pruned
from seft_ds.checkpoint.verify import verify
from tests.ranks import run_processes
from tests.tiny import tiny_model
from tests.zero.test_engine import config, tokens


def make_source(folder: Path) -> None:
    model = tiny_model("llama")
    model.save_pretrained(folder / "dense")
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]
    save_pruned(
        model, folder / "dense", folder / "source", {f"{n}.weight": None for n in names}, {}
    )


def start(folder: str, bf16: bool, stage: int = 3, **seft: Any) -> Any:
    from transformers import AutoModelForCausalLM

    import seft_ds

    torch.manual_seed(0)
    dtype = torch.bfloat16 if bf16 else torch.float32
    model = AutoModelForCausalLM.from_pretrained(f"{folder}/source", dtype=dtype)
    return seft_ds.initialize(model=model, config=config(stage, bf16, total_steps=20, **seft))[0]


def train(engine: Any, first: int, last: int) -> None:
    for step in range(first, last):
        ids = tokens(step, row=engine.seft.ranks.rank)
        engine.backward(engine(input_ids=ids, labels=ids).loss)
        engine.step()


def save_both(folder: str) -> None:
    """A checkpoint of each kind after 12 steps, and the model that the engine itself writes."""
    import seft_ds

    for base in ("copy", "reference"):
        for bf16 in (False, True):
            engine = start(folder, bf16, checkpoint_base=base)
            train(engine, 0, 12)
            name = f"{base}-{'bf16' if bf16 else 'fp32'}"
            engine.save_checkpoint(f"{folder}/{name}", "here")
            seft_ds.save_model(engine, f"{folder}/source", f"{folder}/{name}-model")


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints")
    make_source(folder)
    run_processes(3, save_both, str(folder))
    return folder


KINDS = ("copy-fp32", "copy-bf16", "reference-fp32", "reference-bf16")


@pytest.mark.parametrize("kind", KINDS)
def test_export_equals_the_model_that_the_engine_writes(home: Path, kind: str) -> None:
    record = export_checkpoint(home / kind, home / f"{kind}-out")
    assert verify(home / f"{kind}-out").ok
    mine, engines = tensors(home / f"{kind}-out"), tensors(home / f"{kind}-model")
    assert mine.keys() == engines.keys()
    assert all(torch.equal(mine[n], engines[n]) for n in mine)
    theirs = json.loads((home / f"{kind}-model/sparsity.json").read_text())
    assert record["mask_digest"] == theirs["mask_digest"]
    assert {n: t["changed_positions"] for n, t in record["targets"].items()} == {
        n: t["changed_positions"] for n, t in theirs["targets"].items()
    }


def test_a_reference_is_smaller_and_knows_its_base(home: Path, tmp_path: Path) -> None:
    def size(kind: str) -> int:
        return sum(p.stat().st_size for p in (home / kind / "here").glob("*.safetensors"))

    assert size("reference-fp32") < 0.6 * size("copy-fp32")
    other = tmp_path / "other"
    shutil.copytree(home / "source", other)
    from safetensors.torch import save_file

    changed = tensors(other)
    for name in ("model.layers.0.mlp.up_proj.weight", "model.embed_tokens.weight"):
        broken = {n: t.clone() for n, t in changed.items()}
        broken[name].view(-1)[5] += 1e-3
        save_file(broken, other / "model.safetensors")
        with pytest.raises(ValueError, match=name.removesuffix(".weight")):
            export_checkpoint(home / "reference-fp32", tmp_path / "out", str(other))
    # A copy needs the config and the tokenizer only.
    (other / "model.safetensors").unlink()
    export_checkpoint(home / "copy-fp32", tmp_path / "out", str(other))
    assert verify(tmp_path / "out").ok


@pytest.mark.parametrize("kind", KINDS)
def test_the_size_is_as_predicted(home: Path, kind: str) -> None:
    from safetensors import safe_open

    from seft_ds.checkpoint.layout import read_meta
    from seft_ds.checkpoint.size import checkpoint_bytes

    tag = home / kind / "here"
    meta = read_meta(tag)
    found: dict[str, int] = {}
    for path in tag.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (not a dict)
                part = name if name.startswith("other.") else name.split(".", 1)[1]
                found[part] = found.get(part, 0) + file.get_tensor(name).nbytes
    found.pop("fresh_slots", None)  # a few, between an event and the next step
    targets = [t.target() for t in meta.targets]
    entries = sum(t.numel for t in targets)
    width = getattr(torch, meta.dtype).itemsize
    is_open = [s is not None for s in meta.window_steps]
    predicted = checkpoint_bytes(
        targets,
        sum(o.numel * getattr(torch, o.dtype).itemsize for o in meta.others),
        width,
        meta.base,
        found.get("touched_values", 0) / width / entries,
        sum(t.numel for t, yes in zip(targets, is_open, strict=True) if yes) / entries,
    )
    rounding = 3 * len(targets) * meta.ranks  # each mask of each rank ends in a whole byte
    assert 0 <= sum(found.values()) - sum(predicted.values()) <= rounding
    assert any(is_open) and meta.moments == ["mean", "square"]


def test_deepspeeds_own_recovery_finds_nothing_to_misread(home: Path, tmp_path: Path) -> None:
    """zero_to_fp32 would rebuild weights without knowing what is dead: nothing there is in its format."""
    from deepspeed.utils.zero_to_fp32 import convert_zero_checkpoint_to_fp32_state_dict

    checkpoint = home / "copy-fp32"
    assert not list(checkpoint.rglob("*zero_to_fp32*")) and not list(
        checkpoint.rglob("*_states.pt")
    )
    with pytest.raises(FileNotFoundError):
        convert_zero_checkpoint_to_fp32_state_dict(str(checkpoint), str(tmp_path / "out"))
    assert not list(tmp_path.rglob("*.bin")) and not list(tmp_path.rglob("*.safetensors"))


def test_only_plain_data_is_loaded(home: Path, tmp_path: Path) -> None:
    """No pickle but engine.pt, and that one by torch's weights_only reader."""
    import pickle

    from seft_ds.checkpoint.engine_file import read_engine_state

    names = {p.suffix for p in (home / "copy-fp32/here").iterdir()}
    assert names == {".json", ".safetensors", ".pt"}
    read_engine_state(home / "copy-fp32/here")

    class Harm:
        def __reduce__(self):
            return (open, (str(tmp_path / "harm"), "w"))

    torch.save({"counters": Harm()}, tmp_path / "engine.pt")
    with pytest.raises(ValueError, match="can't be read"):
        read_engine_state(tmp_path)
    (tmp_path / "engine.pt").write_bytes(pickle.dumps(Harm()))
    with pytest.raises(ValueError, match="can't be read"):
        read_engine_state(tmp_path)
    assert not (tmp_path / "harm").exists()


def refusals(folder: str) -> dict[str, str]:
    """What a load says to everything that doesn't fit; all on one engine that stays usable."""
    said: dict[str, str] = {}

    def attempt(name: str, work: Any) -> None:
        try:
            work()
            said[name] = "no error"
        except ValueError as error:
            said[name] = str(error)

    copy, reference = f"{folder}/copy-fp32", f"{folder}/reference-fp32"
    engine = start(folder, False, checkpoint_base="copy")
    attempt("bf16", lambda: engine.load_checkpoint(f"{folder}/copy-bf16", "here"))
    attempt("nothing", lambda: engine.load_checkpoint(f"{folder}/none", "here"))
    attempt("no latest", lambda: engine.load_checkpoint(folder))
    attempt("module only", lambda: engine.load_checkpoint(copy, "here", load_module_only=True))
    attempt("tag", lambda: engine.save_checkpoint(f"{folder}/x", "../y"))
    client = {"f": print}
    attempt("client state", lambda: engine.save_checkpoint(f"{folder}/x", "t", client))
    engine.load_checkpoint(copy, "here")
    train(engine, 12, 13)
    attempt("trained", lambda: engine.load_checkpoint(reference, "here"))
    engine.load_checkpoint(copy, "here")  # a copy may be loaded again
    train(engine, 12, 14)
    engine.seft.check()
    other = start(folder, False, checkpoint_base="copy", density=0.03)
    attempt("slots", lambda: other.load_checkpoint(copy, "here"))
    third = start(folder, False, checkpoint_base="copy", prune="taylor")
    attempt("settings", lambda: third.load_checkpoint(copy, "here"))
    accumulating = start(folder, False)
    accumulating._config.gradient_accumulation_steps = 2
    ids = tokens(0)
    accumulating.backward(accumulating(input_ids=ids, labels=ids).loss)
    accumulating.step()
    attempt("half a step", lambda: accumulating.save_checkpoint(f"{folder}/x", "t"))
    return said


def test_what_does_not_fit_is_refused(home: Path) -> None:
    said = run_processes(1, refusals, str(home))[0]
    wanted = {
        "bf16": "trained in bfloat16",
        "nothing": "holds no SEFT state",
        "no latest": "is no checkpoint",
        "module only": "loaded whole",
        "tag": "plain folder name",
        "client state": "plain data and tensors",
        "trained": "already trained",
        "slots": "another number of slots",
        "settings": "'prune'",
        "half a step": "middle of gradient accumulation",
    }
    for name, part in wanted.items():
        assert part in said[name], (name, said[name])
    assert not (home / "x").exists() or not list((home / "x").iterdir())


def disk_full(folder: str, small: str) -> list[str]:
    """A save that can't be finished, after one that could; then one more where there is room."""
    from seft_ds.errors import RunError

    said = []
    engine = start(folder, False)
    train(engine, 0, 3)
    engine.save_checkpoint(f"{folder}/roomy", "good")
    for place in (small, "/proc/nowhere"):
        try:
            engine.save_checkpoint(place, "t")
        except RunError as error:
            said.append(str(error))
    assert engine.seft.last_checkpoint == Path(folder) / "roomy/good"
    train(engine, 3, 4)
    engine.save_checkpoint(f"{folder}/roomy", "after")
    return said


def test_a_full_disk_or_one_that_cannot_be_written(home: Path, tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", small])
    if mounted.returncode:
        pytest.skip("a tmpfs can't be mounted here (not root)")
    try:
        on_all = run_processes(2, disk_full, str(home), str(small))
        assert not list(small.rglob("*")), list(small.rglob("*"))
    finally:
        subprocess.run(["umount", small], check=True)
    for said in on_all:
        assert "No space left" in said[0] and "roomy/good" in said[0]
        assert len(said) == 2 and "could not be written" in said[1]
    assert find_problems(home / "roomy/good") == find_problems(home / "roomy/after") == []
