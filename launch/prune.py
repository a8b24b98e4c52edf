"""Prune a dense model and write it as an ordinary model folder with exact zeros and a sparsity.json.

    deepspeed launch/prune.py --model_name_or_path DIR --output_dir PRUNED --method wanda \\
        --sparsity 0.6 --calibration_file TEXT
    python launch/prune.py --model_name_or_path DIR --output_dir PRUNED --method sparsegpt --pattern 2:4

The model is read from its safetensors one block at a time, so that it may be larger than the memory of any
rank; --dry_run says how much that takes. Runs the same under `python`, `deepspeed` and `torchrun`; several
ranks share the calibration sequences. A run that was cut off goes on after its last whole block when it is
started again. Exit status: 0; 2 for a mistake in the input; 1 for any other error, the loss of a rank among
them.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from seft_ds.signals import guard_process, nothing_left, set_outcome

if __name__ == "__main__":
    guard_process("stopped before it began")  # the imports take seconds

import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from seft_ds.checkpoint.origin import origin_of
from seft_ds.console import (
    frozen_imports,
    is_first_rank,
    model_folder,
    prepare_device,
    quiet_libraries,
    run,
    torch_dtype,
)
from seft_ds.devices import settle_accelerator
from seft_ds.prune.choose import Budget
from seft_ds.prune.owl import OwlSettings
from seft_ds.prune.recipe import Recipe, recipe_of
from seft_ds.prune.work import FOLDER_NAME, Work, is_resumable


@dataclass
class PruneArguments:
    """What to prune, how much of it, and from which data."""

    model_name_or_path: str = field(metadata={"help": "folder of the dense model"})
    output_dir: str = field(metadata={"help": "where the pruned model goes"})
    method: str = field(default="wanda", metadata={"help": "wanda, sparsegpt or magnitude"})
    sparsity: float | None = field(default=None, metadata={"help": "share to prune, such as 0.6"})
    pattern: str | None = field(default=None, metadata={"help": "N:M, N of every M inputs stay"})
    budget: str = field(
        default="auto",
        metadata={"help": "what competes: row, weight, global, or auto (the paper's)"},
    )
    targets: list[str] | None = field(
        default=None,
        metadata={
            "help": "prune only the layers whose names end in one of these, and leave the rest dense; "
            "default: every linear layer and expert of the blocks"
        },
    )
    layerwise: str = field(
        default="uniform", metadata={"help": "uniform, or owl: blocks with outliers keep more"}
    )
    owl_m: float = field(default=5.0, metadata={"help": "an outlier is this many times the mean"})
    owl_lambda: float = field(default=0.08, metadata={"help": "half the range of densities"})
    calibration_file: str | None = field(
        default=None, metadata={"help": '.txt (a text a line), .json or .jsonl ("text"), also .gz'}
    )
    calibration_dataset: str | None = field(
        default=None, metadata={"help": 'NAME or NAME:CONFIG with a "text" column, split train'}
    )
    calibration_samples: int = field(default=128, metadata={"help": "number of sequences"})
    max_length: int = field(default=2048, metadata={"help": "tokens per sequence"})
    add_bos_token: bool = field(
        default=True,
        metadata={"help": "begin sequences with what the tokenizer puts before a text"},
    )
    seed: int = field(default=0, metadata={"help": "chooses the calibration sequences"})
    dtype: str = field(default="auto", metadata={"help": "auto (as stored), float32 or bfloat16"})
    overwrite: bool = field(default=False, metadata={"help": "replace what output_dir holds"})
    dry_run: bool = field(
        default=False, metadata={"help": "say what would be pruned and how much memory it takes"}
    )
    local_rank: int = field(default=-1, metadata={"help": "set by the deepspeed launcher"})


def check(options: PruneArguments) -> tuple[Path, Recipe]:
    """The model folder and the recipe, after every check that needs no model.

    Raises:
        ValueError: what is wrong and what to change.
    """
    recipe = recipe_of(
        options.method,
        Budget(options.sparsity, options.pattern),
        options.budget,
        options.layerwise,
        OwlSettings(options.owl_m, options.owl_lambda),
    )
    torch_dtype(options.dtype)
    if recipe.needs_text:
        check_calibration(options)
    folder = model_folder(options.model_name_or_path)
    check_output(Path(options.output_dir), folder, options.overwrite)
    return folder, recipe


def check_output(output: Path, source: Path, overwrite: bool) -> None:
    """Raises ValueError unless the pruned model can go to `output` without harm to anything else."""
    if output.is_file():
        raise ValueError(f"--output_dir {output} is a file; give a folder")
    if source.resolve().is_relative_to(output.resolve()):
        raise ValueError(f"--output_dir {output} holds the dense model; give another folder")
    if not output.is_dir() or not any(output.iterdir()) or is_resumable(output):
        return
    if not overwrite:
        raise ValueError(
            f"--output_dir {output} is not empty; give another folder, or --overwrite to replace it"
        )
    if not (output / "config.json").is_file():
        raise ValueError(
            f"--output_dir {output} holds something that is no model, which --overwrite does not "
            "delete; give another folder"
        )


@contextmanager
def replacing(output: Path) -> Iterator[None]:
    """Set aside the model that `output` holds, if any; delete it at the end, or put it back on error.

    The folder of unfinished work stays where it is. A run that was killed in here has left the old model
    aside: it is deleted when a later run has written the new one.
    """
    old = output.with_name(f".{output.name}.replaced")
    moved = (output / "config.json").is_file() and not is_resumable(output)
    if moved:
        shutil.rmtree(old, ignore_errors=True)  # of a run that was killed after it had written
        output.rename(old)
        _move_work(old, output)
    try:
        yield
    except BaseException:
        if moved:
            Work(output).end_assembling()  # or the old model would pass for a half-written one
            _move_work(output, old)
            shutil.rmtree(output, ignore_errors=True)
            old.rename(output)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _move_work(there: Path, here: Path) -> None:
    if (there / FOLDER_NAME).is_dir():
        here.mkdir(exist_ok=True)
        (there / FOLDER_NAME).rename(here / FOLDER_NAME)


def check_calibration(options: PruneArguments) -> None:
    """Raises ValueError unless at most one source of calibration text is given, and readable."""
    from seft_ds.prune.calibrate import check_text_file

    if options.calibration_file is not None and options.calibration_dataset is not None:
        raise ValueError(
            "got --calibration_file and --calibration_dataset; give one source of calibration text, or "
            "neither for the built-in one"
        )
    if options.calibration_file is not None:
        check_text_file(options.calibration_file)
    if options.calibration_samples < 1 or options.max_length < 2:
        raise ValueError(
            f"got --calibration_samples {options.calibration_samples} and --max_length "
            f"{options.max_length}; wanted at least 1 and 2"
        )


def calibration(
    options: PruneArguments, folder: Path, model: Any
) -> tuple[torch.Tensor, str | None]:
    """int64 (samples, max_length): the calibration sequences, the same on every rank; what they begin with.

    The built-in text gives fewer where it has no more.
    """
    from transformers import AutoTokenizer

    from seft_ds.beginning import described, in_words
    from seft_ds.prune.calibrate import dataset_texts, default_texts, read_texts, sequences
    from seft_ds.prune.limits import check_ids, check_positions, embedding_rows

    check_positions(options.max_length, model.config, "the model")
    built_in = False
    if options.calibration_file is not None:
        texts: Sequence[str] = read_texts(options.calibration_file)
    elif options.calibration_dataset is not None:
        texts = dataset_texts(options.calibration_dataset)
    else:
        texts, built_in = default_texts(), True
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    samples = options.calibration_samples
    added = options.add_bos_token
    found = sequences(
        tokenizer,
        texts,
        samples,
        options.max_length,
        options.seed,
        fewer=built_in,
        add_bos_token=added,
    )
    check_ids(found.unique().tolist(), embedding_rows(model), tokenizer, "the calibration text")
    begins = described(tokenizer, added, "sequence")
    if begins and not built_in:
        say(f"calibrating with {len(found)} sequences of {options.max_length} tokens{begins}")
    if built_in:
        few = "" if len(found) == samples else f", which has no more than {len(found)} of them"
        say(
            f"calibrating with {len(found)} sequences of {options.max_length} tokens of Python's own "
            f"manual{few}{begins}: a stand-in, text like what the model is for is better (--calibration_file)"
        )
    return found, in_words(tokenizer, added)


def say(line: str) -> None:
    """Print a line on the first rank."""
    if is_first_rank():
        print(line, flush=True)


def about(
    options: PruneArguments,
    recipe: Recipe,
    folder: Path,
    dtype: torch.dtype,
    begins_with: str | None,
) -> dict[str, Any]:
    """What the written model says about how it came to be; names only, no paths of this machine."""
    settings = asdict(options) | {"dtype": str(dtype).removeprefix("torch."), "budget": recipe.unit}
    settings["begins_with"] = begins_with
    unrelated = ["model_name_or_path", "output_dir", "overwrite", "dry_run", "local_rank"]
    unrelated += ["targets"] * (options.targets is None)
    unrelated += ["owl_m", "owl_lambda"] * (recipe.owl is None)
    unrelated += ["budget"] * (recipe.budget.pattern is not None)
    if not recipe.needs_text:
        unrelated += ["calibration_file", "calibration_dataset", "calibration_samples"]
        unrelated += ["max_length", "seed", "add_bos_token", "begins_with"]
    elif options.calibration_file is not None:
        settings["calibration_file"] = Path(options.calibration_file).name
    for name in unrelated:
        settings.pop(name, None)
    return origin_of(folder.resolve()) | {"pruning": settings}


@dataclass
class Prepared:
    """The model's structure, where its tensors are, and the text with what each sequence begins with."""

    model: Any
    files: Any  # ModelFiles
    dtype: torch.dtype
    sequences: torch.Tensor | None
    begins_with: str | None


def prepare(
    options: PruneArguments, recipe: Recipe, folder: Path, device: torch.device
) -> Prepared:
    """Everything that can be known before a weight is read.

    Raises:
        ValueError: the model, its files or the text can't be used; what to change.
    """
    from seft_ds.checkpoint.model_files import open_model_files
    from seft_ds.prune.blocks import check_pattern_fits, decoder_blocks
    from seft_ds.prune.empty import empty_model

    files = open_model_files(folder, pickles=False)
    for line in files.notes():
        say(f"warning: {line}")
    dtype = torch_dtype(options.dtype)
    if not isinstance(dtype, torch.dtype):  # "auto": as stored
        dtype = files.dtype
    model = empty_model(folder, dtype, device, files)
    blocks = decoder_blocks(model, files.naming, options.targets or "auto")
    check_pattern_fits(blocks, recipe.budget)
    tell_what_stays_dense(blocks)
    sequences = begins_with = None
    if recipe.needs_text and not options.dry_run:
        sequences, begins_with = calibration(options, folder, model)
    return Prepared(model, files, dtype, sequences, begins_with)


def tell_what_stays_dense(blocks: list[Any]) -> None:
    """Print which matrices of the blocks will not be pruned, if there are any."""
    from seft_ds.prune.blocks import left_dense

    share, kinds = left_dense(blocks)
    if kinds:
        more = f" and {len(kinds) - 6} more" if len(kinds) > 6 else ""
        say(f"left dense: {share:.1%} of the blocks' weights ({', '.join(kinds[:6])}{more})")


def dry_run(options: PruneArguments, recipe: Recipe, prepared: Prepared) -> None:
    """Print what would be pruned, and the plan of memory."""
    from seft_ds.prune.blocks import decoder_blocks, weight_shapes
    from seft_ds.prune.plan import pruning_plan

    blocks = decoder_blocks(prepared.model, targets=options.targets or "auto")
    shapes = weight_shapes(blocks)
    total = sum(out * inputs for out, inputs in shapes.values())
    how = recipe.budget.pattern or f"{recipe.budget.sparsity:.4g} per {recipe.unit}"
    say(f"{recipe.method}, {how}: {len(shapes)} weights in {len(blocks)} blocks, {total:,} entries")
    plan = pruning_plan(
        prepared.model,
        recipe.method,
        sequences=options.calibration_samples,
        length_tokens=options.max_length,
        dtype=prepared.dtype,
        ranks=int(os.environ.get("WORLD_SIZE", "1")),
        targets=options.targets or "auto",
    )
    for line in plan.lines():
        say(line)


def prune(options: PruneArguments) -> None:
    """Check, read, prune, write."""
    folder, recipe = check(options)
    device = prepare_device()
    if options.dry_run:
        dry_run(options, recipe, prepare(options, recipe, folder, device))
        return
    # Only now the slow imports: a mistake in the arguments is told at once.
    from seft_ds.distributed.agreement import agree, all_or_none
    from seft_ds.distributed.collectives import close_ranks, init_ranks
    from seft_ds.distributed.liveness import watch_peers
    from seft_ds.prune.folder import assemble, find_quotas, prune_blocks, settings_of
    from seft_ds.prune.source import FromFiles
    from seft_ds.prune.statistics import FEW_TOKENS
    from seft_ds.train.run_dir import RunLock

    ranks = init_ranks()
    watch_peers(ranks)
    first = ranks.rank == 0
    start = time.monotonic()
    ready = all_or_none(ranks, lambda: prepare(options, recipe, folder, device))
    settings = settings_of(recipe, folder, ready.dtype, ready.sequences, options.targets)
    agree(ranks, settings, "what to prune")
    output = Path(options.output_dir)
    work, lock = Work(output), RunLock()

    def begin() -> set[int]:
        work.folder.mkdir(parents=True, exist_ok=True)
        lock.take(work.folder)
        return work.begin(settings, options.overwrite)

    finished = ranks.gather_object(all_or_none(ranks, lambda: begin() if first else set()))[0]
    source = FromFiles(
        ready.model,
        ready.files,
        work,
        ready.dtype,
        device,
        writes=first or recipe.method == "magnitude",
        finished=set(finished),
        targets=options.targets or "auto",
    )
    set_outcome(lambda: how_to_go_on(work, len(source.blocks)))
    if finished:
        say(
            f"going on with an earlier run: {len(finished)} of {len(source.blocks)} blocks are done"
        )
    quotas = ranks.gather_object(work.quotas() if first else None)[0]
    if quotas is None:
        quotas = find_quotas(source, recipe, ready.sequences, ranks, progress=first)
        if first:
            work.keep_quotas(quotas)
    prune_blocks(source, recipe, quotas, ready.sequences, ranks, progress=first)
    if first:
        seconds, blocks = time.monotonic() - start, len(source.blocks)
        say(f"pruned {len(quotas)} weights in {blocks} blocks, {seconds:.0f} s; writing")
        facts = about(options, recipe, folder, ready.dtype, ready.begins_with)
        if any(block.experts for block in source.blocks):
            facts["by_magnitude"] = few = work.by_magnitude()
            say(
                f"{few} matrices of experts saw fewer than {FEW_TOKENS} tokens and were pruned by magnitude"
            )
        with replacing(output):
            work.begin_assembling()
            record = assemble(source, work, quotas, folder, output, facts)
            work.remove()
        nothing_left()
        report(record, output)
    close_ranks()


def how_to_go_on(work: Work, blocks: int) -> str:
    """For the line that a run ends with before its time."""
    try:
        done = len(work.finished())
    except OSError:  # rank 0 has just removed it
        return "stopped; the same command goes on"
    return f"stopped after {done} of {blocks} blocks; the same command goes on from there"


def report(record: dict[str, Any], output: Path) -> None:
    """Print what was written."""
    live, total, raised = record["live"], record["total"], record["live_zeros_raised"]
    say(f"wrote {output}: {live} of {total} weights live, sparsity {1 - live / total:.4%}")
    if raised:
        say(
            f"{raised} live weights were 0 (inputs that are always 0, or zeros of the dense model) and are "
            "written as the smallest normal number"
        )


def main() -> None:
    set_outcome("stopped; nothing was written")
    settle_accelerator()  # before transformers, which imports DeepSpeed
    quiet_libraries()
    with frozen_imports():
        from seft_ds.train.flags import parse_options

    prune(parse_options(PruneArguments, __doc__))


if __name__ == "__main__":
    sys.exit(run(main))
