"""A loss or gradient that isn't finite: the step is skipped everywhere and counted; too many stop the run."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from seft_ds.distributed.window import Window
from seft_ds.sparse.curvature import Curvature
from seft_ds.zero.guard import StepGuard, describe_batches
from tests.checkpoint.saved import differences, whole_state
from tests.ranks import run_processes, run_threads
from tests.tiny import tiny_model
from tests.zero.test_engine import config, tokens

STEPS = 12
FULL = bool(os.environ.get("SEFT_FULL"))


def start(stage: int, bf16: bool, clipping: float, **seft: Any) -> Any:
    import seft_ds

    torch.manual_seed(0)
    model = tiny_model("llama", torch.bfloat16 if bf16 else torch.float32)
    settings = config(stage, bf16, total_steps=STEPS, **seft)
    settings["gradient_accumulation_steps"] = 2
    if clipping:
        settings["gradient_clipping"] = clipping
    return seft_ds.initialize(model=model, config=settings)[0]


def one_step(engine: Any, step: int, bad: str = "") -> None:
    """bad: "loss" makes the loss NaN on rank 1's second micro-batch; "gradient" only its gradient."""
    for micro in range(2):
        ids = tokens(step, row=2 * engine.seft.ranks.rank + micro)
        loss = engine(input_ids=ids, labels=ids).loss
        if micro == 1 and engine.seft.ranks.rank == engine.seft.ranks.size - 1:
            if bad == "loss":
                loss = loss * float("nan")
            elif bad == "gradient":
                loss = loss + (loss - loss.detach()).clamp(min=0).sqrt()  # 0, of infinite slope
        engine.backward(loss)
        engine.step()


def as_if_skipped(engine: Any) -> None:
    """The slow, obvious skip: nothing is computed, only the steps are counted."""
    engine.global_steps += 1
    engine.global_samples += engine.train_batch_size()
    engine.skipped_steps += 1
    engine.seft.after_step(False, None, engine.seft.lr)


def skipped(stage: int, bf16: bool, clipping: float, bad: str) -> tuple[list[str], list[dict]]:
    """What differs from a run in which the bad steps never ran; and the journal's word on them."""
    engine = start(stage, bf16, clipping)
    records: list[dict] = []
    engine.seft.listeners.append(lambda r: records.append(r) if r["kind"] == "skipped" else None)
    reference = start(stage, bf16, clipping)
    for step in range(STEPS):
        # Step 5 closes windows whose events are due, 8 and 9 lie in windows.
        if step + 1 in (5, 8, 9):
            before = whole_state(engine)
            one_step(engine, step, bad)
            after = whole_state(engine)
            assert not engine.was_step_applied()
            if step + 1 == 8:  # no event then: nothing at all changes but the count
                changed = [
                    n
                    for n in differences(before, after)
                    if n.endswith((".delta", ".mean", ".square"))
                ]
                assert not changed, changed
            as_if_skipped(reference)
        else:
            one_step(engine, step)
            one_step(reference, step)
    engine.seft.check()
    assert engine.seft.skipped_steps == engine.skipped_steps == 3
    return differences(whole_state(engine), whole_state(reference)), records


def skipped_all() -> list:
    ways = [(False, 0.0, "loss"), (True, 0.0, "gradient"), (True, 0.5, "loss")]
    cases = [
        (stage, *way)
        for stage in (0, 1, 2, 3)
        for n, way in enumerate(ways)
        if FULL or n == stage % 3
    ]
    return [(case, *skipped(*case)) for case in cases]


@pytest.mark.timeout(600)
def test_a_bad_step_changes_nothing_but_the_count() -> None:
    for case, found, records in run_processes(2, skipped_all)[0]:
        assert not found, (case, found)
        assert [r["step"] for r in records] == [5, 8, 9]
        assert [r["in_a_row"] for r in records] == [1, 1, 2]
        for record in records:
            if case[3] == "loss":
                [batch] = record["batches"]
                assert (batch["rank"], batch["micro_batch"]) == (1, 1)
                wanted = tokens(record["step"] - 1, row=3).reshape(-1)[:24].tolist()
                assert batch["first"] == wanted and batch["shape"] == [2, 16]
            else:
                assert record["batches"] == []


def too_many(folder: str) -> list[str]:
    """What is said when three steps in a row are bad and two are allowed, and a checkpoint is there."""
    from seft_ds.errors import RunError

    said = []
    for saved in (True, False):
        engine = start(3, False, 0.0, max_skipped_steps=2)
        for step in range(4):
            one_step(engine, step)
        if saved:
            engine.save_checkpoint(folder, "good")
        before = whole_state(engine)
        try:
            for step in range(4, 9):
                one_step(engine, step, "loss")
        except RunError as error:
            said.append(str(error))
        assert engine.seft.step == 7
        after = whole_state(engine)
        assert [
            n for n in differences(before, after) if n.endswith((".delta", ".mean", ".square"))
        ] == []
        engine.seft.check()
    return said


def test_too_many_in_a_row_stop_the_run_and_say_where(tmp_path: Any) -> None:
    on_all = run_processes(2, too_many, str(tmp_path))
    assert on_all[0] == on_all[1]
    first, second = on_all[0]
    for text in ("at step 7, 3 steps in a row (max_skipped_steps is 2)", "micro-batch 1 of rank 1"):
        assert text in first and text in second
    assert "those after step 4" in first and f"{tmp_path}/good" in first
    assert "no checkpoint has been written" in second


def first_window_lost() -> list[int]:
    """Slots that the first event of each weight dropped, its whole window having been skipped."""
    engine = start(2, False, 0.0, start="gradient", waves=False, interval=4, window=2, stop=1.0)
    dropped: list[int] = []
    engine.seft.listeners.append(
        lambda r: dropped.append(r["dropped"] / r["slots"]) if r["kind"] == "event" else None
    )
    for step in range(8):
        one_step(engine, step, "loss" if step < 2 else "")
    engine.seft.check()
    return dropped


def test_a_first_event_whose_window_was_lost_is_made_up_for() -> None:
    """`start: gradient` replaces every slot in its first event, though the window before it was bad."""
    dropped = run_processes(2, first_window_lost)[0]
    assert len(dropped) == 28 and dropped[:14] == [1.0] * 14 and max(dropped[14:]) < 0.5


@pytest.mark.parametrize("size", [1, 3])
def test_a_window_that_is_not_finite_is_seen_on_every_rank_and_named(size: int) -> None:
    """Where no slot's gradient shows it: one rank's overflow in the part of the weight that another owns."""

    def work(ranks: Any) -> list[Any]:
        window = Window(12, 1, ranks, torch.device("cpu"))
        curvature = Curvature(3, 4, torch.device("cpu"))
        sinks: dict[str, Any] = {"q_proj": window, "k_proj": curvature}
        states: Any = [
            SimpleNamespace(
                live_bits=torch.zeros(1, dtype=torch.uint8),
                target=SimpleNamespace(name=name),
                step_sums=sink.unfinished,
            )
            for name, sink in sinks.items()
        ]
        guard = StepGuard(states, ranks)
        said = [(*guard.agree(False), guard.bad_weights())]  # nothing was measured
        for sink, value in [(window, 1.0), (window, torch.inf), (curvature, torch.nan)]:
            dy, x = torch.ones(2, 3), torch.ones(2, 4)
            if ranks.rank == size - 1:
                dy[0, 0] = value
            sink.add(dy, x)
            said.append((*guard.agree(False), guard.bad_weights()))
            guard.reset()
            sink.discard_step()
        return said

    for said in run_threads(size, work):
        assert said == [
            (False, False, []), (False, False, []), (True, False, ["q_proj"]), (True, False, ["k_proj"]),
        ]  # fmt: skip
    assert describe_batches([], list("abcde")).endswith("overflowed at a, b, c and 2 others")
