"""A fault of each kind, as benchmarks/faults.py injects hundreds; and that its judge can find something."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import fault_session
from benchmarks.fault_judge import judge_end, judge_final
from benchmarks.fault_kinds import DAMAGES, MOMENTS, Fault, Kind
from benchmarks.fault_session import Ended, prepare
from benchmarks.faults import (
    Outcome,
    References,
    all_faults,
    attempt,
    few_faults,
    table,
)


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> References:
    prepare()
    return References(tmp_path_factory.mktemp("references"))


@pytest.mark.parametrize("fault", few_faults(), ids=str)
def test_nothing_is_lost(fault: Fault, references: References, tmp_path: Path) -> None:
    outcome = attempt(fault, tmp_path, references)
    if outcome.not_tried:
        pytest.skip(outcome.not_tried)
    assert not outcome.problems


def test_the_plan_has_every_kind_moment_and_stage() -> None:
    faults = all_faults()
    assert len(faults) >= 200 and len(set(faults)) == len(faults)
    assert {f.kind for f in faults} == set(Kind)
    assert {f.kind for f in few_faults()} == set(Kind) - {Kind.RUNTIME_ERROR, Kind.KILL_BUSY}
    assert {f.moment for f in faults} == set(MOMENTS) | set(DAMAGES)
    rows: dict[tuple[Kind, str], set[int]] = {}
    for f in faults:
        rows.setdefault((f.kind, f.moment), set()).add(f.stage)
    assert all(stages == {0, 1, 2, 3} for stages in rows.values())


# Can it fail?


def test_a_run_that_goes_on_from_an_old_checkpoint_has_lost(
    references: References, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from seft_ds.train import resume

    newest_first = resume.checkpoints_in
    monkeypatch.setattr(resume, "checkpoints_in", lambda folder: newest_first(folder)[::-1])
    fault = Fault(Kind.KILL, "in backward", stage=0, bf16=False, rank=1, step=8)
    problems = attempt(fault, tmp_path, references).problems
    assert problems == ["resumed from 'checkpoint-3', wanted 'checkpoint-6'"]


def test_damage_that_is_taken_is_found(
    references: References, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A flipped bit that nobody looks for: the run goes on, from the wrong place and to another state."""
    from seft_ds.checkpoint import hooks
    from seft_ds.train import resume

    for module in (hooks, resume):
        monkeypatch.setattr(module, "check_together", lambda ranks, directory: None)
    fault = Fault(Kind.DAMAGE, "a bit flipped", stage=0, bf16=False, step=8)
    text = "; ".join(attempt(fault, tmp_path, references).problems)
    # Where it meets a value that can't be, the load itself refuses.
    assert "ended with 2" in text or ("wanted 'checkpoint-6'" in text and "final state" in text)


def ended(**changes: Any) -> Ended:
    """A session whose rank 1 was killed, and whose rank 0 ended as it should."""
    said = (
        "\nstruck at 5.0\n\nerror on rank 0: rank 1 (pid 12 on here) died: its connection closed; the same "
        "command goes on from None\n"
    )
    return replace(Ended([1, -9], [said, ""], [11, 12], [5.1, 5.0]), **changes)


@pytest.mark.parametrize(
    "session, problem",
    [
        (ended(), ""),
        (ended(status=[None, -9]), "rank 0 hung"),
        (ended(status=[0, -9]), "rank 0 ended with 0, wanted 1"),
        (ended(pids=[11, 13]), "rank 0 did not say"),
        (ended(said=["", "struck at 5.0\n"]), "rank 0 did not say"),
        (ended(said=[ended().said[0].replace("struck", "stuck"), ""]), "the fault did not strike"),
        (ended(said=[ended().said[0] + "Traceback", ""]), "rank 0 showed a traceback"),
        (ended(said=[ended().said[0].replace("None", "/r/checkpoint-3"), ""]), "not whole"),
    ],
)
def test_wrong_ends_are_found(session: Ended, problem: str, tmp_path: Path) -> None:
    fault = Fault(Kind.KILL, "in backward", stage=0, bf16=False, rank=1, step=8)
    problems = judge_end(fault, session, tmp_path)
    assert problems == [] if not problem else any(problem in p for p in problems), problems


def test_another_final_state_is_found() -> None:
    wanted = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([3])}
    changed = {"a": torch.tensor([1.0, 2.0000002]), "b": torch.tensor([3])}
    assert judge_final(wanted, wanted) == []
    assert judge_final(changed, wanted) == ["the final state differs: a"]
    assert judge_final(None, wanted) == ["it did not reach the last step"]


def test_a_rank_that_hangs_is_ended_and_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fault_session, "LIMIT_S", 0.3)
    pids = []
    for seconds in (60, 0):
        pid = os.fork()
        if pid == 0:
            time.sleep(seconds)
            os._exit(3)
        pids.append(pid)
    status, _ = fault_session._wait_for(pids)
    assert status == [None, 3]


# The table.


def test_the_table_counts_and_goes_between_its_markers(tmp_path: Path) -> None:
    kill = Fault(Kind.KILL, "in backward", stage=0, bf16=False)
    full = Fault(Kind.FULL, "before a save, no room", stage=3, bf16=False)
    outcomes = [
        Outcome(kill, [], 0.25),
        Outcome(replace(kill, rank=1), ["lost"], 0.75),
        Outcome(replace(kill, stage=2), [], 2.0),
        Outcome(full, [], not_tried="no root"),
    ]
    text = table(outcomes)
    assert (
        "| SIGKILL of one rank | in backward | 1/2 |  | 1/1 |  | 3 | 2 | 1 | 0.75 s, at most 2.00 s |"
        in text
    )
    assert "| disk full | before a save, no room | not tried | not tried | not tried |" in text
    assert "| **3** | **2** | **1** |" in text
