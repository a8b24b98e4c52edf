"""Prune a dense model and write it as an ordinary model folder with exact zeros and a sparsity.json.

    deepspeed launch/prune.py --model_name_or_path DIR --output_dir PRUNED --method wanda \\
        --sparsity 0.6 --calibration_file TEXT
    python launch/prune.py --model_name_or_path DIR --output_dir PRUNED --method magnitude --pattern 2:4

Runs the same under `python`, `deepspeed` and `torchrun`; several ranks share the calibration
sequences and every one of them holds the whole model. Exit status: 0; 2 for a mistake in the
input; 1 for any other error, the loss of a rank among them.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
if not torch.cuda.is_available():  # before anything imports deepspeed, which chooses once
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

from seft_ds.console import model_folder, prepare_device, run, torch_dtype
from seft_ds.prune.choose import Budget


@dataclass
class PruneArguments:
    """What to prune, how much of it, and from which data."""

    model_name_or_path: str = field(metadata={"help": "folder of the dense model"})
    output_dir: str = field(metadata={"help": "where the pruned model goes"})
    method: str = field(default="wanda", metadata={"help": "wanda or magnitude"})
    sparsity: float | None = field(default=None, metadata={"help": "share to prune, such as 0.6"})
    pattern: str | None = field(default=None, metadata={"help": "N:M, N of every M inputs stay"})
    calibration_file: str | None = field(
        default=None, metadata={"help": '.txt (a text a line), .json or .jsonl ("text"), also .gz'}
    )
    calibration_dataset: str | None = field(
        default=None, metadata={"help": 'NAME or NAME:CONFIG with a "text" column, split train'}
    )
    calibration_samples: int = field(default=128, metadata={"help": "number of sequences"})
    max_length: int = field(default=2048, metadata={"help": "tokens per sequence"})
    seed: int = field(default=0, metadata={"help": "chooses the calibration sequences"})
    dtype: str = field(default="auto", metadata={"help": "auto (as stored), float32 or bfloat16"})
    overwrite: bool = field(default=False, metadata={"help": "replace what output_dir holds"})
    local_rank: int = field(default=-1, metadata={"help": "set by the deepspeed launcher"})


def check(options: PruneArguments) -> tuple[Path, Budget]:
    """The model folder and the budget, after every check that needs no model.

    Raises:
        ValueError: what is wrong and what to change.
    """
    if options.method not in ("wanda", "magnitude"):
        raise ValueError(f"got --method {options.method}; wanted wanda or magnitude")
    budget = Budget(options.sparsity, options.pattern)
    torch_dtype(options.dtype)
    if options.method == "wanda":
        check_calibration(options)
    folder = model_folder(options.model_name_or_path)
    check_output(Path(options.output_dir), folder, options.overwrite)
    return folder, budget


def check_output(output: Path, source: Path, overwrite: bool) -> None:
    """Raises ValueError unless the pruned model can go to `output` without harm to anything else."""
    if output.is_file():
        raise ValueError(f"--output_dir {output} is a file; give a folder")
    if source.resolve().is_relative_to(output.resolve()):
        raise ValueError(f"--output_dir {output} holds the dense model; give another folder")
    if not output.is_dir() or not any(output.iterdir()):
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
    """Set aside the model that `output` holds, if any; delete it at the end, or put it back on error."""
    old = output.with_name(f".{output.name}.replaced")
    if not output.is_dir():
        yield
        return
    shutil.rmtree(
        old, ignore_errors=True
    )  # of a run that was killed after it had written its model
    output.rename(old)
    try:
        yield
    except BaseException:
        shutil.rmtree(output, ignore_errors=True)
        old.rename(output)
        raise
    shutil.rmtree(old)


def check_calibration(options: PruneArguments) -> None:
    """Raises ValueError unless exactly one source of calibration text is given and readable."""
    from seft_ds.prune.calibrate import check_text_file

    if (options.calibration_file is None) == (options.calibration_dataset is None):
        raise ValueError(
            "--method wanda needs calibration text from exactly one source: give "
            "--calibration_file FILE or --calibration_dataset NAME (--method magnitude needs none)"
        )
    if options.calibration_file is not None:
        check_text_file(options.calibration_file)
    if options.calibration_samples < 1 or options.max_length < 2:
        raise ValueError(
            f"got --calibration_samples {options.calibration_samples} and --max_length "
            f"{options.max_length}; wanted at least 1 and 2"
        )


def calibration(options: PruneArguments, tokenizer: Any, longest_tokens: int) -> torch.Tensor:
    """int64 (samples, max_length): the calibration sequences, the same on every rank."""
    from seft_ds.prune.calibrate import dataset_texts, read_texts, sequences

    if options.max_length > longest_tokens:
        raise ValueError(
            f"got --max_length {options.max_length}, but the model takes {longest_tokens} tokens; "
            "give that or less"
        )
    if options.calibration_file is not None:
        texts: Sequence[str] = read_texts(options.calibration_file)
    else:
        assert options.calibration_dataset is not None
        texts = dataset_texts(options.calibration_dataset)
    return sequences(
        tokenizer, texts, options.calibration_samples, options.max_length, options.seed
    )


def about(options: PruneArguments, folder: Path, dtype: torch.dtype) -> dict[str, Any]:
    """What the written model says about how it came to be; names only, no paths of this machine."""
    settings = asdict(options) | {"dtype": str(dtype).removeprefix("torch.")}
    for unrelated in ("model_name_or_path", "output_dir", "overwrite", "local_rank"):
        del settings[unrelated]
    if options.method == "magnitude":
        settings = {k: settings[k] for k in ("method", "sparsity", "pattern", "dtype")}
    elif options.calibration_file is not None:
        settings["calibration_file"] = Path(options.calibration_file).name
    return {"base_model": folder.resolve().name, "pruning": settings}


def prune(options: PruneArguments) -> None:
    """Check, load, prune, write."""
    folder, budget = check(options)
    device = prepare_device()
    # Only now the slow imports: a mistake in the arguments is told at once.
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from seft_ds.checkpoint.pruned import save_pruned
    from seft_ds.distributed.collectives import close_ranks, init_ranks
    from seft_ds.distributed.liveness import watch_peers
    from seft_ds.prune.walk import prune_by_magnitude, prune_by_wanda

    ranks = init_ranks()
    watch_peers(ranks)
    first = ranks.rank == 0
    start = time.monotonic()
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch_dtype(options.dtype), trust_remote_code=False
    )
    model = model.to(device)
    if options.method == "magnitude":
        targets = prune_by_magnitude(model, budget, progress=first)
    else:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        longest = int(getattr(model.config, "max_position_embeddings", options.max_length))
        tokens = calibration(options, tokenizer, longest)
        targets = prune_by_wanda(model, budget, tokens, ranks, progress=first)
    if first:
        print(f"pruned {len(targets)} weights in {time.monotonic() - start:.0f} s; writing")
        output = Path(options.output_dir)
        with replacing(output):
            record = save_pruned(
                model, folder, output, targets, about(options, folder, model.dtype)
            )
        live, total = record["live"], record["total"]
        print(f"wrote {output}: {live} of {total} weights live, sparsity {1 - live / total:.4%}")
    close_ranks()


def main() -> None:
    from transformers import HfArgumentParser

    parser = HfArgumentParser(PruneArguments, description=(__doc__ or "").splitlines()[0])
    (options,) = parser.parse_args_into_dataclasses()
    prune(options)


if __name__ == "__main__":
    sys.exit(run(main))
