"""Command lines: a recipe's entries before the flags, `--seft.*` apart, old names as today's ones."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import yaml

from seft_ds.json_file import read_text, shown

_RECIPE_BYTES = 1 << 20


def split_seft_flags(argv: list[str]) -> tuple[list[str], dict[str, Any]]:
    """Take `--seft.NAME VALUE` and `--seft.NAME=VALUE` out of the flags."""
    rest, found = [], {}
    flags = iter(argv)
    for flag in flags:
        if not flag.startswith("--seft."):
            rest.append(flag)
            continue
        name, eq, value = flag.removeprefix("--seft.").partition("=")
        if not eq:
            value = next(flags, "")
        if value == "" or value.startswith("--"):
            raise ValueError(f"--seft.{name} needs a value")
        found[name] = plain_value(value)
    return rest, found


def plain_value(text: str) -> Any:
    """A number, true, false, null or list as JSON writes them; anything else is a string (2:4)."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


class RecipeLoader(yaml.SafeLoader):
    """YAML in which 2:4 is a string (not 124, a number to base 60) and 5e-3 a number.

    Without aliases: a few lines of them stand for more text than any memory holds.
    """

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError(
                f"*{self.peek_event().anchor}: write the value out where it is used"
            )
        return super().compose_node(parent, index)


_INT, _FLOAT = "tag:yaml.org,2002:int", "tag:yaml.org,2002:float"
RecipeLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in (_INT, _FLOAT)]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
RecipeLoader.add_implicit_resolver(_INT, re.compile(r"[-+]?\d+$"), list("-+0123456789"))
RecipeLoader.add_implicit_resolver(
    _FLOAT, re.compile(r"[-+]?(\d+\.\d*|\.?\d+)([eE][-+]?\d+)?$"), list("-+.0123456789")
)


def expand_yaml(argv: list[str]) -> tuple[list[str], dict[str, Any]]:
    """Put the entries of `--config FILE.yaml` before the flags, so that flags win."""
    if "--config" not in argv:
        return argv, {}
    at = argv.index("--config")
    path = Path(argv[at + 1]) if at + 1 < len(argv) else Path("")
    if not os.path.isfile(path):
        raise ValueError(f"--config {path}: no such file")
    text = read_text(path, _RECIPE_BYTES)
    try:
        recipe = yaml.load(text, RecipeLoader) or {}
    except Exception as error:  # yaml's constructors raise whatever the conversion of a value meets
        reason = f"{type(error).__name__}: {error}"[:300]
        raise ValueError(f"--config {path} is not YAML that can be read ({reason})") from None
    if not isinstance(recipe, dict):
        raise ValueError(f"--config {path}: wanted NAME: VALUE lines, got {type(recipe).__name__}")
    seft = recipe.pop("seft", {}) or {}
    if not isinstance(seft, dict):
        raise ValueError(f"--config {path}: seft: wanted NAME: VALUE lines, got {shown(seft)}")
    flags: list[str] = []
    for name, value in recipe.items():
        if value is None:
            continue
        flags.append(f"--{name}")
        if isinstance(value, list):
            flags += [str(v) for v in value]
        else:
            flags.append(json.dumps(value) if isinstance(value, dict) else str(value))
    return flags + argv[:at] + argv[at + 2 :], seft
