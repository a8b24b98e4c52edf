"""What a run trains with, kept in its checkpoints, and compared when a run goes on from one.

A checkpoint brings back the optimizer, the schedule and the position in the data. Other rows, another order
or another learning rate would be ignored, or mixed with what was there, so they are refused. Whatever doesn't
decide about the steps may change: where and how often is saved, logged and evaluated, ranks, stages, paths.
"""

from __future__ import annotations

import hashlib
import json
import sys
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset

from seft_ds.console import is_first_rank
from seft_ds.distributed.agreement import file_facts, folder_facts
from seft_ds.json_file import read_object, shown
from seft_ds.train.forms import Rows
from seft_ds.train.prepared import tables_of

NAME = "run_settings.json"  # in a checkpoint
FORMAT = "seft_ds-run-1"
_SHOWN = 4

# Arguments of Trainer and TRL that don't change which steps are taken: by their first words, or whole.
_FREE_FAMILIES = (
    "save_", "logging_", "log_", "eval_", "hub_", "push_", "ddp_", "fsdp", "torch_", "include_", "report_",
    "trackio_", "run_", "do_", "gradient_checkpointing", "activation_", "use_", "liger_", "debug", "skip_",
    "dataloader_num", "dataloader_pin", "dataloader_pre", "dataloader_per", "restore_", "enable_jit",
)  # fmt: skip
_FREE = frozenset(
    """
    output_dir overwrite resume dry_run resume_from_checkpoint disable_tqdm local_rank project
    per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps
    auto_find_batch_size trust_remote_code accelerator_config parallelism_config deepspeed
    load_best_model_at_end metric_for_best_model greater_is_better prediction_loss_only
    batch_eval_metrics dataset_num_proc ignore_data_skip full_determinism tf32 bf16 fp16
    bf16_full_eval fp16_full_eval optim remove_unused_columns label_names chat_template_path
    pad_token warmup_ratio
    """.split()
)
_DATA = (
    "dataset_train_split", "mix_weights", "rename_columns", "streaming", "val_set_size", "max_train_samples",
)  # fmt: skip


def settings_of(resolved: dict[str, Any], teacher: Path | None) -> dict[str, Any]:
    """The settings that decide about the steps of a run, by the names of their flags.

    Args:
        resolved: everything that was set, as plain data.
        teacher: folder of the dense model that is learnt from.
    """
    run, method, deepspeed = resolved["run"], resolved["method"], resolved["deepspeed"]
    found = {k: v for k, v in run.items() if k not in _FREE and not k.startswith(_FREE_FAMILIES)}
    if run["max_steps"] > 0:
        found.pop("num_train_epochs", None)  # has no effect then
    found |= {name: resolved["data"][name] for name in _DATA}
    found["method"] = method["method"]
    found["distill"] = None if teacher is None else _digest(folder_facts(teacher))
    if teacher is not None:
        found["distill_weight"] = method["distill_weight"]
    params = (deepspeed.get("optimizer") or {}).get("params") or {}
    for name in ("lr", "betas", "eps", "weight_decay", "momentum"):
        found[f"optimizer.params.{name}"] = params.get(name, "auto")
    found["scheduler"] = deepspeed.get("scheduler")
    found["gradient_clipping"] = deepspeed.get("gradient_clipping", "auto")
    return json.loads(json.dumps(found, default=str))


class RunFacts:
    """What a run trains with: its settings, and its rows once somebody asks for them."""

    def __init__(self, settings: dict[str, Any], rows: Rows, data: Any):
        self.settings, self._rows, self._data = settings, rows, data

    @cached_property
    def data(self) -> dict[str, Any]:
        """The training rows: in memory a digest of every token, of a stream its files."""
        files, names = self._data.train_file or [], self._data.dataset_name or []
        sources = [[file, file_facts(Path(file))[Path(file).name]] for file in files]
        found: dict[str, Any] = {"sources": sources + [[name, "by name"] for name in names]}
        if isinstance(self._rows, Dataset):
            found |= {"rows": len(self._rows), "sha256": digest_of(self._rows)}
        return found

    def write(self, path: Path) -> None:
        """Write what `check_settings` and `check_data` read."""
        facts = {"format": FORMAT, "settings": self.settings, "data": self.data}
        path.write_text(json.dumps(facts, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def digest_of(rows: Dataset) -> str:
    """Of the tokens and labels of all rows in their order, however many files they came from."""
    digest = hashlib.sha256()
    for table in tables_of(rows, 4096):
        for name in ("input_ids", "labels"):
            column = table.column(name)
            digest.update(pc.list_value_length(column).to_numpy().astype(np.int64).tobytes())
            digest.update(pc.list_flatten(column).to_numpy().astype(np.int64).tobytes())
    return digest.hexdigest()


def read_facts(checkpoint: Path) -> dict[str, Any] | None:
    """What a checkpoint's run trained with; None if an older version wrote it, which didn't say.

    Raises:
        ValueError: a damaged file.
    """
    path = checkpoint / NAME
    if not path.is_file():
        return None
    facts = read_object(path)
    data = facts.get("data")
    sources = data.get("sources") if isinstance(data, dict) else None
    pairs = isinstance(sources, list) and all(isinstance(s, list) and len(s) == 2 for s in sources)
    if facts.get("format") != FORMAT or not pairs or not isinstance(facts.get("settings"), dict):
        raise ValueError(f"{path}: format {shown(facts.get('format'))}, wanted {FORMAT!r}")
    return facts


def check_settings(checkpoint: Path, mine: dict[str, Any]) -> None:
    """ValueError if a run that goes on from a checkpoint was started with other settings than its own."""
    facts = read_facts(checkpoint)
    if facts is None:
        if is_first_rank():
            print(
                f"warning: {checkpoint} doesn't say with which data and settings its run was started (an "
                "older version wrote it), so they are not compared",
                file=sys.stderr,
            )
        return
    saved = facts["settings"]
    changed = [k for k in sorted(saved.keys() & mine.keys()) if saved[k] != mine[k]]
    if not changed:
        return
    parts = [f"--{k} {shown(mine[k])} (it had {shown(saved[k])})" for k in changed[:_SHOWN]]
    more = f" and {len(changed) - _SHOWN} more" if len(changed) > _SHOWN else ""
    raise ValueError(
        f"the run of {checkpoint} was started with other settings: {', '.join(parts)}{more}; a run goes on "
        "with those that it began with: give the same, or begin a new run in another --output_dir"
    )


def check_data(checkpoint: Path, run: RunFacts) -> None:
    """ValueError if a run that goes on from a checkpoint has other training rows than its own."""
    facts = read_facts(checkpoint)
    if facts is None:
        return
    saved, mine = facts["data"], run.data
    before = _contents(saved)
    if "sha256" in saved and "sha256" in mine:
        same = saved["sha256"] == mine["sha256"]
    else:
        same = before == _contents(mine)
    if same:
        return
    pairs = zip(mine["sources"], _contents(mine), strict=True)
    names = [str(name) for (name, _), content in pairs if content not in before]
    what = f"changed: {', '.join(names)}" if names else "other files, another tokenizer or template"
    counts = f"{shown(saved.get('rows'))} rows then, {mine['rows']} now; " if "rows" in mine else ""
    raise ValueError(
        f"the data differ from those that the run of {checkpoint} trained on ({counts}{what}): it would "
        "repeat rows and never see others; give the same data, or begin a new run in another --output_dir"
    )


def _contents(data: dict[str, Any]) -> list[Any]:
    """Of the sources, in their order; a file may have another name now."""
    return [content if content != "by name" else name for name, content in data["sources"]]


def _digest(facts: dict[str, str]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
