"""The command that starts a run again, and what it ran on: for the journal and the report."""

from __future__ import annotations

import os
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path


def command_line(
    argv: Sequence[str] | None = None, environment: Mapping[str, str] | None = None
) -> str:
    """The whole command, launcher included, in the quoting of a shell.

    argv, environment: of a rank; default: this one's. What the launchers add to them is left out.
    """
    argv = list(sys.argv if argv is None else argv)
    environment = os.environ if environment is None else environment
    argv = [a for a in argv if not a.startswith("--local_rank=")]
    return shlex.join([*launcher(environment), *argv])


def launcher(environment: Mapping[str, str]) -> list[str]:
    """How ranks were started, by the marks that each launcher leaves in their environment."""
    world = environment.get("WORLD_SIZE", "1")
    here = environment.get("LOCAL_WORLD_SIZE") or environment.get("LOCAL_SIZE") or world
    if not here.isdigit() or not world.isdigit() or "RANK" not in environment:
        return ["python"]
    nodes = max(1, int(world) // max(1, int(here)))
    if "TORCHELASTIC_RUN_ID" in environment:
        return ["torchrun", f"--nnodes={nodes}", f"--nproc_per_node={here}"]
    if "LOCAL_SIZE" not in environment:  # which DeepSpeed's launcher sets
        if world == "1":
            return ["python"]
        if world in (environment.get("OMPI_COMM_WORLD_SIZE"), environment.get("PMI_SIZE")):
            return ["mpirun", "-n", world, "python"]
        if "SLURM_STEP_ID" in environment:
            return ["srun", f"--ntasks={world}", "python"]
    return ["deepspeed", *(["--num_nodes", str(nodes)] if nodes > 1 else []), "--num_gpus", here]


def machine() -> dict[str, str]:
    """Python, system and processor."""
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "processor": processor(),
        "threads a rank": os.environ.get("OMP_NUM_THREADS", "not set"),
    }


def processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The processor's own name, where the system tells it."""
    try:
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor() or "unknown"
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]}, {len(names)} logical cores" if names else platform.machine()
