"""What a pruning run has finished so far, in a hidden folder of its output: OUT/.pruning.

    settings.json            what decides about the result: method, budget, digests of model and text ...
    quotas.json              dead counts per weight, where they took a pass over the model (owl, global)
    block-00012.safetensors  a finished block's pruned weights, of each NAME the packed mask NAME.live, and
                             in by_magnitude how many of them saw too little text
    assembling               the model is being put together: OUT may hold part of it

A block's file is written aside, synced and renamed, so that one that is there is whole. No activations are
kept: a run that goes on takes the calibration sequences through the finished blocks again.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from seft_ds.checkpoint.manifest import aside_of, write_bytes, write_tensors
from seft_ds.checkpoint.verify import RECORD_NAME
from seft_ds.json_file import read_object
from seft_ds.prune.choose import Quota
from seft_ds.sparse import mask
from seft_ds.tensor_files import open_tensors

FOLDER_NAME = ".pruning"
_SETTINGS, _QUOTAS, _ASSEMBLING = "settings.json", "quotas.json", "assembling"
_BLOCK = re.compile(r"block-(\d{5,})\.safetensors")
_LIVE = ".live"
_BY_MAGNITUDE = "by_magnitude"


class Work:
    """The folder of unfinished work of an output folder."""

    def __init__(self, output: Path) -> None:
        self.output, self.folder = output, output / FOLDER_NAME

    def begin(self, settings: dict[str, Any], overwrite: bool) -> set[int]:
        """Make the folder, or go on with what is there; returns the finished blocks. On one rank.

        Raises:
            ValueError: what is there was made with other settings, and is not to be overwritten.
        """
        settings = json.loads(json.dumps(settings))  # as they will be read
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / _SETTINGS
        if path.is_file():
            differing = _differences(read_object(path), settings)
            if not differing:
                return self.finished()
            if not overwrite and self.finished():  # without one it is a start that failed
                raise ValueError(
                    f"--output_dir {self.output} holds a pruning run that was cut off and had other "
                    f"settings: {'; '.join(differing[:3])}; start it with the same ones, give another "
                    "folder, or --overwrite to begin anew"
                )
            self.clear()
        self._write_json(_SETTINGS, settings)
        return set()

    def clear(self) -> None:
        """Delete what is finished, the settings first; a lock stays."""
        for path in sorted(self.folder.iterdir(), key=lambda path: path.name != _SETTINGS):
            if not path.name.startswith("."):
                path.unlink()

    def finished(self) -> set[int]:
        """The blocks that are done."""
        found = (_BLOCK.fullmatch(path.name) for path in self.folder.iterdir())
        return {int(match[1]) for match in found if match}

    def keep(
        self,
        index: int,
        weights: dict[str, torch.Tensor],
        dead: dict[str, torch.Tensor],
        by_magnitude: int = 0,
    ) -> None:
        """Write a finished block: its weights (out, in), which of their entries died, bool alike, and how
        many of them are of experts that too few tokens reached."""
        tensors = {**weights, _BY_MAGNITUDE: torch.tensor([by_magnitude])}
        for name, died in dead.items():
            tensors[name + _LIVE] = mask.pack(~died.reshape(-1))
        path = self._block(index)
        aside = aside_of(path)
        write_tensors(aside, tensors)
        os.replace(aside, path)
        self._sync()

    def names(self, index: int) -> set[str]:
        """The weights in a finished block."""
        with open_tensors(self._block(index)) as file:
            names = set(file.keys()) - {_BY_MAGNITUDE}
        return {name for name in names if not name.endswith(_LIVE)}

    def by_magnitude(self) -> int:
        """How many weights of all finished blocks are of experts that too few tokens reached."""
        return sum(int(self.read(index, _BY_MAGNITUDE)) for index in self.finished())

    def read(self, index: int, name: str) -> torch.Tensor:
        """A finished block's weight (out, in)."""
        with open_tensors(self._block(index)) as file:
            return file.get_tensor(name).clone()

    def live_bits(self, index: int, name: str) -> torch.Tensor:
        """The packed mask of a finished block's weight, uint8 (ceil(n / 8),)."""
        return self.read(index, name + _LIVE)

    def quotas(self) -> dict[str, Quota] | None:
        """Those that a former start of this run found out, if it got that far."""
        if not (self.folder / _QUOTAS).is_file():
            return None
        found = read_object(self.folder / _QUOTAS)
        return {name: Quota(**quota) for name, quota in found.items()}

    def keep_quotas(self, quotas: dict[str, Quota]) -> None:
        """Write the quotas of all weights."""
        self._write_json(_QUOTAS, {name: asdict(quota) for name, quota in quotas.items()})

    def begin_assembling(self) -> None:
        """From here on the output folder may hold a part of the model, which a later start removes."""
        if (self.folder / _ASSEMBLING).is_file():
            for path in self.output.glob("*.safetensors*"):
                path.unlink()
        write_bytes(self.folder / _ASSEMBLING, b"")
        self._sync()

    def end_assembling(self) -> None:
        """It has failed, and nothing of the model is left in the output folder."""
        (self.folder / _ASSEMBLING).unlink(missing_ok=True)

    def remove(self) -> None:
        """The model is written: the work is of no use any more."""
        # What can't be deleted now harms nobody: a folder with a record is a finished model.
        shutil.rmtree(self.folder, ignore_errors=True)

    def _block(self, index: int) -> Path:
        return self.folder / f"block-{index:05d}.safetensors"

    def _write_json(self, name: str, value: dict[str, Any]) -> None:
        path = self.folder / name
        write_bytes(aside_of(path), json.dumps(value, indent=1).encode() + b"\n")
        os.replace(aside_of(path), path)
        self._sync()

    def _sync(self) -> None:
        """Have the disk hold the names in the folder."""
        descriptor = os.open(self.folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        except OSError:
            pass  # some network file systems have no sync of directories
        finally:
            os.close(descriptor)


def is_resumable(output: Path) -> bool:
    """Whether a folder holds a pruning run that was cut off, and nothing that it did not write."""
    folder = output / FOLDER_NAME
    if not folder.is_dir() or (output / RECORD_NAME).is_file():
        return False
    ours = {FOLDER_NAME, aside_of(output / "model").name}  # the model while it is written
    only_ours = {path.name for path in output.iterdir()} <= ours
    return only_ours or (folder / _ASSEMBLING).is_file()


def _differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """ "sparsity was 0.5, is 0.6" for every setting that is another one."""
    keys = [*now, *(key for key in before if key not in now)]
    return [
        f"{key} was {_short(before.get(key))}, is {_short(now.get(key))}"
        for key in keys
        if before.get(key) != now.get(key)
    ]


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
