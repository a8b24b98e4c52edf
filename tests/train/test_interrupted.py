"""`launch/finetune.py` stopped by a signal, by a killed rank, by ranks that were started differently."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch

from seft_ds.checkpoint.manifest import checkpoints_in, find_problems
from seft_ds.checkpoint.verify import verify
from tests import forked
from tests.ranks import free_port
from tests.train.test_finetune import BIN, ROOT, make_models

FLAGS = [
    "--model_name_or_path", "pruned", "--train_file", "text.txt", "--max_steps", "18",
    "--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "2",
    "--learning_rate", "1e-2", "--packing", "true",
    "--packing_strategy", "wrapped", "--logging_steps", "2", "--save_strategy", "steps",
    "--save_steps", "5", "--save_total_limit", "2", "--seft.interval", "4", "--seft.window", "2",
    "--seft.density", "0.05", "--max_length", "16", "--deepspeed", str(ROOT / "ds_configs/zero3.json"),
]  # fmt: skip
ENV = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("interrupted")
    make_models(folder)
    return folder


def launched(home: Path, *flags: str) -> subprocess.Popen:
    """Two ranks under DeepSpeed's launcher."""
    launcher = [str(BIN / "deepspeed"), "--num_gpus", "2", "--master_port", str(free_port())]
    return popen(home, [*launcher, str(ROOT / "launch/finetune.py"), *FLAGS, *flags], ENV)


def bare(home: Path, *flags: list[str], size: int = 2, accumulate: int = 2) -> list[forked.Forked]:
    """Ranks as srun starts them, nobody above them; flags: of each rank."""
    port = str(free_port())
    ranks = []
    for rank, own in enumerate(flags):
        own = [*own, "--gradient_accumulation_steps", str(accumulate)]
        env = {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size),
            "LOCAL_WORLD_SIZE": str(size),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        ranks.append(forked.start("finetune", [*FLAGS, *own], home, env))
    return ranks


def popen(home: Path, command: list[str], env: dict[str, str]) -> subprocess.Popen:
    return subprocess.Popen(
        command, cwd=home, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def wait_for_step(run: Path, step: int, running: subprocess.Popen | forked.Forked) -> None:
    """Until the journal has a step of that number."""
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and running.poll() is None:
        if (run / "journal.jsonl").is_file():
            for line in (run / "journal.jsonl").read_text().splitlines():
                if '"kind": "step"' in line and json.loads(line)["step"] >= step:
                    return
        time.sleep(0.01)
    raise AssertionError(
        running.said() if isinstance(running, forked.Forked) else running.communicate()[0]
    )


def ranks_of(launcher: subprocess.Popen) -> list[int]:
    """Process ids of the ranks below DeepSpeed's launcher, by rank."""
    import psutil

    found = {}
    for child in psutil.Process(launcher.pid).children(recursive=True):
        for flag in child.cmdline():
            if flag.startswith("--local_rank="):
                found[int(flag.removeprefix("--local_rank="))] = child.pid
    return [found[rank] for rank in sorted(found)]


def model(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def same(a: Path, b: Path) -> bool:
    x, y = model(a), model(b)
    return x.keys() == y.keys() and all(torch.equal(x[n], y[n]) for n in x)


def steps_of(run: Path) -> list[tuple[int, float]]:
    """(step, loss) of a journal; of repeated steps the last one stands."""
    lines = [json.loads(line) for line in (run / "journal.jsonl").read_text().splitlines()]
    return sorted({r["step"]: r["loss"] for r in lines if r["kind"] == "step"}.items())


@pytest.fixture(scope="module")
def unbroken(home: Path) -> Path:
    ranks = bare(home, *[["--output_dir", "unbroken"]] * 2)
    assert [rank.wait(300) for rank in ranks] == [0, 0], [rank.said() for rank in ranks]
    return home / "unbroken"


@pytest.mark.timeout(600)
def test_a_signal_to_one_rank_stops_all_and_resume_goes_on(home: Path, unbroken: Path) -> None:
    running = launched(home, "--output_dir", "signalled", "--resume", "auto")
    wait_for_step(home / "signalled", 2, running)
    os.kill(ranks_of(running)[1], signal.SIGUSR1)
    said = running.communicate(timeout=120)[0]
    assert running.returncode == 0, said
    assert "stopped by SIGUSR1 after step" in said and "--resume auto goes on from" in said
    run = home / "signalled"
    [newest, *_] = checkpoints_in(run)
    assert find_problems(newest) == [] and not (run / "model.safetensors").exists()
    ranks = bare(home, *[["--output_dir", "signalled", "--resume", "auto"]] * 2)
    assert [rank.wait(300) for rank in ranks] == [0, 0], [rank.said() for rank in ranks]
    assert same(run, unbroken)
    assert steps_of(run) == steps_of(unbroken)
    assert len(checkpoints_in(run)) == 2  # save_total_limit


@pytest.mark.timeout(600)
def test_a_finished_run_is_left_as_it_is(home: Path, unbroken: Path) -> None:
    """A job that is started once more; and one that was killed while it wrote the model."""
    before = {
        p.name: p.stat().st_mtime_ns for p in unbroken.iterdir() if not p.name.startswith(".")
    }
    [alone] = bare(home, ["--output_dir", "unbroken", "--resume", "auto"], size=1, accumulate=4)
    assert alone.wait(200) == 0 and "is finished" in alone.said(), alone.said()
    after = {p.name: p.stat().st_mtime_ns for p in unbroken.iterdir() if not p.name.startswith(".")}
    assert before == after
    shutil.copytree(unbroken, home / "half")
    (home / "half/sparsity.json").unlink()
    [alone] = bare(home, ["--output_dir", "half", "--resume", "auto"], size=1, accumulate=4)
    assert alone.wait(200) == 0, alone.said()
    assert same(home / "half", unbroken) and verify(home / "half").ok
    # Into another folder, from its last checkpoint: the same model, and no step beyond it.
    last = ["--output_dir", "elsewhere", "--resume", "unbroken/checkpoint-18"]
    [alone] = bare(home, last, size=1, accumulate=4)
    assert alone.wait(200) == 0 and "nothing is left to train" in alone.said(), alone.said()
    assert same(home / "elsewhere", unbroken) and steps_of(home / "elsewhere") == []
    assert json.loads((home / "elsewhere/sparsity.json").read_text())["steps"] == 18


@pytest.mark.timeout(600)
def test_two_runs_in_one_folder_and_another_batch_are_refused(home: Path, unbroken: Path) -> None:
    shutil.copytree(unbroken, home / "shared")
    shutil.rmtree(home / "shared/checkpoint-18")  # so that there is something left to do
    (home / "shared/sparsity.json").unlink()
    with open(home / "shared/.lock", "a+") as holder:
        fcntl.flock(holder, fcntl.LOCK_EX)
        holder.truncate(0)
        holder.write("elsewhere 7\n")
        holder.flush()
        [second] = bare(home, ["--output_dir", "shared", "--resume", "auto"], size=1)
        assert second.wait(200) == 2, second.said()
        assert "a run is writing to" in second.said() and "pid 7 on elsewhere" in second.said()
    [other] = bare(home, ["--output_dir", "shared", "--resume", "auto"], size=1)
    assert other.wait(200) == 2 and "took 4 rows a step, this one would take 2" in other.said()
    # On one rank with twice the accumulation the same rows follow.
    [other] = bare(home, ["--output_dir", "shared", "--resume", "auto"], size=1, accumulate=4)
    assert other.wait(200) == 0, other.said()
    assert verify(home / "shared").ok
    for (step, loss), (wanted_step, wanted) in zip(
        steps_of(home / "shared"), steps_of(unbroken), strict=True
    ):
        assert step == wanted_step and abs(loss - wanted) < 0.02 * wanted


@pytest.mark.timeout(600)
def test_a_killed_rank_is_named_and_the_run_goes_on(home: Path, unbroken: Path) -> None:
    """Killed after a checkpoint that is then damaged, so that the one before it has to serve."""
    running = bare(home, *[["--output_dir", "killed", "--resume", "auto"]] * 2)
    wait_for_step(home / "killed", 11, running[0])
    os.kill(running[1].pid, signal.SIGKILL)
    killed = time.monotonic()
    running[0].wait(60)
    took = time.monotonic() - killed
    said = running[0].said()
    assert running[0].returncode == 1, said
    assert f"rank 1 (pid {running[1].pid} on" in said and "Traceback" not in said, said
    assert "--resume auto goes on from" in said
    assert took < 20, took
    run = home / "killed"
    newest, before = checkpoints_in(run)[:2]
    file = next(newest.rglob("rank-00001*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    again = bare(home, *[["--output_dir", "killed", "--resume", "auto"]] * 2)
    assert again[0].wait(300) == 0, again[0].said()
    assert again[1].wait(60) == 0
    said = again[0].said()
    assert f"{newest.name} is damaged" in said and f"resuming from killed/{before.name}" in said
    assert same(run, unbroken) and steps_of(run) == steps_of(unbroken)
    assert (run / f"abandoned-{newest.name}").is_dir()  # not counted, not resumed from


@pytest.mark.timeout(600)
def test_ranks_started_differently_are_told_before_any_step(home: Path) -> None:
    running = bare(home, ["--output_dir", "a"], ["--output_dir", "a", "--seft.window", "3"])
    assert [r.wait(120) for r in running] == [2, 2], [r.said() for r in running]
    said = [r.said() for r in running]
    assert "the ranks disagree on the settings" in said[0]
    assert "seft.window is 2 on rank 0 and 3 on rank 1" in said[0]
    assert not (home / "a").exists()


def test_a_run_that_died_before_its_first_checkpoint_starts_anew(home: Path) -> None:
    """--resume auto in a job script must not need a hand; a finished run's model is not touched."""
    from seft_ds.train.opening import goes_on

    run = home / "early"
    run.mkdir()
    (run / "resolved_config.yaml").write_text("{}")
    assert goes_on(run, None, "auto") and not goes_on(run, None, "never")
    (run / "sparsity.json").write_text("{}")
    assert not goes_on(run, None, "auto")
