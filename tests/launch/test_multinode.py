"""The templates for several nodes, started as they say on two network namespaces; and the recipes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from seft_ds.checkpoint.verify import verify
from tests.ranks import free_port
from tests.train.test_finetune import make_models
from tests.train.test_two_hosts import ADDRESSES, hosts

__all__ = ["hosts"]  # a fixture
ROOT = Path(__file__).resolve().parents[2]
TEMPLATES = ROOT / "launch/multinode"
RECIPES = sorted((ROOT / "launch/recipes").glob("*.yaml"))
# Slurm's two programs, as far as the template uses them: a task a node, in its network.
SRUN = """#!/bin/bash
shift   # --kill-on-bad-exit
for rank in 0 1; do
    host=$(sed -n "$((rank + 1))p" "$FAKE_HOSTS")
    SLURM_STEP_ID=0 SLURM_STEP_NUM_TASKS=2 SLURM_PROCID=$rank SLURM_LOCALID=0 SLURM_NTASKS=2 \
        GLOO_SOCKET_IFNAME=$host ip netns exec "$host" "$@" &
    pids+=($!)
done
status=0
for pid in "${pids[@]}"; do wait "$pid" || status=$?; done
exit $status
"""
SCONTROL = """#!/bin/bash
if [ "$1" = show ]; then echo "$FIRST_ADDRESS"; echo other; else echo "$@" >> "$REQUEUED"; fi
"""


def flags(home: Path, output: str, *more: str) -> list[str]:
    return [
        "--model_name_or_path", str(home / "pruned"), "--train_file", str(home / "text.txt"),
        "--output_dir", str(home / output), "--deepspeed", str(ROOT / "ds_configs/zero3.json"),
        "--max_steps", "3", "--per_device_train_batch_size", "2", "--max_length", "16",
        "--seft.density", "0.05", *more,
    ]  # fmt: skip


def environment(**more: str) -> dict[str, str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    plain = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return {**plain, "PATH": path, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", **more}


def on_each_host(
    hosts: list[str], template: str, arguments: list[str], **env: str
) -> list[tuple[int, str]]:
    """(status, what was said) of the template on both hosts."""
    port = str(free_port())
    started = [
        subprocess.Popen(
            ["ip", "netns", "exec", host, str(TEMPLATES / template), *arguments],
            env=environment(
                NODE_RANK=str(rank), MASTER_ADDR=ADDRESSES[0], MASTER_PORT=port,
                GLOO_SOCKET_IFNAME=host, **env,
            ),
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank, host in enumerate(hosts)
    ]  # fmt: skip
    said = [p.communicate(timeout=300)[0] for p in started]
    return [(p.returncode, text) for p, text in zip(started, said, strict=True)]


@pytest.mark.timeout(900)
def test_each_template_runs_on_two_nodes(hosts: list[str], tmp_path: Path) -> None:
    make_models(tmp_path)
    for status, said in on_each_host(
        hosts, "torchrun.sh", flags(tmp_path, "torchrun"), NODES="2", GPUS="1"
    ):
        assert status == 0, said
    assert verify(tmp_path / "torchrun").ok

    hostfile = tmp_path / "hostfile"
    hostfile.write_text(f"{ADDRESSES[0]} slots=1\n{ADDRESSES[1]} slots=1\n")
    for status, said in on_each_host(
        hosts, "no_ssh.sh", flags(tmp_path, "no_ssh"), HOSTFILE=str(hostfile)
    ):
        assert status == 0, said
    assert verify(tmp_path / "no_ssh").ok


@pytest.mark.timeout(900)
def test_the_slurm_template_requeues_until_the_run_is_complete(
    hosts: list[str], tmp_path: Path
) -> None:
    make_models(tmp_path)
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    (tmp_path / "hosts").write_text("\n".join(hosts) + "\n")
    requeued = tmp_path / "requeued"
    env = environment(
        SLURM_JOB_ID="7", SLURM_JOB_NODELIST="nodes", SLURM_CPUS_PER_TASK="8", MASTER_PORT=str(free_port()),
        FAKE_HOSTS=str(tmp_path / "hosts"), FIRST_ADDRESS=ADDRESSES[0], REQUEUED=str(requeued),
    )  # fmt: skip
    env["PATH"] = f"{programs}{os.pathsep}{env['PATH']}"

    def submit(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [str(TEMPLATES / "slurm.sh"), *arguments]
        return subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)

    assert submit("--max_steps", "3").returncode == 2  # there is no folder to look for the end in
    done = submit(*flags(tmp_path, "run"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert verify(tmp_path / "run").ok and not requeued.exists()
    # Stopped in time: status 0, and no model yet.
    seen = tmp_path / "cpus"
    (programs / "srun").write_text(f"#!/bin/bash\necho $SRUN_CPUS_PER_TASK > {seen}\n")
    assert submit(*flags(tmp_path, "stopped")).returncode == 0
    assert requeued.read_text() == "requeue 7\n" and seen.read_text() == "8\n"
    (programs / "srun").write_text("#!/bin/bash\nexit 1\n")
    assert submit(*flags(tmp_path, "failed")).returncode == 1
    assert submit(f"--output_dir={tmp_path / 'failed'}").returncode == 1
    assert requeued.read_text() == "requeue 7\n"


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda p: p.stem)
def test_every_recipe_is_accepted(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from seft_ds.train.arguments import parse

    make_models(tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ds_configs").symlink_to(ROOT / "ds_configs")
    text = recipe.read_text()
    for line in text.splitlines():
        if line.startswith("train_file: "):
            (tmp_path / line.removeprefix("train_file: ")).write_text("{}")
    more = [] if "deepspeed:" in text else ["--deepspeed", "ds_configs/zero3.json"]
    more += [] if "train_file:" in text or "dataset_name:" in text else ["--train_file", "text.txt"]
    arguments = parse(
        ["--config", str(recipe), "--model_name_or_path", "pruned", "--output_dir", "RUN", *more]
    )
    assert arguments.run.max_steps >= 100
    assert arguments.deepspeed["seft"]["density"] > 0
