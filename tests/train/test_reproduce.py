"""The command in the journal starts the run again, whatever started it; memory is looked at when it grows."""

from __future__ import annotations

import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest

from seft_ds.memory import Plan
from seft_ds.train import measuring
from seft_ds.train.reproduce import command_line, machine, processor

ARGV = ["launch/finetune.py", "--local_rank=0", "--output_dir", "my run", "--seft.interval", "6"]
REST = "launch/finetune.py --output_dir 'my run' --seft.interval 6"


@pytest.mark.parametrize(
    "environment, launcher",
    [
        ({}, "python"),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_SIZE": "2"}, "deepspeed --num_gpus 2"),
        (
            {"RANK": "0", "WORLD_SIZE": "16", "LOCAL_SIZE": "8"},
            "deepspeed --num_nodes 2 --num_gpus 8",
        ),
        (
            {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4", "TORCHELASTIC_RUN_ID": "x"},
            "torchrun --nnodes=2 --nproc_per_node=4",
        ),
        ({"RANK": "1", "WORLD_SIZE": "4", "SLURM_STEP_ID": "0"}, "srun --ntasks=4 python"),
        ({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}, "python"),
        ({"RANK": "1", "WORLD_SIZE": "4", "OMPI_COMM_WORLD_SIZE": "4"}, "mpirun -n 4 python"),
        (
            {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_SIZE": "2", "SLURM_STEP_ID": "0"},
            "deepspeed --num_gpus 2",
        ),
        ({"RANK": "0", "WORLD_SIZE": "many"}, "python"),
    ],
)
def test_the_command_has_its_launcher(environment: dict[str, str], launcher: str) -> None:
    line = command_line(ARGV, environment)
    assert line == f"{launcher} {REST}"
    assert shlex.split(line)[-5:] == [a for a in ARGV if "local_rank" not in a]


def test_the_machine_is_described(tmp_path: Path) -> None:
    assert set(machine()) == {"python", "system", "processor", "threads a rank"}
    info = tmp_path / "cpuinfo"
    info.write_text("processor: 0\nmodel name\t: A CPU\nprocessor: 1\nmodel name\t: A CPU\n")
    assert processor(info) == "A CPU, 2 logical cores"
    assert processor(tmp_path / "none")


def test_memory_is_looked_at_when_more_windows_are_open(monkeypatch: pytest.MonkeyPatch) -> None:
    held = iter([{"weights": 5, "windows": 0}, {"weights": 5, "windows": 9}])
    monkeypatch.setattr(measuring, "held", lambda engine: next(held))

    def engine(n_open: int) -> SimpleNamespace:
        states = [SimpleNamespace(window=object() if i < n_open else None) for i in range(3)]
        return SimpleNamespace(seft=SimpleNamespace(states=states))

    meter = measuring.MemoryMeter(Plan(device={"weights": 6}, host={"weights": 1, "masks": 2}))
    for n_open in (0, 0, 2, 1, 2):  # a third look would run out of `held`
        meter.look(engine(n_open))
    record = meter.record()
    assert record["measured"] == {"weights": 5, "windows": 9}
    assert record["planned"] == {"weights": 7, "masks": 2}
    assert record["peak_bytes"] > 1 << 20
