"""One session of benchmarks/faults.py: two ranks that train a tiny model, from the newest whole checkpoint of
the run's folder to the last step, as launch/finetune.py does it.

The ranks are forked, so that imports are paid for once, but are processes with a status of their own, and
their environment is that of two machines with one rank each, so that each tells why it ends.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import signal
import sys
import time
import traceback
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch

from benchmarks.fault_kinds import ALLOWED_NAN, Fault, Injector, Kind

RANKS = 2
STEPS = 14
SAVE_STEPS, KEPT = 3, 3
MICRO_BATCHES = 2
LIMIT_S = 60.0  # a session that takes longer has hung


@dataclass(frozen=True)
class Job:
    """What one session does."""

    home: Path  # for its logs and its final state
    run_dir: Path  # for the checkpoints
    stage: int
    bf16: bool
    faults: tuple[Fault, ...] = ()
    left_out: int = 0  # a step that is only counted; 0: none
    resume: str = "auto"  # or a checkpoint: as in a loop of one's own, which writes over later ones


@dataclass
class Ended:
    """How a session ended."""

    status: list[int | None]  # a rank's exit status, or minus the signal; None: it had to be killed
    said: list[str]  # what each rank wrote
    pids: list[int]
    ended_s: list[float]  # on time.monotonic
    final: dict[str, torch.Tensor] | None = None  # the whole state after the last step

    @property
    def struck_s(self) -> float | None:
        """When the (last) fault struck."""
        times = re.findall(r"^struck at ([\d.]+)$", "\n".join(self.said), re.MULTILINE)
        return max(map(float, times)) if times else None

    @property
    def saved(self) -> list[str]:
        """The checkpoints that were finished, by name."""
        return re.findall(r"^saved (checkpoint-\d+)$", self.said[0], re.MULTILINE)

    @property
    def goes_on_from(self) -> str | None:
        """The name of the checkpoint that it started from; "" if there was none; None: it didn't start."""
        found = re.search(r"^goes on from (.*)$", self.said[0], re.MULTILINE)
        return found[1] if found else None


# The processes.


def run_session(job: Job) -> Ended:
    """Start the ranks and wait for all of them to end."""
    from tests.ranks import free_port

    job.home.mkdir(parents=True)
    port = free_port()
    sys.stdout.flush()
    sys.stderr.flush()
    pids = []
    for rank in range(RANKS):
        pid = os.fork()
        if pid == 0:
            _be_rank(job, rank, port)
        pids.append(pid)
    status, ended = _wait_for(pids)
    said = [(job.home / f"rank-{r}.log").read_text(errors="replace") for r in range(RANKS)]
    path = job.home / "final.pt"
    final = torch.load(path) if path.is_file() else None
    return Ended(status, said, pids, ended, final)


def _wait_for(pids: list[int]) -> tuple[list[int | None], list[float]]:
    deadline = time.monotonic() + LIMIT_S
    status: dict[int, int | None] = {}
    ended: dict[int, float] = {}
    while len(ended) < len(pids):
        for pid in [p for p in pids if p not in ended]:
            late = time.monotonic() > deadline
            if late:
                os.kill(pid, signal.SIGKILL)
            done, code = os.waitpid(pid, 0 if late else os.WNOHANG)
            if done:
                ended[pid] = time.monotonic()
                status[pid] = None if late else os.waitstatus_to_exitcode(code)
        time.sleep(0.002)
    return [status[p] for p in pids], [ended[p] for p in pids]


def _be_rank(job: Job, rank: int, port: int) -> NoReturn:
    """The life of a forked rank, as that of a launch script."""
    status = 1
    try:
        log = os.open(job.home / f"rank-{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for stream in (1, 2):
            os.dup2(log, stream)
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", closefd=False, buffering=1)  # noqa: SIM115
        (job.home / f"pid-{rank}").write_text(str(os.getpid()))
        torch.set_num_threads(1)
        warnings.simplefilter("ignore")
        os.environ.update(
            RANK=str(rank), WORLD_SIZE=str(RANKS), LOCAL_RANK="0", LOCAL_WORLD_SIZE="1",
            MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
        )  # fmt: skip
        from seft_ds import console, launching

        launching._settled = None  # the parent's place is not this rank's
        status = console.run(lambda: repair(job, rank))
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)  # the exit handlers are the parent's


# What a rank does.


def repair(job: Job, rank: int) -> None:
    """A run from its newest whole checkpoint to its end, or to where it is stopped."""
    from seft_ds.distributed.agreement import all_or_none
    from seft_ds.distributed.collectives import close_ranks, init_ranks
    from seft_ds.distributed.liveness import watch_peers
    from seft_ds.signals import watch_signals
    from seft_ds.train.resume import find_checkpoint
    from seft_ds.train.run_dir import RunLock
    from tests.checkpoint.saved import whole_state

    injectors = [Injector(fault, job.home, job.run_dir, rank) for fault in job.faults]
    ranks = init_ranks()
    watch = watch_peers(ranks)
    lock = RunLock()
    all_or_none(ranks, lambda: take_own(job.run_dir, lock, rank))
    checkpoint = find_checkpoint(job.resume, job.run_dir, ranks)
    engine = start(job, rank)
    seft = engine.seft
    seft.stop_request = watch_signals()
    seft.listeners.append(lambda record: tell_skipped(record, rank))
    watch.hint = lambda: f"the same command goes on from {seft.last_checkpoint}"
    if checkpoint is not None:
        engine.load_checkpoint(str(checkpoint.parent), checkpoint.name)
    all_or_none(ranks, lambda: make_ready(job, checkpoint, seft.step, rank))
    while seft.step < STEPS:
        step = seft.step + 1
        for injector in injectors:
            injector.begin_step(step)
        take_step(engine, step, counted_only=step == job.left_out)
        stopping = seft.stopping and step < STEPS
        if stopping or step % SAVE_STEPS == 0:
            save(engine, job.run_dir, step)
        if stopping:
            tell_stop(seft, step)
            break
    else:
        seft.check()
        final = whole_state(engine)
        if rank == 0:
            torch.save(final, job.home / "final.pt")
    seft.stop_request.close()
    close_ranks()


def take_own(run_dir: Path, lock: Any, rank: int) -> None:
    from seft_ds.checkpoint.manifest import remove_leftovers

    if rank == 0:
        lock.take(run_dir)
        remove_leftovers(run_dir)


def make_ready(job: Job, checkpoint: Path | None, step: int, rank: int) -> None:
    """Later checkpoints step aside; not in a run that was sent back, to see what it does to them."""
    from seft_ds.checkpoint.manifest import checkpoints_in
    from seft_ds.train.run_dir import set_aside

    if rank == 0:
        if job.resume == "auto":
            set_aside(checkpoints_in(job.run_dir), step)
        print(f"goes on from {checkpoint.name if checkpoint else ''}", flush=True)


def start(job: Job, rank: int) -> Any:
    """A new engine on the pruned model. Here a rank that disagrees gets its own setting or weight."""
    import seft_ds
    from tests.tiny import tiny_model
    from tests.zero.test_engine import config

    model = tiny_model("llama", torch.bfloat16 if job.bf16 else torch.float32)
    base = "reference" if job.bf16 else "copy"  # both kinds of checkpoints are tried
    settings = config(
        job.stage, job.bf16, total_steps=STEPS, checkpoint_base=base, max_skipped_steps=ALLOWED_NAN
    )
    settings["gradient_accumulation_steps"] = MICRO_BATCHES
    settings["scheduler"] = {
        "type": "WarmupDecayLR",
        "params": {"total_num_steps": STEPS, "warmup_num_steps": 3, "warmup_max_lr": 5e-3},
    }
    for fault in job.faults:
        if fault.kind == Kind.SETTINGS and fault.rank == rank:
            settings["seft"]["interval"] += 1
        if fault.kind == Kind.WEIGHTS and fault.rank == rank:
            model.model.norm.weight.data[5] += 0.01
    torch.manual_seed(0)
    return seft_ds.initialize(model=model, config=settings)[0]


def take_step(engine: Any, step: int, counted_only: bool) -> None:
    if counted_only:
        from tests.zero.test_skip import as_if_skipped

        as_if_skipped(engine)
        return
    for micro in range(MICRO_BATCHES):
        ids = next_batch(step, engine.seft.ranks.rank * MICRO_BATCHES + micro)
        engine.backward(loss_of(engine, ids))
        engine.step()


def next_batch(step: int, row: int) -> torch.Tensor:
    from tests.zero.test_engine import tokens

    return tokens(step, row=row)


def loss_of(engine: Any, ids: torch.Tensor) -> torch.Tensor:
    return engine(input_ids=ids, labels=ids).loss


def save(engine: Any, run_dir: Path, step: int) -> None:
    """RUN/checkpoint-N; of the older ones the last few stay."""
    from seft_ds.checkpoint.manifest import checkpoints_in

    engine.save_checkpoint(str(run_dir), f"checkpoint-{step}")
    if engine.seft.ranks.rank == 0:
        print(f"saved checkpoint-{step}", flush=True)
        for old in checkpoints_in(run_dir)[KEPT:]:
            shutil.rmtree(old)


def tell_skipped(record: dict, rank: int) -> None:
    if rank == 0 and record["kind"] == "skipped":
        print(f"skipped step {record['step']}", flush=True)


def tell_stop(seft: Any, step: int) -> None:
    names = [n for n in seft.ranks.gather_object(seft.stop_request.name) if n]
    if seft.ranks.rank == 0:
        print(
            f"stopped by {names[0]} after step {step} of {STEPS}: the same command goes on from "
            f"{seft.last_checkpoint}",
            flush=True,
        )


def prepare() -> None:
    """Import what a rank needs, most of all what DeepSpeed would import late, before the ranks are forked."""
    import importlib

    for name in (
        "deepspeed", "torch.utils.cpp_extension", "deepspeed.module_inject.auto_ep_layer",
        "deepspeed.ops.op_builder.all_ops", "deepspeed.runtime.bf16_optimizer",
        "deepspeed.runtime.zero.stage3", "deepspeed.runtime.zero.stage_1_and_2",
        "deepspeed.runtime.superoffload.superoffload_stage3",
        "deepspeed.runtime.zero.muon.muon_optimizer", "seft_ds.api",
        "seft_ds.checkpoint.hooks", "seft_ds.train.resume", "seft_ds.train.run_dir",
        "tests.checkpoint.saved", "tests.zero.test_skip",
    ):  # fmt: skip
        importlib.import_module(name)
    from deepspeed.comm.torch import build_shm_op

    from tests.tiny import tiny_model

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # Its extension for CPUs too: where it has to be compiled, ranks would wait a minute for each other.
    build_shm_op()
    tiny_model("llama")  # transformers imports a model's code when it is first made
