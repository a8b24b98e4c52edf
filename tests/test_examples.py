"""The examples as their heads say, and the same run three ways: finetune.py, TRL with a callback, a raw loop.

Run by run on two ranks under ZeRO-3. `launch/finetune.py` measures tasks and a text as well, and reports to
TensorBoard: neither changes a loss.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from seft_ds.checkpoint.verify import verify
from tests import forked
from tests.evaluate.test_harness import CHOICE
from tests.ranks import free_port
from tests.train.test_finetune import BIN, ROOT, WORDS, make_models

STEPS = 8
GENERATE = """
task: tiny_generate
dataset_path: json
dataset_kwargs:
  data_files:
    test: {rows}
output_type: generate_until
test_split: test
doc_to_text: "{{{{query}}}}"
doc_to_target: "{{{{choices[0]}}}}"
generation_kwargs:
  until: ["fox"]
  max_gen_toks: 5
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
"""
COMMON = [
    "--deepspeed", "ds.json", "--max_steps", str(STEPS), "--learning_rate", "1e-2", "--max_length", "16",
]  # fmt: skip
TRAINER = [
    *COMMON, "--per_device_train_batch_size", "2", "--lr_scheduler_type", "constant", "--logging_steps", "1",
    "--train_sampling_strategy", "sequential", "--optim", "adamw_torch", "--gradient_checkpointing", "false",
]  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("examples")
    make_models(folder)
    model_in_fp32(folder / "pruned")
    # Rows of equal length: the mean over a batch's tokens is then the mean over its rows.
    texts = [" ".join(WORDS[(i * j) % len(WORDS)] for j in range(1, 12)) for i in range(64)]
    (folder / "rows.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    (folder / "held_out.txt").write_text(" ".join(texts[:9]))
    shipped = json.loads((ROOT / "ds_configs/zero3.json").read_text())
    block = {"window": 2, "interval": 3, "density": 0.05}
    (folder / "ds.json").write_text(json.dumps(shipped | {"seft": block}))
    questions = [
        {"query": t, "choices": [WORDS[i], WORDS[i + 1], WORDS[i + 2]], "gold": i % 3}
        for i, t in enumerate(texts[:7])
    ]
    (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, questions)))
    (folder / "tasks").mkdir()
    for name, template in (("choice", CHOICE), ("generate", GENERATE)):
        text = template.format(rows=folder / "questions.jsonl")
        (folder / f"tasks/{name}.yaml").write_text(text)
    return folder


def model_in_fp32(folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).save_pretrained(folder)


def on_ranks(home: Path, size: int, folder: str, script: str, *flags: str) -> str:
    """What rank 0 printed; the script runs as a launcher starts it, in forks."""
    port = str(free_port())
    started = []
    for rank in range(size):
        env = {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size),
            "LOCAL_WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
            "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1",
            "HF_DATASETS_CACHE": str(home / "cache"),
        }  # fmt: skip
        started.append(forked.start(script, list(flags), home, env, folder=folder))
    done = [process.finish(280) for process in started]
    for result in done:
        assert result.returncode == 0, result.stdout + result.stderr
    said = done[-1].stdout + done[-1].stderr
    assert size == 1 or folder == "examples" or not said, f"rank 1 said: {said}"
    return done[0].stdout


def journal(run: Path, kind: str) -> list[dict]:
    lines = [json.loads(line) for line in (run / "journal.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


def measured(home: Path, name: str, size: int, rows: int, *more: str) -> str:
    return on_ranks(
        home, size, "launch", "finetune", *TRAINER, "--model_name_or_path", "pruned",
        "--train_file", "rows.jsonl", "--output_dir", name, "--per_device_train_batch_size", str(rows),
        "--eval_tasks", "tiny_choice,tiny_generate", "--eval_include_path", "tasks",
        "--eval_text_file", "held_out.txt", "--eval_steps", "4", "--per_device_eval_batch_size", "2",
        "--report_to", "tensorboard", *more,
    )  # fmt: skip


@pytest.fixture(scope="module")
def finetuned(home: Path) -> str:
    return measured(home, "finetune", 2, 2, "--report_each_weight", "true")


def test_three_ways_give_the_same_losses(home: Path, finetuned: str) -> None:
    losses = [line["loss"] for line in journal(home / "finetune", "step")]
    assert len(losses) == STEPS and losses[-1] < losses[0]
    assert journal(home / "finetune", "event")
    told = on_ranks(
        home, 2, "examples", "trl_sft", *TRAINER, "--model_name_or_path", "pruned", "--dtype", "float32",
        "--dataset_name", "rows.jsonl", "--output_dir", "trl", "--report_to", "none", "--bf16", "false",
        "--use_cpu", "--save_strategy", "no",
    )  # fmt: skip
    assert [line["loss"] for line in journal(home / "trl", "step")] == pytest.approx(
        losses, rel=1e-5
    )
    assert "slots train" in told and "model:   trl/model" in told and "report:  trl/report" in told
    assert (home / "trl/report.html").is_file() and (home / "trl/model/README.md").is_file()
    said = on_ranks(
        home, 2, "examples", "deepspeed_loop", *COMMON, "--model_name_or_path", "pruned",
        "--train_file", "rows.jsonl", "--output_dir", "loop", "--batch_size", "2",
    )  # fmt: skip
    raw = [json.loads(line)["loss"] for line in said.splitlines() if line.startswith("{")]
    assert raw == pytest.approx(losses, rel=1e-5)
    digests = set()
    for folder in ("finetune", "trl/model", "loop"):
        assert verify(home / folder).ok
        digests.add(json.loads((home / folder / "sparsity.json").read_text())["mask_digest"])
    assert len(digests) == 1, "the same weights came back in all three"


def test_measurements_are_the_same_on_one_rank(home: Path, finetuned: str) -> None:
    assert "batch size 2 on each rank" in finetuned
    said = measured(home, "alone", 1, 4)
    found = []
    for run in ("finetune", "alone"):
        found.append({(e["step"], e["name"]): e["value"] for e in journal(home / run, "eval")})
    names = ("perplexity", "tiny_choice_acc", "tiny_generate_exact_match")
    assert set(found[0]) == {(s, f"eval_{n}") for s in (4, 8) for n in names}
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    # The last one is of the model that was written.
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from seft_ds.evaluate import perplexity
    from tests.ranks import ThreadRanks, run_threads

    model = AutoModelForCausalLM.from_pretrained(home / "finetune")
    tokenizer = AutoTokenizer.from_pretrained(home / "finetune")
    windows = perplexity.windows_of(tokenizer, (home / "held_out.txt").read_text(), 16)

    def work(ranks: ThreadRanks) -> float:
        return perplexity.measure(model, windows, ranks).perplexity

    assert run_threads(1, work)[0] == pytest.approx(found[0][8, "eval_perplexity"], rel=1e-4)
    assert f"step {STEPS}/{STEPS}: loss" in said and "live 4" in said and "left" in said
    assert "evaluation after step 4: perplexity" in said
    # Without --report_each_weight: totals only.
    tags = [t.removeprefix("train/") for t in tensorboard(home / "alone").Tags()["scalars"]]
    ours = {"sparsity/all", "churn/all", "memory_gib", "tokens_per_second"}
    assert ours <= set(tags) and not [t for t in tags if "layers" in t] and len(tags) < 30


def tensorboard(run: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (folder,) = (run / "runs").iterdir()
    events = EventAccumulator(str(folder))
    events.Reload()
    return events


def test_sparsity_and_churn_of_each_weight_are_in_tensorboard(home: Path, finetuned: str) -> None:
    events = tensorboard(home / "finetune")
    tags = set(events.Tags()["scalars"])
    targets = journal(home / "finetune", "run")[0]["targets"]
    short = [t["name"].removeprefix("model.") for t in targets]
    assert {f"train/{kind}/{name}" for kind in ("sparsity", "churn") for name in short} <= tags
    assert {"train/loss", "eval/perplexity", "eval/tiny_choice_acc"} <= tags
    live = sum(t["live"] for t in targets)
    total = sum(t["shape"][0] * t["shape"][1] for t in targets)
    values = [e.value for e in events.Scalars("train/sparsity/all")]
    assert values == pytest.approx([1 - live / total] * STEPS)
    revived = sum(e["revived"] for e in journal(home / "finetune", "event"))
    assert sum(e.value for e in events.Scalars("train/churn/all")) * live == pytest.approx(revived)


def test_own_model_and_own_rows_by_three_flags(home: Path) -> None:
    """The recipe as it is: only model, data and folder, and fewer steps for the test's sake."""
    env = os.environ | {
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "MODEL": str(home / "pruned"),
        "DATA": str(home / "rows.jsonl"), "RUN": str(home / "own"), "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1", "MASTER_PORT": str(free_port()),
    }  # fmt: skip
    done = subprocess.run(
        [ROOT / "examples/own_model_and_data.sh", "--max_steps", "3", "--max_length", "16",
         "--seft.density", "0.05"],
        cwd=ROOT, env=env, capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert verify(home / "own").ok


def snippets() -> list[str]:
    """The scripts of docs/python.md."""
    return re.findall(
        r"```python\n(.*?)```", (ROOT / "docs/python.md").read_text(), flags=re.DOTALL
    )


@pytest.mark.parametrize("number", [0, 1])
def test_scripts_of_the_page_run_as_they_are(home: Path, tmp_path: Path, number: int) -> None:
    """Under plain python; with fewer steps, for the test's sake."""
    name = f"pasted_{number}"
    code = snippets()[number].replace("max_steps=100", "max_steps=2").replace("256", "16")
    (tmp_path / "pasted").mkdir()
    body = "".join(f"    {line}\n" for line in code.splitlines())
    (tmp_path / f"pasted/{name}.py").write_text(f"def main():\n{body}")
    shutil.copytree(home / "pruned", tmp_path / "PRUNED")
    shutil.copy(home / "rows.jsonl", tmp_path / "DATA.jsonl")
    (tmp_path / "ds_configs").symlink_to(ROOT / "ds_configs")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(tmp_path)
        sys.modules.pop("pasted", None)
        env = {"OMP_NUM_THREADS": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache")}
        done = forked.start(name, [], tmp_path, env, folder="pasted").finish(280)
    assert done.returncode == 0, done.stdout + done.stderr
    assert verify(tmp_path / "RUN/model").ok and (tmp_path / "RUN/report.html").is_file()
    assert "slots train" in done.stdout and "model:   RUN/model" in done.stdout
