"""SEFT's own state beside DeepSpeed's checkpoint: masks, slots, windows, and the sparse weights.

One safetensors file a rank and one `seft.json`. Everything is stored by global position or slot index,
each rank its own range, so that a reader can put a whole weight together without knowing ZeRO, and
`launch/export.py` can make a model from a checkpoint without the original ranks. DeepSpeed's part of
the checkpoint holds the deltas' optimizer state.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from seft_ds.distributed.window import Window
from seft_ds.sparse import mask
from seft_ds.zero import shards
from seft_ds.zero.engine import SparseEvolution
from seft_ds.zero.weight_state import SlotTable, WeightState

FORMAT = "seft_ds-checkpoint-1"
FOLDER = "seft"
META = "seft.json"


def save_state(seft: SparseEvolution, directory: Path, source_dir: str) -> None:
    """Write this rank's part; rank 0 also writes the description. A collective."""
    folder = directory / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, torch.Tensor] = {}
    windows = []
    for i, state in enumerate(seft.states):
        tensors |= {f"{i}.{name}": t.contiguous() for name, t in _tensors_of(state).items()}
        windows.append(state.window.steps if state.window is not None else None)
    save_file(tensors, folder / _file_name(seft.ranks.rank, seft.ranks.size))
    ranges = seft.ranks.gather_object([(s.lo, s.hi) for s in seft.states])
    if seft.ranks.rank == 0:
        meta = {
            "format": FORMAT,
            "step": seft.step,
            "total_steps": seft.schedule.total_steps if seft.schedule else None,
            "ranks": seft.ranks.size,
            "ranges": ranges,  # [rank][target] = the positions [lo, hi) in that rank's file
            "targets": [asdict(s.target) for s in seft.states],
            "window_steps": windows,
            "source_dir": source_dir,
            "config": seft.config.model_dump(),
            "counters": [seft.n_events, seft.event_seconds, seft.event_bytes],
        }
        (folder / META).write_text(json.dumps(meta))
    seft.ranks.barrier()


def load_state(seft: SparseEvolution, directory: Path) -> None:
    """Restore what `save_state` wrote, after DeepSpeed has restored weights and optimizer.

    Raises:
        ValueError: no SEFT state there, or that of another model, configuration or rank count.
    """
    meta = read_meta(directory)
    _check_same_run(seft, meta)
    name = _file_name(seft.ranks.rank, seft.ranks.size)
    with safe_open(directory / FOLDER / name, framework="pt") as file:
        for i, state in enumerate(seft.states):
            prefix = f"{i}."
            tensors = {
                key.removeprefix(prefix): file.get_tensor(key)
                for key in file.keys()  # noqa: SIM118 (not a dict)
                if key.startswith(prefix)
            }
            _restore(state, tensors, meta["window_steps"][i])
    seft.step = meta["step"]
    seft.resumed_total_steps = meta["total_steps"]
    seft.n_events, seft.event_seconds, seft.event_bytes = meta["counters"]
    if seft.schedule is not None:
        seft.begin(seft.schedule.total_steps)


def read_meta(directory: Path) -> dict[str, Any]:
    """The description of the SEFT state in a checkpoint's tag directory. ValueError if there is none."""
    path = directory / FOLDER / META
    if not path.is_file():
        raise ValueError(
            f"{directory} holds no SEFT state ({FOLDER}/{META} is missing): it was not saved by a SEFT "
            "run, or the save was interrupted; give another checkpoint"
        )
    meta = json.loads(path.read_text())
    if meta.get("format") != FORMAT:
        raise ValueError(f"{path}: format {meta.get('format')!r}, this version reads {FORMAT!r}")
    return meta


def find_tag(checkpoint: Path) -> Path:
    """The directory with the state of a checkpoint: itself, or the one that DeepSpeed's `latest` names."""
    if (checkpoint / FOLDER).is_dir():
        return checkpoint
    latest = checkpoint / "latest"
    if not latest.is_file():
        raise ValueError(
            f"{checkpoint} is no checkpoint (no file 'latest'); give RUN/checkpoint-N as it was written"
        )
    name = latest.read_text().strip()
    if Path(name).name != name or not (checkpoint / name).is_dir():
        raise ValueError(f"{latest} names {name!r}, which is no folder beside it")
    return checkpoint / name


def whole_weights(directory: Path) -> Iterator[tuple[dict, torch.Tensor, torch.Tensor, int]]:
    """(target, weight (out, in), packed live bits, changed positions), one target at a time.

    Reads the files of all ranks; at most one weight is in memory.
    """
    meta = read_meta(directory)
    names = [_file_name(r, meta["ranks"]) for r in range(meta["ranks"])]
    for name in names:
        if not (directory / FOLDER / name).is_file():
            raise ValueError(
                f"{directory}: {FOLDER}/{name} is missing; the checkpoint is incomplete"
            )
    files = [safe_open(directory / FOLDER / name, framework="pt") for name in names]
    for i, target in enumerate(meta["targets"]):
        lengths = [meta["ranges"][r][i][1] - meta["ranges"][r][i][0] for r in range(len(files))]
        weight = torch.cat([f.get_tensor(f"{i}.weight") for f in files])
        live, start = (
            torch.cat(
                [
                    mask.unpack(f.get_tensor(f"{i}.{part}"), n)
                    for f, n in zip(files, lengths, strict=True)
                ]
            )
            for part in ("live_bits", "start_bits")
        )
        yield target, weight.view(target["shape"]), mask.pack(live), int((live ^ start).sum())


def _tensors_of(state: WeightState) -> dict[str, torch.Tensor]:
    """What a restart of this rank needs; the owned weights too, for readers without DeepSpeed."""
    _, weight = shards.owned(state.weight, state.multiple, state.ranks)
    tensors = {
        "weight": weight,
        "live_bits": state.live_bits,
        "start_bits": state.start_bits,
        "slots.position": state.slots.position,
        "slots.slot": state.slots.slot,
        "slots.base": state.slots.base,
        "slots.born_dead": state.slots.born_dead,
    }
    if state.fresh_slots is not None:
        tensors["fresh_slots"] = state.fresh_slots
    if state.window is not None:
        tensors |= {"window.G": state.window.G, "window.Q": state.window.Q}
    return tensors


def _restore(state: WeightState, tensors: dict[str, torch.Tensor], steps: int | None) -> None:
    device = state.live_bits.device
    tensors = {name: t.to(device) for name, t in tensors.items()}
    state.live_bits, state.start_bits = tensors["live_bits"], tensors["start_bits"]
    state.slots = SlotTable(
        *(tensors[f"slots.{part}"] for part in ("position", "slot", "base", "born_dead"))
    )
    state.fresh_slots = tensors.get("fresh_slots")
    state.window = None
    if steps is not None:
        state.window = Window(state.target.numel, state.multiple, state.ranks, device)
        state.window.G.copy_(tensors["window.G"])
        state.window.Q.copy_(tensors["window.Q"])
        state.window.steps = steps


def _check_same_run(seft: SparseEvolution, meta: dict) -> None:
    if meta["ranks"] != seft.ranks.size:
        raise ValueError(
            f"the checkpoint was written by {meta['ranks']} ranks and this run has {seft.ranks.size}; "
            f"resume with {meta['ranks']}, or make a model of it with launch/export.py"
        )
    mine = json.loads(json.dumps([asdict(s.target) for s in seft.states]))
    if mine != meta["targets"]:
        raise ValueError(
            "the checkpoint belongs to another model or another number of slots: its targets differ "
            "from this run's; start from the same pruned model with the same density"
        )
    mine_config = json.loads(json.dumps(seft.config.model_dump()))
    changed = [k for k, v in meta["config"].items() if mine_config.get(k) != v]
    if changed:
        came = {k: mine_config.get(k) for k in changed}
        was = {k: meta["config"][k] for k in changed}
        raise ValueError(f'the "seft" settings changed since the checkpoint: was {was}, now {came}')


def _file_name(rank: int, size: int) -> str:
    return f"rank-{rank:05d}-of-{size:05d}.safetensors"
