"""Flags of dataclasses, a recipe's entries before them, and `--seft.*` apart."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml
from transformers import HfArgumentParser

from seft_ds.command_line import FlagParser, nearest
from seft_ds.config import SeftConfig, check_each
from seft_ds.console import is_first_rank
from seft_ds.json_file import printable, read_text, shown
from seft_ds.train.old_names import grouped, translate

_RECIPE_BYTES = 1 << 20
Options = TypeVar("Options")


class DataclassParser(FlagParser, HfArgumentParser):
    """The flags of dataclasses, their mistakes told in one line each."""


def parse_options(kind: type[Options], about: str | None, argv: list[str] | None = None) -> Options:
    """An instance of the dataclass `kind` from the command line. Raises ValueError for a mistake in it."""
    parser = DataclassParser([kind], description=(about or "").splitlines()[0])  # type: ignore[list-item]
    return kind(**vars(parser.parse_args(argv)))


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
        check_setting_names([name], "--seft.")
        if value == "" or value.startswith("--"):
            raise ValueError(f"--seft.{name} needs a value")
        found[name] = plain_value(value)
    return rest, found


def check_setting_names(names: Iterable[Any], where: str) -> None:
    """Raises ValueError, beginning with `where`, for a name that is no setting of the "seft" block."""
    for name in names:
        if name not in SeftConfig.model_fields:
            near = nearest(str(name), SeftConfig.model_fields) or [*SeftConfig.model_fields]
            raise ValueError(
                f"{where}{printable(str(name), 80)}: there is no such setting; did you mean "
                f"{' or '.join(map(repr, near))}?"
            )


def plain_value(text: str) -> Any:
    """A number, true, false, null or list as JSON writes them; anything else is a string (2:4)."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


class RecipeLoader(yaml.SafeLoader):
    """YAML in which 2:4 and no are strings (not 124, a number to base 60, and false) and 5e-3 a number.

    Without aliases: a few lines of them stand for more text than any memory holds. No name may come twice.
    """

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        twice = [name for name in names if names.count(name) > 1]
        if twice:
            raise yaml.YAMLError(f"{twice[0]} is there twice")
        return super().construct_mapping(node, deep)

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError(
                f"*{self.peek_event().anchor}: write the value out where it is used"
            )
        return super().compose_node(parent, index)


_BOOL, _INT, _FLOAT = (f"tag:yaml.org,2002:{kind}" for kind in ("bool", "int", "float"))
RecipeLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in (_BOOL, _INT, _FLOAT)]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
RecipeLoader.add_implicit_resolver(
    _BOOL, re.compile("true|True|TRUE|false|False|FALSE$"), list("tTfF")
)
RecipeLoader.add_implicit_resolver(_INT, re.compile(r"[-+]?\d+$"), list("-+0123456789"))
RecipeLoader.add_implicit_resolver(
    _FLOAT, re.compile(r"[-+]?(\d+\.\d*|\.?\d+)([eE][-+]?\d+)?$"), list("-+.0123456789")
)


def take_recipe(argv: list[str]) -> tuple[list[str], str | None]:
    """(the flags without `--config FILE`, the file)."""
    at = next((i for i, flag in enumerate(argv) if flag.partition("=")[0] == "--config"), None)
    if at is None:
        return argv, None
    _, equals, file = argv[at].partition("=")
    if equals:
        return argv[:at] + argv[at + 1 :], file
    if at + 1 == len(argv) or argv[at + 1].startswith("--"):
        raise ValueError("--config needs a value: the YAML file that describes the run")
    return argv[:at] + argv[at + 2 :], argv[at + 1]


def read_recipe(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(a recipe's entries, its "seft" block).

    Raises:
        ValueError: naming the file: there is none, no YAML, no NAME: VALUE lines, an unknown setting.
    """
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
    check_setting_names(seft, f"--config {path}: seft: ")
    check_each(seft, f"--config {path}: ")
    return recipe, seft


def flag_names(argv: Iterable[str]) -> frozenset[str]:
    """The names of the flags among words."""
    flags = (word.partition("=")[0][2:] for word in argv if word.startswith("--"))
    return frozenset(flag.replace("-", "_") for flag in flags)


def as_flags(recipe: dict[Any, Any], path: Path) -> list[tuple[str, list[str], Any]]:
    """(flag, words, value) of each entry that has a value.

    Raises:
        ValueError: a value that no flag can have.
    """
    found = []
    for name, value in recipe.items():
        if value is None:
            continue
        values = value if isinstance(value, list) else [value]
        if any(isinstance(v, list) or v is None for v in values) or not values:
            raise ValueError(
                f"--config {path}: {shown(name)}: wanted plain values, got {shown(value)}"
            )
        words = [json.dumps(v) if isinstance(v, dict) else str(v) for v in values]
        if any(word.startswith("--") for word in words):
            raise ValueError(f"--config {path}: {shown(name)}: a value can't begin with --")
        found.append((f"--{name}", words, value))
    return found


def flags_of_recipe(
    recipe: dict[Any, Any], path: Path, parser: FlagParser
) -> tuple[list[str], list[str]]:
    """(a recipe as flags of today's names, what to say of those that were translated).

    Raises:
        ValueError: beginning with the file and the name that is unknown, or has a value of another kind.
    """
    argv: list[str] = []
    said: list[str] = []
    where = f"--config {path}: "
    for flag, words, given in as_flags(recipe, path):
        current, warnings = translate([flag, *words])
        said += [f"{where}{warning}" for warning in warnings]
        for new, values in grouped(current):
            if isinstance(given, bool) and values == [str(given)] and parser.takes_text(new):
                raise ValueError(f"{where}{flag[2:]}: wanted text, got {str(given).lower()}")
            parser.check_setting(new.removeprefix("--"), values, where)
            # As one word, or a negative number could pass for a flag.
            argv += [f"{new}={values[0]}"] if len(values) == 1 else [new, *values]
    return argv, said


@dataclass
class Recipe:
    """What `--config FILE` brought."""

    file: str | None = None
    names: frozenset[str] = frozenset()  # set there, and by no flag
    seft: dict[str, Any] = field(default_factory=dict)

    def called(self, name: str) -> str:
        """An argument as the user wrote it."""
        return f"--config {self.file}: {name}" if name in self.names else f"--{name}"


def with_recipe(argv: list[str], parser: DataclassParser) -> tuple[list[str], Recipe]:
    """A recipe's entries as flags, and those of the command line behind them, so that these win."""
    argv, file = take_recipe(argv)
    argv, translated = translate(argv)
    first: list[str] = []
    recipe = Recipe()
    if file is not None:
        entries, seft = read_recipe(Path(file))
        first, more = flags_of_recipe(entries, Path(file), parser)
        translated = more + translated
        recipe = Recipe(file, flag_names(first) - flag_names(argv), seft)
    for line in translated:
        warn(line)
    return first + argv, recipe


def warn(line: str) -> None:
    if is_first_rank():
        print(f"warning: {line}", file=sys.stderr)
