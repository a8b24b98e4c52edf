"""The model that is written carries the template that it was trained with, also one made of a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from seft_ds.checkpoint.from_checkpoint import export_checkpoint
from seft_ds.checkpoint.tokenizer_files import changes_between, put_changes, read_changes
from seft_ds.checkpoint.verify import verify
from seft_ds.train.callback import check_vocabulary
from seft_ds.train.sample import check_template
from seft_ds.train.template import use_template
from tests.tiny import tiny_model
from tests.train.test_finetune import WORDS, finetune, make_models, tokenizer_into

OLD = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
NEW = "{% for m in messages %}{{ m['role'] }} w40 {{ m['content'] }} w41 {% endfor %}"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("template")
    make_models(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder / "pruned")
    tokenizer.chat_template = OLD
    tokenizer.save_pretrained(folder / "pruned")
    chats = [
        [{"role": "user", "content": WORDS[i % 9]}, {"role": "assistant", "content": WORDS[i % 7]}]
        for i in range(16)
    ]
    (folder / "chats.jsonl").write_text("".join(json.dumps({"messages": c}) + "\n" for c in chats))
    (folder / "new.jinja").write_text(NEW)
    return folder


@pytest.fixture()
def other(tmp_path: Path) -> Path:
    """A tokenizer with a template, and another token that ends an answer."""
    tokenizer_into(tmp_path / "other")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "other")
    tokenizer.chat_template, tokenizer.eos_token = NEW, "w41"
    tokenizer.save_pretrained(tmp_path / "other")
    return tmp_path / "other"


def test_a_run_saves_the_template_that_it_trained_with(home: Path) -> None:
    done = finetune(
        home, "--model_name_or_path", "pruned", "--train_file", "chats.jsonl", "--output_dir", "run",
        "--chat_template_path", "new.jinja", "--max_steps", "2", "--save_steps", "2", "--max_length", "32",
        "--eos_token", "w41", "--seft.density", "0.05",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "w40" in done.stdout, "the first row, as it is trained on"
    source = AutoTokenizer.from_pretrained(home / "pruned")
    assert (source.chat_template, source.eos_token) == (OLD, "<eos>")
    export_checkpoint(home / "run/checkpoint-2", home / "exported")
    for folder in (home / "run", home / "exported"):
        assert verify(folder).ok
        saved = AutoTokenizer.from_pretrained(folder)
        assert (saved.chat_template, saved.eos_token) == (NEW, "w41")
        assert AutoModelForCausalLM.from_pretrained(folder).config.eos_token_id == 41
    assert "chat_template_path: new.jinja" in (home / "run/resolved_config.yaml").read_text()


def test_a_template_that_nothing_is_written_with() -> None:
    run = SimpleNamespace(chat_template_path="new.jinja", assistant_only_loss=False)
    with pytest.raises(ValueError, match="--chat_template_path is for messages"):
        check_template(Dataset.from_list([{"text": "a"}]), None, run)


def test_a_folders_template_comes_without_its_tokens(home: Path, other: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(home / "pruned")
    run = SimpleNamespace(chat_template_path=str(other), eos_token=None)
    use_template(tokenizer, run)
    assert (tokenizer.chat_template, run.eos_token) == (NEW, "w41")
    theirs = AutoTokenizer.from_pretrained(other)
    theirs.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    theirs.chat_template = NEW.replace("w41", "<|im_end|>")
    theirs.save_pretrained(other)
    with pytest.raises(
        ValueError, match=r"its template has <\|im_end\|>, and the model's tokenizer"
    ):
        use_template(AutoTokenizer.from_pretrained(home / "pruned"), run)


@pytest.mark.parametrize(
    "text, said",
    [("{% for %}", "bad.jinja, line 1"), (None, "no such file, and no folder of a tokenizer")],
)
def test_templates_that_are_none(home: Path, tmp_path: Path, text: str | None, said: str) -> None:
    path = tmp_path / "bad.jinja"
    if text is not None:
        path.write_text(text)
    run = SimpleNamespace(chat_template_path=str(path), eos_token=None)
    with pytest.raises(ValueError, match=said):
        use_template(AutoTokenizer.from_pretrained(home / "pruned"), run)


def test_changes_go_into_every_file_that_says_so(tmp_path: Path) -> None:
    tokenizer_into(tmp_path)
    before, after = (AutoTokenizer.from_pretrained(tmp_path) for _ in range(2))
    assert changes_between(before, after) == {}
    after.chat_template, after.eos_token = NEW, "w50"
    changes = changes_between(before, after)
    assert changes == {"chat_template": NEW, "eos_token": ["w50", 50]}
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": OLD}))
    (tmp_path / "config.json").write_text('{"eos_token_id": 1, "text_config": {"eos_token_id": 1}}')
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [1, 7]}')
    put_changes(tmp_path, changes)
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template == NEW
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert (config["chat_template"], config["eos_token"]) == (NEW, "w50")
    config = json.loads((tmp_path / "config.json").read_text())
    assert config == {"eos_token_id": 50, "text_config": {"eos_token_id": 50}}
    ends = json.loads((tmp_path / "generation_config.json").read_text())["eos_token_id"]
    assert ends == [50, 1, 7]
    (tmp_path / "tokenizer_changes.json").write_text('{"eos_token": ["a"]}')
    with pytest.raises(ValueError, match="it is damaged"):
        read_changes(tmp_path)


def test_a_model_that_was_given_more_tokens_is_refused(tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.save_pretrained(tmp_path)
    check_vocabulary(model, str(tmp_path))
    model.resize_token_embeddings(192)
    with pytest.raises(ValueError, match="has 192 token embeddings, and .* says 128"):
        check_vocabulary(model, str(tmp_path))
