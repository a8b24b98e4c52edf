"""The good inputs that bad ones are made from: runs with checkpoints, models, data, a journal."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from seft_ds.checkpoint.manifest import entries_below, seal
from tests.ranks import run_processes
from tests.tiny import dense_model, prune_, tiny_model

STEPS = (5, 10)  # of the checkpoints of each run
NEWEST, TAG = "checkpoint-10", "global_step10"
# The name of a run, the model, bf16, and what checkpoints hold of the base model.
RUNS = (
    ("copy", "llama", False, "copy"),
    ("copy-bf16-2of4", "llama24", True, "copy"),
    ("reference", "llama", False, "reference"),
)


def make_all(home: Path) -> None:
    """Everything, below `home`. Forks ranks; this process stays as it is."""
    home.mkdir(parents=True, exist_ok=True)
    run_processes(1, make_models, str(home))
    run_processes(2, make_runs, str(home))
    for name, *_ in RUNS:
        for step in STEPS:
            state = {"global_step": step, "max_steps": 20, "epoch": 0.5, "log_history": []}
            (home / name / f"checkpoint-{step}" / "trainer_state.json").write_text(
                json.dumps(state)
            )
            reseal(home / name / f"checkpoint-{step}")
    make_data(home / "data")
    make_journal(home / "run" / "journal.jsonl")


def make_models(home: str) -> None:
    """dense and pruned folders of each kind; `sharded` is pruned in several files."""
    from torch import nn

    from seft_ds.checkpoint.pruned import save_pruned

    for kind in ("llama", "llama24"):
        model = dense_model(kind.removesuffix("24"))
        prune_(model, pattern=(2, 4) if kind == "llama24" else None)
        dense = Path(home) / f"dense-{kind}"
        model.save_pretrained(dense)
        linear = [
            n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"
        ]
        targets = {f"{n}.weight": "2:4" if kind == "llama24" else None for n in linear}
        for name, shard_bytes in ((f"pruned-{kind}", 2**30), (f"sharded-{kind}", 20_000)):
            save_pruned(model, dense, Path(home) / name, targets, {}, max_shard_bytes=shard_bytes)


def make_runs(home: str) -> None:
    for name, kind, bf16, base in RUNS:
        engine = make_engine(kind, bf16, base, source=f"{home}/pruned-{kind}")
        for step in range(1, STEPS[-1] + 1):
            train_step(engine, step)
            if step in STEPS:
                engine.save_checkpoint(f"{home}/{name}/checkpoint-{step}", f"global_step{step}")


def make_engine(kind: str, bf16: bool, base: str, source: str = "", stage: int = 0) -> Any:
    """A tiny engine whose windows and events come often."""
    import seft_ds

    torch.manual_seed(0)
    model = tiny_model(kind, torch.bfloat16 if bf16 else torch.float32)
    model.config._name_or_path = source
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 1,
        "zero_optimization": {"stage": stage},
        "bf16": {"enabled": bf16},
        "optimizer": {"type": "AdamW", "params": {"lr": 5e-3, "torch_adam": True}},
        "scheduler": {
            "type": "WarmupDecayLR",
            "params": {"total_num_steps": 20, "warmup_num_steps": 3, "warmup_max_lr": 5e-3},
        },
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
        "seft": {
            "interval": 5,
            "window": 3,
            "density": 0.02,
            "total_steps": 20,
            "checkpoint_base": base,
        },
    }
    return seft_ds.initialize(model=model, config=config)[0]


def train_step(engine: Any, step: int) -> None:
    g = torch.Generator().manual_seed(1000 * step + engine.seft.ranks.rank)
    ids = torch.randint(0, 128, (2, 16), generator=g)
    engine.backward(engine(input_ids=ids, labels=ids).loss)
    engine.step()


def reseal(checkpoint: Path) -> None:
    """Make the checksums right again: those of each tag, then those of the checkpoint around it."""
    for folder in [p for p in checkpoint.iterdir() if p.is_dir()]:
        (folder / "manifest.json").unlink(missing_ok=True)
        seal(folder, entries_below(folder, {}))
    (checkpoint / "manifest.json").unlink(missing_ok=True)
    seal(checkpoint, entries_below(checkpoint, {}))


def make_data(folder: Path) -> None:
    """A file of each type that `load_rows` reads, and one of each form of rows."""
    import gzip

    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir()
    texts = [f"row {i}: the quick brown fox jumps over {i} lazy dogs" for i in range(40)]
    (folder / "text.txt").write_text("\n".join(texts) + "\n")
    (folder / "text.csv").write_text(
        "text,n\n" + "".join(f"{t},{i}\n" for i, t in enumerate(texts))
    )
    lines = "".join(json.dumps({"text": t}) + "\n" for t in texts)
    (folder / "text.jsonl").write_text(lines)
    (folder / "text.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (folder / "text.json").write_text(json.dumps([{"text": t} for t in texts]))
    pq.write_table(pa.table({"text": texts}), folder / "text.parquet")
    alpaca = [{"instruction": t, "input": "", "output": "yes"} for t in texts]
    (folder / "alpaca.jsonl").write_text("".join(json.dumps(r) + "\n" for r in alpaca))
    pairs = [{"prompt": t, "completion": "yes"} for t in texts]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(r) + "\n" for r in pairs))
    chat = [{"messages": [{"role": "user", "content": t}]} for t in texts]
    (folder / "chat.jsonl").write_text("".join(json.dumps(r) + "\n" for r in chat))


def make_journal(path: Path) -> None:
    """The records of a short run."""
    from seft_ds.report.journal import Journal

    targets = [{"name": "a.0.q", "shape": [24, 24], "live": 230, "slots": 12}]
    with Journal(path) as journal:
        journal.write("run", command="c", ranks=2, targets=targets, config={"scope": "layer"})
        for step in range(1, 21):
            journal.write("step", step=step, loss=2.5, learning_rate=1e-3, seconds=0.5, tokens=64)
            if step % 5 == 0:
                journal.write(
                    "event", step=step, target="a.0.q", dropped=2, live=230, target_live=230
                )
        journal.write("end", step=20, seconds=10.0, live=230, target_live=230)


def copy(source: Path, to: Path) -> Path:
    shutil.copytree(source, to, symlinks=True)
    return to
