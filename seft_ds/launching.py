"""Which rank of how many this process is, as whoever started it says in the environment.

Each launcher has its own variables. Here they become one `Place`, and the variables that torch, DeepSpeed
and accelerate read. Nothing here imports torch: it has to be settled before a backend is chosen.
"""

from __future__ import annotations

import os
import re
import socket
import sys
import zlib
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, replace
from typing import NamedTuple

DEFAULT_PORT = 29500
LOOPBACK = ("127.0.0.1", "localhost", "::1")


class Launcher(NamedTuple):
    """The variables in which a launcher says who a process is; the first that is set counts."""

    name: str
    rank: tuple[str, ...]
    size: tuple[str, ...]
    local_rank: tuple[str, ...] = ()
    local_size: tuple[str, ...] = ()


# deepspeed, torchrun and accelerate launch; also whoever sets the variables by hand.
TORCH = Launcher(
    "torch's variables",
    ("RANK",),
    ("WORLD_SIZE",),
    ("LOCAL_RANK",),
    ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"),
)
SLURM = "srun"
# Innermost first: mpirun may start its daemons with srun, never the other way round.
OTHERS = (
    Launcher(
        "Open MPI's mpirun",
        ("OMPI_COMM_WORLD_RANK",),
        ("OMPI_COMM_WORLD_SIZE",),
        ("OMPI_COMM_WORLD_LOCAL_RANK",),
        ("OMPI_COMM_WORLD_LOCAL_SIZE",),
    ),
    Launcher(
        "MVAPICH",
        ("MV2_COMM_WORLD_RANK", "MVP_COMM_WORLD_RANK"),
        ("MV2_COMM_WORLD_SIZE", "MVP_COMM_WORLD_SIZE"),
        ("MV2_COMM_WORLD_LOCAL_RANK", "MVP_COMM_WORLD_LOCAL_RANK"),
        ("MV2_COMM_WORLD_LOCAL_SIZE", "MVP_COMM_WORLD_LOCAL_SIZE"),
    ),
    Launcher(
        "jsrun",
        ("JSM_NAMESPACE_RANK",),
        ("JSM_NAMESPACE_SIZE",),
        ("JSM_NAMESPACE_LOCAL_RANK",),
        ("JSM_NAMESPACE_LOCAL_SIZE",),
    ),
    Launcher("Flux", ("FLUX_TASK_RANK",), ("FLUX_JOB_SIZE",), ("FLUX_TASK_LOCAL_ID",)),
    Launcher(
        "MPICH's or Intel's mpiexec (PMI)",
        ("PMI_RANK", "PMIX_RANK", "PALS_RANKID"),
        ("PMI_SIZE", "PALS_SIZE"),
        ("MPI_LOCALRANKID", "PMI_LOCAL_RANK", "PALS_LOCAL_RANKID"),
        ("MPI_LOCALNRANKS", "PMI_LOCAL_SIZE", "PALS_LOCAL_SIZE"),
    ),
)
# One value for all processes of a run, and another for the next run: a port follows from it.
_RUN_NAMES = (
    ("SLURM_JOB_ID", "SLURM_STEP_ID"),
    ("PMIX_NAMESPACE",),
    ("OMPI_MCA_ess_base_jobid",),
    ("PALS_APID",),
    ("FLUX_JOB_ID",),
    ("LSB_JOBID",),
    ("PBS_JOBID",),
)


@dataclass(frozen=True)
class Place:
    """Where this process stands among the ranks of its run."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int | None = 1  # ranks on this machine; None: not said
    launcher: str = "python"
    note: str = ""  # what its user may not expect, in a line


ALONE = Place()


def read_place(env: Mapping[str, str], *, in_terminal_shell: bool = False) -> Place:
    """This process's place among the ranks.

    Args:
        env: the environment.
        in_terminal_shell: this is a command in a shell, not the program that srun started (see
            `in_srun_shell`).

    Raises:
        ValueError: the variables are no numbers, contradict each other, or leave out what is needed.
    """
    others = [found for kind in OTHERS if (found := _read(env, kind)) is not None]
    slurm = _read_slurm(env, in_terminal_shell)
    if slurm is not None:
        others.append(slurm)
    # A run of one may be a leftover of the shell that a larger one was started from.
    other = next((place for place in others if place.size > 1), None)
    own = _read_torch(env, other)
    if own is not None or other is not None:
        return own or other or ALONE
    if not others:
        _refuse_unknown_size(env)
    return replace(ALONE, note=_without_srun(env))


def _read_torch(env: Mapping[str, str], other: Place | None) -> Place | None:
    """The place that RANK and WORLD_SIZE give, or None if they are not set.

    other: what another launcher's variables say, if they say more than one rank.
    """
    rank, size = _number(env, ("RANK",)), _number(env, ("WORLD_SIZE",))
    if rank is None and size is None:
        return None
    if rank is None or size is None:
        if other is not None and size in (None, other.size):
            return None  # DeepSpeed's launcher for MPICH sets the size only
        missing, there = ("RANK", "WORLD_SIZE") if rank is None else ("WORLD_SIZE", "RANK")
        if other is None and rank in (None, 0) and size in (None, 1):
            return ALONE  # a leftover that says nothing
        raise ValueError(
            f"{there} is {env[there]}, but {missing} is not set; set RANK, WORLD_SIZE and LOCAL_RANK for "
            "every process, or start with deepspeed, torchrun or srun"
        )
    # deepspeed and torchrun may run inside a task of srun or mpirun, and then they know better.
    marked = "TORCHELASTIC_RUN_ID" in env or "CROSS_SIZE" in env or "LOCAL_SIZE" in env
    if other is not None and other.size > size and not marked:
        raise ValueError(
            f"WORLD_SIZE is {size}, but {other.launcher} started {other.size} processes; unset RANK and "
            "WORLD_SIZE, or set them for every process"
        )
    local_rank = _number(env, TORCH.local_rank)
    local_size = _number(env, TORCH.local_size)
    if local_rank is None and other is not None and (other.rank, other.size) == (rank, size):
        local_rank, local_size = other.local_rank, local_size or other.local_size
    if local_rank is None and (size == 1 or env.get("MASTER_ADDR", "") in LOOPBACK):
        local_rank, local_size = rank, size
    if local_rank is None:
        raise ValueError(
            f"RANK {rank} and WORLD_SIZE {size} are set, but LOCAL_RANK is not; set it to the number of this "
            "process on its machine, from 0 (0 if each machine runs one)"
        )
    return _checked(
        Place(rank, size, local_rank, local_size or (1 if size == 1 else None), "torch")
    )


def _read(env: Mapping[str, str], kind: Launcher) -> Place | None:
    """The place that one launcher's variables give, or None if it started nothing here."""
    rank, size = _number(env, kind.rank), _number(env, kind.size)
    if size is None:  # see `_refuse_unknown_size`
        return None
    if rank is None:
        if size == 1:
            return None
        raise ValueError(
            f"{_first(env, kind.size)} is {size}, but {kind.rank[0]} is not set; unset the one or set the "
            "other"
        )
    local_rank, local_size = _number(env, kind.local_rank), _number(env, kind.local_size)
    if local_rank is None:  # srun --mpi=pmi2 and Cray's
        local_rank = _number(env, ("SLURM_LOCALID",)) if _same_in_slurm(env, rank, size) else None
        local_size = local_size or _tasks_here(env)
    if local_rank is None and (size == 1 or env.get("MASTER_ADDR", "") in LOOPBACK):
        local_rank, local_size = rank, size
    if local_rank is None:
        raise ValueError(
            f"{kind.name} started {size} processes without saying which of a machine this is; set LOCAL_RANK "
            "for every process (0 if each machine runs one)"
        )
    return _checked(
        Place(rank, size, local_rank, local_size or (1 if size == 1 else None), kind.name)
    )


def _refuse_unknown_size(env: Mapping[str, str]) -> None:
    """ValueError for a process that some launcher gave a rank, of how many nobody says (PMIx alone)."""
    name = next((n for kind in OTHERS if (n := _first(env, kind.rank)) is not None), None)
    if name is not None:
        raise ValueError(
            f"{name} is set, but not how many processes there are; set RANK, WORLD_SIZE, LOCAL_RANK, "
            "MASTER_ADDR and MASTER_PORT for every process, or start with deepspeed, torchrun or srun"
        )


def _same_in_slurm(env: Mapping[str, str], rank: int, size: int) -> bool:
    step = _number(env, ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"))
    return (rank, size) == (_number(env, ("SLURM_PROCID",)), step)


def _read_slurm(env: Mapping[str, str], in_terminal_shell: bool) -> Place | None:
    """The task of srun that this process is, or None: sbatch's and salloc's own shells are no tasks."""
    rank = _number(env, ("SLURM_PROCID",))
    step = env.get("SLURM_STEP_ID") is not None or "SLURM_STEP_NUM_TASKS" in env
    if rank is None or not (step or rank > 0):
        return None
    size = _number(env, ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS")) or 1
    if size > 1 and in_terminal_shell:
        raise ValueError(
            f"this shell is one of {size} tasks (srun --pty), so a program started in it would wait for the "
            "others; start it with srun or deepspeed, or ask for the shell with --ntasks=1"
        )
    local_rank = _number(env, ("SLURM_LOCALID",))
    if local_rank is None:
        if size > 1:
            raise ValueError(
                f"srun started {size} tasks, but SLURM_LOCALID is not set; set it to the number of this task "
                "on its node, from 0"
            )
        local_rank = 0
    return _checked(Place(rank, size, local_rank, 1 if size == 1 else _tasks_here(env), SLURM))


def _without_srun(env: Mapping[str, str]) -> str:
    """A remark for a program that got several tasks of Slurm and was started without srun."""
    tasks = env.get("SLURM_NTASKS", "1")
    if "SLURM_JOB_ID" not in env or tasks in ("", "1"):
        return ""
    return f"started without srun: one rank, though the Slurm job has {tasks} tasks"


def _tasks_here(env: Mapping[str, str]) -> int | None:
    """How many tasks of this Slurm step run on this node, from a list such as "8(x2),4"."""
    text = env.get("SLURM_STEP_TASKS_PER_NODE") or env.get("SLURM_TASKS_PER_NODE") or ""
    counts: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if match is None:
            return None
        counts += [int(match[1])] * int(match[2] or 1)
    node = env.get("SLURM_NODEID", "")
    if len(set(counts)) == 1:
        return counts[0]
    return counts[int(node)] if node.isdigit() and int(node) < len(counts) else None


def _checked(place: Place) -> Place:
    """`place`, unless its numbers contradict each other."""
    here = place.size if place.local_size is None else place.local_size
    if not 0 <= place.rank < place.size or not 0 <= place.local_rank < here <= place.size:
        raise ValueError(
            f"{place.launcher}: rank {place.rank} of {place.size}, local rank {place.local_rank} of {here} "
            "can't be; every rank has to be below the number of ranks (look at RANK, WORLD_SIZE, LOCAL_RANK, "
            "LOCAL_WORLD_SIZE or your launcher's own variables)"
        )
    return place


def _first(env: Mapping[str, str], names: tuple[str, ...]) -> str | None:
    return next((name for name in names if env.get(name, "") != ""), None)


def _number(env: Mapping[str, str], names: tuple[str, ...]) -> int | None:
    """The value of the first of `names` that is set; an empty one is not."""
    name = _first(env, names)
    if name is None:
        return None
    text = env[name].strip()
    if not re.fullmatch(r"-?\d{1,9}", text):
        raise ValueError(f"{name} is {text!r:.40}; wanted a whole number (or unset it)")
    return int(text)


def variables(place: Place, env: Mapping[str, str]) -> dict[str, str]:
    """What torch, DeepSpeed and accelerate read, as far as `env` doesn't say it already.

    Raises:
        ValueError: it isn't said at which address and port the ranks meet.
    """
    found = {
        "RANK": str(place.rank),
        "WORLD_SIZE": str(place.size),
        "LOCAL_RANK": str(place.local_rank),
    }
    if place.local_size is not None:
        found["LOCAL_WORLD_SIZE"] = str(place.local_size)
    if place.size == 1 and place.launcher != "torch":
        found["MASTER_ADDR"] = "127.0.0.1"
    elif not env.get("MASTER_ADDR"):
        found["MASTER_ADDR"] = _address(place, env)
    port = _number(env, ("MASTER_PORT",))
    if port is not None and not 0 < port < 65536:
        raise ValueError(f"MASTER_PORT is {port}; wanted a port from 1 to 65535")
    if place.size == 1 and (port is None or place.launcher != "torch"):
        found["MASTER_PORT"] = str(_free_port())
    elif port is None:
        found["MASTER_PORT"] = str(_port(env))
    return {name: value for name, value in found.items() if env.get(name) != value}


def _address(place: Place, env: Mapping[str, str]) -> str:
    """Where the ranks meet if nobody says so: on this machine, if it runs them all."""
    if place.local_size == place.size or _number(env, ("SLURM_STEP_NUM_NODES",)) == 1:
        return "127.0.0.1"
    how = "export it as the host name of the first one, for all ranks"
    if place.launcher == SLURM:
        how += " (scontrol show hostnames $SLURM_JOB_NODELIST | head -n 1)"
    elif place.launcher.startswith("Open MPI"):
        how += " (mpirun -x MASTER_ADDR=HOST)"
    raise ValueError(
        f"{place.launcher} started {place.size} ranks on several machines, but MASTER_ADDR is not set: {how}"
    )


def _port(env: Mapping[str, str]) -> int:
    """The same for all ranks of a run; two runs on one machine seldom have the same."""
    for names in _RUN_NAMES:
        values = [env.get(name, "") for name in names]
        if values[0]:
            return 20000 + zlib.crc32("/".join(values).encode()) % 12000
    return DEFAULT_PORT


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def in_srun_shell(env: Mapping[str, str]) -> bool:
    """Whether this process was started in the terminal's shell that `srun --pty` opened."""
    started = env.get("SLURM_TASK_PID", "")
    if "SLURM_PTY_PORT" not in env or not started.isdigit():
        return False
    return int(started) != os.getpid() and sys.stdin is not None and sys.stdin.isatty()


_settled: Place | None = None


def settle(env: MutableMapping[str, str] = os.environ) -> Place:
    """Find this process's place, and set what torch, DeepSpeed and accelerate read of it.

    Safe to call more than once. ValueError as `read_place` and `variables`.
    """
    global _settled
    if _settled is not None and _announced(_settled, env):
        return _settled
    place = read_place(env, in_terminal_shell=in_srun_shell(env))
    env.update(variables(place, env))
    _settled = place
    return place


def _announced(place: Place, env: Mapping[str, str]) -> bool:
    return (env.get("RANK"), env.get("WORLD_SIZE")) == (str(place.rank), str(place.size))


def known_place(env: Mapping[str, str] = os.environ) -> Place:
    """This process's place as far as it is known, for messages: never an error."""
    if _settled is not None and _announced(_settled, env):
        return _settled
    try:
        return read_place(env)
    except ValueError:
        return Place(rank=_guess(env, "rank"), local_rank=_guess(env, "local_rank"))


def _guess(env: Mapping[str, str], field: str) -> int:
    """The highest number that any launcher's variables give, so that few take themselves for the first."""
    names = [name for kind in (TORCH, *OTHERS) for name in getattr(kind, field)]
    names.append({"rank": "SLURM_PROCID", "local_rank": "SLURM_LOCALID"}[field])
    return max((int(env[name]) for name in names if env.get(name, "").isdigit()), default=0)


def device_index(local_rank: int, visible: int) -> int:
    """Which of the `visible` GPUs is this rank's: its own, where each rank was given one alone.

    Raises:
        ValueError: there are several, but fewer than ranks.
    """
    if visible == 1:
        return 0
    if local_rank >= visible:
        raise ValueError(
            f"local rank {local_rank} on {socket.gethostname()} has no GPU: {visible} are visible; start as "
            "many ranks on a machine as it has GPUs"
        )
    return local_rank


def use_first_device(env: MutableMapping[str, str] = os.environ) -> None:
    """Have DeepSpeed and accelerate take device 0: they take LOCAL_RANK for the number of the device."""
    env["LOCAL_RANK"] = "0"
    if "OMPI_COMM_WORLD_LOCAL_RANK" in env:  # DeepSpeed wants both to be the same
        env["OMPI_COMM_WORLD_LOCAL_RANK"] = "0"


def core_share(cores: int, machine_cores: int, place: Place) -> int:
    """How many of the `cores` that this process may run on are its own.

    srun and mpirun often give each rank cores of its own; deepspeed and torchrun never do by themselves.
    """
    ranks = place.local_size or 1
    bound = place.launcher not in ("torch", "python") and cores * ranks <= machine_cores
    return max(1, cores if bound else cores // ranks)
