"""Perplexity on a text and lm-eval tasks of a model folder.

    deepspeed launch/evaluate.py --model_name_or_path DIR --text_file TEXT --max_length 1024
    python launch/evaluate.py --model_name_or_path DIR --tasks arc_easy,piqa --include_path YAML_DIR \\
        --limit 100 --output_path results.json

Runs the same under `python`, `deepspeed` and `torchrun`; several ranks share the windows of the
text and the requests of the tasks, and every one of them holds the whole model. Exit status: 0; 2 for a
mistake in the input; 1 if a task failed (the others' results are written), and for any other error, the
loss of a rank among them.
"""

from __future__ import annotations

import sys
from pathlib import Path

if Path(sys.path[0]).resolve() == Path(__file__).resolve().parent:
    sys.path.pop(0)  # lm-eval imports a package that is also called `evaluate`
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from seft_ds.signals import guard_process, nothing_left, set_outcome

if __name__ == "__main__":
    guard_process("stopped before it began")  # the imports take seconds

import time
from dataclasses import dataclass, field
from typing import Any

from seft_ds.console import (
    frozen_imports,
    model_folder,
    prepare_device,
    quiet_libraries,
    run,
    torch_dtype,
)
from seft_ds.devices import settle_accelerator
from seft_ds.errors import RunError


@dataclass
class EvaluateArguments:
    """What to measure, and on which model."""

    model_name_or_path: str = field(metadata={"help": "folder of the model"})
    text_file: str | None = field(
        default=None, metadata={"help": 'perplexity on .txt, .json or .jsonl ("text"), also .gz'}
    )
    max_length: int = field(default=1024, metadata={"help": "tokens per window and per request"})
    max_windows: int | None = field(default=None, metadata={"help": "only the text's first ones"})
    tasks: str | None = field(default=None, metadata={"help": "lm-eval tasks, comma between"})
    include_path: str | None = field(default=None, metadata={"help": "folder of task YAMLs"})
    limit: float | None = field(default=None, metadata={"help": "documents per task; <1: a share"})
    add_bos_token: bool = field(
        default=True,
        metadata={"help": "begin windows and requests with what the tokenizer puts before a text"},
    )
    batch_size: int = field(default=8, metadata={"help": "requests at a time, for the tasks"})
    dtype: str = field(default="auto", metadata={"help": "auto (as stored), float32 or bfloat16"})
    output_path: str | None = field(default=None, metadata={"help": "results as a JSON file"})
    local_rank: int = field(default=-1, metadata={"help": "set by the deepspeed launcher"})


def check(options: EvaluateArguments) -> Path:
    """The model folder, after every check that needs neither the model nor lm-eval.

    Raises:
        ValueError: what is wrong and what to change.
    """
    from seft_ds.prune.calibrate import check_text_file

    if options.text_file is None and options.tasks is None:
        raise ValueError("nothing to measure: give --text_file FILE, --tasks NAME,NAME, or both")
    if options.text_file is not None:
        check_text_file(options.text_file)
    torch_dtype(options.dtype)
    if options.batch_size < 1 or (options.limit is not None and options.limit <= 0):
        raise ValueError(
            f"got --batch_size {options.batch_size} and --limit {options.limit}; wanted a whole "
            "number above 0 and a number above 0"
        )
    if options.output_path is not None and Path(options.output_path).is_dir():
        raise ValueError(f"--output_path {options.output_path} is a folder; give a JSON file")
    return model_folder(options.model_name_or_path)


def task_names(tasks: str) -> list[str]:
    """The names in a comma-separated list."""
    return [name.strip() for name in tasks.split(",") if name.strip()]


def limit_of(limit: float | None) -> float | None:
    """lm-eval takes a whole number as a count of documents and a fraction as a share of them."""
    return int(limit) if limit is not None and limit >= 1 else limit


def evaluate(options: EvaluateArguments) -> None:
    """Check, load, measure, print and write."""
    folder = check(options)
    device = prepare_device()
    # Only now the slow imports: a mistake in the arguments is told at once.
    from transformers import AutoTokenizer

    from seft_ds.beginning import in_words
    from seft_ds.checkpoint.load import load_causal_lm
    from seft_ds.checkpoint.model_files import open_model_files
    from seft_ds.distributed.agreement import all_or_none
    from seft_ds.distributed.collectives import close_ranks, init_ranks
    from seft_ds.distributed.liveness import watch_peers
    from seft_ds.evaluate.perplexity import write_json
    from seft_ds.prune.limits import check_positions

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    ranks = init_ranks()
    watch_peers(ranks)
    manager = None
    if options.tasks is not None:
        manager = all_or_none(ranks, lambda: known_tasks(options))
    files = all_or_none(ranks, lambda: open_model_files(folder))
    for line in files.notes() if ranks.rank == 0 else ():
        print(f"warning: {line}", flush=True)
    named = torch_dtype(options.dtype)
    model = load_causal_lm(files, files.dtype if isinstance(named, str) else named, ranks)
    model = model.to(device).eval()
    check_positions(options.max_length, model.config, "the model")
    dtype = str(model.dtype).removeprefix("torch.")
    results: dict[str, Any] = {"model": options.model_name_or_path, "dtype": dtype}
    results["begins_with"] = in_words(tokenizer, options.add_bos_token)
    if options.text_file is not None:
        results["perplexity"] = on_text(options, model, tokenizer, ranks)
    if manager is not None:
        results["tasks"] = on_tasks(options, model, tokenizer, ranks, manager)
    if ranks.rank == 0 and options.output_path is not None:
        write_json(options.output_path, results)
        nothing_left()
        print(f"wrote {options.output_path}")
    close_ranks()
    failed = results.get("tasks", {}).get("failed", {})
    if failed:
        told = "; ".join(f"task {name} failed: {why}" for name, why in failed.items())
        raise RunError(f"{told}. The other results are above")


def on_text(options: EvaluateArguments, model: Any, tokenizer: Any, ranks: Any) -> dict[str, Any]:
    """Perplexity on the text file; rank 0 prints it."""
    from seft_ds.beginning import beginning_of, described
    from seft_ds.evaluate import perplexity
    from seft_ds.prune.limits import check_ids, embedding_rows

    assert options.text_file is not None
    start = time.monotonic()
    text = perplexity.read_text(options.text_file)
    added = options.add_bos_token
    windows = perplexity.windows_of(
        tokenizer, text, options.max_length, options.max_windows, add_bos_token=added
    )
    ids = windows.unique().tolist()
    check_ids(ids, embedding_rows(model), tokenizer, options.text_file)
    begin_tokens = len(beginning_of(tokenizer)) if added else 0
    measured = perplexity.measure(
        model, windows, ranks, begin_tokens=begin_tokens, progress=ranks.rank == 0
    )
    dtype = str(model.dtype).removeprefix("torch.")
    if ranks.rank == 0:
        line = perplexity.as_line(measured) + described(tokenizer, added)
        print(f"{line}, {dtype}, {time.monotonic() - start:.0f} s")
    return {"text_file": Path(options.text_file).name, **measured.as_json()}


def known_tasks(options: EvaluateArguments) -> Any:
    """lm-eval's index of tasks, once it holds all that were asked for, and their data can be read."""
    from seft_ds.evaluate import harness

    names = task_names(options.tasks or "")
    manager = harness.task_manager(names, options.include_path)
    harness.load_tasks(names, manager)
    return manager


def on_tasks(
    options: EvaluateArguments, model: Any, tokenizer: Any, ranks: Any, manager: Any
) -> dict[str, Any]:
    """lm-eval's results for the tasks; rank 0 prints them and has them all."""
    from seft_ds.beginning import described
    from seft_ds.evaluate import harness

    found = harness.evaluate_tasks(
        model,
        tokenizer,
        task_names(options.tasks or ""),
        ranks,
        manager=manager,
        batch_size=options.batch_size,
        limit=limit_of(options.limit),
        max_length_tokens=options.max_length,
        add_bos_token=options.add_bos_token,
        progress=ranks.rank == 0,
    )
    if ranks.rank == 0:
        print(harness.as_table(found))
        size = f"batch size {options.batch_size} on each of {ranks.size} ranks"
        begins = described(tokenizer, options.add_bos_token, "request")
        print(f"{size}, at most {options.max_length} tokens{begins}")
    return harness.as_json(found)


def main() -> None:
    set_outcome("stopped; nothing was written")
    settle_accelerator()  # before transformers, which imports DeepSpeed
    quiet_libraries()
    with frozen_imports():
        from seft_ds.train.flags import parse_options

    evaluate(parse_options(EvaluateArguments, __doc__))


if __name__ == "__main__":
    sys.exit(run(main))
