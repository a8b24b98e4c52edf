"""A sparse model to a model hub: what of a run directory belongs to the model, checked before it leaves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from seft_ds.checkpoint.export import is_side_file
from seft_ds.checkpoint.packing import is_packed, packed_problems
from seft_ds.checkpoint.verify import RECORD_NAME, verify
from seft_ds.errors import RunError
from seft_ds.json_file import printable
from seft_ds.tensor_files import INDEX_NAME

CARD_NAME = "README.md"
REPORT_FILES = ("report.html", "journal.jsonl")


def files_to_push(folder: Path, with_report: bool = False) -> list[str]:
    """Relative names of a model's own files, or of all files of a packed model.

    A run directory's checkpoints, settings and logs stay here; they may hold paths of this machine, as do
    the report and the journal, which go along only if asked for.

    Raises:
        ValueError: no sparse model, or one that does not hold: the tensor or file is named.
    """
    if is_packed(folder):
        problems = packed_problems(folder)
        names = [p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()]
    else:
        problems = verify(folder).problems
        names = [p.name for p in folder.iterdir() if p.is_file() and _is_of_model(p, with_report)]
    if problems:
        shown = "; ".join(printable(p, 200) for p in problems[:3])
        raise ValueError(f"{folder} does not hold, so it is not pushed: {shown}")
    return sorted(names)


def push(
    folder: Path,
    repo_id: str,
    *,
    private: bool = True,
    revision: str | None = None,
    with_report: bool = False,
    message: str = "Sparse model",
) -> str:
    """Upload to a hub that `huggingface_hub` is set up for (HF_ENDPOINT, HF_TOKEN); returns the address.

    The repository is made if it is not there. All files arrive in one commit.

    Raises:
        ValueError: a folder that does not hold, or a name that no repository can have.
        RunError: the hub can't be reached, or refuses.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    names = files_to_push(folder, with_report)
    api = HfApi()
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        done: Any = api.upload_folder(
            repo_id=repo_id, folder_path=folder, allow_patterns=[_literal(n) for n in names],
            revision=revision, commit_message=message,
        )  # fmt: skip
    except HFValidationError as error:
        raise ValueError(f"--repo_id {repo_id}: wanted OWNER/NAME ({error})") from None
    except (HfHubHTTPError, OSError) as error:  # connection errors are OSErrors, or httpx's own
        raise _refused(repo_id, error) from error
    except Exception as error:
        if type(error).__module__.startswith("httpx"):
            raise _refused(repo_id, error) from error
        raise
    return str(getattr(done, "commit_url", done))


def _refused(repo_id: str, error: Exception) -> RunError:
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return RunError(
        f"{repo_id} was not pushed ({reason}); log in with `hf auth login`, or set HF_TOKEN and, for "
        "another hub, HF_ENDPOINT"
    )


def _is_of_model(path: Path, with_report: bool) -> bool:
    name = path.name
    if name.startswith("."):
        return False
    weights = name.startswith("model") and path.suffix == ".safetensors"
    own = name in (INDEX_NAME, RECORD_NAME, CARD_NAME) or is_side_file(name)
    return weights or own or (with_report and name in REPORT_FILES)


def _literal(name: str) -> str:
    """A name as a pattern that matches nothing else."""
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)
