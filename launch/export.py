"""Make a sparse model directory from a checkpoint, offline and on one process.

    python launch/export.py --checkpoint RUN/checkpoint-100 --output_dir DIR

At most one weight and one output shard are in memory. Exit status: 0, or 2 for a mistake in the input.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from seft_ds.checkpoint.from_checkpoint import export_checkpoint
from seft_ds.command_line import FlagParser
from seft_ds.console import run


def main() -> None:
    parser = FlagParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", required=True, help="RUN/checkpoint-N")
    parser.add_argument("--output_dir", required=True, help="where the model goes")
    parser.add_argument(
        "--model_name_or_path",
        help="the pruned model that the run started from, if it has moved since",
    )
    options = parser.parse_args()
    record = export_checkpoint(
        Path(options.checkpoint), Path(options.output_dir), options.model_name_or_path
    )
    print(
        f"wrote {options.output_dir}: {record['live']:,} live of {record['total']:,} target weights"
    )


if __name__ == "__main__":
    sys.exit(run(main))
