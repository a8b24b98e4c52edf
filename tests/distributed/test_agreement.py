"""Agreement at the start, on threads as ranks; once on gloo processes."""

from __future__ import annotations

import hashlib
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from seft_ds.distributed.agreement import agree, all_or_none, file_facts, folder_facts
from tests.ranks import run_processes, run_threads

HOST = socket.gethostname()
TAIL = "; start all ranks with the same command and files"


def outcomes(size: int, work: Callable[[Any], Any]) -> list[Any]:
    """Each rank's result, or (type, text) of its error."""

    def body(ranks: Any) -> Any:
        try:
            return work(ranks)
        except (Exception, SystemExit) as error:
            return type(error).__name__, str(error)

    return run_threads(size, body)


def disagreement(facts: list[dict], what: str = "the settings") -> str:
    """The text of the error that all ranks raise alike."""
    found = outcomes(len(facts), lambda ranks: agree(ranks, facts[ranks.rank], what))
    assert len(set(found)) == 1
    kind, text = found[0]
    assert kind == "ValueError" and text.startswith(f"the ranks disagree on {what}: ")
    assert text.endswith(TAIL)
    return text.removeprefix(f"the ranks disagree on {what}: ").removesuffix(TAIL)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_equal_facts_cost_one_digest(size: int) -> None:
    def work(ranks: Any) -> int:
        sent: list[Any] = []
        exchange = ranks.gather_object
        ranks.gather_object = lambda value: sent.append(value) or exchange(value)
        # The order of keys, and of a set's members, is no disagreement.
        facts: dict[str, Any] = {
            "a": {"b": float("nan"), "long": "x" * 10**5},
            "c": (1, None, True),
        }
        facts |= {"set": {0, 8}, "path": Path("x"), 3: {}, "deep": [{1: 0, "k": ()}]}
        assert str({0, 8}) != str({8, 0})
        if ranks.rank % 2:
            facts = dict(reversed(facts.items())) | {"c": [1, None, True], "set": {8, 0}}
        agree(ranks, facts, "the settings")
        return sum(len(value) for value in sent)

    assert outcomes(size, work) == [64] * size


def test_both_sides_are_named() -> None:
    facts = [{"seft": {"interval": n, "window": 3}} for n in (20, 20, 30, 30)]
    assert disagreement(facts) == "seft.interval is 20 on ranks 0, 1 and 30 on ranks 2, 3"
    facts[1] = facts[2]
    assert disagreement(facts) == "seft.interval is 20 on rank 0 and 30 on ranks 1-3"


@pytest.mark.parametrize(
    "left, right, text",
    [
        ({"a": 1}, {}, "a is 1 on rank 0 and missing on rank 1"),
        ({}, {"a": "missing"}, 'a is missing on rank 0 and "missing" on rank 1'),
        ({"a": None}, {"a": "null"}, 'a is null on rank 0 and "null" on rank 1'),
        ({"a": True}, {"a": 1}, "a is true on rank 0 and 1 on rank 1"),
        ({"a": {}}, {"a": {"b": 1}}, "a is {} on rank 0 and missing on rank 1; a.b is"),
        ({"a": [1, 2]}, {"a": (2, 1)}, "a is [1, 2] on rank 0 and [2, 1] on rank 1"),
        ({"a": Path("x")}, {"a": Path("y")}, 'a is "x" on rank 0 and "y" on rank 1'),
    ],
)
def test_what_differs(left: dict, right: dict, text: str) -> None:
    assert text in disagreement([left, right])


def test_errors_stay_short() -> None:
    many = disagreement([{f"k{i}": i for i in range(9)}, {f"k{i}": -i for i in range(9)}])
    assert many.count(" is ") == 3 and many.endswith("; and 5 more")  # k0 is 0 on both
    ranks = disagreement([{"k": r % 6} for r in range(13)])
    assert ranks == (
        "k is 0 on ranks 0, 6, 12, 1 on ranks 1, 7, 2 on ranks 2, 8 and "
        "something else on ranks 3-5, 9-11"
    )
    # Values that differ only far behind are told apart.
    text = disagreement([{"k": "x" * 999 + "y"}, {"k": "x" * 999 + "z"}])
    assert len(text) < 240 and text.count("sha256") == 2
    one, other = text.removeprefix("k is ").split(" and ")
    assert one.removesuffix(" on rank 0") != other.removesuffix(" on rank 1")


def fail_on(errors: dict[int, BaseException], size: int) -> list[Any]:
    def work(ranks: Any) -> int:
        def alone() -> int:
            if ranks.rank in errors:
                raise errors[ranks.rank]
            return ranks.rank

        return all_or_none(ranks, alone)

    return outcomes(size, work)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_all_come_through_or_fail_alike(size: int) -> None:
    assert fail_on({}, size) == list(range(size))
    alike = fail_on({r: ValueError("no model") for r in range(size)}, size)
    assert alike == [("ValueError", "no model")] * size
    for failed in range(1, size):
        found = fail_on({failed: ValueError("no model")}, size)
        assert found == [("ValueError", f"on rank {failed} ({HOST}): no model")] * size


def test_the_lowest_failed_rank_speaks() -> None:
    found = fail_on({1: ValueError("one"), 2: ValueError("two")}, 3)
    assert found == [("ValueError", f"on rank 1 ({HOST}): one")] * 3
    found = fail_on({0: ValueError("one"), 1: ValueError("two")}, 2)
    assert found == [("ValueError", f"on rank 0 ({HOST}): one")] * 2


def test_os_errors_become_input_errors() -> None:
    def work(ranks: Any) -> str:
        return all_or_none(ranks, lambda: open(f"missing-{ranks.rank // 2}/x").read())

    kind, text = outcomes(1, work)[0]
    assert kind == "ValueError" and text == "[Errno 2] No such file or directory: 'missing-0/x'"
    found = outcomes(3, work)
    assert found == [("ValueError", f"on rank 0 ({HOST}): {text}")] * 3
    assert fail_on({0: OSError()}, 1) == [("ValueError", "OSError")]


@pytest.mark.parametrize(
    "error, told",
    [
        (KeyError("k"), "KeyError: 'k'"),
        (RuntimeError("out of memory"), "RuntimeError: out of memory"),
        (SystemExit(2), "SystemExit: 2"),  # argparse
        (AssertionError(), "AssertionError"),
    ],
)
def test_other_errors_pass_through_where_they_happen(error: BaseException, told: str) -> None:
    peer = ("ValueError", f"on rank 1 ({HOST}): {told}")
    assert fail_on({1: error}, 3) == [peer, (type(error).__name__, str(error)), peer]


def test_a_failed_rank_keeps_its_cause() -> None:
    cause = ValueError("the cause")

    def alone() -> None:
        raise cause

    def work(ranks: Any) -> None:
        with pytest.raises(ValueError, match="^the cause$") as caught:
            all_or_none(ranks, alone)
        assert caught.value.__cause__ is cause

    run_threads(1, work)


def write(folder: Path, **files: bytes) -> Path:
    folder.mkdir(exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


def test_facts_of_a_folder(tmp_path: Path) -> None:
    folder = write(tmp_path / "model", config=b"{}", empty=b"")
    (folder / ".hidden").write_text("x")
    (folder / "sub").mkdir()
    (folder / "link").symlink_to(folder / "config")  # a hub's cache has links
    facts = folder_facts(folder)
    digest = hashlib.sha256(b"{}").hexdigest()[:16]
    assert list(facts) == ["config", "empty", "link"]
    assert facts["config"] == facts["link"] == f"2 bytes, sha256 {digest}"
    assert file_facts(folder / "config") == {"config": facts["config"]}


def test_missing_ones_are_input_errors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no folder"):
        folder_facts(tmp_path / "none")
    with pytest.raises(ValueError, match="there is no file"):
        file_facts(tmp_path)


def test_small_files_in_full_and_large_ones_sampled(tmp_path: Path) -> None:
    def fact(data: bytes) -> str:
        folder = write(tmp_path / "model", x=data)
        assert file_facts(folder / "x", 4, 8) == folder_facts(folder, 4, 8)
        return folder_facts(folder, blocks=4, block_bytes=8)["x"]

    def change(data: bytes, at: int) -> bytes:
        return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]

    small, large = bytes(range(32)), bytes(range(101))
    assert "sample" not in fact(small) and "sample" in fact(large)
    assert "sample" in fact(bytes(33))  # blocks that just don't meet
    assert all(fact(change(small, i)) != fact(small) for i in range(32))
    seen = {i for i in range(101) if fact(change(large, i)) != fact(large)}
    assert seen == {*range(8), *range(31, 39), *range(62, 70), *range(93, 101)}
    assert fact(large[:-1]) != fact(large)


def disagree_in_processes(folder: str) -> list[str]:
    import torch.distributed as dist

    from seft_ds.distributed.collectives import ProcessRanks

    dist.init_process_group("gloo")  # without deepspeed, which takes seconds to import
    ranks = ProcessRanks()
    mine = Path(folder) / ("a" if ranks.rank < 2 else "b")
    texts = []
    facts = all_or_none(ranks, lambda: folder_facts(mine))
    for attempt in (
        lambda: agree(ranks, facts, "the model's files"),
        lambda: all_or_none(ranks, lambda: folder_facts(mine if ranks.rank else mine / "none")),
    ):
        try:
            attempt()
        except ValueError as error:
            texts.append(str(error))
    ranks.barrier()  # and no rank is left in an earlier collective
    return texts


def test_processes(tmp_path: Path) -> None:
    write(tmp_path / "a", config=b"1", same=b"")
    write(tmp_path / "b", config=b"22", same=b"")
    found = run_processes(3, disagree_in_processes, str(tmp_path), timeout=60)
    assert found[0] == found[1] == found[2]
    files, folder = found[0]
    one, two = (
        f"{len(d)} bytes, sha256 {hashlib.sha256(d).hexdigest()[:16]}" for d in (b"1", b"22")
    )
    assert files == (
        f'the ranks disagree on the model\'s files: config is "{one}" on ranks 0, 1 and "{two}" '
        f"on rank 2{TAIL}"
    )
    assert folder.startswith(f"on rank 0 ({HOST}): there is no folder ")
