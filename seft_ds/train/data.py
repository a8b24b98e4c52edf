"""Training data: rows of a file or a dataset in one of the forms that TRL knows.

| columns                        | what is learnt                            |
|--------------------------------|-------------------------------------------|
| text                           | every token                               |
| messages                       | every token of the chat template          |
| prompt, completion             | the completion                            |
| instruction, (input,) output   | the output; worded as the Alpaca prompt   |
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset

FORMS = (("text",), ("messages",), ("prompt", "completion"), ("instruction", "output"))
_LOADERS = {".txt": "text", ".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}


def load_rows(file: str | None, name: str | None, config: str | None, split: str) -> Dataset:
    """The rows of a local file or a named dataset, in a form of `FORMS`.

    Raises:
        ValueError: an unknown file type, no rows, or none of the known columns.
    """
    if file is not None:
        suffixes = [s for s in Path(file).suffixes if s != ".gz"]
        kind = _LOADERS.get(suffixes[-1]) if suffixes else None
        if kind is None:
            raise ValueError(f"{file}: wanted a {', '.join(_LOADERS)} file (or one of them .gz)")
        rows = _read(lambda: load_dataset(kind, data_files=file, split="train"), file)
    else:
        rows = _read(lambda: load_dataset(name, config, split=split), str(name))
    return in_known_form(rows, file or str(name))


def _read(load: Any, what: str) -> Dataset:
    try:
        return load()
    except Exception as error:  # datasets raises many kinds for a bad file or an unreachable name
        raise ValueError(f"can't read {what}: {type(error).__name__}: {error}") from error


def in_known_form(rows: Dataset, what: str) -> Dataset:
    """Keep the columns of the form that the rows have; Alpaca rows become prompt and completion."""
    columns = set(rows.column_names)
    form = next((f for f in FORMS if columns.issuperset(f)), None)
    if form is None:
        wanted = "; ".join(" + ".join(f) for f in FORMS)
        raise ValueError(f"{what} has the columns {sorted(columns)}; wanted one of: {wanted}")
    if form == ("text",):
        rows = rows.filter(lambda row: bool(row["text"] and row["text"].strip()))
    if len(rows) == 0:
        raise ValueError(f"{what} has no rows with text in them")
    if form == ("instruction", "output"):
        return rows.map(_from_alpaca, remove_columns=rows.column_names)
    return rows.select_columns(list(form))


def _from_alpaca(row: dict[str, str]) -> dict[str, str]:
    """One instruction row in the wording that Alpaca-style models are trained with."""
    if row.get("input"):
        opening = "an instruction that describes a task, paired with an input that provides further context"
        middle = f"### Input:\n{row['input']}\n\n"
    else:
        opening, middle = "an instruction that describes a task", ""
    prompt = (
        f"Below is {opening}. Write a response that appropriately completes the request.\n\n"
        f"### Instruction:\n{row['instruction']}\n\n{middle}### Response:\n"
    )
    return {"prompt": prompt, "completion": row["output"]}


def describe_sample(trainer: Any, tokenizer: Any, width: int = 400) -> str:
    """The first training row as the model gets it, and how many of its tokens count in the loss."""
    row = trainer.data_collator([trainer.train_dataset[0]])
    ids, labels = row["input_ids"][0], row["labels"][0]
    counted = int((labels != -100).sum())
    text = tokenizer.decode(ids)
    shown = text if len(text) <= width else text[:width] + " ..."
    return f"first row: {len(ids)} tokens, {counted} in the loss\n{shown}"
