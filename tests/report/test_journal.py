"""The journal survives a run that died in the middle of a line, and only that."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
import torch

from seft_ds.report.journal import Journal, read_journal


def test_records_come_back_in_order_and_are_on_disk_at_once(tmp_path):
    path = tmp_path / "run" / "journal.jsonl"
    journal = Journal(path)
    journal.write("run", model="m", targets=[{"name": "w", "shape": (2, 3)}])
    journal.write("step", step=1, loss=2.5)
    # Not closed: a run that dies now has written both.
    assert read_journal(path) == [
        {"kind": "run", "model": "m", "targets": [{"name": "w", "shape": [2, 3]}]},
        {"kind": "step", "step": 1, "loss": 2.5},
    ]
    journal.close()


def test_values_are_made_plain_json(tmp_path):
    with Journal(tmp_path / "j") as journal:
        journal.write(
            "step",
            loss=torch.tensor(0.5),
            count=np.int64(3),
            bad=float("nan"),
            worse=torch.tensor(float("inf")),
            path=tmp_path,
            dtype=torch.bfloat16,
            flag=True,
        )
    line = (tmp_path / "j").read_text()
    record = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert record["loss"] == 0.5 and record["count"] == 3 and record["flag"] is True
    assert record["bad"] is None and record["worse"] is None
    assert record["path"] == str(tmp_path) and record["dtype"] == "torch.bfloat16"


@pytest.mark.parametrize("torn", ['{"kind": "step", "st', '{"kind"', "\x00\x00", '{"a": "é'])
def test_a_torn_last_line_is_ignored_and_cut_before_appending(tmp_path, torn):
    path = tmp_path / "j"
    with Journal(path) as journal:
        journal.write("step", step=1)
    with open(path, "ab") as file:
        file.write(torn.encode()[: len(torn)])  # may cut the last character in two
    assert [r["step"] for r in read_journal(path)] == [1]
    with Journal(path) as journal:
        journal.write("step", step=2)
    assert [r["step"] for r in read_journal(path)] == [1, 2]
    assert path.read_text().count("\n") == 2


def test_damage_before_the_last_line_is_an_error_with_its_number(tmp_path):
    path = tmp_path / "j"
    path.write_text('{"kind": "run"}\n{"kind": "st\n{"kind": "end"}\n')
    with pytest.raises(ValueError, match="line 2"):
        read_journal(path)
    path.write_text('{"kind": "run"}\n[1]\n')  # whole, but no record
    with pytest.raises(ValueError, match="line 2"):
        read_journal(path)


@pytest.mark.parametrize(
    "line",
    [b"[" * 100_000, b'{"kind": "step", "step": "1"}', b'{"kind": "step", "step": 1, "loss": "x"}',
     b'{"kind": "step", "step": 1, "loss": NaN}', b'{"kind": "step", "step": 1, "loss": 1e999}',
     b'{"kind": "event", "step": 1}', b'{"kind": "run", "targets": [{}]}', b'{"kind": "run", "targets": {}}',
     b'{"kind": "run", "targets": [{"name": "a", "shape": ["x"]}]}',
     b'{"kind": "run", "config": ' + b'{"a":' * 100 + b"1" + b"}" * 100 + b"}"],
)  # fmt: skip
def test_records_that_readers_could_not_use(tmp_path, line):
    path = tmp_path / "j"
    path.write_bytes(b'{"kind": "run"}\n' + line + b"\n")
    with pytest.raises(ValueError, match="line 2"):
        read_journal(path)
    path.write_bytes(b'{"kind": "run"}\n' + line)  # torn, for all that is known
    assert [r["kind"] for r in read_journal(path)] == ["run"]


def test_zeros_after_the_last_line_are_not_read_at_once(tmp_path):
    path = tmp_path / "j"
    path.write_bytes(b'{"kind": "run"}\n')
    os.truncate(path, 1 << 40)
    with pytest.raises(ValueError, match="line 2"):
        read_journal(path)
    path.write_bytes(b'{"kind": "run"}\n' + b"\x00" * (3 << 20))
    Journal(path).close()
    assert path.read_bytes() == b'{"kind": "run"}\n'


def test_a_missing_journal_is_an_error_and_an_empty_one_is_empty(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        read_journal(tmp_path / "j")
    Journal(tmp_path / "j").close()
    assert read_journal(tmp_path / "j") == []
