"""The scripts on data that can't all be used: what is left out is said, what can't be meant is one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests import forked
from tests.ranks import free_port
from tests.train.test_finetune import ROOT, make_models

ENV = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
MODEL = ["--model_name_or_path", "pruned", "--max_length", "16"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("left_out")
    make_models(folder)
    long = "the quick " * 20
    answers = [{"prompt": "the quick", "completion": " fox", "id": i} for i in range(5)]
    lost = [{"prompt": long, "completion": " fox", "id": i} for i in range(11)]
    write(folder / "answers.jsonl", answers + lost)
    good = {
        "messages": [{"role": "user", "content": "the"}, {"role": "assistant", "content": "fox"}]
    }
    write(folder / "chats.jsonl", [good, {"messages": []}, good])
    odd = {"messages": [{"role": "critic", "content": "the"}, *good["messages"]]}
    write(folder / "odd.jsonl", [good, good, odd])
    text = "{% for m in messages %}{{ m['content'] + ' ' }}{% endfor %}"
    (folder / "t.jinja").write_text(text, encoding="utf-8-sig")
    return folder


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def ranks(home: Path, *flags: str) -> list[forked.Forked]:
    """finetune.py on two ranks, as srun starts them."""
    port, base = str(free_port()), [*MODEL, "--deepspeed", str(ROOT / "ds_configs/zero3.json")]
    base += ["--output_dir", "out", "--max_steps", "2", "--dry_run", "true"]
    found = []
    for rank in range(2):
        env = ENV | {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
        }  # fmt: skip
        found.append(forked.start("finetune", [*base, *flags], home, env))
    return found


def test_what_is_left_out_is_said_once(home: Path) -> None:
    both = ranks(
        home, "--train_file", "chats.jsonl", "--validation_file", "answers.jsonl",
        "--chat_template_path", "t.jinja",
    )  # fmt: skip
    assert [rank.wait(120) for rank in both] == [0, 0], both[0].said()
    said, other = (rank.said() for rank in both)
    for line in (
        "answers.jsonl: columns left out: id",
        "chats.jsonl: 1 of 3 rows left out: no messages (row 2, counted from 1)",
        "11 of 16 evaluation rows left out: nothing in the first 16 tokens (--max_length) counts",
    ):
        assert said.count(line) == 1 and line not in other
    assert "⟦the fox⟧" in said  # without the mark of the template's file


def test_a_row_that_nobody_can_mean_ends_all_ranks_in_a_line(home: Path) -> None:
    both = ranks(
        home, "--train_file", "chats.jsonl", "odd.jsonl", "--chat_template_path", "t.jinja"
    )
    assert [rank.wait(120) for rank in both] == [2, 2]
    said = both[0].said() + both[1].said()
    assert "error: odd.jsonl, row 3 (counted from 1): turn 1 has the role 'critic'" in said
    assert "Traceback" not in said and not (home / "out").exists()


def test_tokens_and_lengths_that_the_model_does_not_have(home: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(home / "pruned")
    tokenizer.add_tokens(["<spare>", "<more>", "<think>"], special_tokens=True)
    think = tokenizer.convert_tokens_to_ids("<think>")
    for model in ("pruned", "dense"):
        (home / f"more-{model}").mkdir()
        for path in (home / model).iterdir():
            (home / f"more-{model}" / path.name).symlink_to(path)
        for path in tokenizer.save_pretrained(home / "saved"):
            target = home / f"more-{model}" / Path(path).name
            target.unlink(missing_ok=True)
            target.write_bytes(Path(path).read_bytes())
    write(home / "think.jsonl", [{"text": "the <think> fox " * 20}] * 4)
    zero = [
        "--deepspeed",
        str(ROOT / "ds_configs/zero3.json"),
        "--output_dir",
        "o",
        "--dry_run",
        "true",
    ]
    runs = [
        ("finetune", [*zero, "--train_file", "think.jsonl", "--max_steps", "2"]),
        ("evaluate", ["--text_file", "think.jsonl"]),
        ("prune", ["--output_dir", "p", "--method", "wanda", "--sparsity", "0.5", "--calibration_file",
                   "think.jsonl", "--calibration_samples", "2"]),
    ]  # fmt: skip
    for script, flags in runs:
        model = "dense" if script == "prune" else "pruned"
        for name, length, said in (
            (
                f"more-{model}",
                "16",
                f"'<think>' (id {think}), and the model's embedding has 128 rows",
            ),
            (model, "80", "takes 64 tokens"),
        ):
            argv = ["--model_name_or_path", name, "--max_length", length, *flags]
            done = forked.start(script, argv, home, ENV).finish(120)
            assert done.returncode == 2 and said in done.stderr, done.stderr
            assert "Traceback" not in done.stderr
