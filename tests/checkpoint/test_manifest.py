"""A save cut off anywhere leaves the old state or the new one; every kind of damage is found."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import random
import shutil
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from seft_ds.checkpoint import manifest
from seft_ds.checkpoint.manifest import (
    MANIFEST_NAME,
    FileEntry,
    aside_of,
    checkpoints_in,
    entries_below,
    find_problems,
    hash_file,
    publish,
    read_manifest,
    remove_leftovers,
    seal,
    write_bytes,
    write_tensors,
)
from seft_ds.tensor_files import DTYPE_CODES

WEIGHTS, NOTES, FOREIGN = "model.safetensors", "notes.json", "zero/optim.pt"
RANK, SUB = "seft/rank-00000.safetensors", f"seft/{MANIFEST_NAME}"
TOP = sorted([WEIGHTS, NOTES, FOREIGN, SUB])  # what the manifest itself lists
ALL = sorted([*TOP, RANK])


def write_aside(target: Path, value: int) -> Path:
    """A checkpoint as a run writes it, up to the seal: a part sealed by itself, a file by others."""
    aside = aside_of(target)
    (aside / "seft").mkdir(parents=True)
    (aside / "zero").mkdir()
    part = {"rank-00000.safetensors": write_tensors(aside / RANK, {"a": torch.arange(9) + value})}
    seal(aside / "seft", entries_below(aside / "seft", part), {"part": value})
    (aside / FOREIGN).write_bytes(b"%d" % value * 300)
    known = {
        WEIGHTS: write_tensors(aside / WEIGHTS, {"w": torch.full((40, 5), value / 3)}),
        NOTES: write_bytes(aside / NOTES, b"[%d]" % value),
    }
    seal(aside, entries_below(aside, known), {"value": value, "nested": [1.5, None, {"k": "v"}]})
    return aside


def save(target: Path, value: int) -> None:
    publish(write_aside(target, value), target)


def contents(directory: Path) -> dict[str, bytes] | None:
    if not directory.is_dir():
        return None
    files = (path for path in directory.rglob("*") if path.is_file())
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in files}


@pytest.fixture
def sealed(tmp_path) -> Path:
    save(tmp_path / "run" / "checkpoint-4", 4)
    return tmp_path / "run" / "checkpoint-4"


@pytest.fixture(scope="module")
def states(tmp_path_factory) -> tuple[dict, dict]:
    """What an uninterrupted save of the values 1 and 2 leaves."""
    root = tmp_path_factory.mktemp("states")
    for value in (1, 2):
        save(root / str(value), value)
    return contents(root / "1"), contents(root / "2")


# What is written


def _awkward() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    tensors: dict[str, torch.Tensor] = {}
    for dtype, code in DTYPE_CODES.items():
        raw = torch.randint(0, 256, (6, 40), dtype=torch.uint8, generator=generator)
        whole = (
            raw % 2 == 0 if dtype == torch.bool else raw.view(dtype)
        )  # every bit pattern, NaNs too
        tensors |= {
            f"{code}.whole": whole,
            f"{code}.transposed": whole.t(),
            f"{code}.strided": whole[::2, 1:],
            f"{code}.expanded": whole[0, 0].expand(3, 2),
            f"{code}.scalar": whole[1, 1],
            f"{code}.empty": whole[:0],
            f"{code}.no_columns": whole[:, :0],
        }
    tensors["parameter"] = torch.nn.Parameter(torch.ones(3))
    tensors["negated view"] = torch._neg_view(torch.arange(3.0))  # as x.conj().imag is one
    tensors["änd.ünicode"] = torch.ones(1)
    return tensors


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    a, b = (t.detach().resolve_neg().contiguous().reshape(-1).view(torch.uint8) for t in (a, b))
    return torch.equal(a, b)


def test_tensors_come_back_bit_for_bit(tmp_path):
    tensors = _awkward()
    assert tensors["negated view"].is_neg()
    entry = write_tensors(tmp_path / "t", tensors)
    data = (tmp_path / "t").read_bytes()
    assert entry == FileEntry(len(data), hashlib.sha256(data).hexdigest())
    assert entry == hash_file(tmp_path / "t")
    with safe_open(tmp_path / "t", framework="pt") as file:
        assert set(file.keys()) == set(tensors)
        for name, tensor in tensors.items():
            read = file.get_tensor(name)
            assert read.dtype == tensor.dtype and read.shape == tensor.shape, name
            assert _same_bits(read, tensor), name


def test_a_file_without_tensors_can_be_read(tmp_path):
    write_tensors(tmp_path / "t", {})
    with safe_open(tmp_path / "t", framework="pt") as file:
        assert list(file.keys()) == []


@pytest.mark.parametrize(
    "name, tensor", [("a", torch.ones(2) * 1j), ("__metadata__", torch.ones(2))]
)
def test_what_the_format_cannot_hold_is_refused_before_writing(tmp_path, name, tensor):
    with pytest.raises(ValueError, match=f"{name}.*(convert|rename)"):
        write_tensors(tmp_path / "t", {"fine": torch.ones(1), name: tensor})
    assert not (tmp_path / "t").exists()


def test_one_tensor_is_on_the_host_at_a_time(tmp_path, monkeypatch):
    alive: list[weakref.ref] = []
    real = manifest._bytes_of

    def tracked(tensor):
        assert not [ref for ref in alive if ref() is not None], "the one before is still held"
        view = real(tensor)
        alive.append(weakref.ref(view.obj))
        return view

    monkeypatch.setattr(manifest, "_bytes_of", tracked)
    write_tensors(tmp_path / "t", {str(i): torch.ones(50, 2).t() for i in range(5)})
    assert len(alive) == 5


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_tensors_of_a_gpu(tmp_path):
    tensors = {name: t.cuda() for name, t in _awkward().items()}
    assert write_tensors(tmp_path / "gpu", tensors) == write_tensors(tmp_path / "cpu", _awkward())


def test_hash_file_reads_in_blocks_and_only_regular_files(tmp_path, monkeypatch):
    monkeypatch.setattr(manifest, "_READ_BYTES", 7)
    entry = write_bytes(tmp_path / "f", bytes(range(100)))
    assert hash_file(tmp_path / "f") == entry == FileEntry(100, entry.sha256)
    (tmp_path / "link").symlink_to("f")
    os.mkfifo(tmp_path / "pipe")
    for name in ("link", "pipe", "missing", "."):
        with pytest.raises(OSError):
            hash_file(tmp_path / name)


# What is listed


def test_a_save_holds_and_lists_what_it_should(sealed):
    assert find_problems(sealed) == []
    assert not aside_of(sealed).exists() and [p.name for p in sealed.parent.iterdir()] == [
        sealed.name
    ]
    entries, about = read_manifest(sealed)
    assert entries == {name: hash_file(sealed / name) for name in TOP}
    assert about == {"value": 4, "nested": [1.5, None, {"k": "v"}]}
    assert sorted(read_manifest(sealed / "seft")[0]) == ["rank-00000.safetensors"]
    text = (sealed / MANIFEST_NAME).read_text()
    assert text == json.dumps(json.loads(text), indent=1, sort_keys=True) + "\n"


def test_only_unknown_files_are_hashed_and_sealed_folders_are_not_entered(tmp_path, monkeypatch):
    hashed: list[str] = []
    real = manifest.hash_file
    monkeypatch.setattr(
        manifest, "hash_file", lambda path: (hashed.append(path.name), real(path))[1]
    )
    write_aside(tmp_path / "t", 1)
    assert sorted(hashed) == sorted([MANIFEST_NAME, "optim.pt"])


def test_a_leftover_of_a_seal_is_not_listed(tmp_path):
    aside = write_aside(tmp_path / "t", 1)
    before = entries_below(aside, {})
    (aside / f".{MANIFEST_NAME}.writing").write_bytes(b"{")
    assert entries_below(aside, {}) == before


def test_a_known_file_has_to_be_there_as_it_was_written(tmp_path):
    known = {"a": write_bytes(tmp_path / "a", b"abc"), "b": write_bytes(tmp_path / "b", b"de")}
    (tmp_path / "b").write_bytes(b"d")
    with pytest.raises(OSError, match="b has 1 bytes after 2"):
        entries_below(tmp_path, known)
    (tmp_path / "b").unlink()
    with pytest.raises(OSError, match="b was written and is not there"):
        entries_below(tmp_path, known)


def test_what_no_manifest_can_list_is_refused(tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    directory = tmp_path / "d"
    for make in (
        lambda: (directory / "x").symlink_to(outside),
        lambda: (directory / "x").symlink_to("nowhere"),
        lambda: os.mkfifo(directory / "x"),
        lambda: (directory / "back\\slash").write_bytes(b""),
        lambda: (directory / "new\nline").write_bytes(b""),
        lambda: write_bytes(directory / "sub" / MANIFEST_NAME, b'{"somebody": "else\'s"}'),
    ):
        (directory / "sub").mkdir(parents=True)
        make()
        with pytest.raises(ValueError):
            entries_below(directory, {})
        shutil.rmtree(directory)


def test_about_may_be_anything_that_json_holds(tmp_path):
    about = {"loss": float("nan"), 10: "int keys", 2: [], "text": "\ud83d" + "\ude00 ü", "e": 1e300}
    seal(tmp_path, {}, about)
    assert find_problems(tmp_path) == []
    seal(tmp_path, {})
    assert read_manifest(tmp_path) == ({}, {})


def test_an_unlisted_file_is_nobodys_concern(sealed):
    (sealed / "README").write_text("my best run")
    assert find_problems(sealed) == []


# Saves that are cut off


class Fuse:
    """Counts what changes or reads the disk, and breaks at the `at`-th call (and all after it, if
    `for_good`). A write is torn: half of it arrives."""

    CALLS = ("open", "fsync", "replace", "unlink", "rmdir", "mkdir")

    def __init__(self, monkeypatch, at: int, blow: Callable[[], None], for_good: bool = False):
        self.at, self.blow, self.for_good, self.count = at, blow, for_good, 0
        for name in self.CALLS:
            monkeypatch.setattr(os, name, self._wrapped(getattr(os, name)))
        fuse, real_open = self, open

        class TornFile(io.FileIO):
            def write(self, data: Any) -> int:
                if fuse.due():
                    super().write(memoryview(data)[: len(data) // 2])
                    fuse.blow()
                return super().write(data)

        def opened(path, mode="r", **kwargs):
            if self.due():
                self.blow()
            return TornFile(path, "w") if mode == "wb" else real_open(path, mode, **kwargs)

        monkeypatch.setattr("builtins.open", opened)

    def due(self) -> bool:
        self.count += 1
        return self.count == self.at or (self.for_good and self.count > self.at)

    def _wrapped(self, real: Callable) -> Callable:
        def call(*args, **kwargs):
            if self.due():
                self.blow()
            return real(*args, **kwargs)

        return call


def _no_room() -> None:
    raise OSError(errno.ENOSPC, "no room, says the test")


def _check_after_crash(target: Path, old: dict | None, new: dict) -> None:
    """No directory seems good and isn't; after clearing up there is the old state or the new."""
    for directory in target.parent.iterdir():
        if not find_problems(directory):
            assert contents(directory) in (old, new), directory
    assert contents(target) in (None, old, new)
    remove_leftovers(target.parent)
    assert contents(target) in (old, new)
    assert [path for path in target.parent.iterdir() if path != target] == []


@pytest.mark.parametrize("replaces", [False, True], ids=["first", "replaces"])
@pytest.mark.parametrize("for_good", [False, True], ids=["once", "for good"])
def test_an_error_at_any_call_leaves_the_old_or_the_new(tmp_path, states, replaces, for_good):
    old, new = states if replaces else (None, states[1])
    failures = 0
    for at in range(1, 1000):
        target = tmp_path / str(at) / "checkpoint-7"
        target.parent.mkdir()
        if replaces:
            save(target, 1)
        failed = False
        with pytest.MonkeyPatch.context() as patch:
            fuse = Fuse(patch, at, _no_room, for_good)
            try:
                save(target, 2)
            except OSError:
                failed = True
        if not failed:
            assert contents(target) == new and find_problems(target) == []
        elif not for_good:  # moved back at once, or the new one was in place already
            assert contents(target) in (old, new)
        failures += failed
        _check_after_crash(target, old, new)
        if fuse.count < at:
            break
    else:
        pytest.fail("the save never got through")
    assert failures > 30


@pytest.mark.parametrize("replaces", [False, True], ids=["first", "replaces"])
def test_the_end_of_the_process_at_any_call_leaves_the_old_or_the_new(tmp_path, states, replaces):
    old, new = states if replaces else (None, states[1])
    seen = []
    for at in range(1, 1000):
        target = tmp_path / str(at) / "checkpoint-7"
        target.parent.mkdir()
        if replaces:
            save(target, 1)
        child = os.fork()
        if child == 0:
            code = 3
            try:
                with pytest.MonkeyPatch.context() as patch:
                    Fuse(patch, at, lambda: os._exit(5))
                    save(target, 2)
                code = 0
            finally:
                os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        seen.append("new" if contents(target) == new else "old" if contents(target) else "none")
        _check_after_crash(target, old, new)
        assert code in (0, 5)
        if code == 0:
            break
    assert code == 0 and seen[-1] == "new" and len(seen) > 30
    # The one moment without a target: between the renames of a replacement.
    assert seen.count("none") == (1 if replaces else len(seen) - seen.count("new"))


@pytest.mark.parametrize("point", ["to old", "to target"])
def test_an_interrupt_during_publish_moves_the_old_one_back(tmp_path, states, monkeypatch, point):
    save(tmp_path / "t", 1)
    aside = write_aside(tmp_path / "t", 2)
    real = os.replace

    def interrupted(source, destination):
        if point == "to old":  # after the rename has happened, before we hear of it
            real(source, destination)
        monkeypatch.setattr(os, "replace", real)
        raise KeyboardInterrupt

    def second(source, destination):
        real(source, destination)
        monkeypatch.setattr(os, "replace", interrupted)

    monkeypatch.setattr(os, "replace", interrupted if point == "to old" else second)
    with pytest.raises(KeyboardInterrupt):
        publish(aside, tmp_path / "t")
    assert contents(tmp_path / "t") == states[0]
    publish(aside, tmp_path / "t")
    assert contents(tmp_path / "t") == states[1]


def test_all_is_synced_before_it_becomes_visible(tmp_path, monkeypatch):
    """A power failure loses what was not synced; so each file and folder is, after its last change."""
    synced: dict[int, int] = {}
    steps: list[str] = []
    real_sync, real_replace = os.fsync, os.replace
    target = tmp_path / "t"

    def fsync(descriptor: int) -> None:
        status = os.fstat(descriptor)
        synced[status.st_ino] = status.st_mtime_ns
        if status.st_ino == tmp_path.stat().st_ino:
            steps.append("parent")
        real_sync(descriptor)

    def replace(source, destination) -> None:
        if Path(source).name == f".{MANIFEST_NAME}.writing":
            assert synced[os.stat(source).st_ino] == os.stat(source).st_mtime_ns
        if Path(destination) == target:
            steps.append("visible")
            for path in [Path(source), *Path(source).rglob("*")]:
                assert synced.get(path.stat().st_ino) == path.stat().st_mtime_ns, path
        real_replace(source, destination)

    real_rmtree = shutil.rmtree
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    monkeypatch.setattr(
        shutil, "rmtree", lambda path, **kw: (steps.append("delete"), real_rmtree(path, **kw))
    )
    save(target, 1)
    assert steps[:2] == ["visible", "parent"]
    steps.clear()
    save(target, 2)
    assert steps == ["visible", "parent", "delete"]


def test_directories_without_a_sync_are_no_obstacle_but_broken_disks_are(tmp_path, monkeypatch):
    for code, fails in ((errno.EINVAL, False), (errno.ENOTSUP, False), (errno.EIO, True)):

        def fsync(descriptor: int, code: int = code) -> None:
            if os.path.isdir(f"/proc/self/fd/{descriptor}"):
                raise OSError(code, "says the test")

        monkeypatch.setattr(os, "fsync", fsync)
        if fails:
            with pytest.raises(OSError):
                save(tmp_path / str(code), 1)
        else:
            save(tmp_path / str(code), 1)


def test_a_seal_over_a_seal_is_the_old_or_the_new(tmp_path):
    both = []
    for about in ({"n": 1}, {"n": 2}):
        seal(tmp_path, {}, about)
        both.append((tmp_path / MANIFEST_NAME).read_bytes())
    for at in range(1, 20):
        (tmp_path / MANIFEST_NAME).write_bytes(both[0])
        with pytest.MonkeyPatch.context() as patch:
            fuse = Fuse(patch, at, _no_room)
            try:
                seal(tmp_path, {}, {"n": 2})
            except OSError:
                assert (tmp_path / MANIFEST_NAME).read_bytes() in both
        if fuse.count < at:
            break
    assert at > 4 and (tmp_path / MANIFEST_NAME).read_bytes() == both[1]


def test_an_old_one_that_cannot_be_deleted_does_not_fail_the_save(tmp_path, states, monkeypatch):
    save(tmp_path / "t", 1)
    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", lambda *_, **__: _no_room())
        save(tmp_path / "t", 2)
    assert contents(tmp_path / "t") == states[1]
    assert [path.name for path in remove_leftovers(tmp_path)] == [".t.replaced"]
    assert contents(tmp_path / "t") == states[1]


def test_publish_refuses_what_is_unsealed_and_what_is_in_the_way(tmp_path):
    (tmp_path / "a").mkdir()
    with pytest.raises(AssertionError, match="not sealed"):
        publish(tmp_path / "a", tmp_path / "t")
    seal(tmp_path / "a", {})
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "link").symlink_to("a")
    (tmp_path / "dangling").symlink_to("nowhere")
    for name in ("file", "link", "dangling"):
        with pytest.raises(ValueError, match="in the way"):
            publish(tmp_path / "a", tmp_path / name)
    assert find_problems(tmp_path / "a") == []


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    where = tmp_path / "disk"
    where.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(where)]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("there is no mount command")
    if done.returncode:
        pytest.skip(f"a tmpfs can't be mounted: {done.stderr.strip()}")
    yield where
    subprocess.run(["umount", str(where)], check=True)


def test_a_full_disk_raises_and_leaves_no_target(small_disk, states):
    with pytest.raises(OSError, match="No space"):
        write_tensors(small_disk / "t", {"w": torch.ones(2**17)})
    (small_disk / "t").unlink()
    page, filled = 4096, 0
    outcomes = []
    (small_disk / "filler").write_bytes(b"")
    target = small_disk / "checkpoint-1"
    while True:  # a page less room each time, so that it ends at each point of the save
        try:
            save(target, 1)
        except OSError as error:
            assert error.errno == errno.ENOSPC
            assert not target.exists()
            outcomes.append(False)
        else:
            assert find_problems(target) == [] and contents(target) == states[0]
            shutil.rmtree(target)
            outcomes.append(True)
        remove_leftovers(small_disk)
        with open(small_disk / "filler", "ab", buffering=0) as file:
            try:
                filled += file.write(b"x" * page)
            except OSError:
                break
    assert outcomes[0] and outcomes.count(False) >= 5 and outcomes == sorted(outcomes, reverse=True)


# Leftovers and what is there


def test_leftovers_are_ours_by_name_and_directories(tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "keep").write_bytes(b"keep")
    run = tmp_path / "run"
    kept = [
        ".writing",
        "..writing",
        "a.writing",
        ".a.writing.bak",
        ".a.writing2",
        ".a.old",
        "a.replaced",
    ]
    for name in [*kept, ".a.writing", ".b.replaced", "b", ".c.d.writing"]:
        (run / name).mkdir(parents=True)
    (run / ".file.writing").write_bytes(b"")
    (run / ".link.writing").symlink_to(outside)
    (run / ".a.writing" / "link").symlink_to(outside)
    removed = remove_leftovers(run)
    assert sorted(path.name for path in removed) == sorted(
        [".a.writing", ".b.replaced", ".c.d.writing"]
    )
    left = {path.name for path in run.iterdir()}
    assert left == {*kept, "b", ".file.writing", ".link.writing"}
    assert (outside / "keep").read_bytes() == b"keep"
    assert remove_leftovers(run) == []


def test_a_later_save_of_the_same_step_goes_over_leftovers(tmp_path, states):
    target = tmp_path / "t"
    save(target, 1)
    target.rename(manifest._replaced(target))  # as a crash between the renames leaves it
    save(target, 2)
    assert contents(target) == states[1] and list(tmp_path.iterdir()) == [target]
    (tmp_path / ".t.replaced" / "half").mkdir(parents=True)  # and one before the deletion
    save(target, 1)
    assert contents(target) == states[0] and list(tmp_path.iterdir()) == [target]


def test_checkpoints_are_found_newest_first(tmp_path):
    for name in ("checkpoint-2", "checkpoint-10", "checkpoint-0"):
        (tmp_path / name).mkdir()
    others = "checkpoint-03 checkpoint- checkpoint-1x Xcheckpoint-1 checkpoint--1 checkpoint-٣ runs"
    for name in [
        *others.split(),
        ".checkpoint-5.writing",
        ".checkpoint-6.replaced",
        "checkpoint-7\n",
    ]:
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-11").write_bytes(b"")
    found = [path.name for path in checkpoints_in(tmp_path)]
    assert found == ["checkpoint-10", "checkpoint-2", "checkpoint-0"]
    assert checkpoints_in(tmp_path / "none") == [] == checkpoints_in(tmp_path / "checkpoint-11")


# Damage


@pytest.mark.parametrize("name", ALL)
def test_every_changed_byte_is_found_and_named(sealed, name):
    data = (sealed / name).read_bytes()
    places = {0, 5, 7, 8, 9, 20, len(data) // 3, len(data) // 2, len(data) - 2, len(data) - 1}
    for place in places & set(range(len(data))):
        for bit in (0, 3, 7):
            changed = bytearray(data)
            changed[place] ^= 1 << bit
            (sealed / name).write_bytes(changed)
            problems = find_problems(sealed)
            sha256 = hashlib.sha256(changed).hexdigest()
            expected = f"{name}: sha256 {sha256}, expected {hashlib.sha256(data).hexdigest()}"
            assert expected in problems
            if name != SUB:
                assert problems == [expected] and find_problems(sealed, contents=False) == []
    (sealed / name).write_bytes(data)
    assert find_problems(sealed) == []


@pytest.mark.parametrize("name", ALL)
def test_other_sizes_and_missing_files_are_found_without_reading(sealed, name):
    path = sealed / name
    data = path.read_bytes()
    for other in (data[:-1], data[: len(data) // 2], b"", data + b"\0", data * 2):
        path.write_bytes(other)
        expected = f"{name}: {len(other)} bytes, expected {len(data)}"
        assert expected in find_problems(sealed, contents=False)
        assert expected in find_problems(sealed)
    path.unlink()
    assert f"{name}: missing; expected {len(data)} bytes" in find_problems(sealed, contents=False)
    path.mkdir()
    assert any(p.startswith(f"{name}: not a regular") for p in find_problems(sealed))
    path.rmdir()
    os.mkfifo(path)  # must not wait for a writer
    assert any(p.startswith(f"{name}: not a regular") for p in find_problems(sealed))


def test_swapped_files_and_a_missing_folder_are_found(tmp_path):
    entries = {}
    for name in ("a", "b", "sub/c"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        entries[name] = write_bytes(tmp_path / name, name.encode() * (6 // len(name)))
    seal(tmp_path, entries)
    assert find_problems(tmp_path) == []
    (tmp_path / "a").rename(tmp_path / "x")
    (tmp_path / "b").rename(tmp_path / "a")
    (tmp_path / "x").rename(tmp_path / "b")
    problems = find_problems(tmp_path)
    assert [p.split(":")[0] for p in problems] == ["a", "b"]
    (tmp_path / "sub" / "c").unlink()
    (tmp_path / "sub").rmdir()
    (tmp_path / "sub").write_bytes(b"a file where the folder was")
    assert "sub/c: missing; expected 5 bytes" in find_problems(tmp_path)


def test_an_error_of_the_disk_is_a_problem(sealed, monkeypatch):
    def broken(path):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(manifest, "hash_file", broken)
    problems = find_problems(sealed)
    assert len(problems) == len(ALL) and all("Input/output error" in p for p in problems)
    monkeypatch.setattr(manifest, "_open_regular", broken)
    assert "Input/output error" in find_problems(sealed)[0]
    with pytest.raises(OSError):  # the file may be right all the same
        read_manifest(sealed)


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_each_file_is_hashed_by_one_rank(sealed, monkeypatch, size):
    (sealed / FOREIGN).write_bytes(b"x" * (sealed / FOREIGN).stat().st_size)
    (sealed / NOTES).unlink()
    hashed: list[Path] = []
    real = manifest.hash_file
    monkeypatch.setattr(manifest, "hash_file", lambda path: (hashed.append(path), real(path))[1])
    problems = [find_problems(sealed, share=(rank, size)) for rank in range(size)]
    assert sorted(hashed) == sorted(sealed / name for name in ALL if name != NOTES)
    assert all(any("notes.json: missing" in p for p in of_rank) for of_rank in problems)
    assert sum(p.startswith(FOREIGN) for of_rank in problems for p in of_rank) == 1


def test_shares_are_balanced():
    sizes = random.Random(0).choices([10, 200, 3000, 50000], k=200)
    listed = {f"f{i}": FileEntry(size, "0" * 64) for i, size in enumerate(sizes)}
    parts = [manifest._part_of(listed, rank, 6) for rank in range(6)]
    assert sorted(name for part in parts for name in part) == sorted(listed)
    loads = [sum(listed[name].bytes for name in part) for part in parts]
    assert max(loads) - min(loads) <= 50000
    empty = {f"f{i}": FileEntry(0, "0" * 64) for i in range(12)}
    assert [len(manifest._part_of(empty, rank, 6)) for rank in range(6)] == [2] * 6


@pytest.mark.parametrize("share", [(1, 1), (-1, 2), (0, 0)])
def test_an_impossible_share_is_refused(sealed, share):
    with pytest.raises(ValueError, match="share is"):
        find_problems(sealed, share=share)


# Manifests that others wrote


def forge(directory: Path, files: Any, about: Any = None, **changes: Any) -> None:
    """A manifest whose own checksum is right, whatever it says."""
    about = {} if about is None else about
    document = {"format": manifest.FORMAT, "files": files, "about": about} | changes
    document["seal"] = manifest._seal_of(document)
    (directory / MANIFEST_NAME).write_text(json.dumps(document))


OPENED: list[Any] | None = None


def _audit(event: str, args: tuple) -> None:
    if OPENED is not None and event == "open":
        OPENED.append(args[0])


sys.addaudithook(_audit)


def problems_reading_only(directory: Path) -> list[str]:
    """`find_problems`, having seen that no file outside of the directory was opened."""
    global OPENED
    OPENED = []
    try:
        problems = find_problems(directory)
        paths = [path for path in OPENED if not isinstance(path, int)]
    finally:
        OPENED = None
    for path in paths:
        assert Path(os.path.realpath(path)).is_relative_to(directory.resolve()), path
    return problems


SECRET = b"a secret"
SECRET_ENTRY = {"bytes": len(SECRET), "sha256": hashlib.sha256(SECRET).hexdigest()}


@pytest.fixture
def beside_secret(tmp_path) -> Path:
    """An empty directory with a folder outside of it that it should not look into."""
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "secret").write_bytes(SECRET)
    seal(tmp_path / "outside", entries_below(tmp_path / "outside", {}))
    (tmp_path / "d" / "sub").mkdir(parents=True)
    return tmp_path / "d"


HOSTILE = [
    "",
    ".",
    "..",
    "/etc/passwd",
    "../outside/secret",
    "sub/../../outside/secret",
    "sub/..",
    "./a",
    "sub//a",
    "sub/",
    "..\\outside\\secret",
    "sub\\a",
    "C:secret",
    "c:/secret",
    "//host/secret",
    "nul\0byte",
    "new\nline",
    "escape\x1b[2J",
    "\ud800",
    MANIFEST_NAME,
]


@pytest.mark.parametrize("name", HOSTILE, ids=repr)
def test_names_that_leave_the_directory_are_refused(beside_secret, name):
    if name == "/etc/passwd":
        name = str(beside_secret.parent / "outside" / "secret")
    forge(beside_secret, {name: SECRET_ENTRY})
    with pytest.raises(ValueError, match="lists a name"):
        read_manifest(beside_secret)
    (problem,) = problems_reading_only(beside_secret)
    assert problem.isprintable()
    with pytest.raises(ValueError, match="can't be listed"):
        seal(beside_secret / "sub", {name: FileEntry(**SECRET_ENTRY)})
    # The same one level down, where the manifest above vouches for the one that lists it.
    (beside_secret / MANIFEST_NAME).rename(beside_secret / "sub" / MANIFEST_NAME)
    forge(
        beside_secret,
        {f"sub/{MANIFEST_NAME}": vars(hash_file(beside_secret / "sub" / MANIFEST_NAME))},
    )
    assert len(problems_reading_only(beside_secret)) == 1


def test_harmless_names_are_taken(tmp_path):
    names = [
        "a",
        "..a",
        "a..",
        "...",
        "a b",
        "sub/.hidden",
        "ü",
        "ab:c",
        "seft/MANIFEST.json",
        "-rf",
    ]
    entries = {}
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        entries[name] = write_bytes(tmp_path / name, name.encode())
    assert entries_below(tmp_path, {}) == entries
    seal(tmp_path, entries)
    assert find_problems(tmp_path) == []


def _link(directory: Path, name: str, to: str) -> None:
    (directory / name).symlink_to(to)


@pytest.mark.parametrize(
    "name, make",
    [
        ("a", lambda d: _link(d, "a", "../outside/secret")),
        ("a", lambda d: _link(d, "a", str(d.parent / "outside" / "secret"))),
        ("sub/a", lambda d: _link(d, "sub/a", "../../outside/secret")),
        ("x/secret", lambda d: _link(d, "x", "../outside")),
        ("x/y/secret", lambda d: (_link(d, "x", "."), _link(d, "y", "../outside"))),
        (f"x/{MANIFEST_NAME}", lambda d: _link(d, "x", "../outside")),
        (f"sub/{MANIFEST_NAME}", lambda d: _link(d, "sub/manifest.json", "../../outside/manifest.json")),
        (f"x/{MANIFEST_NAME}", lambda d: _link(d, "x", ".")),
        (f"x/x/x/{MANIFEST_NAME}", lambda d: _link(d, "x", ".")),
        ("a", lambda d: ((d / "b").write_bytes(SECRET), _link(d, "a", "b"))),
        ("a", lambda d: _link(d, "a", "a")),
        ("a", lambda d: _link(d, "a", "/dev/zero")),
    ],
)  # fmt: skip
def test_links_are_never_followed(beside_secret, name, make):
    make(beside_secret)
    real = beside_secret / name
    entry = SECRET_ENTRY
    if name.endswith(MANIFEST_NAME) and real.is_file():  # all would be right but for the link
        data = real.read_bytes()
        entry = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    forge(beside_secret, {name: entry})
    problems = problems_reading_only(beside_secret)
    assert problems == [f"{name}: a symbolic link, or in a linked folder; expected a regular file"]


def test_the_manifest_itself_may_not_be_a_link(beside_secret):
    _link(beside_secret, MANIFEST_NAME, f"../outside/{MANIFEST_NAME}")
    assert len(problems_reading_only(beside_secret)) == 1
    with pytest.raises(ValueError):
        read_manifest(beside_secret)


def test_a_link_to_the_whole_directory_is_fine(sealed, tmp_path):
    (tmp_path / "best").symlink_to(sealed)
    assert find_problems(tmp_path / "best") == []


GOOD = {"bytes": 0, "sha256": "0" * 64}


@pytest.mark.parametrize(
    "files",
    [
        None,
        [],
        "files",
        {"a": None},
        {"a": []},
        {"a": "0"},
        {"a": {}},
        *({"a": GOOD | {"bytes": size}} for size in (-1, True, False, 1.0, "1", None, 2**63, 10**4000)),
        *({"a": GOOD | {"bytes": size}} for size in (float("nan"), float("inf"), [1], {})),
        *({"a": GOOD | {"sha256": h}} for h in ("", "0" * 63, "0" * 65, "0" * 63 + "\n", "0" * 64 + "\n")),
        *({"a": GOOD | {"sha256": h}} for h in ("A" * 64, "g" * 64, "٣" * 64, None, 0, ["0" * 64])),
    ],
)  # fmt: skip
def test_wrong_types_and_absurd_values_are_refused(tmp_path, files):
    forge(tmp_path, files)
    with pytest.raises(ValueError, match="damaged"):
        read_manifest(tmp_path)
    assert len(find_problems(tmp_path)) == 1


@pytest.mark.parametrize(
    "data, says",
    [
        (b"", "JSON"),
        (b"{", "JSON"),
        (b"\x80abc", "JSON"),
        (b'{"format": "\xff"}', "JSON"),
        ("{}".encode("utf-16"), "JSON"),
        (b"[" * 500_000, "JSON"),
        (b'{"a":' * 500_000, "JSON"),
        (b"1" * 10_000, "JSON"),
        (b"null", "None"),
        (b"[]", "a list"),
        (b'"text"', "'text'"),
        (b"{}", "format None"),
        (
            b'{"format": "seft_ds-manifest-2", "files": {}, "about": {}}',
            "reads 'seft_ds-manifest-1'",
        ),
        (b'{"format": "seft_ds-manifest-1", "files": {}, "about": []}', "about"),
        (b'{"format": "seft_ds-manifest-1", "files": {}, "about": {}}', "own checksum"),
        (
            b'{"format": "seft_ds-manifest-1", "files": {}, "about": {}, "seal": [1]}',
            "own checksum",
        ),
    ],
)
def test_what_is_no_manifest_is_refused(tmp_path, data, says):
    (tmp_path / MANIFEST_NAME).write_bytes(data)
    with pytest.raises(ValueError, match=says):
        read_manifest(tmp_path)
    assert says in find_problems(tmp_path)[0] and len(find_problems(tmp_path)) == 1


def test_no_manifest_means_not_finished(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    for directory in (tmp_path, tmp_path / "none", tmp_path / "file"):
        with pytest.raises(ValueError, match="was not finished, or isn't a checkpoint"):
            read_manifest(directory)
        assert len(find_problems(directory)) == 1


def test_nesting_around_the_interpreters_limit_is_an_error_of_the_file(tmp_path):
    for depth in range(100, 1500, 37):
        deep = '{"k":' * (depth // 2) + "[" * depth + "]" * depth + "}" * (depth // 2)
        for key in ("format", "files", "about", "seal"):
            others = {"format": manifest.FORMAT, "files": {}, "about": {}, "seal": ""}
            texts = {k: json.dumps(v) for k, v in others.items()} | {key: deep}
            text = "{" + ",".join(f'"{k}":{v}' for k, v in texts.items()) + "}"
            (tmp_path / MANIFEST_NAME).write_text(text)
            assert len(find_problems(tmp_path)) == 1
        (tmp_path / MANIFEST_NAME).write_text(
            f'{{"format":"{manifest.FORMAT}","files":{{"a":{{"bytes":{deep},"sha256":0}}}},"about":{{}}}}'
        )
        assert len(find_problems(tmp_path)) == 1


def test_too_large_a_manifest_is_not_read(tmp_path, monkeypatch):
    with open(tmp_path / MANIFEST_NAME, "wb") as file:
        file.truncate(64 * 2**20 + 1)
    monkeypatch.setattr(manifest, "_READ_BYTES", "nothing may be read")
    with pytest.raises(ValueError, match="67108865 bytes and a manifest at most 67108864"):
        read_manifest(tmp_path)


def test_manifests_that_list_each_other_over_and_over_end_soon(tmp_path):
    """Each of 40 nested folders lists all below it: 2**40 ways down, if each were gone."""
    folders = [tmp_path]
    for _ in range(40):
        folders.append(folders[-1] / "x")
    folders[-1].mkdir(parents=True)
    entries: dict[str, FileEntry] = {}
    for folder in reversed(folders):
        seal(folder, entries)
        entries = {f"x/{name}": entry for name, entry in entries.items()}
        entries[f"x/{MANIFEST_NAME}"] = hash_file(folder / MANIFEST_NAME)
    assert find_problems(tmp_path) == []
    files, about = read_manifest(tmp_path)
    seal(tmp_path, files | {f"x/x/{MANIFEST_NAME}": FileEntry(1, "0" * 64)}, about)
    assert any("two manifests list it" in problem for problem in find_problems(tmp_path))


def test_depth_is_no_recursion(tmp_path):
    """More manifests inside one another than there are frames left."""
    below: dict[str, FileEntry] = {}
    deepest = tmp_path.joinpath(*["x"] * 150)
    deepest.mkdir(parents=True)
    for folder in [deepest, *deepest.parents[:150]]:
        seal(folder, below)
        below = {f"x/{MANIFEST_NAME}": hash_file(folder / MANIFEST_NAME)}
    frame, depth = sys._getframe(), 0
    while frame.f_back is not None:
        frame, depth = frame.f_back, depth + 1
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(depth + 75)
    try:
        problems = find_problems(tmp_path)
    finally:
        sys.setrecursionlimit(limit)
    assert problems == []


def test_names_too_long_for_the_system_are_problems(tmp_path):
    seal(tmp_path, {"n" * 300: FileEntry(1, "0" * 64), "y/" * 3000 + "a": FileEntry(1, "0" * 64)})
    assert len(find_problems(tmp_path)) == 2


# Random damage


def _junk(rng: random.Random) -> Any:
    return rng.choice(
        [
            None,
            True,
            -1,
            0,
            2**70,
            1.5,
            "",
            "../outside/secret",
            "x" * 64,
            [],
            [[]],
            {},
            {"bytes": 1},
        ]
    )


def _edit_json(rng: random.Random, value: Any) -> Any:
    """The value with one change somewhere inside."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(sorted(value))
        kind = rng.randrange(6)
        rest = {k: v for k, v in value.items() if k != key}
        if kind == 0:
            return rest
        if kind == 1:
            return rest | {rng.choice([*HOSTILE, "other"]): value[key]}
        if kind == 2:
            return value | {rng.choice(["new", "../outside/secret"]): _junk(rng)}
        return value | {key: _edit_json(rng, value[key])}
    if isinstance(value, str) and value and rng.random() < 0.5:
        at = rng.randrange(len(value))
        return value[:at] + rng.choice("0123456789abcdef/.\0") + value[at + 1 :]
    if type(value) is int and rng.random() < 0.5:
        return value + rng.choice([-1, 1, 256])
    return _junk(rng)


def _damage(rng: random.Random, sealed: Path, name: str) -> None:
    path = sealed / name
    data = bytearray(path.read_bytes())
    kind = rng.randrange(10)
    if name.endswith(MANIFEST_NAME) and kind < 5:
        document = _edit_json(rng, json.loads(data))
        if rng.random() < 0.3 and isinstance(document, dict):
            document["seal"] = manifest._seal_of(document)
        path.write_text(json.dumps(document))
    elif kind < 5:
        for _ in range(rng.randint(1, 3)):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
    elif kind == 5:
        path.write_bytes(data[: rng.randrange(len(data))])
    elif kind == 6:
        path.write_bytes(data + rng.randbytes(rng.randint(1, 50)))
    elif kind == 7:
        start, length = rng.randrange(len(data)), rng.randint(1, 64)
        data[start : start + length] = bytes(len(data[start : start + length]))
        path.write_bytes(data)
    elif kind == 8:
        other = sealed / rng.choice([n for n in [*ALL, MANIFEST_NAME] if n != name])
        mine, theirs = bytes(data), other.read_bytes()
        path.write_bytes(theirs)
        other.write_bytes(mine)
    else:
        path.unlink()
        rng.choice(
            [
                lambda: None,
                path.mkdir,
                lambda: os.mkfifo(path),
                lambda: path.symlink_to("../../outside/secret"),
                lambda: path.symlink_to("notes.json"),
            ]
        )()


def _same_json(a: bytes | None, b: bytes) -> bool:
    try:
        return a is not None and repr(json.loads(a)) == repr(json.loads(b))
    except (ValueError, RecursionError):
        return False


def test_random_damage_never_raises_and_is_always_found(sealed, tmp_path):
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "secret").write_bytes(SECRET)
    before = contents(sealed)
    untouched = tmp_path / "untouched"
    shutil.copytree(sealed, untouched)
    rng = random.Random(20)
    changed = found = 0
    for trial in range(450):
        name = rng.choice([*ALL, MANIFEST_NAME, MANIFEST_NAME, SUB])
        _damage(rng, sealed, name)
        problems = problems_reading_only(sealed)
        union = {p for rank in range(3) for p in find_problems(sealed, share=(rank, 3))}
        assert union == set(problems), trial
        find_problems(sealed, contents=False)
        after = contents(sealed)
        top = (after.pop(MANIFEST_NAME, None), before[MANIFEST_NAME])
        files_differ = after != {k: v for k, v in before.items() if k != MANIFEST_NAME}
        plain = not any(path.is_symlink() for path in sealed.rglob("*"))
        resealed = _is_resealed(sealed) and not _same_json(*top)
        # Whoever rewrites the top manifest with its checksum has made another one, with other files.
        if not resealed:
            intact = not files_differ and plain and _same_json(*top)
            assert bool(problems) != intact, (trial, name, problems)
            changed, found = changed + (not intact), found + bool(problems)
        shutil.rmtree(sealed)
        shutil.copytree(untouched, sealed)
    assert changed == found > 350
    assert find_problems(sealed) == []


def _is_resealed(directory: Path) -> bool:
    path = directory / MANIFEST_NAME
    if not path.is_file():  # it may be a pipe
        return False
    try:
        document = json.loads(path.read_bytes())
        return document["seal"] == manifest._seal_of(document)
    except (ValueError, TypeError, KeyError):
        return False
