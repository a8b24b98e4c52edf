"""What a run's later records add to the page: exchanges, overlap, update sizes, memory, circumstances."""

from __future__ import annotations

import re
import shlex

import pytest

from seft_ds.report.facts import facts_of, memory_rows, overlap, update_sizes
from seft_ds.report.heatmap import heatmap, numbers_table
from seft_ds.report.journal import Journal, read_journal
from seft_ds.report.page import page
from seft_ds.report.sections import in_lines
from tests.report.test_page import _Page

NAMES = [f"model.layers.{x}.{p}" for x in (0, 1) for p in ("self_attn.q_proj", "mlp.up_proj")]
RUN = {
    "kind": "run",
    "model": "/somewhere/else/wanda-60",
    "command": "deepspeed --num_gpus 2 launch/finetune.py --output_dir 'my run'",
    "time": "2026-11-26T10:00:00+0000",
    "machine": {"python": "3.11.2", "processor": "A <fast> one"},
    "targets": [{"name": n, "shape": [4, 5], "live": 10, "slots": 2} for n in NAMES],
    "config": {"seft": {"scope": "global"}},
    "resolved": {"run": {"weight_decay": 0.125}},
}
EXCHANGE = {
    "kind": "exchange",
    "step": 5,
    "exchanged": 4,
    "most": 6,
    "paying": 1234,
    "targets": {
        NAMES[0]: {"revived": 4, "pruned": 0, "live": 14, "changed": 4},
        NAMES[1]: {"revived": 0, "pruned": 4, "live": 6, "changed": 4},
    },
    "seconds": 2.0,
    "bytes": 4096,
}
MEMORY = {
    "kind": "memory",
    "step": 9,
    "planned": {"weights": 2048, "activations": 4096},
    "measured": {"weights": 1024},
    "peak_bytes": 8192,
    "peak_of": "process",
}
DELTAS = {
    "kind": "deltas",
    "step": 9,
    "targets": {n: {"rms": 1e-3 * (i + 1), "largest": 0.1} for i, n in enumerate(NAMES)},
}
STEPS = [{"kind": "step", "step": s, "loss": 3.0, "seconds": 1.0} for s in range(1, 10)]
RECORDS = [RUN, *STEPS, EXCHANGE, MEMORY, DELTAS]


def _shown(records):
    text = page(facts_of(records), "my run")
    return text, _Page(text).text


def test_exchanges_have_a_row_each_and_the_weights_their_new_counts() -> None:
    _, shown = _shown(RECORDS)
    assert "5 4 6 1,234 2 s 4 KiB" in shown
    assert "self_attn.q_proj 2 40 20 24 40.00 %" in shown  # tensors, weights, live first and last
    assert "1 exchange" in shown and "Live count exact yes" in shown


def test_overlap_counts_what_left_the_first_mask() -> None:
    event = {"kind": "event", "step": 7, "target": NAMES[0], "live": 14, "changed": 8}
    again = {"kind": "event", "step": 8, "target": NAMES[0], "live": 14, "changed": 2}
    facts = facts_of([RUN, EXCHANGE, event, again])
    # Of 40 live weights 4, then 6, then 3 have gone.
    assert overlap(facts) == [(0, 1.0), (5, 0.9), (7, 0.85), (8, pytest.approx(0.925))]
    old = {k: v for k, v in event.items() if k != "changed"}
    assert overlap(facts_of([RUN, old])) == []  # a journal from before it was recorded
    assert "90.00 % of the weights that were live at the start" in _shown(RECORDS)[1]


def test_update_sizes_are_drawn_and_can_be_read() -> None:
    layers, projections, sizes = update_sizes(facts_of(RECORDS))
    assert (layers, projections) == ([0, 1], ["self_attn.q_proj", "mlp.up_proj"])
    assert sizes == [[1e-3, 3e-3], [2e-3, 4e-3]]
    text, shown = _shown(RECORDS)
    assert "<title>layer 1, mlp.up_proj: 4.00e-03</title>" in text
    assert "1 3.00e-03 4.00e-03" in shown  # the row of layer 1 in the table


def test_memory_stands_beside_its_plan() -> None:
    assert memory_rows(facts_of(RECORDS)) == [
        ("weights", 2048.0, 1024.0),
        ("activations", 4096.0, None),
    ]
    _, shown = _shown(RECORDS)
    assert "weights 2 KiB 1 KiB" in shown and "activations 4 KiB –" in shown
    assert "Peak of the process: 8 KiB" in shown


def test_a_second_start_forgets_what_the_first_measured() -> None:
    facts = facts_of([*RECORDS, RUN])
    assert facts.memory == {} and facts.deltas == {}


def test_circumstances_name_command_machine_and_every_setting() -> None:
    text, shown = _shown(RECORDS)
    assert "launch/finetune.py \\ --output_dir 'my run'" in shown and "2026-11-26T10:00:00" in shown
    assert '"weight_decay": 0.125' in shown and "A &lt;fast&gt; one" in text
    headline = text[: text.index("<section")]
    assert "wanda-60" in headline and "/somewhere" not in headline


def test_a_command_has_a_line_for_each_flag_and_means_the_same() -> None:
    command = "deepspeed --num_gpus 2 launch/finetune.py --a 'x --y' --b=1 --c 2 3"
    lines = in_lines(command)
    assert lines.splitlines() == [
        "deepspeed --num_gpus 2 launch/finetune.py \\", "  --a 'x --y' \\", "  --b=1 \\", "  --c 2 3",
    ]  # fmt: skip
    assert shlex.split(lines.replace("\\\n", " ")) == shlex.split(command)
    assert in_lines("an open ' quote") == "an open ' quote" and in_lines("") == ""


@pytest.mark.parametrize("broken", [None, 5, [1], {"x": None}, {"x": [1]}, {"x": "y"}])
def test_records_of_another_form_still_make_a_page(broken) -> None:
    records = [
        RUN,
        {"kind": "memory", "planned": broken, "measured": broken, "peak_bytes": None},
        {"kind": "deltas", "targets": broken},
        {**EXCHANGE, "targets": broken},
    ]
    assert "How it was run" in _shown(records)[1]


def test_the_new_numbers_are_checked_when_the_journal_is_read(tmp_path) -> None:
    path = tmp_path / "journal.jsonl"
    with Journal(path) as journal:
        for record in RECORDS:
            journal.write(**record)
    assert facts_of(read_journal(path)).exchanges[0]["exchanged"] == 4
    path.write_text('{"kind": "event", "step": 1, "target": "a", "changed": "many"}\n')
    with pytest.raises(ValueError, match="line 1"):
        read_journal(path)


def test_a_heatmap_is_as_opaque_as_its_values() -> None:
    svg = heatmap([0, 1], ["a.q<", "b.up"], [[0.0, 1.0], [2.0, 4.0]], "what", str)
    found = [float(x) for x in re.findall(r'fill-opacity="([0-9.]+)"><title>', svg)]
    assert found == [0.05, 0.287, 0.525, 1.0]
    assert svg.count("<title>") == 4 and "layer 1, b.up: 4.0" in svg and "a.q&lt;" in svg
    assert 'role="img"' in svg and "aria-label" in svg
    empty = heatmap([], [], [], "what", str)
    zeros = heatmap([0], ["q"], [[0.0]], "what", str)
    assert empty.startswith("<svg") and 'fill-opacity="0.050"><title>' in zeros
    head, rows = numbers_table([0, 1], ["a.q", "b.up"], [[0.0, 1.0], [2.0, 4.0]], str)
    assert head == ["layer", "q", "up"] and rows == [["0", "0.0", "2.0"], ["1", "1.0", "4.0"]]
