"""Which device a rank runs on.

A GPU that is there and doesn't work is an error: on the CPU in its place a run would take weeks.
"""

from __future__ import annotations

import functools
import glob
import os
import re
from collections.abc import Mapping
from pathlib import Path

import torch

from seft_ds.launching import Place, device_index, use_first_device

CPU = "cpu"
HIDDEN = ("", "-1", "none", "NoDevFiles")  # values of CUDA_VISIBLE_DEVICES that show no GPU
_YES = ("true", "t", "yes", "y", "1")
_DEVICE_FILES = ("/dev/nvidiactl", "/dev/nvidia[0-9]*")
_SLURM_NAMES = ("SLURM_JOB_GPUS", "SLURM_STEP_GPUS", "SLURM_GPUS_ON_NODE")


def told_to_use_cpu(env: Mapping[str, str]) -> bool:
    """Whether the user asked for the CPU, or hid the GPUs."""
    if env.get("DS_ACCELERATOR") == CPU:
        return True
    devices = env.get("CUDA_VISIBLE_DEVICES")
    return devices is not None and devices.split(",")[0].strip() in HIDDEN


def asks_for_cpu(argv: list[str]) -> bool:
    """Whether a recipe or a flag says --use_cpu, or --no_cuda as it was called.

    Asked before the flags are read, since what reads them imports DeepSpeed; mistakes are told there.
    """
    asked, by_flag = False, False
    for word, after in zip(argv, [*argv[1:], "--"]):
        flag, equals, value = word.partition("=")
        value = value if equals else after
        if flag == "--config" and not by_flag:
            asked = _recipe_asks(Path(value))
        elif flag.replace("-", "_") in ("__use_cpu", "__no_cuda"):
            asked, by_flag = value.startswith("--") or value.lower() in _YES, True
    return asked


def _recipe_asks(path: Path) -> bool:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError):
        return False
    found = re.findall(r"^[\"']?(?:use_cpu|no_cuda)[\"']?:\s*(\w+)", text, flags=re.MULTILINE)
    return bool(found) and found[-1].lower() in _YES


def sign_of_gpu(env: Mapping[str, str], files: tuple[str, ...] = _DEVICE_FILES) -> str | None:
    """What says that this machine, or the scheduler, gives this process a GPU; None if nothing does."""
    # DeepSpeed's launch.py numbers devices for its ranks even where there are none.
    if env.get("CUDA_VISIBLE_DEVICES") and "CROSS_SIZE" not in env:
        return f"CUDA_VISIBLE_DEVICES is {env['CUDA_VISIBLE_DEVICES']}"
    for name in _SLURM_NAMES:
        if env.get(name, "") not in ("", "0"):
            return f"{name} is {env[name]}"
    found = sorted(path for pattern in files for path in glob.glob(pattern))
    return f"{found[0]} is there" if found else None


def trouble_with_gpu(cuda_build: str | None, sign: str | None, driver: str) -> str | None:
    """Why the CPU must not take the place of a GPU that doesn't work; None if there is no sign of one.

    Args:
        cuda_build: the CUDA version that torch was built for.
        sign: see `sign_of_gpu`.
        driver: what the driver says.
    """
    if cuda_build is None or sign is None:
        return None
    said = " ".join(driver.split()).rstrip(".")
    return (
        f"{sign}, but torch (built for CUDA {cuda_build}) can't use a GPU: {said or 'no reason given'}; mend "
        "that, or set DS_ACCELERATOR=cpu to run on the CPU"
    )


def driver_text() -> str:
    """What CUDA says when it is started."""
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return str(error)
    return ""


@functools.cache
def settle_accelerator() -> str | None:
    """Decide between GPU and CPU before anything imports DeepSpeed, which chooses once.

    Returns why the CPU must not be taken, or None. Call it before anything else asks torch for a GPU.
    """
    if told_to_use_cpu(os.environ):
        os.environ["CUDA_VISIBLE_DEVICES"] = (
            ""  # for transformers and accelerate, which look for a GPU
        )
        os.environ.setdefault("DS_ACCELERATOR", CPU)
        return None
    if torch.cuda.is_available():
        return None
    os.environ.setdefault("DS_ACCELERATOR", CPU)
    return trouble_with_gpu(torch.version.cuda, sign_of_gpu(os.environ), driver_text())


def choose_device(place: Place) -> tuple[torch.device, str | None]:
    """This rank's device, set as torch's current one, and why the run can't go on, or None.

    DeepSpeed and accelerate will take the same one.
    """
    trouble = settle_accelerator()
    if not torch.cuda.is_available():
        return torch.device(CPU), trouble
    try:
        index = device_index(place.local_rank, torch.cuda.device_count())
    except ValueError as error:
        return torch.device("cuda", 0), str(error)
    if index != place.local_rank:
        use_first_device()
    device = torch.device("cuda", index)
    torch.cuda.set_device(device)
    return device, None


def device_of_group(bound: int | None, current: int, local_rank: int, visible: int) -> int:
    """The GPU of a rank whose group is there: the one that it is bound to, the one that was set, or its own.

    Args:
        bound: of the group; None: it isn't bound to one.
        current: torch's current device; 0 if nobody set one.
    """
    if bound is not None:
        return bound
    return current or device_index(local_rank, visible)
