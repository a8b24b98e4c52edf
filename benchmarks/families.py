"""Which families of models can be pruned and repaired: a tiny random model of each goes all the way.

    python benchmarks/families.py                 # all of them, 22 minutes on one core; writes the page
    python benchmarks/families.py --new           # those that have no row yet: goes on after an interruption
    python benchmarks/families.py falcon gpt2     # some, printed only; with --write their rows are replaced
    python benchmarks/families.py --page          # writes the page from the results that are there

Each family: save_pretrained, launch/prune.py (Wanda, 60 %), launch/finetune.py (ZeRO-3, 4 steps with an
event), launch/verify.py, from_pretrained; `benchmarks/family_checks.py` says what has to hold after each. A
family "works", is "refused" in one line, or "FAILS": a traceback, or a check that does not hold.
"""

from __future__ import annotations

import argparse
import datetime
import fcntl
import json
import os
import re
import shutil
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import family_checks as checks
from benchmarks.family_models import WORDS, families, make_model, write_texts

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "results" / "families.json"
PAGE = ROOT / "docs" / "families.md"
SPARSITY = 0.6
_ENV = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
_LIMIT_S = 240
MAGNITUDE = "use --method magnitude"
# What a refusal of the repair says -> what is tried then.
ADVICE = {
    "--gradient_checkpointing false": ["--gradient_checkpointing", "false"],
    "--router_aux_loss_coef 0": ["--router_aux_loss_coef", "0"],
    "ZeRO stage 2": ["--deepspeed", str(ROOT / "ds_configs/zero2.json")],
}


@dataclass
class Row:
    """What came of a family."""

    family: str
    model: str  # class
    result: str = "works"  # or "refused", "FAILS"
    note: str = ""  # the line that refuses it, or what failed
    targets: list[str] = field(default_factory=list)  # what had to be named, as the refusal advises
    flags: str = ""  # and what else
    tensors: int = 0  # that were pruned
    share: float = 0.0  # of all weights of the blocks
    seconds: float = 0.0


class Ended(Exception):
    """A family goes no further: (result, note)."""


def run_script(script: str, argv: list[str], folder: Path) -> str:
    """What a script said.

    Raises:
        Ended: it refused in one line, or it failed.
    """
    from tests import forked

    done = forked.start(script, argv, folder, _ENV).finish(_LIMIT_S)
    said = done.stdout + done.stderr
    if done.returncode == 0:
        return said
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    if done.returncode == 2 and len(errors) == 1 and "Traceback" not in said:
        raise Ended("refused", f"{script}: {errors[0].removeprefix('error: ')}")
    last = [line for line in said.splitlines() if line.strip()][-1:] or ["nothing said"]
    raise Ended("FAILS", f"{script} (status {done.returncode}): {last[0][:300]}")


def must_hold(stage: str, problems: list[str]) -> None:
    """Raises Ended with the first problem, if there is any."""
    if problems:
        raise Ended("FAILS", f"{stage}: {problems[0]} ({len(problems)} in all)")


def prune(folder: Path, targets: list[str], method: str) -> None:
    """dense -> pruned, checked."""
    argv = ["--model_name_or_path", "dense", "--output_dir", "pruned", "--method", method]
    argv += ["--sparsity", str(SPARSITY), "--calibration_file", "calibration.txt"]
    argv += ["--calibration_samples", "8", "--max_length", "32"]
    run_script("prune", argv + (["--targets", *targets] if targets else []), folder)
    dense, pruned = folder / "dense", folder / "pruned"
    must_hold("prune", checks.folder_problems(dense, pruned, values_stay=True))
    must_hold("prune", checks.load_problems(pruned, dense))
    if method == "wanda":
        must_hold("prune", checks.wanda_problems(dense, pruned, sequences(folder), SPARSITY))


def prune_as_advised(folder: Path, row: Row) -> None:
    """Prune, and where it is refused do what the refusal advises, which goes into the row."""
    method = "wanda"
    for _ in range(3):
        try:
            prune(folder, row.targets, method)
            return
        except Ended as refusal:
            result, note = refusal.args
            advice = (advised(note) or row.targets, "magnitude" if MAGNITUDE in note else method)
            if result != "refused" or advice == (row.targets, method):
                raise
            (row.targets, method), row.note = advice, note
            row.flags = f"--method {method}" * (method != "wanda")
            shutil.rmtree(folder / "pruned", ignore_errors=True)


def sequences(folder: Path) -> Any:
    """The calibration sequences that `prune` draws."""
    from transformers import AutoTokenizer

    from seft_ds.prune.calibrate import read_texts
    from seft_ds.prune.calibrate import sequences as draw

    tokenizer = AutoTokenizer.from_pretrained(folder / "dense")
    return draw(tokenizer, read_texts(str(folder / "calibration.txt")), 8, 32, 0)


def repair(folder: Path, row: Row) -> None:
    """pruned -> repaired, checked. What a refusal advises is done, and goes into the row."""
    source, output = "pruned", "repaired"
    argv = ["--model_name_or_path", source, "--train_file", "train.txt", "--output_dir", output]
    argv += ["--deepspeed", str(ROOT / "ds_configs/zero3.json"), "--max_length", "32"]
    argv += ["--per_device_train_batch_size", "2", "--max_steps", "4", "--learning_rate", "1e-2"]
    argv += ["--logging_steps", "1", "--seft.interval", "2", "--seft.window", "1"]
    argv += ["--seft.density", "0.05", "--seft.waves", "false"]
    for _ in range(len(ADVICE) + 1):
        try:
            run_script("finetune", argv, folder)
            break
        except Ended as refusal:  # what it advises is done
            flags = next((f for said, f in ADVICE.items() if said in refusal.args[1]), None)
            if flags is None or flags == argv[-len(flags) :]:
                raise
            argv += flags  # the last of two equal flags counts
            row.note, row.flags = refusal.args[1], f"{row.flags} {' '.join(flags)}".strip()
    pruned, repaired = folder / source, folder / output
    must_hold("finetune", checks.folder_problems(pruned, repaired, values_stay=False))
    must_hold("finetune", checks.repair_problems(pruned, repaired))
    must_hold("finetune", checks.load_problems(repaired, folder / "dense"))
    line = " ".join(WORDS[:14])
    must_hold(
        "finetune",
        checks.loss_problems(pruned, repaired, line, balanced="aux_loss" not in row.flags),
    )
    run_script("verify", [output], folder)


def advised(note: str) -> list[str]:
    """The targets that a refusal says to name."""
    found = re.search(r"--targets ([\w. ]+)", note)
    return found[1].split() if found else []


def try_family(kind: str, folder: Path) -> Row:
    """All the way with one family."""
    start = time.monotonic()
    row = Row(kind, "")
    try:
        row.model, entries = make_model(kind, folder / "dense")
        write_texts(folder)
        prune_as_advised(folder, row)
        repair(folder, row)
        pruned = json.loads((folder / "pruned" / "sparsity.json").read_text())
        row.tensors = len(pruned["targets"])
        row.share = pruned["total"] / entries
    except Ended as end:
        row.result, row.note = end.args
    except Exception as error:  # of the checks themselves: no reason to lose the other families
        row.result, row.note = "FAILS", f"{type(error).__name__}: {str(error)[:300]}"
    row.note = row.note.replace(str(folder), "DIR")
    row.flags = row.flags.replace(f"{ROOT}/", "")
    row.seconds = round(time.monotonic() - start, 1)
    return row


def table(results: dict[str, Any]) -> str:
    """The page's block: what was tried, and a row a family."""
    rows = [Row(**row) for row in results["rows"]]
    counts = {r: sum(row.result == r for row in rows) for r in ("works", "refused", "FAILS")}
    versions = ", ".join(f"{k} {v}" for k, v in results["versions"].items())
    lines = [
        f"`{results['command']}`, {results['date']}, {versions}, one core. "
        f"{len(rows)} of {len(families())} families were tried: "
        f"{counts['works']} work, {counts['refused']} are refused, {counts['FAILS']} fail.",
        "",
        "| family | result | pruned, of the blocks' weights | note |",
        "|---|---|---|---|",
    ]
    for row in rows:
        share = f"{row.tensors} tensors, {row.share:.0%}" if row.tensors else ""
        note = row.note
        if row.result == "works" and note:
            named = f"--targets {' '.join(row.targets)}" if row.targets else ""
            note = f"with `{f'{named} {row.flags}'.strip()}`; without: {note}"
        lines.append(
            f"| {row.family} | {row.result} | {share} | {note.replace('|', chr(92) + '|')} |"
        )
    return "\n".join(lines)


def main() -> int:
    os.environ.update(_ENV)
    torch.set_num_threads(1)  # forks inherit no threads, and would wait for them
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("family", nargs="*", help="model types; default: all")
    parser.add_argument("--page", action="store_true", help="only write the page")
    parser.add_argument("--new", action="store_true", help="only those without a row")
    parser.add_argument("--write", action="store_true", help="of some families: replace their rows")
    parser.add_argument("--keep", help="a folder that keeps what was made")
    options = parser.parse_args()
    if not options.page:
        kinds = options.family or families()
        if options.new:
            kinds = [kind for kind in kinds if kind not in {row["family"] for row in kept_rows()}]
        elif not options.family:
            RESULTS.unlink(missing_ok=True)
        writes = options.write or not options.family
        rows = try_all(kinds, options.keep, writes)
        if not writes:
            return any(row.result == "FAILS" for row in rows)
    from benchmarks.blocks import put_block

    put_block(PAGE, "families", table(json.loads(RESULTS.read_text(encoding="utf-8"))))
    return 0


def try_all(kinds: list[str], keep: str | None, writes: bool) -> list[Row]:
    """A row a family, printed and, with `writes`, kept as it is known."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    rows = []
    for kind in kinds:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(try_family(kind, Path(folder)))
            if keep:
                shutil.copytree(folder, Path(keep) / kind, dirs_exist_ok=True)
        row = rows[-1]
        if writes:
            write_result(row)
        print(f"{kind}: {row.result} ({row.seconds} s, {row.share:.0%}) {row.note}", flush=True)
    return rows


def kept_rows() -> list[dict[str, Any]]:
    """The rows of former runs."""
    return json.loads(RESULTS.read_text(encoding="utf-8"))["rows"] if RESULTS.exists() else []


def write_result(row: Row) -> None:
    """Keep a row, in the order of the families; other families' stay as they are."""
    from seft_ds.checkpoint.export import versions

    name = Path(tempfile.gettempdir()) / "seft-families.lock"
    with open(name, "w") as lock:  # several of these may run
        fcntl.flock(lock, fcntl.LOCK_EX)
        known = {row["family"]: row for row in kept_rows()} | {row.family: asdict(row)}
        results = {
            "command": "python benchmarks/families.py",
            "date": datetime.date.today().isoformat(),
            "versions": {k: versions()[k] for k in ("torch", "transformers", "deepspeed")},
            "rows": [known[kind] for kind in families() if kind in known],
        }
        RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
