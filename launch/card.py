"""Write a model's card anew, with what was measured of it since, and the report of its run.

    python launch/evaluate.py --model_name_or_path MODEL --text_file TEXT.txt --output_path RESULTS.json
    python launch/card.py MODEL --evaluation RESULTS.json [--before RESULTS_OF_THE_PRUNED_MODEL.json]

Exit status: 0, or 2 for a mistake in the input.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from seft_ds.checkpoint.verify import read_record
from seft_ds.command_line import FlagParser
from seft_ds.console import run
from seft_ds.json_file import read_object
from seft_ds.report.card import measured_in, write_model_card
from seft_ds.report.facts import facts_of
from seft_ds.report.journal import JOURNAL_NAME, read_journal
from seft_ds.report.page import write_report


def parser() -> FlagParser:
    """The command line."""
    found = FlagParser(description=(__doc__ or "").splitlines()[0])
    found.add_argument("folder", help="a sparse model or the directory of its run")
    found.add_argument("--evaluation", nargs="*", default=[], help="files of launch/evaluate.py")
    found.add_argument(
        "--before", nargs="*", default=[], help="the same of the model that this one was made from"
    )
    return found


def read_evaluation(path: Path) -> dict[str, Any]:
    """What launch/evaluate.py wrote. ValueError if nothing was measured in it."""
    results = read_object(path)
    if not measured_in(results):
        raise ValueError(
            f"{path}: nothing measured in it; give a file that launch/evaluate.py --output_path wrote"
        )
    return results


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser().parse_args(arguments)
    folder = Path(options.folder)
    record = read_record(folder)
    evaluations = [read_evaluation(Path(path)) for path in options.evaluation]
    before = [read_evaluation(Path(path)) for path in options.before]
    facts = None
    written = []
    if (folder / JOURNAL_NAME).is_file():
        facts = facts_of(read_journal(folder / JOURNAL_NAME))
        written.append(write_report(folder))
    written.append(write_model_card(folder, record, facts, evaluations, before))
    print("wrote " + " and ".join(str(path) for path in written))


if __name__ == "__main__":
    sys.exit(run(main))
