"""Where a model comes from: what it was made from, how it was pruned, its licence."""

from __future__ import annotations

import re
from pathlib import Path, PurePath
from typing import Any

import yaml

from seft_ds.json_file import read_object, read_text

_CARD_BYTES = 1 << 20
_LICENCE_KEYS = ("license", "license_name", "license_link")
_PART = r"[A-Za-z0-9][\w.-]*"


def origin_of(source: str | Path) -> dict[str, Any]:
    """What a record says of the model in `source`, and of what that one was made from.

    `base_model` is a hub's name where one is known: of the source, or of what its own record names.
    Otherwise it is the name of the folder.
    """
    record = _record(Path(source))
    inherited = str(record.get("base_model") or "")
    folder = PurePath(str(source).replace("\\", "/")).name
    found: dict[str, Any] = {"base_model": hub_name(source) or hub_name(inherited) or folder}
    if isinstance(record.get("pruning"), dict):
        found["pruning"] = record["pruning"]
    licence = _licence(Path(source)) or record.get("license")
    if isinstance(licence, dict):
        found["license"] = licence
    return found


def hub_name(source: str | Path) -> str | None:
    """OWNER/NAME if `source` is that, or lies in a hub's cache."""
    text = str(source)
    cached = re.search(rf"models--({_PART}?)--({_PART})(?:/|$)", text)
    if cached is not None:
        return f"{cached[1]}/{cached[2]}"
    is_name = re.fullmatch(rf"{_PART}/{_PART}", text) is not None
    return text if is_name and not Path(text).exists() else None


def _record(folder: Path) -> dict[str, Any]:
    path = folder / "sparsity.json"
    try:
        return read_object(path) if path.is_file() else {}
    except ValueError:  # its own errors are told elsewhere
        return {}


def _licence(folder: Path) -> dict[str, str] | None:
    """The licence that a model's card states."""
    path = folder / "README.md"
    if not path.is_file():
        return None
    try:
        front = re.match(r"---\s*\n(.*?)\n---", read_text(path, _CARD_BYTES), flags=re.DOTALL)
        stated = yaml.safe_load(front[1]) if front else None
    except (ValueError, yaml.YAMLError):
        return None
    if not isinstance(stated, dict) or "license" not in stated:
        return None
    return {key: str(stated[key]) for key in _LICENCE_KEYS if stated.get(key)}
