"""Which rank of how many a process is, over the variables that launchers really set; and on which device."""

from __future__ import annotations

import os

import pytest

from seft_ds import devices
from seft_ds.launching import (
    Place,
    core_share,
    device_index,
    known_place,
    read_place,
    settle,
    use_first_device,
    variables,
)

SBATCH = {"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}
STEP = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0"}


def srun(rank: int, size: int, local: int, per_node: str, **more: str) -> dict[str, str]:
    """A task of srun."""
    return STEP | {
        "SLURM_STEP_NUM_TASKS": str(size), "SLURM_NTASKS": str(size), "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": str(local), "SLURM_STEP_TASKS_PER_NODE": per_node, **more,
    }  # fmt: skip


def ompi(rank: int, size: int, local: int, here: int, **more: str) -> dict[str, str]:
    """A process of Open MPI's mpirun, PMIx and all."""
    names = {"RANK": rank, "SIZE": size, "LOCAL_RANK": local, "LOCAL_SIZE": here}
    found = {f"OMPI_COMM_WORLD_{name}": str(value) for name, value in names.items()}
    return found | {"PMIX_RANK": str(rank), "PMIX_NAMESPACE": "prterun-node-4711@1", **more}


def hydra(rank: int, size: int, local: int, here: int, **more: str) -> dict[str, str]:
    """A process of MPICH's or Intel's mpiexec."""
    names = {"PMI_RANK": rank, "PMI_SIZE": size, "MPI_LOCALRANKID": local, "MPI_LOCALNRANKS": here}
    return {name: str(value) for name, value in names.items()} | more


def torch_env(rank: int, size: int, local: int | None, **more: str) -> dict[str, str]:
    found = {"RANK": str(rank), "WORLD_SIZE": str(size), **more}
    return found if local is None else found | {"LOCAL_RANK": str(local)}


TORCHRUN = {"LOCAL_WORLD_SIZE": "8", "TORCHELASTIC_RUN_ID": "none", "MASTER_ADDR": "a"}
ALONE = (0, 1, 0, 1)


@pytest.mark.parametrize(
    "env, wanted",
    [
        ({}, ALONE),
        # Slurm: a plain python in sbatch's script or salloc's shell is a run of one.
        (SBATCH | {"SLURM_NTASKS": "16"}, ALONE),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "16"}, ALONE),
        (srun(0, 1, 0, "1"), ALONE),
        (srun(0, 1, 0, "1", SLURM_PTY_PORT="3", PMIX_RANK="0"), ALONE),
        (srun(9, 16, 1, "8(x2)"), (9, 16, 1, 8)),
        (srun(17, 20, 1, "8(x2),4", SLURM_NODEID="2"), (17, 20, 1, 4)),
        (srun(5, 8, 1, "strange"), (5, 8, 1, None)),
        # srun --mpi=pmix and pmi2 set MPI's variables too, partly.
        (srun(9, 16, 1, "8(x2)", PMIX_RANK="9"), (9, 16, 1, 8)),
        (srun(9, 16, 1, "8(x2)", PMI_RANK="9", PMI_SIZE="16"), (9, 16, 1, 8)),
        # A leftover of the shell that srun was typed in.
        (srun(9, 16, 1, "8(x2)", PMI_RANK="0", PMI_SIZE="1"), (9, 16, 1, 8)),
        (srun(9, 16, 1, "8(x2)", RANK="0"), (9, 16, 1, 8)),
        # mpirun, alone and inside Slurm, whose tasks are then mpirun's daemons.
        (ompi(1, 2, 1, 2), (1, 2, 1, 2)),
        (ompi(9, 16, 1, 8) | srun(1, 2, 0, "1(x2)"), (9, 16, 1, 8)),
        (ompi(9, 16, 1, 8) | SBATCH | {"SLURM_NTASKS": "16"}, (9, 16, 1, 8)),
        (hydra(3, 4, 3, 4), (3, 4, 3, 4)),
        (hydra(3, 4, 3, 4, WORLD_SIZE="4", LOCAL_SIZE="4"), (3, 4, 3, 4)),
        (hydra(3, 4, 1, 2) | srun(1, 2, 0, "1(x2)"), (3, 4, 1, 2)),
        ({"PMI_RANK": "3", "PMI_SIZE": "8", "PMI_LOCAL_RANK": "1", "PALS_LOCAL_SIZE": "2"}, (3, 8, 1, 2)),
        ({f"MV2_COMM_WORLD_{n}": "1" for n in ("RANK", "LOCAL_RANK")}
         | {f"MV2_COMM_WORLD_{n}": "2" for n in ("SIZE", "LOCAL_SIZE")}, (1, 2, 1, 2)),
        ({"FLUX_TASK_RANK": "3", "FLUX_JOB_SIZE": "4", "FLUX_TASK_LOCAL_ID": "1"}, (3, 4, 1, None)),
        # Launchers that speak torch's language, also inside a task of another.
        (torch_env(9, 16, 1, **TORCHRUN), (9, 16, 1, 8)),
        (torch_env(9, 16, 1, **TORCHRUN) | srun(1, 2, 0, "1(x2)"), (9, 16, 1, 8)),
        (torch_env(0, 1, 0, LOCAL_SIZE="1", CROSS_SIZE="1") | srun(1, 2, 0, "1(x2)"), ALONE),
        (torch_env(3, 4, 3, LOCAL_SIZE="4", CROSS_SIZE="1"), (3, 4, 3, 4)),
        (torch_env(3, 4, None, MASTER_ADDR="127.0.0.1"), (3, 4, 3, 4)),
        (torch_env(9, 16, None) | srun(9, 16, 1, "8(x2)"), (9, 16, 1, 8)),
        (torch_env(0, 1, None), ALONE),
        ({"RANK": "0"}, ALONE),
        ({"WORLD_SIZE": "1", "LOCAL_RANK": ""}, ALONE),
    ],
)  # fmt: skip
def test_each_launcher_is_understood(env, wanted):
    place = read_place(env)
    assert (place.rank, place.size, place.local_rank, place.local_size) == wanted


@pytest.mark.parametrize("env", [ompi(1, 2, 1, 2), hydra(3, 4, 3, 4), torch_env(2, 4, 2)])
def test_accelerate_understands_the_same(env, monkeypatch):
    from accelerate.utils.environment import get_cpu_distributed_information

    for name in (*torch_env(0, 1, 0), "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    theirs, ours = get_cpu_distributed_information(), read_place(env)
    assert (ours.rank, ours.size, ours.local_rank) == (
        theirs.rank,
        theirs.world_size,
        theirs.local_rank,
    )


@pytest.mark.parametrize(
    "env, said",
    [
        (torch_env(1, 2, None), "LOCAL_RANK is not; set it"),
        ({"RANK": "1"}, "WORLD_SIZE is not set"),
        ({"WORLD_SIZE": "8"}, "RANK is not set"),
        ({"RANK": "first", "WORLD_SIZE": "2"}, "RANK is 'first'; wanted a whole number"),
        (torch_env(2, 2, 0), "rank 2 of 2"),
        (torch_env(-1, 2, 0), "rank -1 of 2"),
        (torch_env(0, 2, 3, LOCAL_WORLD_SIZE="2"), "local rank 3 of 2"),
        (torch_env(0, 2, 0, LOCAL_WORLD_SIZE="4"), "of 4"),
        ({"WORLD_SIZE": "1"} | ompi(3, 8, 3, 8), "RANK is not set"),
        # Eight processes that would each be a run of one.
        (torch_env(0, 1, 0) | ompi(3, 8, 3, 8), "WORLD_SIZE is 1, but Open MPI's mpirun started 8"),
        (torch_env(0, 1, 0) | srun(3, 8, 3, "8"), "WORLD_SIZE is 1, but srun started 8"),
        ({"PMIX_RANK": "3"}, "PMIX_RANK is set, but not how many"),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, "OMPI_COMM_WORLD_RANK is not set"),
        ({"PMI_RANK": "3", "PMI_SIZE": "8"}, "set LOCAL_RANK"),
        ({n: v for n, v in srun(3, 8, 3, "8").items() if n != "SLURM_LOCALID"}, "SLURM_LOCALID is not set"),
        (srun(1, 2, 0, "2", SLURM_STEP_NUM_TASKS="many"), "SLURM_STEP_NUM_TASKS is 'many'"),
    ],
)  # fmt: skip
def test_what_is_open_or_contradicts_itself_is_told_in_a_line(env, said):
    with pytest.raises(ValueError) as caught:
        read_place(env)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_messages_know_the_rank_even_if_the_run_does_not():
    """Or each of eight processes would say the same."""
    assert known_place(torch_env(0, 1, 0) | ompi(3, 8, 2, 8)).rank == 3
    assert known_place({"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "x"}).local_rank == 1


def test_a_shell_of_many_tasks_is_none_of_them():
    read_place(srun(0, 1, 0, "1"), in_terminal_shell=True)
    with pytest.raises(ValueError, match="this shell is one of 8 tasks"):
        read_place(srun(0, 8, 0, "8"), in_terminal_shell=True)


def test_a_program_without_srun_in_a_larger_job_is_told():
    assert (
        "one rank, though the Slurm job has 16" in read_place(SBATCH | {"SLURM_NTASKS": "16"}).note
    )
    assert read_place(SBATCH | {"SLURM_NTASKS": "1"}).note == "" == read_place({}).note


@pytest.mark.parametrize(
    "env, address",
    [
        (srun(1, 2, 1, "2"), "127.0.0.1"),
        (srun(1, 2, 1, "odd", SLURM_STEP_NUM_NODES="1"), "127.0.0.1"),
        (srun(1, 2, 0, "1(x2)", MASTER_ADDR="node-0"), None),
        (srun(1, 2, 0, "1(x2)"), ValueError),
        (ompi(1, 2, 1, 2), "127.0.0.1"),
        (ompi(1, 2, 0, 1), ValueError),
        (torch_env(1, 2, 1, LOCAL_WORLD_SIZE="2"), "127.0.0.1"),
        (torch_env(1, 2, 1), ValueError),
        (SBATCH | {"MASTER_ADDR": "node-0", "MASTER_PORT": "29500"}, "127.0.0.1"),
    ],
)
def test_where_the_ranks_meet(env, address):
    place = read_place(env)
    if address is ValueError:
        with pytest.raises(ValueError, match="MASTER_ADDR is not set: export it"):
            variables(place, env)
    else:
        assert variables(place, env).get("MASTER_ADDR") == address


def test_the_port_is_one_for_a_run_and_another_for_the_next():
    def port(env: dict[str, str]) -> int:
        return int(variables(read_place(env), env)["MASTER_PORT"])

    first = [port(srun(rank, 2, rank, "2")) for rank in range(2)]
    assert first[0] == first[1] != port(srun(0, 2, 0, "2") | {"SLURM_STEP_ID": "1"})
    assert port(ompi(0, 2, 0, 2)) == port(ompi(1, 2, 1, 2)) and 20000 <= first[0] < 32000
    assert port(hydra(1, 2, 1, 2)) == 29500
    for bad in ("0", "70000", "free"):
        with pytest.raises(ValueError, match="MASTER_PORT is"):
            variables(Place(1, 2, 1, 2), {"MASTER_PORT": bad})


def test_settling_sets_what_libraries_read_and_keeps_to_it():
    env = ompi(1, 2, 1, 2)
    place = settle(env)
    assert {n: env[n] for n in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")} == {
        "RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2",
    }  # fmt: skip
    before = dict(env)
    assert settle(env) == place and env == before
    use_first_device(env)  # its GPU is the only one that it sees
    assert env["LOCAL_RANK"] == env["OMPI_COMM_WORLD_LOCAL_RANK"] == "0"
    assert settle(env).local_rank == known_place(env).local_rank == 1


def test_a_rank_takes_its_own_gpu_or_the_only_one_that_it_sees():
    assert [device_index(3, 8), device_index(3, 1), device_index(0, 2)] == [3, 0, 0]
    with pytest.raises(ValueError, match="local rank 3 .* has no GPU: 2 are visible"):
        device_index(3, 2)
    # A group that somebody else has made: its device, the one that was set, or our own.
    assert devices.device_of_group(5, 0, 3, 8) == 5
    assert devices.device_of_group(None, 2, 3, 8) == 2
    assert devices.device_of_group(None, 0, 3, 8) == 3
    assert devices.device_of_group(None, 0, 3, 1) == 0


@pytest.mark.parametrize(
    "place, cores, share",
    [
        (Place(1, 4, 1, 4, "torch"), 16, 4),
        (Place(1, 4, 1, 4, "srun"), 4, 4),  # bound: four times four are the machine's 16
        (Place(1, 4, 1, 4, "srun"), 16, 4),
        (Place(1, 4, 1, None, "srun"), 16, 16),
        (Place(1, 32, 1, 32, "torch"), 16, 1),
    ],
)
def test_cores_are_shared_unless_each_rank_has_its_own(place, cores, share):
    assert core_share(cores, 16, place) == share


@pytest.mark.parametrize(
    "env, asked",
    [
        ({}, False),
        ({"DS_ACCELERATOR": "cpu"}, True),
        ({"DS_ACCELERATOR": "cuda"}, False),
        ({"CUDA_VISIBLE_DEVICES": ""}, True),
        ({"CUDA_VISIBLE_DEVICES": "-1"}, True),
        ({"CUDA_VISIBLE_DEVICES": "0,1"}, False),
    ],
)
def test_who_asks_for_the_cpu(env, asked):
    assert devices.told_to_use_cpu(env) == asked


def test_flags_that_ask_for_the_cpu(tmp_path):
    (tmp_path / "r.yaml").write_text("use_cpu: true\n")
    (tmp_path / "bad.yaml").write_bytes(b"[\xff")
    yes = [["--use_cpu"], ["--use_cpu", "true"], ["--use-cpu=True"], ["--no_cuda", "--x", "1"]]
    no = [[], ["--use_cpu", "false"], ["--config", str(tmp_path / "bad.yaml")], ["--config"]]
    for argv in [*yes, ["--config", str(tmp_path / "r.yaml")]]:
        assert devices.asks_for_cpu(argv), argv
    for argv in [*no, ["--config", str(tmp_path / "r.yaml"), "--use_cpu", "no"]]:
        assert not devices.asks_for_cpu(argv), argv


def test_a_gpu_that_does_not_work_is_no_reason_for_the_cpu(tmp_path):
    (tmp_path / "nvidia0").touch()
    files = (str(tmp_path / "nvidia[0-9]*"),)
    none = (str(tmp_path / "nothing*"),)
    assert devices.sign_of_gpu({}, none) is None
    assert devices.sign_of_gpu({"SLURM_GPUS_ON_NODE": "0"}, none) is None
    # What DeepSpeed's launcher sets on a machine without GPUs.
    assert devices.sign_of_gpu({"CUDA_VISIBLE_DEVICES": "0,1", "CROSS_SIZE": "1"}, none) is None
    assert devices.sign_of_gpu({}, files) == f"{tmp_path}/nvidia0 is there"
    assert devices.sign_of_gpu({"SLURM_JOB_GPUS": "2,3"}, none) == "SLURM_JOB_GPUS is 2,3"
    sign = devices.sign_of_gpu({"CUDA_VISIBLE_DEVICES": "0"}, none)
    old = "The NVIDIA driver on your system is too old\n(found version 12020)."
    text = devices.trouble_with_gpu("13.0", sign, old)
    assert text is not None and "\n" not in text
    assert "CUDA_VISIBLE_DEVICES is 0" in text and "too old (found version 12020);" in text
    assert "DS_ACCELERATOR=cpu" in text
    assert devices.trouble_with_gpu(None, sign, old) is None  # a build that knows no CUDA
    assert devices.trouble_with_gpu("13.0", None, "Found no NVIDIA driver") is None


def test_without_a_gpu_the_libraries_are_told(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: os.environ["CUDA_VISIBLE_DEVICES"] != "")
    for name, value in {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "0"}.items():
        monkeypatch.setenv(name, value)
    devices.settle_accelerator.cache_clear()
    try:
        assert devices.settle_accelerator() is None
        assert os.environ["CUDA_VISIBLE_DEVICES"] == ""  # or transformers would take it
    finally:
        devices.settle_accelerator.cache_clear()
