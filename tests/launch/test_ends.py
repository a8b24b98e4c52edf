"""What is said and what is left when a signal ends a script, or its start fails: the table of
docs/reliability.md."""

from __future__ import annotations

import functools
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from seft_ds.errors import RunError
from tests import forked
from tests.ranks import free_port
from tests.train.test_finetune import ROOT, make_models
from tests.train.test_interrupted import wait_for_step

CPU = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
TRAIN = [
    "--model_name_or_path", "pruned", "--train_file", "text.txt", "--max_steps", "400",
    "--per_device_train_batch_size", "1", "--packing", "true", "--packing_strategy", "wrapped",
    "--logging_steps", "1", "--seft.interval", "4", "--seft.window", "2", "--seft.density", "0.05",
    "--max_length", "16", "--deepspeed", str(ROOT / "ds_configs/zero3.json"),
]  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ends")
    make_models(folder)
    return folder


def start(
    script: str, argv: list[str], home: Path, before: Callable[[], None], **env: str
) -> forked.Forked:
    def ready() -> None:
        # A shell may have started the tests with SIGINT ignored.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        before()

    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    return forked.start(
        script, argv, home, alone | CPU | {"MASTER_PORT": str(free_port())} | env, ready
    )


def first(module: Any, name: str, does: Callable[[], None], after: bool = False) -> None:
    """Have `module.name` do something before, or after, what it does. In a fork."""
    real = getattr(module, name)

    @functools.wraps(real)
    def replaced(*args: Any, **kwargs: Any) -> Any:
        if not after:
            does()
        result = real(*args, **kwargs)
        if after:
            does()
        return result

    setattr(module, name, replaced)


def signalled(number: int) -> None:
    os.kill(os.getpid(), number)


def failing(text: str) -> None:
    raise RunError(text)


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_while_the_model_loads(home: Path, number: int, status: int) -> None:
    from seft_ds.train import run

    before = functools.partial(first, run, "load_model", functools.partial(signalled, number))
    done = start("finetune", [*TRAIN, "--output_dir", "early"], home, before).finish(120)
    assert done.returncode == status, done.stderr
    wanted = f"{signal.Signals(number).name}: stopped before training began; nothing was changed"
    assert [line for line in done.stderr.splitlines() if "no GPU" not in line] == [wanted]
    assert not (home / "early").exists()


def test_ctrl_c_on_two_ranks_is_an_orderly_stop(home: Path) -> None:
    """The terminal signals every rank, and each of them only once."""
    port = str(free_port())
    ranks = [
        start(
            "finetune", [*TRAIN, "--output_dir", "run"], home, lambda: None, RANK=str(rank),
            LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", MASTER_PORT=port,
        )
        for rank in range(2)
    ]  # fmt: skip
    wait_for_step(home / "run", 2, ranks[0])
    for rank in ranks:
        os.kill(rank.pid, signal.SIGINT)
    assert [rank.wait(120) for rank in ranks] == [0, 0], [rank.said() for rank in ranks]
    done = [rank.finish(1) for rank in ranks]
    assert done[0].stderr.count("SIGINT: stopping after this step; once more exits at once") == 1
    assert "SIGINT" not in done[1].stderr + done[1].stdout
    assert "Traceback" not in done[0].stderr + done[1].stderr
    last = done[0].stdout.splitlines()[-1]
    assert last.startswith("stopped by SIGINT after step") and "--resume auto goes on" in last
    [checkpoint] = (home / "run").glob("checkpoint-*")
    assert last.endswith(f"run/{checkpoint.name}")
    assert not (home / "run/sparsity.json").exists()


def test_a_start_that_fails_leaves_nothing_in_the_way(home: Path) -> None:
    from seft_ds.train import run
    from seft_ds.train.trainer import SparseSFTTrainer

    argv = [*TRAIN, "--output_dir", "failed"]
    stops = functools.partial(failing, "the first step fails")
    broken = functools.partial(first, SparseSFTTrainer, "training_step", stops)
    done = start("finetune", argv, home, broken).finish(120)
    assert done.returncode == 1 and "the first step fails" in done.stderr, done.stderr
    assert (home / "failed/resolved_config.yaml").is_file()
    # The corrected command is accepted: it gets as far as the model.
    accepted = functools.partial(first, run, "load_model", functools.partial(failing, "accepted"))
    done = start("finetune", argv, home, accepted).finish(120)
    assert done.stderr.endswith("error: accepted\n"), done.stderr
    done = start("finetune", [*TRAIN, "--output_dir", "run"], home, accepted).finish(120)
    assert done.returncode == 2 and "is not empty" in done.stderr  # that one has a checkpoint


def test_what_counts_as_a_failed_start(tmp_path: Path) -> None:
    from seft_ds.report.journal import Journal
    from seft_ds.train.opening import only_a_failed_start

    def holds(*names: str) -> bool:
        for path in tmp_path.iterdir():
            path.unlink() if path.is_file() else path.rmdir()
        for name in names:
            (tmp_path / name).mkdir() if "." not in name else (tmp_path / name).touch()
        return only_a_failed_start(tmp_path)

    assert holds() and holds(".lock") and holds(".lock", "resolved_config.yaml")
    assert holds("resolved_config.yaml", "journal.jsonl", "runs")
    assert not holds("runs") and not holds("resolved_config.yaml", "checkpoint-5")
    assert not holds("notes.txt") and not holds("resolved_config.yaml", "model.safetensors")
    assert not holds("resolved_config.yaml", ".checkpoint-5.writing")
    assert holds("resolved_config.yaml", "journal.jsonl")
    with Journal(tmp_path / "journal.jsonl") as journal:
        journal.write("run", ranks=1)
        assert only_a_failed_start(tmp_path)
        journal.write("step", step=1, loss=2.0)
    assert not only_a_failed_start(tmp_path)


def test_pruning_goes_on_after_its_last_block(home: Path) -> None:
    from seft_ds.prune.work import Work

    argv = ["--model_name_or_path", "dense", "--output_dir", "sparse", "--method", "magnitude"]
    argv += ["--sparsity", "0.5"]
    stops = functools.partial(signalled, signal.SIGTERM)
    before = functools.partial(first, Work, "keep", stops, after=True)
    done = start("prune", argv, home, before).finish(120)
    assert done.returncode == 143, done.stderr
    said = "SIGTERM: stopped after 1 of 2 blocks; the same command goes on from there"
    assert done.stderr.splitlines()[-1] == said and "Traceback" not in done.stderr
    assert [path.name for path in (home / "sparse").iterdir()] == [".pruning"]
    done = start("prune", argv, home, lambda: None).finish(120)
    assert done.returncode == 0, done.stderr
    assert "going on with an earlier run: 1 of 2 blocks are done" in done.stdout
    assert (home / "sparse/sparsity.json").is_file() and not (home / "sparse/.pruning").exists()


def test_an_interrupted_evaluation_is_one_line(home: Path) -> None:
    from seft_ds.evaluate import perplexity

    argv = ["--model_name_or_path", "pruned", "--text_file", "text.txt", "--max_length", "16"]
    stops = functools.partial(signalled, signal.SIGINT)
    before = functools.partial(first, perplexity, "measure", stops)
    done = start("evaluate", [*argv, "--output_path", "e.json"], home, before).finish(120)
    assert done.returncode == 130 and not (home / "e.json").exists()
    assert done.stderr.splitlines()[-1] == "SIGINT: stopped; nothing was written"
    assert "Traceback" not in done.stderr
