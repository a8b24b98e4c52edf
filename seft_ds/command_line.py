"""The command lines of all scripts: a mistake is a ValueError of one line, with the nearest right name."""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NoReturn

from seft_ds.json_file import shown

_KINDS = {int: "a whole number", float: "a number", str: "text"}
_MOST_CHOICES = 12  # more of them are not listed


class FlagParser(argparse.ArgumentParser):
    """An ArgumentParser that raises ValueError where argparse prints its usage and exits.

    Attributes:
        also_known: flags that are taken out of the words before this parser sees them.
        unlikely: flags that nobody means who wrote another one.
        foreign: what to say of flags of other tools.
    """

    also_known: Sequence[str] = ()
    unlikely: Collection[str] = ()
    foreign: Mapping[str, str] = {}

    def __init__(self, *args: Any, **settings: Any):
        super().__init__(*args, **{"allow_abbrev": False, **settings})

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse does it. Raises ValueError for a flag or a word that it doesn't know."""
        args = sys.argv[1:] if args is None else list(args)
        self.check_names(args)  # first, or a misspelt flag would be told as a missing one
        found, rest = self.parse_known_args(args, namespace)
        if rest:
            raise ValueError(f"{shown(rest[0])} follows no flag that takes it; see --help")
        return found

    def check_names(self, words: Iterable[str]) -> None:
        """Raises ValueError, with the nearest right name, for a flag that there isn't."""
        if self._subparsers is not None:  # which know their own
            return
        for word in words:
            if word == "--":
                return
            flag = word.partition("=")[0]
            if word.startswith("--") and flag not in self._option_string_actions:
                raise ValueError(self.unknown(flag))

    def unknown(self, name: str, where: str = "") -> str:
        """What to say of a name that there isn't. where: the file that has it; default: a flag."""
        plain = name.lstrip("-").replace("-", "_")
        if plain in self.foreign:
            return f"{where or '--'}{plain}: {self.foreign[plain]}"
        if plain == "config" and not where and "config" in self.also_known:
            return "--config is given twice: one file describes a run, and flags change parts of it"
        known = {
            *self._option_string_actions,
            *(f"--{name}" for name in self.also_known if not where),
        }
        known -= {"--help", *(f"--{name}" for name in self.unlikely)}
        likely = [
            k[2:] for k in known if "-" not in k[2:] and (not k.startswith("--no_") or not where)
        ]
        near = nearest(plain, likely)
        there = (
            f"{where}there is no setting {shown(plain)}"
            if where
            else f"there is no flag {name:.80}"
        )
        if not near:
            return f"{there}; see --help"
        return f"{there}; did you mean {' or '.join(near if where else [f'--{n}' for n in near])}?"

    def takes_text(self, flag: str) -> bool:
        """Whether a flag that there is takes any text."""
        action = self._option_string_actions.get(flag)
        return action is not None and action.type is str and action.choices is None

    def check_setting(self, name: str, words: list[str], where: str) -> None:
        """Check one NAME: VALUE of a file as if it were a flag.

        Raises:
            ValueError: beginning with `where`: no such name, or a value of another kind.
        """
        action = self._option_string_actions.get(f"--{name}")
        if action is not None and action.nargs == 0:
            raise ValueError(f"{where}{name}: write {name.removeprefix('no_')}: false")
        if action is None:
            raise ValueError(self.unknown(name, where))
        if len(words) != 1 and action.nargs != "+":
            raise ValueError(f"{where}{name}: wanted one value, got {len(words)}")
        try:
            for word in words:
                self._check_value(action, self._get_value(action, word))
        except ValueError as error:
            raise ValueError(f"{where}{str(error).removeprefix('--')}") from None

    def _get_value(self, action: argparse.Action, text: str) -> Any:
        try:
            return super()._get_value(action, text)
        except argparse.ArgumentError:
            raise ValueError(f"{_name(action)} {shown(text)}: wanted {_wanted(action)}") from None

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            near = nearest(str(value), [str(choice) for choice in action.choices], most=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(f"{_name(action)} {shown(value)}: wanted {_wanted(action)}{hint}")

    def error(self, message: str) -> NoReturn:
        """Raise what is left for argparse to find: what is missing."""
        message = re.sub(r"(--[\w.]+)/--[\w./-]+", r"\1", message)  # the spelling with dashes
        missing = message.removeprefix("the following arguments are required: ")
        if missing != message:
            raise ValueError(f"give {missing}; see --help")
        message = message.removeprefix("argument ")
        message = re.sub(r": expected (one|at least one) argument$", " needs a value", message)
        raise ValueError(message)


def nearest(name: str, known: Iterable[str], most: int = 3) -> list[str]:
    """Names that one may have meant: spelt nearly the same, or longer, or with all its words among theirs."""
    name, known = name.lower(), sorted(known, key=lambda k: (len(k), k))
    words = set(_words(name))
    ways = (
        lambda: difflib.get_close_matches(name, known, n=1, cutoff=0.8),
        lambda: [k for k in known if len(name) > 3 and k.startswith(name)],
        lambda: [k for k in known if words and words <= set(_words(k))],
        lambda: difflib.get_close_matches(name, known, n=1, cutoff=0.6),
    )
    return next((found[:most] for way in ways if (found := way())), [])


def _words(name: str) -> list[str]:
    return [word for word in re.split(r"[._]", name.lower()) if word]


def _name(action: argparse.Action) -> str:
    return action.option_strings[0] if action.option_strings else action.dest


def _wanted(action: argparse.Action) -> str:
    if action.choices is not None:
        choices = [str(choice) for choice in action.choices]
        more = ", ..." if len(choices) > _MOST_CHOICES else ""
        return f"one of {', '.join(choices[:_MOST_CHOICES])}{more}"
    if action.type in _KINDS:
        return _KINDS[action.type]  # type: ignore[index]
    if getattr(action.type, "__name__", "") == "string_to_bool":  # transformers' own
        return "true or false"
    return "a value of another kind"
