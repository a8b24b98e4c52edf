"""What is packed comes back byte for byte, takes the bits that it should, and is refused when damaged."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from launch import pack as script
from seft_ds.checkpoint import packed_file
from seft_ds.checkpoint.export import TargetInfo, TensorInfo, write_sparse_model
from seft_ds.checkpoint.packing import is_packed, pack, packed_problems, unpack

Q, UP = "model.layers.0.q_proj.weight", "model.layers.0.up_proj.weight"


def sparse_model(folder: Path, dtype: torch.dtype, shard_bytes: int = 1 << 30) -> Path:
    """A folder as the exporter writes it: two targets, one dense tensor, config and an odd file."""
    base = folder / "base"
    base.mkdir(parents=True)
    (base / "config.json").write_text('{"model_type": "llama"}')
    g = torch.Generator().manual_seed(0)
    tensors = {
        "embed": torch.randn(7, 5, generator=g),
        Q: torch.randn(40, 30, generator=g),
        UP: torch.randn(33, 9, generator=g),
    }
    for name in (Q, UP):
        tensors[name][torch.rand(tensors[name].shape, generator=g) < 0.6] = 0
    layout = [TensorInfo(n, tuple(t.shape), dtype) for n, t in tensors.items()]
    live = {n: int(tensors[n].count_nonzero()) for n in (Q, UP)}
    targets = {n: TargetInfo(target_live=count) for n, count in live.items()}
    write_sparse_model(
        folder / "model", tensors.items(), layout=layout, targets=targets,
        source_dir=base, about={}, max_shard_bytes=shard_bytes,
    )  # fmt: skip
    (folder / "model" / "note of mine.bin").write_bytes(bytes(range(256)) * 9)
    return folder / "model"


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shard_bytes", [1 << 30, 1000], ids=["one file", "several files"])
def test_a_model_comes_back_byte_for_byte(
    tmp_path: Path, dtype: torch.dtype, shard_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed_file, "BLOCK", 512)  # so that a tensor has several blocks
    model = sparse_model(tmp_path, dtype, shard_bytes)
    packed = pack(model, tmp_path / "packed")
    unpacked = unpack(tmp_path / "packed", tmp_path / "unpacked")
    assert files_of(tmp_path / "unpacked") == files_of(model)
    assert len(list(model.glob("*.safetensors"))) == (1 if shard_bytes > 1000 else 3)
    record = json.loads((model / "sparsity.json").read_text())
    bits = 8 * dtype.itemsize * record["live"] + sum(
        8 * -(-n // 8)
        for n in (512, 512, 176, 33 * 9)  # masks, block by block
    )
    assert packed.target_bits == unpacked.target_bits == bits
    assert packed.target_weights == record["total"] == 40 * 30 + 33 * 9
    assert packed.model_bytes == unpacked.model_bytes == sum(map(len, files_of(model).values()))


def test_every_bit_is_kept(tmp_path: Path) -> None:
    """Negative zeros, infinities and NaNs with a payload: a weight is its bits."""
    model = sparse_model(tmp_path, torch.float32)
    path = model / "model.safetensors"
    tensors = load_file(path)
    odd = torch.tensor([0x80000000, 0x7F800000, 0xFFC12345, 1], dtype=torch.int64)
    tensors[Q].view(-1)[:4] = odd.to(torch.int32).view(torch.float32)
    save_file(tensors, path, metadata={"format": "pt", "note": "é"})
    pack(model, tmp_path / "packed")
    unpack(tmp_path / "packed", tmp_path / "unpacked")
    assert (tmp_path / "unpacked" / path.name).read_bytes() == path.read_bytes()


def test_no_loader_takes_it_for_a_model(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    packed = tmp_path / "packed"
    pack(sparse_model(tmp_path, torch.bfloat16), packed)
    names = {p.name for p in packed.iterdir()}
    assert names == {"model.seftpack", "side", "manifest.json", "README.md"}
    assert not list(packed.rglob("*.safetensors*"))
    for folder in (packed, packed / "side"):
        with pytest.raises((OSError, ValueError)):
            AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    assert is_packed(packed) and packed_problems(packed) == []


@pytest.fixture(scope="module")
def packed_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packed")
    pack(sparse_model(folder, torch.bfloat16), folder / "packed")
    return folder / "packed"


@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7), file=st.integers(0, 3))
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_any_damaged_bit_is_found(
    packed_once: Path, tmp_path_factory: pytest.TempPathFactory, place: float, bit: int, file: int
) -> None:
    folder = tmp_path_factory.mktemp("damaged")
    copy = shutil.copytree(packed_once, folder / "packed")
    paths = ["model.seftpack", "side/config.json", "side/sparsity.json", "manifest.json"]
    path = copy / paths[file]
    data = bytearray(path.read_bytes())
    data[int(place * len(data))] ^= 1 << bit
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"model\.seftpack|config\.json|sparsity\.json|manifest"):
        unpack(copy, folder / "out")
    assert sorted(p.name for p in folder.iterdir()) == ["packed"]  # nothing half done is left


def test_damage_is_named(packed_once: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(packed_once, tmp_path / "packed")
    path = copy / "model.seftpack"
    whole = path.read_bytes()
    head_bytes = 8 + int.from_bytes(whole[8:16], "little") + 8
    for at, named in (
        (0, "first bytes"),
        (20, "head"),
        (head_bytes + 100, Q),
        (len(whole) - 1, UP),
    ):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 255]) + whole[at + 1 :])
        with pytest.raises(ValueError, match=named):
            unpack(copy, tmp_path / "out")
    path.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match="model.seftpack.*bytes, expected"):
        unpack(copy, tmp_path / "out")
    path.unlink()
    with pytest.raises(ValueError, match="model.seftpack: missing"):
        unpack(copy, tmp_path / "out")


def test_what_can_not_be_packed_or_written(tmp_path: Path) -> None:
    model = sparse_model(tmp_path, torch.bfloat16)
    (model / "checkpoint-5").mkdir()
    (model / ".lock").write_text("")
    assert pack(model, tmp_path / "packed").left_out == [".lock", "checkpoint-5"]
    for source, target, says in [
        (model, tmp_path / "packed", "there already"),
        (tmp_path / "none", tmp_path / "x", "not a directory"),
        (tmp_path / "base", tmp_path / "x", "no \\*.safetensors"),
        (tmp_path / "packed", tmp_path / "x", "manifest.json is of"),
    ]:
        with pytest.raises(ValueError, match=says):
            pack(source, target)
    for source, target, says in [
        (tmp_path / "packed", model, "there already"),
        (model, tmp_path / "x", "no manifest.json"),
    ]:
        with pytest.raises(ValueError, match=says):
            unpack(source, target)
    (model / "model.safetensors").write_bytes(b"\x10" + bytes(30))
    with pytest.raises(ValueError, match="model.safetensors.*can't be read"):
        pack(model, tmp_path / "x")
    record = json.loads((model / "sparsity.json").read_text())
    save_file({Q: torch.zeros(40, 30)}, model / "model.safetensors")
    with pytest.raises(ValueError, match=f"names {UP}"):
        pack(model, tmp_path / "x")
    assert record["targets"] and not (tmp_path / "x").exists()


def test_the_script(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    model = sparse_model(tmp_path, torch.bfloat16)
    script.main(["pack", str(model), str(tmp_path / "packed")])
    script.main(["unpack", str(tmp_path / "packed"), str(tmp_path / "out")])
    said = capsys.readouterr().out
    assert said.count("bits a sparse weight") == 2
    assert files_of(tmp_path / "out") == files_of(model)
