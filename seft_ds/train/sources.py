"""From arguments to rows: which files and datasets, in which shares, and what of them is held out.

One source is read as it is. Several are put one after the other, or, with `mix_weights`, drawn from at random
in these shares until each has been used up (a smaller one is then repeated). The held-out rows are a file, a
split, or a part of the training rows that training doesn't see.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

from datasets import IterableDataset, concatenate_datasets, interleave_datasets

from seft_ds.train.chat_template import Template
from seft_ds.train.data import forms_of, load_rows
from seft_ds.train.forms import Rows, Say


@dataclass(frozen=True)
class Source:
    """A file, or a dataset by its name."""

    file: str | None = None
    name: str | None = None
    config: str | None = None

    def __str__(self) -> str:
        return str(self.file or (f"{self.name}:{self.config}" if self.config else self.name))


def check_sources(values: dict[str, Any]) -> None:
    """What can be said of the data's arguments without reading any.

    Raises:
        ValueError: no source, a missing file, settings that exclude each other.
    """
    files, names = values["train_file"] or [], values["dataset_name"] or []
    weights = values["mix_weights"]
    if not files and not names:
        raise ValueError("give --train_file or --dataset_name, the rows to train on")
    for flag, given in (("train_file", files), ("validation_file", [values["validation_file"]])):
        for file in given:
            if file and not os.path.isfile(file):
                raise ValueError(f"--{flag} {file}: no such file")
    if values["dataset_config"] and len(names) != 1:
        raise ValueError(
            f"--dataset_config is of one dataset, and --dataset_name names {len(names)}; write NAME:CONFIG "
            "for each that has configurations"
        )
    if weights is not None and (
        len(weights) != len(files) + len(names) or not all(0 < w < math.inf for w in weights)
    ):
        raise ValueError(
            f"--mix_weights {' '.join(map(str, weights))}: wanted a number above 0 for each of "
            f"{len(files)} files and {len(names)} datasets, in this order"
        )
    _check_held_out(values, names)
    for pair in values["rename_columns"] or []:
        old, equals, new = pair.partition("=")
        if not (old and equals and new):
            raise ValueError(
                f"--rename_columns {pair:.60}: wanted OLD=NEW, such as question=prompt"
            )
    for flag in ("max_train_samples", "max_eval_samples"):
        if values[flag] is not None and values[flag] < 1:
            raise ValueError(f"--{flag} {values[flag]}: wanted 1 or more")
    length = values.get("max_length")
    if length is not None and length < 2:
        raise ValueError(
            f"--max_length {length}: a row of one token has nothing to predict; wanted 2 or more"
        )
    if values["streaming"] and values["max_steps"] < 1:
        raise ValueError(
            "--streaming reads rows while training, so nobody knows how many there are: give --max_steps"
        )


def _check_held_out(values: dict[str, Any], names: list[str]) -> None:
    given = [f for f in ("validation_file", "dataset_test_split", "val_set_size") if values[f]]
    if len(given) > 1:
        raise ValueError(f"give one of {', '.join('--' + flag for flag in given)}")
    if values["dataset_test_split"] and len(names) != 1:
        raise ValueError(
            f"--dataset_test_split {values['dataset_test_split']} is of one dataset, and --dataset_name "
            f"names {len(names)}; use --validation_file or --val_set_size"
        )
    size = values["val_set_size"]
    if size is not None and (size <= 0 or (size >= 1 and size != int(size))):
        raise ValueError(
            f"--val_set_size {size}: wanted a share below 1, or a whole number of rows"
        )
    if size is not None and size < 1 and values["streaming"]:
        raise ValueError(
            f"--val_set_size {size}: of a stream no share can be told; give a number of rows"
        )


def read_sources(
    data: Any, seed: int, template: Template | None = None, say: Say = lambda line: None
) -> tuple[Rows, Rows | None]:
    """The rows to train on and those held out, each in one of the known forms.

    Args:
        data: DataArguments that `check_sources` has passed.
        seed: of the mixture and of the choice of the held-out rows.
        template: that writes messages; None: they are not tried.
        say: told what is left out of each source.

    Raises:
        ValueError: naming the source that can't be read, or has no rows of a known form.
    """
    renames = dict(pair.split("=", 1) for pair in data.rename_columns or [])
    sources = [Source(file=f) for f in data.train_file or []]
    sources += [_named(n, data.dataset_config) for n in data.dataset_name or []]

    def read(source: Source, split: str) -> Rows:
        return load_rows(
            source.file,
            source.name,
            source.config,
            split,
            streaming=data.streaming,
            renames=renames,
            template=template,
            say=say,
        )

    parts = [read(s, data.dataset_train_split if s.name else "train") for s in sources]
    rows = mixed(parts, [str(s) for s in sources], data.mix_weights, seed)
    held_out = None
    if data.validation_file:
        held_out = read(Source(file=data.validation_file), "train")
    elif data.dataset_test_split:
        held_out = read(sources[-1], data.dataset_test_split)
    elif data.val_set_size:
        rows, held_out = split_off(rows, data.val_set_size, seed)
    held_out = held_out if held_out is None else first(held_out, data.max_eval_samples)
    return first(rows, data.max_train_samples), held_out


def _named(name: str, config: str | None) -> Source:
    name, _, own = name.partition(":")
    return Source(name=name, config=own or config)


def mixed(parts: list[Rows], names: list[str], weights: list[float] | None, seed: int) -> Rows:
    """One set of rows from several.

    Raises:
        ValueError: they don't have the same form, so that no one loss mask fits them all.
    """
    if len(parts) == 1:
        return parts[0]
    forms = [forms_of(rows) for rows in parts]
    for form, name in zip_longest(forms[1:], names[1:]):
        if form != forms[0]:
            raise ValueError(
                f"{names[0]} has {forms[0]} and {name} has {form}: what is mixed needs one form; turn one "
                "into the other, or train on one after the other"
            )
    if weights is None:
        return concatenate_datasets(parts)
    shares = [w / sum(weights) for w in weights]
    return interleave_datasets(
        parts, probabilities=shares, seed=seed, stopping_strategy="all_exhausted"
    )


def split_off(rows: Rows, size: float, seed: int) -> tuple[Rows, Rows]:
    """(the rest, `size` rows): drawn at random from rows in memory, the first ones of a stream.

    Raises:
        ValueError: nothing would be left to train on.
    """
    if isinstance(rows, IterableDataset):
        return rows.skip(int(size)), rows.take(int(size))
    count = int(size) if size >= 1 else max(1, round(size * len(rows)))
    if count >= len(rows):
        raise ValueError(
            f"--val_set_size {size}: there are {len(rows)} rows, so none would be left to train on"
        )
    parts = rows.train_test_split(test_size=count, seed=seed)
    return parts["train"], parts["test"]


def first(rows: Rows, count: int | None) -> Rows:
    if count is None:
        return rows
    if isinstance(rows, IterableDataset):
        return rows.take(count)
    return rows.select(range(min(count, len(rows))))
