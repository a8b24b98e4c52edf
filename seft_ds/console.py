"""What the launch scripts have in common: the fallback to CPU, the checks of a model folder, the way
that a mistake of the user is told.
"""

from __future__ import annotations

import atexit
import gc
import io
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import torch

from seft_ds.devices import choose_device
from seft_ds.errors import RunError
from seft_ds.launching import core_share, known_place, settle
from seft_ds.signals import Stopped, guard_process, guarded, say_stopped

WEIGHT_FILES = ("*.safetensors", "pytorch_model*.bin")
ADAPTER_NAME = "adapter_config.json"
# Copies of the weights in other formats, which some repositories hold beside them.
_NOT_WANTED = ["original/*", "*.pth", "*.gguf", "*.h5", "*.msgpack", "*.onnx", "onnx/*", "*.tflite"]


# Loggers of libraries, and how those of their lines begin that say nothing to a user.
_SAYING_NOTHING = {
    # The saved config is the source's own; only this process's copy is aligned.
    "transformers.trainer_utils": "The tokenizer has new PAD/BOS/EOS tokens",
}


def _says_something(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(_SAYING_NOTHING.get(record.name, "\0"))


@contextmanager
def frozen_imports() -> Iterator[None]:
    """Freeze what is imported inside for the garbage collector: later collections pass over it.

    DeepSpeed, transformers and the collector itself start many, and each would walk over a million objects:
    a third of the time of a short run.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
        atexit.register(gc.unfreeze)  # or nanobind, in Triton, takes them for leaks and says so


def prepare_device() -> torch.device:
    """Settle which rank this is and on which device it runs: its own GPU, or the CPU, which rank 0 says.

    Call it before anything imports transformers or DeepSpeed.

    Raises:
        ValueError: the launcher's variables leave something open, or there is a GPU that can't be used. On
            several ranks the latter is left to `init_ranks`, where they learn of it together.
    """
    place = settle()
    device, trouble = choose_device(place)
    if trouble and place.size == 1:
        raise ValueError(trouble)
    quiet_libraries()
    if device.type == "cuda":
        return device
    share_cores()
    if place.rank == 0:
        for line in (place.note, "" if trouble else "no GPU found: running on CPU"):
            if line:
                print(line, file=sys.stderr)
    return device


def quiet_libraries() -> None:
    """Silence what users can do nothing about, such as deprecations inside libraries; all but errors on
    other ranks than the first.
    """
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    for name in _SAYING_NOTHING:
        logging.getLogger(name).addFilter(_says_something)
    warnings.formatwarning = lambda message, *_, **__: (
        f"warning: {message}\n"
    )  # without our lines of code
    if not is_first_rank():  # which says the same
        warnings.simplefilter("ignore")
        for library in ("TRANSFORMERS", "DATASETS", "HF_HUB"):
            os.environ.setdefault(f"{library}_VERBOSITY", "error")
    if not is_first_rank() or not sys.stderr.isatty():  # a bar would be lines in a file
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # transformers' own too
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")


def share_cores() -> None:
    """Divide this machine's cores among its ranks, unless OMP_NUM_THREADS says otherwise.

    accelerate would give every rank all cores where the launcher doesn't announce LOCAL_WORLD_SIZE.
    """
    place = settle()
    os.environ.setdefault("LOCAL_WORLD_SIZE", str(place.local_size or 1))
    share = core_share(len(os.sched_getaffinity(0)), os.cpu_count() or 1, place)
    threads = os.environ.setdefault("OMP_NUM_THREADS", str(share)).split(",")[0]  # of nested levels
    torch.set_num_threads(int(threads) if threads.isdigit() and int(threads) else share)


def is_first_rank() -> bool:
    """Whether this process is rank 0, known before the ranks have met."""
    return known_place().rank == 0


# Called with the error that ends this rank. One tells the peers, and returns what to print instead of the
# traceback if the error only follows from the loss of a peer. A list, because what knows the peers
# (distributed/liveness.py) stands in a later layer.
on_failure: list[Callable[[BaseException], str | None]] = []


def run(main: Callable[[], int | None]) -> int:
    """Exit status of `main`: its own, or 2 after a ValueError and 1 after a RunError, each told in one line.

    ValueError is how this project tells users what to change, so its traceback would only hide the
    message. Every other error passes through with its traceback, unless it follows from the loss of a peer:
    then the process says which and ends here, with status 1. So it does after a signal, with 128 + n.
    """
    print_anything()
    was_guarded = guarded()  # by the script, which ends with this call
    guard = guard_process()
    if guard is not None:
        guard.clears_up = True
    try:
        status = main()
    except Stopped as stop:
        end_by_signal(stop)
    except (ValueError, RunError) as error:
        explain(error)
        tell(" ".join(str(error).split()))
        status = 2 if isinstance(error, ValueError) else 1
    except BaseException as error:
        if guard is not None and guard.pending:  # its peers got it too, and one was gone first
            end_by_signal(guard.pending)
        loss = explain(error)
        if loss is not None:
            # The line break first: a progress bar has left none.
            print(f"\nerror on rank {known_place().rank}: {loss}", file=sys.stderr)
            leave(1)
        raise
    finally:
        if guard is not None:
            guard.finished = True
            if not was_guarded:
                guard.close()
    return status or 0


def end_by_signal(stop: Stopped) -> NoReturn:
    """Say so in one line, tell the peers, and end."""
    explain(stop)
    say_stopped(str(stop))
    leave(stop.status)


def print_anything() -> None:
    """Let no character end the run that the terminal or log can't show: it is written as \\u20ac."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def explain(error: BaseException) -> str | None:
    """Tell the peers that this rank ends by `error`, or learn from which peer's loss it follows."""
    losses = [hook(error) for hook in list(on_failure)]
    return next((text for text in losses if text is not None), None)


def tell(text: str) -> None:
    """Print what ends the run, on the first rank of each machine."""
    place = known_place()
    if place.rank == 0:
        print(f"error: {text}", file=sys.stderr)
        return
    if place.local_rank == 0:  # a file that is missing on this machine only
        print(f"error on rank {place.rank}: {text}", file=sys.stderr)
    time.sleep(1)  # rank 0 prints before the launcher sees a failure and ends everybody


def leave(status: int) -> NoReturn:
    """End at once: the exit of a process group may wait for a peer that is lost."""
    for name in ("multiprocessing", "multiprocess"):  # the latter is of datasets
        module = sys.modules.get(name)
        for child in module.active_children() if module else []:
            child.terminate()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def model_folder(name: str) -> Path:
    """The folder of a model that is given as a folder or, where a hub can be reached, as a hub name.

    Raises:
        ValueError: a folder without config.json or weights, one that holds an adapter beside them, or a name
            that leads to none.
    """
    folder = Path(name)
    if not folder.is_dir():
        folder = _from_hub(name)
    if not (folder / "config.json").is_file():
        raise ValueError(f"{name} has no config.json; wanted the folder of a Hugging Face model")
    if not has_weights(folder):
        raise ValueError(
            f"{name} holds no weights ({' or '.join(WEIGHT_FILES)}); wanted the folder of a whole "
            "model, as save_pretrained writes it"
        )
    refuse_adapter(folder)
    return folder


def refuse_adapter(folder: Path) -> None:
    """ValueError for a folder with an adapter in it, of which nobody can tell whether it is merged."""
    if (folder / ADAPTER_NAME).is_file():
        raise ValueError(
            f"{folder} holds an adapter beside a whole model ({ADAPTER_NAME}), which transformers would put "
            "on top of it; if it is merged already, move its files away; if not, merge it first (peft: "
            "merge_and_unload)"
        )


def local_folder(name: str) -> Path | None:
    """The folder that a model was loaded from, by its path or by a hub name that was downloaded; or None."""
    from huggingface_hub import snapshot_download

    if os.path.isdir(name):
        return Path(name)
    if not name or name.startswith((".", "/", "~")) or name.count("/") > 1:
        return None
    try:
        return Path(snapshot_download(name, local_files_only=True))
    except Exception:  # the hub's errors have no common base; all mean that it is not here
        return None


def has_weights(folder: Path) -> bool:
    """Whether a folder has files of the names that hold a model's weights."""
    return any(any(folder.glob(pattern)) for pattern in WEIGHT_FILES)


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download

    # A hub name is "model" or "owner/model"; anything else was meant as a path.
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ValueError(f"there is no folder {name}; check --model_name_or_path")
    try:
        return Path(snapshot_download(name, ignore_patterns=_NOT_WANTED))
    except Exception as error:  # the hub's errors have no common base
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"{name} is neither a folder here nor a model that the hub gives ({reason}); "
            "pass the folder of a model"
        ) from error


def torch_dtype(name: str) -> torch.dtype | str:
    """The dtype that --dtype names; "auto" stays, and means the one that the files hold.

    Raises:
        ValueError: another name.
    """
    known: dict[str, torch.dtype | str] = {
        "auto": "auto",
        "float32": torch.float32,
        "bfloat16": torch.bfloat16,
    }
    if name not in known:
        raise ValueError(f"got --dtype {name}; wanted one of {', '.join(known)}")
    return known[name]
