"""What a run shows: lines where nobody watches, sparsity and churn from the records of events."""

from __future__ import annotations

import io
from types import SimpleNamespace

import pytest

from seft_ds.bars import BarsAsLines, duration, with_progress
from seft_ds.train.journaling import JournaledRun
from seft_ds.train.progress import Progress, Topology


@pytest.mark.parametrize("seconds, text", [(0, "0:00"), (245.4, "4:05"), (3729, "1:02:09")])
def test_durations_as_a_clock_shows_them(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_topology_follows_events_and_exchanges() -> None:
    topology = Topology({"model.a": 100, "b": 300}, {"model.a": 40, "b": 120})
    first = topology.scalars(each_weight=True)
    assert first["sparsity/all"] == pytest.approx(0.6) and first["churn/all"] == 0
    assert set(first) == {f"{k}/{n}" for k in ("sparsity", "churn") for n in ("all", "a", "b")}
    topology.note({"kind": "step", "loss": 1.0})
    topology.note({"kind": "event", "target": "model.a", "live": 40, "revived": 4})
    targets = {"model.a": {"live": 50, "revived": 12}, "b": {"live": 110, "revived": 0}}
    topology.note({"kind": "exchange", "targets": targets})
    then = topology.scalars(each_weight=True)
    assert then["churn/all"] == pytest.approx(16 / 160)
    assert then["churn/a"] == pytest.approx(16 / 50) and then["sparsity/a"] == pytest.approx(0.5)
    both = {"sparsity/all", "churn/all"}
    assert set(topology.scalars(each_weight=True)) == both, "nothing has changed since"
    topology.note({"kind": "event", "target": "model.a", "live": 50, "revived": 4})
    assert set(topology.scalars()) == both, "weights one by one only on request"


def test_lines_in_place_of_a_bar(capsys: pytest.CaptureFixture[str]) -> None:
    run = JournaledRun(None, None)
    run.tokens_per_second, run.topology = 4210.4, Topology({"a": 100}, {"a": 40})
    run.scalars = run.topology.scalars()
    args, state = (
        SimpleNamespace(disable_tqdm=False),
        SimpleNamespace(global_step=0, max_steps=10, is_world_process_zero=True),
    )
    progress = Progress(run)
    progress.on_train_begin(args, state, None)
    state.global_step = 5
    progress.on_step_end(args, state, None)
    progress.on_log(args, state, None, {"loss": 2.31442, "learning_rate": 1.0})
    progress.on_log(args, state, None, {"eval_loss": 2.5, "eval_runtime": 3.0, "eval_arc_acc": 0.5})
    progress.on_log(args, state, None, {"train_runtime": 3.0})
    state.is_world_process_zero = False
    progress.on_log(args, state, None, {"loss": 1.0})
    progress.on_train_end(args, state, None)
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("step 5/10: loss 2.314, 4,210 tokens/s, live 40.00%, churn 0.00%, ")
    assert first.endswith("0:00 left") and "GiB" in first
    assert second == "evaluation after step 5: loss 2.5, arc_acc 0.5"


def test_progress_in_a_file_has_no_carriage_return(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter([0, 0, 20, 40, 60, 80])  # an item takes 20 s
    monkeypatch.setattr("seft_ds.bars.time", SimpleNamespace(monotonic=lambda: next(clock)))
    assert list(with_progress(range(5), "pruning", "block", shown=True)) == [0, 1, 2, 3, 4]
    assert list(with_progress(range(3), "pruning", "block", shown=False)) == [0, 1, 2]
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["pruning: block 2 of 5, 1:00 left", "pruning: block 4 of 5, 0:20 left"]


def test_bars_of_libraries_become_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("seft_ds.bars.time", SimpleNamespace(monotonic=lambda: now[0]))
    for seconds, wanted in ((30.0, "requests:  45%  45/100 [00:31<00:38]\n"), (None, "")):
        stream, now[0] = io.StringIO(), 0.0
        bars = BarsAsLines(stream, seconds)
        bars.write("\rrequests:   0%|          | 0/100 [00:00<?]")
        now[0] = 31.0
        bars.write("\rrequests:  45%|████▌     | 45/100 [00:31<00:38]")
        bars.write("\rrequests:  46%|████▌     | 46/100 [00:31<00:38]")
        bars.write("\n")
        bars.write("warning: something else\n")
        assert stream.getvalue() == wanted + "warning: something else\n"
