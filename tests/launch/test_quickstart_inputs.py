"""The text and the downloads of the first run, on made-up packages."""

from __future__ import annotations

import gzip
import json
import subprocess
import zipfile

import pytest

from tests.prune.test_launch import load_script

script = load_script("quickstart_inputs")


def requests(passages: list[str]) -> bytes:
    """A requests file: two lines (yes and no) for every passage."""
    lines = [
        json.dumps({"doc": {"query": f"{p}\nQuestion: is it?\nAnswer:"}, "label": label})
        for p in passages
        for label in (0, 1)
    ]
    return gzip.compress("\n".join(lines).encode())


def wheel_with(path, train: list[str], val: list[str]):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(script.BOOLQ.format(split="train"), requests(train))
        archive.writestr(script.BOOLQ.format(split="val"), requests(val))
    return path


def test_texts_are_distinct_and_do_not_overlap(tmp_path):
    train = ["Owl -- An owl\nhoots.", "Fox -- A fox barks.", "Owl -- An owl hoots."]
    val = [
        "Elk -- An elk  bugles.",
        "FOX -- Another text under a known title.",
        "Reynard -- a fox barks.",
        "Owl -- An owl hoots.",
        "Elk -- An elk bugles.",
        "Elk -- It sheds its antlers.",
    ]
    wheel = wheel_with(tmp_path / "w.whl", train, val)
    script.make_texts(wheel, tmp_path / "train.txt", tmp_path / "heldout.txt")
    assert (tmp_path / "train.txt").read_text() == "Owl -- An owl hoots.\nFox -- A fox barks.\n"
    expected = "Elk -- An elk bugles.\nElk -- It sheds its antlers.\n"
    assert (tmp_path / "heldout.txt").read_text() == expected


def test_a_question_inside_a_passage_stays_in_it():
    query = "T -- He asked.\nQuestion: what?\nNo one knew.\nQuestion: did he?\nAnswer:"
    assert script.passage(query) == "T -- He asked. Question: what? No one knew."


def package(content: bytes, tmp_path):
    file = tmp_path / "content"
    file.write_bytes(content)
    return script.Package("some-name", "1.0", "some.whl", script.sha256(file), 1)


def test_a_wheel_that_is_there_is_not_fetched_again(tmp_path, monkeypatch):
    wanted = package(b"wheel", tmp_path)
    (tmp_path / "some.whl").write_bytes(b"wheel")
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: pytest.fail("pip was called"))
    assert script.fetch(wanted, tmp_path) == tmp_path / "some.whl"


def test_another_file_under_the_same_name_is_refused(tmp_path):
    wanted = package(b"wheel", tmp_path)
    (tmp_path / "some.whl").write_bytes(b"other")
    with pytest.raises(ValueError, match="sha256 .* wanted .*delete it"):
        script.fetch(wanted, tmp_path)


def test_pip_fetches_into_place(tmp_path, monkeypatch):
    wanted = package(b"wheel", tmp_path)
    asked = []

    def pip(command, **settings):
        asked.append(command)
        folder = command[command.index("--dest") + 1]
        with open(f"{folder}/some.whl", "wb") as file:
            file.write(b"wheel")
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", pip)
    assert script.fetch(wanted, tmp_path).read_bytes() == b"wheel"
    assert "--no-deps" in asked[0] and asked[0][-1] == "some-name==1.0"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["content", "some.whl"]


def test_a_failed_download_says_what_to_do(tmp_path, monkeypatch):
    wanted = package(b"wheel", tmp_path)
    failed = subprocess.CompletedProcess([], 1)
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: failed)
    with pytest.raises(ValueError, match=r"could not download some-name==1\.0.*by hand"):
        script.fetch(wanted, tmp_path)


def test_nothing_is_done_twice(tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    for name in ("model/config.json", "train.txt", "heldout.txt"):
        (tmp_path / name).write_text("made")
    monkeypatch.setattr(script, "fetch", lambda *a: pytest.fail("something was fetched"))
    inputs = script.prepare(tmp_path)
    assert inputs.model == tmp_path / "model" and inputs.train_text.read_text() == "made"
