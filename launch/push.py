"""Push a sparse model, or its packed form, to a model hub; recounted before it leaves.

    python launch/push.py MODEL --repo_id OWNER/NAME [--public] [--with_report]

Needs a hub and a token that may write (`hf auth login`, or HF_TOKEN; HF_ENDPOINT for another hub).
Exit status: 0; 2 for a mistake in the input or a model that does not hold; 1 if the hub refuses.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from seft_ds.checkpoint.hub import files_to_push, push
from seft_ds.command_line import FlagParser
from seft_ds.console import run


def parser() -> FlagParser:
    """The command line."""
    found = FlagParser(description=(__doc__ or "").splitlines()[0])
    found.add_argument("folder", help="a sparse model, or its packed form")
    found.add_argument("--repo_id", required=True, help="OWNER/NAME")
    found.add_argument("--revision", help="a branch, made if it is not there")
    found.add_argument(
        "--public", action="store_true", help="if the repository is made: for all to see"
    )
    found.add_argument(
        "--with_report", action="store_true", help="report.html and journal.jsonl too"
    )
    found.add_argument("--message", default="Sparse model", help="of the commit")
    found.add_argument("--dry_run", action="store_true", help="only check, and list the files")
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser().parse_args(arguments)
    folder = Path(options.folder)
    if options.dry_run:
        print("\n".join(files_to_push(folder, options.with_report)))
        return
    where = push(
        folder, options.repo_id, private=not options.public, revision=options.revision,
        with_report=options.with_report, message=options.message,
    )  # fmt: skip
    print(f"pushed {folder} to {where}")


if __name__ == "__main__":
    sys.exit(run(main))
