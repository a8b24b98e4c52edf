"""The files of a model folder beside the model that transformers makes of it.

transformers fills what a file lacks with random numbers, passes over what the model has no place for, ties a
head that the file keeps apart, and under ZeRO-3 warns of none of it. So every script compares first, from the
headers alone: each tensor of the model is in the files, in its shape, and each tensor of the files is in the
model. What a run writes has the names that its source has.

Names differ between files and model in three ways: fused experts (`seft_ds.naming`), families whose names
transformers changes when it loads (GPT-NeoX's `embed_out`), and base models, whose names lack a prefix. In
some families tensors are also put together or turned (*converted*); a run can't train those, and copies them
from the files as they are. Read in transformers 5.23.0, core_model_loading.py and conversion_mapping.py.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from seft_ds.checkpoint.parts import stored_infos
from seft_ds.console import refuse_adapter
from seft_ds.json_file import read_object, shown
from seft_ds.naming import Naming, naming_of_model
from seft_ds.sparse.linear import is_slot_parameter
from seft_ds.tensor_files import Stored, TensorInfo, stored_tensors
from seft_ds.zero import shards

_COMPARED_ENTRIES = 1 << 24
_OLD_BUFFERS = r"rotary_emb\.inv_freq$"  # which versions of 2023 saved in every block


@dataclass(frozen=True)
class Converted:
    """Tensors of the model that transformers makes of others: which, and of which in the files."""

    rule: Any  # transformers' WeightConverter
    first: str  # the name that its tensors in files are mapped to
    names: tuple[str, ...]  # in the model
    parts: tuple[tuple[str, str], ...]  # (key in the files, the rule's pattern that it matched)


@dataclass(frozen=True)
class ModelFiles:
    """The files of a folder, matched with a model. Made by `open_model_files` or `compare`."""

    folder: Path
    naming: Naming  # the family's, with this folder's own names
    stored: dict[str, Stored]  # by the folder's names, in the model's order; converted ones last
    dtype: torch.dtype  # that most numbers are stored in
    copies: dict[str, str] = field(default_factory=dict)  # tied copy in the files -> original there
    converted: tuple[Converted, ...] = ()
    untied: tuple[str, ...] = ()  # tied in config.json, and kept apart by the files
    left_out: tuple[str, ...] = ()  # in the files, and known to be of no use to the model
    leftover_quantization: str | None = None  # the method that config.json names for plain tensors
    other_dtypes: tuple[str, ...] = ()  # parameters that are not stored in `dtype`

    @property
    def verbatim(self) -> set[str]:
        """The names in the model of what is copied from the files rather than written from the model."""
        return {name for group in self.converted for name in group.names}

    def extra_layout(self, dtype: torch.dtype) -> list[TensorInfo]:
        """What is written in addition to the model's own tensors: tied copies and verbatim ones."""
        keys = [*self.copies, *(key for group in self.converted for key, _ in group.parts)]
        return [TensorInfo(key, *self._as_written(key, dtype)) for key in keys]

    def _as_written(self, key: str, dtype: torch.dtype) -> tuple[tuple[int, ...], torch.dtype]:
        stored = self.stored[self.copies.get(key, key)]
        return stored.shape, dtype if stored.dtype.is_floating_point else stored.dtype

    def with_extras(
        self, tensors: Iterable[tuple[str, torch.Tensor]]
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """`tensors` by their names in files, each followed by its tied copies, and then the verbatim ones."""
        copies: dict[str, list[str]] = {}
        for name, original in self.copies.items():
            copies.setdefault(original, []).append(name)
        for name, tensor in tensors:
            yield name, tensor
            for copied in copies.get(name, ()):
                yield copied, tensor
        for group in self.converted:
            for key, _ in group.parts:
                yield key, self.stored[key].read()

    def notes(self) -> list[str]:
        """Lines for the user: what of the folder is not used as it stands."""
        lines = []
        if self.left_out:
            lines.append(
                f"{self.folder}: {len(self.left_out)} tensors of its files have no place in the model and "
                f"are left out ({self.left_out[0]}{', ...' if len(self.left_out) > 1 else ''})"
            )
        if self.untied:
            lines.append(
                f"{self.folder}: config.json ties {self.untied[0]}, but the files hold one that differs; it "
                "is kept (tie_word_embeddings: false)"
            )
        if self.other_dtypes:
            word = str(self.dtype).removeprefix("torch.")
            lines.append(
                f"{self.folder}: most of it is stored in {word}, {_some(list(self.other_dtypes))} otherwise; "
                "one dtype is used for all of them (--dtype)"
            )
        if self.leftover_quantization:
            lines.append(
                f"{self.folder}: config.json has a quantization_config ({self.leftover_quantization}), but "
                "the tensors are plain numbers; it is ignored"
            )
        return lines


def open_model_files(folder: Path, *, pickles: bool = True) -> ModelFiles:
    """Compare a folder's files with the model that its config.json describes. No weight is read.

    pickles: take a pytorch_model.bin where there are no safetensors.

    Raises:
        ValueError: naming the file or the tensors: something is missing, too much, damaged, of another shape
            or quantised; what to do about it.
    """
    stored = stored_tensors(folder, pickles)
    return compare(_without_weights(folder), folder, stored)


def load_config(folder: Path, files: ModelFiles | None = None) -> Any:
    """The transformers config of a folder, for plain tensors; with `files`, tied only if the files are.

    Raises:
        ValueError: transformers can't read it.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # of many kinds; all mean that the config is unusable
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise ValueError(f"the config.json of {folder} cannot be used ({reason})") from error
    for part in _parts_of(config):
        if hasattr(part, "quantization_config"):  # of tensors that are plain: `compare` has looked
            del part.quantization_config
        if files is not None and files.untied:
            part.tie_word_embeddings = False
    return config


def _parts_of(config: Any) -> list[Any]:
    inner = config.get_text_config() if hasattr(config, "get_text_config") else config
    return [config] if inner is config else [config, inner]


def _without_weights(folder: Path) -> Any:
    """The causal language model of a folder on the meta device, under ZeRO-3 too."""
    from transformers import AutoModelForCausalLM

    config = load_config(folder)
    try:
        with _not_partitioned(), torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except (ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise ValueError(f"{folder} is no causal language model ({reason})") from error


@contextmanager
def _not_partitioned() -> Iterator[None]:
    """Have transformers build a model as if there were no ZeRO-3, which would cut it up over the ranks."""
    from transformers.integrations import deepspeed as integration

    kept = integration._hf_deepspeed_config_weak_ref
    integration.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        integration._hf_deepspeed_config_weak_ref = kept


def compare(model: Any, folder: Path, stored: dict[str, Stored]) -> ModelFiles:
    """Match the tensors in files with those of a model on any device, partitioned or not.

    Raises:
        ValueError: a tensor that the model or the files lack, or another shape.
    """
    refuse_adapter(folder)
    family = naming_of_model(model)
    infos = [
        info
        for name, tensor in _tensors(model)
        for info in stored_infos(family, name, shards.shape_of(tensor), tensor.dtype)
    ]
    shapes = {info.name: info.shape for info in infos}
    quantization = read_object(folder / "config.json").get("quantization_config")
    matched = _match(model, family, shapes, stored)
    ties = dict(
        getattr(model, "all_tied_weights_keys", None) or {}
    )  # copy -> original, in the model
    ties = {family.in_files(c): family.in_files(o) for c, o in ties.items()}
    copies, untied = _resolve_ties(matched.found, ties)
    covered = {family.in_files(name) for group in matched.converted for name in group.names}
    optional = {family.in_files(name) for name in _optional_buffers(model)}
    missing = [n for n in shapes if n not in matched.found and n not in ties]
    missing = [n for n in missing if n not in covered and n not in optional]
    left_out = [key for key in matched.unknown if _is_ignored(model, key)]
    unknown = [key for key in matched.unknown if not _is_ignored(model, key)]
    if unknown or missing:
        raise ValueError(_misfit(model, folder, unknown, missing, quantization))
    for name, tensor in matched.found.items():
        if tensor.shape != shapes[name]:
            raise ValueError(
                f"{tensor.key} in {tensor.path} has shape {tensor.shape}, the model has {shapes[name]}; give "
                "a folder whose files and config.json belong together, or, of a model that was changed after "
                "it was loaded (a larger embedding), save it and load that"
            )
    own = {usual: tensor.key for usual, tensor in matched.found.items() if usual != tensor.key}
    parts = [key for group in matched.converted for key, _ in group.parts]
    in_order = [matched.found[name].key for name in shapes if name in matched.found]
    dtype = main_dtype(stored)
    buffers = {family.in_files(name) for name, _ in model.named_buffers()}
    odd = [
        t.key
        for n, t in matched.found.items()
        if t.dtype.is_floating_point and t.dtype != dtype and n not in buffers
    ]
    return ModelFiles(
        folder,
        replace(family, own=own),
        {key: stored[key] for key in [*in_order, *parts]},
        dtype,
        copies=copies,
        converted=tuple(matched.converted),
        untied=tuple(untied),
        left_out=tuple(left_out),
        leftover_quantization=None if quantization is None else _method_of(quantization),
        other_dtypes=tuple(odd),
    )


def _tensors(model: Any) -> Iterator[tuple[str, Any]]:
    """(name, tensor) of everything that a folder may hold of a model: tied ones under each of their names."""
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if not is_slot_parameter(name):
            yield name, parameter
    for prefix, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                yield f"{prefix}.{name}" if prefix else name, buffer


def main_dtype(stored: dict[str, Stored]) -> torch.dtype:
    """The floating dtype that most numbers are in."""
    counts: dict[torch.dtype, int] = {}
    for tensor in stored.values():
        if tensor.dtype.is_floating_point:
            counts[tensor.dtype] = counts.get(tensor.dtype, 0) + torch.Size(tensor.shape).numel()
    return max(counts, key=lambda dtype: counts[dtype], default=torch.float32)


@dataclass
class _Matched:
    found: dict[str, Stored] = field(default_factory=dict)  # by the family's name in files
    converted: list[Converted] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)


def _match(model: Any, family: Naming, names: Iterable[str], stored: dict[str, Stored]) -> _Matched:
    """Find the model's tensor for each of the files: by the family's name, or as transformers renames it."""
    result, wanted = _Matched(), set(names)
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    others = []
    for key, tensor in stored.items():
        name = key if key in wanted else prefix + key
        if name in wanted and name not in result.found:
            result.found[name] = tensor
        else:
            others.append(key)
    groups: dict[str, tuple[Any, list[tuple[str, str]]]] = {}
    for key, (name, rule, pattern) in zip(others, _renamed(model, others), strict=True):
        usual = family.in_files(name)
        if rule is not None:
            groups.setdefault(name, (rule, []))[1].append((key, pattern))
        elif name != key and usual in wanted and usual not in result.found:
            result.found[usual] = stored[key]
        else:
            result.unknown.append(key)
    for first, (rule, parts) in groups.items():
        parts.sort(key=lambda part: _natural(part[0]))  # expert 2 before expert 10
        made = [n for n in _made_by(rule, first) if family.in_files(n) in wanted]
        if made:
            result.converted.append(Converted(rule, first, tuple(made), tuple(parts)))
        else:
            result.unknown += [key for key, _ in parts]
    return result


def _renamed(model: Any, keys: list[str]) -> list[tuple[str, Any, str]]:
    """Of each key in files: (name in the model, the converter that it goes through or None, its pattern)."""
    if not keys or not hasattr(model, "base_model_prefix"):  # no model of transformers
        return [(key, None, "") for key in keys]
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, rename_source_key

    rules = get_model_conversion_mapping(model)
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    renamings = [rule for rule in rules if not isinstance(rule, WeightConverter)]
    of_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    there = {name: True for name, _ in _tensors(model)}
    found = []
    for key in keys:
        name, pattern = rename_source_key(
            key, renamings, converters, model.base_model_prefix, there
        )
        found.append((name, None if pattern is None else of_pattern[pattern], pattern or ""))
    return found


def _natural(key: str) -> list[tuple[bool, int, str]]:
    """Sorts the numbers in a name as numbers."""
    return [(p.isdigit(), int(p) if p.isdigit() else 0, p) for p in key.split(".")]


def _made_by(rule: Any, first: str) -> list[str]:
    """The tensors of the model that a converter makes; `first` is the name of the first of them."""
    start = rule.target_patterns[0]
    return [first.replace(start, target, 1) for target in rule.target_patterns]


def _resolve_ties(
    found: dict[str, Stored], ties: dict[str, str]
) -> tuple[dict[str, str], list[str]]:
    """({tied copy in the files: original there}, what the files keep apart); edits `found`.

    A copy alone stands for the original. Of two that are equal the original is read, of two that differ both.
    """
    copies, untied = {}, []
    for name, original in ties.items():
        tensor = found.pop(name, None)
        if tensor is None:
            continue
        if original not in found:
            found[original] = tensor
        elif _equal(tensor, found[original]):
            copies[tensor.key] = found[original].key
        else:
            found[name] = tensor
            untied.append(name)
    return copies, untied


def _optional_buffers(model: Any) -> list[str]:
    """Buffers that the model makes for itself where the files have none."""
    patterns = getattr(model, "_keys_to_ignore_on_load_missing", None) or ()
    return [n for n, _ in model.named_buffers() if any(re.search(p, n) for p in patterns)]


def _is_ignored(model: Any, key: str) -> bool:
    """Whether a tensor that the model has no place for is known to be of no use to it."""
    patterns = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    buffers = {name for name, _ in model.named_buffers()}
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    known = key in buffers or prefix + key in buffers
    return known or any(re.search(p, key) for p in (*patterns, _OLD_BUFFERS))


def _misfit(
    model: Any, folder: Path, unknown: list[str], missing: list[str], quantization: Any
) -> str:
    """What to say of files that are not those of the model."""
    kind = type(model).__name__
    said = []
    if missing:
        said.append(f"{_some(missing)} of {kind} {_is_are(missing)} missing from the files")
    if unknown:
        said.append(f"{_some(unknown)} in the files {_is_are(unknown)} not in {kind}")
    if quantization is not None:
        advice = (
            f"its config.json has a quantization_config ({_method_of(quantization)}): give the model in bf16 "
            "or fp32"
        )
    elif missing:
        advice = (
            "complete the copy, or correct config.json: what is missing would be random numbers"
        )
    else:
        advice = "correct config.json, or give the folder of a causal language model"
    return f"{folder} does not hold the model that its config.json describes: {'; '.join(said)}. {advice}"


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _is_are(names: list[str]) -> str:
    return "is" if len(names) == 1 else "are"


def _method_of(quantization: Any) -> str:
    named = quantization.get("quant_method") if isinstance(quantization, dict) else None
    return named if isinstance(named, str) and len(named) < 40 else shown(quantization)


def _equal(one: Stored, other: Stored) -> bool:
    """Whether two stored tensors are the same, some entries at a time."""
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    total = torch.Size(one.shape).numel()
    return all(
        torch.equal(*(t.read_flat(lo, min(lo + _COMPARED_ENTRIES, total)) for t in (one, other)))
        for lo in range(0, total, _COMPARED_ENTRIES)
    )


def read_converted(
    group: Converted, read: Callable[[str], torch.Tensor], model: Any
) -> dict[str, torch.Tensor]:
    """The tensors that transformers makes of a group's tensors in files, by their names in the model."""
    rule = copy.deepcopy(group.rule)
    for key, pattern in group.parts:
        rule.add_tensor(group.first, key, pattern, read(key))
    made = rule.convert(group.first, model=model, config=model.config)
    return {name: t[0] if isinstance(t, list) else t for name, t in made.items()}
