"""Writes a sparse model as an ordinary Hugging Face directory, plus `sparsity.json`.

The zeros on disk are exactly the dead positions. Dead entries are written as +0.0 (never -0.0); a live
weight that is zero in the file's dtype (grown a moment ago, or too small for bf16) is written as the
smallest normal number with its sign, and counted as `live_zeros_raised`. So any tool can recount the
mask from the files, and `W != 0` after loading is the live set.

`quantization_config` (with its `sparsity_config`) is never written: readers refuse it or load such a
file with random weights, and the tensors here are plain.

Everything goes to a hidden directory in the target, is read back and recounted there
(checkpoint/verify.py), and only then moved into place, `sparsity.json` last: a directory that has one
is complete. No collectives: callers run this on rank 0 and hand it full tensors one by one.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from seft_ds.checkpoint.manifest import aside_of
from seft_ds.checkpoint.origin import origin_of
from seft_ds.checkpoint.shard_files import ShardWriter, index_of, plan_shards
from seft_ds.checkpoint.tokenizer_files import Changes, put_changes
from seft_ds.checkpoint.verify import (
    FORMAT,
    RECORD_NAME,
    count_not_finite,
    model_digest,
    packed_digest,
    pattern_of,
    structure_of,
    tensor_digest,
    verify,
)
from seft_ds.json_file import read_object
from seft_ds.sparse import mask
from seft_ds.tensor_files import DTYPE_CODES, INDEX_NAME, TensorInfo

__all__ = ["TargetInfo", "TensorInfo", "about_run", "versions", "write_sparse_model"]

_SIDE_SUFFIXES = {".json", ".model", ".txt", ".jinja", ".tiktoken", ".py"}
_LEGAL_PREFIXES = ("LICENSE", "LICENCE", "NOTICE", "USE_POLICY")
# What the writer itself puts into the record, so that `about` may not.
_RECORD_KEYS = set("format pattern live total sparsity live_zeros_raised mask_digest".split())
_RECORD_KEYS |= {"tensors", "targets", "others", "config", "idle"}
# Parts of a config that describe packed or quantised tensors, which these are not.
_COMPRESSION_KEYS = {"quantization_config", "compression_config", "sparsity_config"}
_SIDE_BYTES = 1 << 30
# JSON that belongs to a run or to an adapter, not to the model.
_NOT_OF_THE_MODEL = {
    RECORD_NAME,
    "trainer_state.json",
    "adapter_config.json",
    "train_results.json",
    "eval_results.json",
    "all_results.json",
}


@dataclass
class TargetInfo:
    """What is known of one sparse weight, beside its values.

    `live_bits` is the packed mask (seft_ds.sparse.mask) of the whole weight in row-major order, uint8
    (ceil(n / 8),), or a function that reads it when the weight is written; None means that `W != 0`
    defines what is live.
    """

    pattern: str | None = None  # "2:4"; None is unstructured
    target_live: int | None = None
    changed_positions: int | None = None
    live_bits: torch.Tensor | Callable[[], torch.Tensor] | None = None
    idle: bool = False  # no gradient reached it in the whole run


def write_sparse_model(
    output_dir: str | Path,
    tensors: Iterable[tuple[str, torch.Tensor]],
    *,
    layout: list[TensorInfo],
    targets: dict[str, TargetInfo],
    source_dir: str | Path,
    about: dict[str, Any],
    tokenizer: Changes | None = None,
    max_shard_bytes: int = 5 * 2**30,
    untied: bool = False,
) -> dict[str, Any]:
    """Write a model directory and return its sparsity record, as `sparsity.json` holds it.

    `tensors` yields (name, full tensor) for everything in `layout`, in any order and on any device;
    each is cast to its layout dtype, written and let go. `source_dir` is where the config and the
    tokenizer come from: a model directory, or a name that transformers can load; `tokenizer` is what the
    run changed of it. `output_dir` may hold other files of a run, but no model. `untied`: the head is a
    tensor of its own, whatever the config of `source_dir` says.

    Raises ValueError for what the caller can change (a model is there already, tensors or targets that
    do not fit the layout) and RuntimeError, naming the tensor, if the files read back differ.
    """
    output_dir = Path(output_dir)
    _check_request(output_dir, layout, targets, about)
    made = not output_dir.exists()
    output_dir.mkdir(parents=True, exist_ok=True)
    # Inside, so that moving into place is a rename within one file system, wherever that is mounted.
    aside = aside_of(output_dir / "model")
    shutil.rmtree(aside, ignore_errors=True)  # of a save that was interrupted
    aside.mkdir()
    try:
        config = copy_side_files(source_dir, aside, _main_dtype(layout), untied)
        put_changes(aside, tokenizer or {})
        entries, others, raised = _write_tensors(aside, tensors, layout, targets, max_shard_bytes)
        record = _sparsity_record(entries, others, raised, config, about)
        if idle := sorted(name for name, target in targets.items() if target.idle):
            record["idle"] = idle
        _write_json(aside / RECORD_NAME, record)
        result = verify(aside)
        if not result.ok:
            listed = "; ".join(result.problems[:5])
            raise RuntimeError(f"the files written for {output_dir} do not hold: {listed}")
        _move_into(aside, output_dir)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        if made:
            with contextlib.suppress(OSError):  # others may have put something there
                output_dir.rmdir()
        raise
    shutil.rmtree(aside, ignore_errors=True)
    return record


def versions() -> dict[str, str]:
    """Installed versions of what the numbers in a record depend on; absent packages are left out."""
    found = {}
    for name in ("seft-ds", "torch", "deepspeed", "transformers", "accelerate", "bitsandbytes"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def about_run(
    source: str | Path, steps: int, changes: tuple[int, int], config: dict[str, Any]
) -> dict[str, Any]:
    """What the record of a repaired model says of the run.

    changes: (events, exchanges); config: the "seft" block, as plain data.
    """
    events, exchanges = changes
    if config.get("dense_model") is not None:  # where it lay is nobody's business
        config = {**config, "dense_model": Path(config["dense_model"]).name}
    return {
        "method": "seft",
        **origin_of(source),
        "steps": steps,
        "events": events,
        "exchanges": exchanges,
        "scope": config.get("scope", "layer"),
        "seft": config,
        "versions": versions(),
    }


def exact_zeros(
    weight: torch.Tensor, live: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, int]:
    """`weight` in `dtype` with zeros at exactly the dead positions; how many live zeros were raised.

    `live` is bool like `weight`. One host-device sync.
    """
    out = weight.to(dtype).masked_fill(~live, 0.0)
    zeros = live & (out == 0)
    raised = int(torch.count_nonzero(zeros))
    if raised:  # the sign is there still: -1e-45 is -0.0 in bf16
        smallest = torch.full((), torch.finfo(dtype).tiny, dtype=dtype, device=out.device)
        out[zeros] = torch.copysign(smallest, out[zeros])
    return out, raised


def copy_side_files(
    source_dir: str | Path, destination: Path, dtype: torch.dtype, untied: bool = False
) -> dict[str, Any]:
    """Copy config, tokenizer and what else is not weights; the config's dtype becomes `dtype`.

    Returns the config as it is written.

    A `source_dir` that is no local directory is looked up by transformers (its cache, or the hub).
    """
    source = Path(source_dir)
    if source.is_dir():
        for path in sorted(source.iterdir()):
            if path.is_file() and is_side_file(path.name):
                if path.stat().st_size > _SIDE_BYTES:
                    raise ValueError(
                        f"{path} has {path.stat().st_size} bytes: no part of a tokenizer"
                    )
                shutil.copyfile(path, destination / path.name)
    else:
        _save_from_transformers(str(source_dir), destination)
    config_path = destination / "config.json"
    if not config_path.is_file():
        raise ValueError(f"{source_dir} has no config.json; give the directory of the base model")
    try:
        config = read_object(config_path)
    except ValueError as error:
        raise ValueError(f"of the base model {source_dir}: {error}") from None
    written = config_for_plain_weights(config, dtype)
    if untied:
        for part in (written, written.get("text_config")):
            if isinstance(part, dict):
                part["tie_word_embeddings"] = False
    _write_json(config_path, written)
    return written


def config_for_plain_weights(config: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """A copy of a model's config that describes plain tensors of `dtype`."""
    name = str(dtype).removeprefix("torch.")
    out: dict[str, Any] = {}
    for key, value in config.items():
        if key in _COMPRESSION_KEYS:
            continue
        if key in ("dtype", "torch_dtype"):  # older readers look for torch_dtype: kept where it was
            value = name
        elif key.endswith("_config") and isinstance(value, dict):  # text_config ...
            value = config_for_plain_weights(value, dtype)
        out[key] = value
    if "model_type" in out and "torch_dtype" not in out:
        out["dtype"] = name
    return out


def is_side_file(name: str) -> bool:
    if name in _NOT_OF_THE_MODEL or name.endswith(".index.json"):
        return False
    return Path(name).suffix in _SIDE_SUFFIXES or name.upper().startswith(_LEGAL_PREFIXES)


def _save_from_transformers(name: str, destination: Path) -> None:
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    AutoConfig.from_pretrained(name, trust_remote_code=False).save_pretrained(destination)
    for side in (AutoTokenizer, GenerationConfig):
        try:
            side.from_pretrained(name, trust_remote_code=False).save_pretrained(destination)
        except (OSError, ValueError):
            continue  # a model need not have either


def _check_request(
    output_dir: Path,
    layout: list[TensorInfo],
    targets: dict[str, TargetInfo],
    about: dict[str, Any],
) -> None:
    """ValueError for a request that can't be carried out, before anything is written."""
    if output_dir.is_dir():
        there = sorted(p.name for p in output_dir.glob("*.safetensors"))
        there += [n for n in (INDEX_NAME, RECORD_NAME) if (output_dir / n).exists()]
        if there:
            raise ValueError(
                f"{output_dir} holds a model already ({there[0]}); give another directory"
            )
    elif output_dir.exists():
        raise ValueError(f"{output_dir} is a file; give a directory")
    by_name = {info.name: info for info in layout}
    if len(by_name) != len(layout):
        raise ValueError("the layout names a tensor twice; name each once")
    if not targets:
        raise ValueError("no sparse targets; name at least one tensor of the layout")
    for name in targets:
        if name not in by_name:
            raise ValueError(f"target {name} is not in the layout; use the tensor's full name")
        if not by_name[name].dtype.is_floating_point:
            raise ValueError(
                f"target {name} is {by_name[name].dtype}; only float weights are sparse"
            )
    for info in layout:
        if info.dtype not in DTYPE_CODES:
            raise ValueError(f"{info.name} has dtype {info.dtype}; use one of {list(DTYPE_CODES)}")
    clash = sorted(set(about) & _RECORD_KEYS)
    if clash:
        raise ValueError(f"`about` has {clash}, which the writer fills in itself; rename them")


def _main_dtype(layout: list[TensorInfo]) -> torch.dtype:
    """The floating dtype that most bytes of the model are in."""
    size_bytes: dict[torch.dtype, int] = {}
    for info in layout:
        if info.dtype.is_floating_point:
            size_bytes[info.dtype] = size_bytes.get(info.dtype, 0) + info.size_bytes
    return max(size_bytes, key=lambda dtype: size_bytes[dtype])


def _write_tensors(
    directory: Path,
    tensors: Iterable[tuple[str, torch.Tensor]],
    layout: list[TensorInfo],
    targets: dict[str, TargetInfo],
    max_shard_bytes: int,
) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, Any]], int]:
    """Write all weights files; returns the record's `targets` and `others`, and the number of live zeros
    that were raised."""
    shards = plan_shards(layout, max_shard_bytes)
    by_name = {info.name: info for info in layout}
    entries: dict[str, dict[str, Any]] = {}
    others: dict[str, dict[str, Any]] = {}
    raised_total = 0
    with ShardWriter(directory, shards) as writer:
        for name, tensor in tensors:
            info = by_name.get(name)
            if info is None or name not in writer.missing:
                raise ValueError(f"tensor {name} came twice or is not in the layout")
            if tuple(tensor.shape) != info.shape:
                raise ValueError(
                    f"{name} came in shape {tuple(tensor.shape)}, layout: {info.shape}"
                )
            if name in targets:
                tensor, entries[name], raised = _sparse_tensor(tensor, info, targets[name])
                raised_total += raised
            written = tensor.to(info.dtype).cpu().contiguous()
            if name not in targets:
                others[name] = _entry_of(info) | _content_of(written)
            writer.write(name, written)
        if writer.missing:
            raise ValueError(
                f"{len(writer.missing)} tensors never came: {sorted(writer.missing)[:3]}"
            )
    if len(shards) > 1:
        _write_json(directory / INDEX_NAME, index_of(shards))
    return dict(sorted(entries.items())), dict(sorted(others.items())), raised_total


def _content_of(tensor: torch.Tensor) -> dict[str, Any]:
    """What the record says of the values of a tensor that is not sparse."""
    wrong = count_not_finite(tensor)  # a mask may well hold -inf
    return {"digest": tensor_digest(tensor)} | ({"not_finite": wrong} if wrong else {})


def _entry_of(info: TensorInfo) -> dict[str, Any]:
    return {"shape": list(info.shape), "dtype": str(info.dtype).removeprefix("torch.")}


def _sparse_tensor(
    weight: torch.Tensor, info: TensorInfo, target: TargetInfo
) -> tuple[torch.Tensor, dict[str, Any], int]:
    """The tensor as written, its entry in the record, and how many live zeros were raised."""
    if target.live_bits is None:
        live = weight != 0
        bits = mask.pack(live.view(-1))
    else:
        bits = target.live_bits() if callable(target.live_bits) else target.live_bits
        if bits.numel() != -(-weight.numel() // 8):
            raise ValueError(f"{info.name}: {bits.numel()} mask bytes for {weight.numel()} weights")
        live = mask.unpack(bits.to(weight.device), weight.numel()).view(weight.shape)
    written, raised = exact_zeros(weight, live, info.dtype)
    entry = _entry_of(info) | {
        "pattern": target.pattern,
        "target_live": target.target_live,
        "live": mask.count(bits),
        "changed_positions": target.changed_positions,
        "mask_digest": packed_digest(bits),
    }
    return written, entry, raised


def _sparsity_record(
    entries: dict[str, dict[str, Any]],
    others: dict[str, dict[str, Any]],
    raised: int,
    config: dict[str, Any],
    about: dict[str, Any],
) -> dict[str, Any]:
    live = sum(entry["live"] for entry in entries.values())
    total = sum(torch.Size(entry["shape"]).numel() for entry in entries.values())
    return {
        "format": FORMAT,
        "pattern": pattern_of(entries),
        "live": live,
        "total": total,
        "sparsity": 1 - live / max(total, 1),
        "live_zeros_raised": raised,
        "tensors": len(entries) + len(others),
        "mask_digest": model_digest({n: entry["mask_digest"] for n, entry in entries.items()}),
        **about,
        "config": structure_of(config),
        "targets": entries,
        "others": others,
    }


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _move_into(aside: Path, output_dir: Path) -> None:
    """Move all files of `aside` into `output_dir`, the record last, each synced before."""
    names = sorted(path.name for path in aside.iterdir())
    for name in names:
        with open(aside / name, "rb") as file:
            os.fsync(file.fileno())
    for name in sorted(names, key=lambda name: name == RECORD_NAME):
        os.replace(aside / name, output_dir / name)
