"""`launch/finetune.py` as a user runs it: one real run on two ranks, then everything that it left."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from seft_ds.checkpoint.manifest import seal
from seft_ds.checkpoint.pruned import save_pruned
from seft_ds.checkpoint.verify import verify
from tests import forked
from tests.ranks import free_port
from tests.tiny import dense_model, prune_

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
WORDS = "the quick brown fox jumps over the lazy dog while seven wizards brew a potion".split()


# What no log of a script has: bars, and lines of libraries that say nothing to a user.
NOISE = ("\r", "Loading weights", "it/s]", "[transformers]", "kernels-community", "FutureWarning")


def tokenizer_into(folder: Path) -> None:
    """A word-level tokenizer of 128 entries, made here."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {w: i for i, w in enumerate(["<unk>", "<eos>", "<pad>", *WORDS])}
    vocabulary |= {f"w{i}": i for i in range(len(vocabulary), 128)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", eos_token="<eos>", pad_token="<pad>"
    ).save_pretrained(folder)


def make_models(folder: Path) -> None:
    """folder/dense and folder/pruned: a tiny LLaMA in bf16 with a tokenizer."""
    model = dense_model("llama", torch.bfloat16)
    model.save_pretrained(folder / "dense")
    tokenizer_into(folder / "dense")
    prune_(model, 0.6)
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]
    save_pruned(
        model, folder / "dense", folder / "pruned", {f"{n}.weight": None for n in names}, {}
    )
    lines = [" ".join(WORDS[(i * j) % len(WORDS)] for j in range(1, 12)) for i in range(200)]
    (folder / "text.txt").write_text("\n".join(lines))


def finetune(
    folder: Path, *flags: str, ranks: int = 0, launcher: bool = False
) -> subprocess.CompletedProcess:
    """Run the script plainly or as `ranks` ranks, in forks; with `launcher` as users do, by deepspeed's."""
    base = ["--deepspeed", str(ROOT / "ds_configs/zero3.json"), "--max_length", "16"]
    env = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    if not ranks:
        return forked.start("finetune", [*base, *flags], folder, env).finish(280)
    if not launcher:
        return as_ranks(folder, [*base, *flags], env, ranks)
    start = [BIN / "deepspeed", "--num_gpus", ranks, "--master_port", free_port()]
    command = [*start, ROOT / "launch/finetune.py", *base, *flags]
    return subprocess.run(
        [str(c) for c in command],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=280,
        env={**os.environ, **env},
    )


def as_ranks(
    folder: Path, argv: list[str], env: dict[str, str], size: int
) -> subprocess.CompletedProcess:
    """The ranks of one run in forks: what rank 0 printed, the errors of all, the worst status."""
    env = env | {
        "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }  # fmt: skip
    started = [
        forked.start("finetune", argv, folder, env | {"RANK": str(r), "LOCAL_RANK": str(r)})
        for r in range(size)
    ]
    done = [rank.finish(280) for rank in started]
    errors = "".join(d.stderr for d in done)
    return subprocess.CompletedProcess(
        argv, max(d.returncode for d in done), done[0].stdout, errors
    )


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finetune")
    make_models(folder)
    return folder


@pytest.fixture(scope="module")
def finished(home: Path) -> Path:
    """A run of 12 steps on 2 ranks, with events and checkpoints."""
    done = finetune(
        home, "--model_name_or_path", "pruned", "--train_file", "text.txt", "--output_dir", "run",
        "--max_steps", "12", "--per_device_train_batch_size", "2", "--learning_rate", "1e-2",
        "--packing", "true", "--packing_strategy", "wrapped", "--logging_steps", "1",
        "--save_strategy", "steps", "--save_steps", "6", "--seft.interval", "4", "--seft.window", "2",
        "--seft.density=0.05", ranks=2, launcher=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "no GPU found: running on CPU" in done.stderr or torch.cuda.is_available()
    said = done.stdout + done.stderr
    assert not [noise for noise in NOISE if noise in said], said
    return home / "run"


def test_the_run_directory(home: Path, finished: Path) -> None:
    result = verify(finished)
    assert result.ok, result.problems
    before = json.loads((home / "pruned/sparsity.json").read_text())
    after = json.loads((finished / "sparsity.json").read_text())
    assert {n: t["live"] for n, t in after["targets"].items()} == {
        n: t["live"] for n, t in before["targets"].items()
    }
    assert after["mask_digest"] != before["mask_digest"] and after["events"] > 0
    records = [json.loads(line) for line in (finished / "journal.jsonl").read_text().splitlines()]
    kinds = [r["kind"] for r in records]
    assert kinds[0] == "run" and kinds[-1] == "end" and kinds.count("step") == 12
    events = [r for r in records if r["kind"] == "event"]
    assert len(events) == after["events"]
    assert all(
        r["live"] == r["target_live"] and r["seconds"] > 0 and r["bytes"] > 0 for r in events
    )
    losses = [r["loss"] for r in records if r["kind"] == "step"]
    assert losses[-1] < losses[0]
    for name in ("resolved_config.yaml", "report.html", "README.md", "tokenizer.json"):
        assert (finished / name).stat().st_size > 0, name
    assert "interval: 4" in (finished / "resolved_config.yaml").read_text()


def test_export_of_the_last_checkpoint_is_the_final_model(home: Path, finished: Path) -> None:
    from safetensors.torch import load_file

    done = subprocess.run(
        [sys.executable, ROOT / "launch/export.py", "--checkpoint", "run/checkpoint-12",
         "--output_dir", "exported"],
        cwd=home, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert verify(home / "exported").ok
    final, exported = (load_file(d / "model.safetensors") for d in (finished, home / "exported"))
    assert final.keys() == exported.keys()
    assert all(torch.equal(final[n], exported[n]) for n in final)


def test_resume_continues_to_the_same_model(home: Path, finished: Path) -> None:
    """From the checkpoint at step 6 the same steps lead to the same weights."""
    from safetensors.torch import load_file

    done = finetune(
        home, "--model_name_or_path", "pruned", "--train_file", "text.txt", "--output_dir", "again",
        "--max_steps", "12", "--per_device_train_batch_size", "2", "--learning_rate", "1e-2",
        "--packing", "true", "--packing_strategy", "wrapped", "--logging_steps", "1",
        "--seft.interval", "4", "--seft.window", "2", "--seft.density=0.05",
        "--resume", str(finished / "checkpoint-6"), ranks=2,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    final, again = (load_file(d / "model.safetensors") for d in (finished, home / "again"))
    assert all(torch.equal(final[n], again[n]) for n in final)


def test_a_loss_that_is_not_the_models_is_refused(home: Path) -> None:
    """TRL multiplies the last hidden states by the head itself; a model may do something in between."""

    def cap_logits() -> None:
        from transformers import LlamaForCausalLM

        real = LlamaForCausalLM.forward

        @functools.wraps(real)
        def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            output = real(self, *args, **kwargs)
            output.logits = 30 * torch.tanh(output.logits)
            return output

        LlamaForCausalLM.forward = forward

    flags = ["--model_name_or_path", "pruned", "--train_file", "text.txt", "--output_dir", "capped"]
    flags += [
        "--max_length",
        "16",
        "--max_steps",
        "2",
        "--deepspeed",
        str(ROOT / "ds_configs/zero3.json"),
    ]
    env = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    done = forked.start("finetune", flags, home, env, cap_logits).finish(120)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "error: TRL takes the loss of LlamaForCausalLM for" in done.stderr
    assert not (home / "capped/sparsity.json").exists()


def test_weights_come_back_from_the_dense_model(home: Path) -> None:
    done = finetune(
        home, "--model_name_or_path", "pruned", "--train_file", "text.txt", "--output_dir", "back",
        "--max_steps", "6", "--seft.dense_model", str(home / "dense"), "--seft.window", "2", ranks=2,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert verify(home / "back").ok
    before, after = (
        json.loads((home / d / "sparsity.json").read_text()) for d in ("pruned", "back")
    )
    assert after["live"] == before["live"] and after["scope"] == "global"
    assert (after["events"], after["exchanges"]) == (0, 1)
    assert after["seft"]["dense_model"] == "dense"  # its name, not where it lay
    lines = [json.loads(line) for line in (home / "back/journal.jsonl").read_text().splitlines()]
    (exchange,) = [line for line in lines if line["kind"] == "exchange"]
    assert exchange["step"] == 2 and exchange["exchanged"] > 0
    again = finetune(
        home, "--model_name_or_path", "pruned", "--train_file", "text.txt", "--output_dir", "dense",
        "--seft.dense_model", str(home / "dense"), "--overwrite", "true", "--max_steps", "6",
    )  # fmt: skip
    assert again.returncode == 2 and "which this run needs" in again.stderr


BAD = {
    "dense model": (["--model_name_or_path", "dense"], "nothing to repair"),
    "no weights": (["--model_name_or_path", "empty"], "holds no weights"),
    "no such data": (["--train_file", "none.jsonl"], "no such file"),
    "wrong columns": (["--train_file", "odd.jsonl"], "wanted one of: text"),
    "no chat template": (["--train_file", "chats.jsonl"], "has no chat template"),
    "long prompts": (
        ["--train_file", "long.jsonl", "--dry_run", "true"],
        "(--max_length) counts in the loss",
    ),
    "unknown task": (["--eval_tasks", "arc_eazy"], "lm-eval knows no task arc_eazy"),
    "a run is there": (["--output_dir", "taken"], "--resume auto"),
    "density": (["--seft.density", "0"], "density = 0"),
    "too many slots": (["--seft.density", "0.9"], "lower density"),
    "interval": (["--seft.interval", "1"], "shorter than window"),
    "unknown setting": (["--seft.intervall", "20"], "did you mean 'interval'"),
    "no ZeRO section": (["--deepspeed", "nozero.json"], 'no "zero_optimization" section'),
    "batch size": (["--deepspeed", "batch7.json"], "can't be had on 1 ranks"),
    "no dense model": (["--seft.dense_model", "none"], "no such folder"),
    "not dense": (["--seft.dense_model", "pruned"], "is pruned itself"),
    "exchange alone": (["--seft.exchange", "0.1"], "give dense_model"),
    "unknown flag": (["--learning_rat", "1"], "learning_rat"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_and_nothing_is_lost(home: Path, case: str) -> None:
    (home / "empty").mkdir(exist_ok=True)
    (home / "empty/config.json").write_text((home / "dense/config.json").read_text())
    (home / "odd.jsonl").write_text('{"question": "a", "reply": "b"}\n')
    chat = {"messages": [{"role": "user", "content": "hello"}]}
    (home / "chats.jsonl").write_text(json.dumps(chat) + "\n")
    long = {"prompt": " ".join(WORDS * 2), "completion": " fox"}
    (home / "long.jsonl").write_text(json.dumps(long) + "\n")
    (home / "nozero.json").write_text('{"seft": {}}')
    shipped = json.loads((ROOT / "ds_configs/zero3.json").read_text())
    odd = {"train_batch_size": 7, "train_micro_batch_size_per_gpu": 2}
    (home / "batch7.json").write_text(json.dumps(shipped | odd))
    (home / "taken").mkdir(exist_ok=True)
    (home / "taken/journal.jsonl").write_text("precious\n")
    flags, said = BAD[case]
    done = finetune(
        home, "--model_name_or_path", "pruned", "--train_file", "text.txt", "--output_dir", "new",
        "--max_steps", "2", *flags,
    )  # fmt: skip
    assert done.returncode == 2, done.stdout + done.stderr
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert not (home / "new").exists()
    assert (home / "taken/journal.jsonl").read_text() == "precious\n"


def kept(folder: Path) -> dict[str, bytes]:
    files = [p for p in folder.iterdir() if p.is_file() and not p.name.startswith(".std")]
    return {p.name: p.read_bytes() for p in files}


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--output_dir", "done", "--resume", "auto"], "no checkpoint there"),
        (["--output_dir", "done", "--resume", "other/checkpoint-6"], "is not empty"),
        (["--output_dir", "pruned", "--overwrite", "true"], "which this run needs"),
        (["--output_dir", ".", "--overwrite", "true"], "which this run needs"),
        (["--output_dir", "photos", "--overwrite", "true"], "replaces runs only"),
        (["--output_dir", "done", "--overwrite", "true", "--optim", "sgd"], "not supported"),
        (
            ["--output_dir", "done", "--overwrite", "true", "--save_only_model", "true"],
            "--save_only",
        ),
    ],
)
def test_a_refused_run_deletes_nothing(home: Path, flags: list[str], said: str) -> None:
    for name in ("done", "photos", "other/checkpoint-6"):
        (home / name).mkdir(parents=True, exist_ok=True)
    seal(home / "other/checkpoint-6", {})
    (home / "done/journal.jsonl").write_text("precious\n")
    (home / "done/model.safetensors").write_text("precious too")
    (home / "photos/cat.jpg").write_text("meow")
    before = [kept(home / name) for name in ("done", "photos", "pruned", ".")]
    done = finetune(
        home,
        "--model_name_or_path",
        "pruned",
        "--train_file",
        "text.txt",
        "--max_steps",
        "2",
        *flags,
    )
    assert done.returncode == 2 and said in done.stderr, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert [kept(home / name) for name in ("done", "photos", "pruned", ".")] == before


def test_overwrite_replaces_a_run(home: Path) -> None:
    old = home / "old"
    (old / "checkpoint-3").mkdir(parents=True)
    (old / "journal.jsonl").write_text('{"kind": "run"}\n')
    (old / "model.safetensors").write_text("old")
    done = finetune(
        home, "--model_name_or_path", "pruned", "--train_file", "text.txt", "--output_dir", "old",
        "--max_steps", "2", "--overwrite", "true", "--seft.trainable", "rank=1",
        "--deepspeed", str(ROOT / "ds_configs/zero2.json"),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "no evolution event fits into 2 steps" in done.stderr
    assert not (old / "checkpoint-3").exists() and verify(old).ok
    assert (old / "journal.jsonl").read_text().count('"kind": "run"') == 1


@pytest.mark.parametrize(
    "name, flags",
    [
        ("config", ["--deepspeed", str(ROOT / "ds_configs/zero3_8bit.json")]),
        ("offload", ["--deepspeed", str(ROOT / "ds_configs/zero3_offload_8bit.json")]),
        ("flag", ["--optim", "adamw_bnb_8bit"]),
        ("lion", ["--optim", "lion_8bit", "--deepspeed", str(ROOT / "ds_configs/zero2.json")]),
    ],
)
def test_8bit_optimizers_by_config_and_by_flag(home: Path, name: str, flags: list[str]) -> None:
    done = finetune(
        home, "--model_name_or_path", "pruned", "--train_file", "text.txt", "--output_dir", name,
        "--max_steps", "6", "--learning_rate", "1e-2", "--seft.interval", "2", "--seft.drop_fraction", "0.2",
        "--save_strategy", "steps", "--save_steps", "6", "--logging_steps", "1", *flags,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert verify(home / name).ok
    lines = (home / name / "journal.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    events = [r for r in records if r["kind"] == "event"]
    assert events and all(r["cut"] >= 0 for r in events)
    updates = [r["largest_update"] / r["learning_rate"] for r in records if r["kind"] == "fresh"]
    assert updates and 0 < max(updates) < 2


def test_flags_and_recipes_keep_their_types(tmp_path: Path) -> None:
    from seft_ds.train.arguments import parser_of_runs
    from seft_ds.train.flags import flags_of_recipe, read_recipe, split_seft_flags, take_recipe

    rest, found = split_seft_flags(
        ["--seft.pattern", "2:4", "--seft.density=1e-3", "--a", "1", "--seft.waves", "false",
         "--seft.targets", '["q_proj"]', "--seft.trainable", "rank=8", "--seft.grow", "[a"]
    )  # fmt: skip
    assert rest == ["--a", "1"]
    assert found == {
        "pattern": "2:4", "density": 1e-3, "waves": False, "targets": ["q_proj"],
        "trainable": "rank=8", "grow": "[a",
    }  # fmt: skip
    recipe = tmp_path / "r.yaml"
    recipe.write_text("learning_rate: 5e-3\nseft:\n  pattern: 4:8\n  density: 1e-2\n  window: 7\n")
    assert take_recipe(["--config", "r", "--b", "2"]) == (["--b", "2"], "r")
    assert take_recipe(["--b", "2", "--config=r"]) == (["--b", "2"], "r")
    entries, seft = read_recipe(recipe)
    assert flags_of_recipe(entries, recipe, parser_of_runs()) == (["--learning_rate=0.005"], [])
    assert seft == {"pattern": "4:8", "density": 0.01, "window": 7}
    recipe.write_text("seft: [1]\n")
    with pytest.raises(ValueError, match="seft: wanted NAME: VALUE"):
        read_recipe(recipe)


def test_dry_run_shows_the_plan_and_writes_nothing(home: Path) -> None:
    done = finetune(
        home, "--model_name_or_path", "pruned", "--train_file", "text.txt", "--output_dir", "dry",
        "--max_steps", "2", "--dry_run", "true",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "memory of a rank during training" in done.stdout and "moments" in done.stdout
    assert "14 sparse weights" in done.stdout and "in the loss" in done.stdout
    assert not (home / "dry").exists()
