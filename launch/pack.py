"""Pack a sparse model for transport (a bit a weight, a value a live weight), and unpack it byte for byte.

    python launch/pack.py pack MODEL PACKED
    python launch/pack.py unpack PACKED MODEL

A few megabytes are in memory at a time, whatever the size of the model. Exit status: 0; 2 for a mistake in
the input, damage included; 1 if the disk is full or the like.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from seft_ds.checkpoint.packing import Packing, pack, unpack
from seft_ds.command_line import FlagParser
from seft_ds.console import run
from seft_ds.errors import RunError


def parser() -> FlagParser:
    """The command line."""
    top = FlagParser(description=(__doc__ or "").splitlines()[0])
    ways = top.add_subparsers(dest="way", required=True)
    for way, help_ in (("pack", "model folder to packed form"), ("unpack", "and back")):
        sub = ways.add_parser(way, help=help_)
        sub.add_argument("source", help="the folder to read")
        sub.add_argument("target", help="the folder to write, new or empty")
    return top


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser().parse_args(arguments)
    started = time.monotonic()
    try:
        done = (pack if options.way == "pack" else unpack)(options.source, options.target)
    except OSError as error:
        raise RunError(f"{options.target} can't be written ({error})") from error
    print(summary(options.way, options.target, done, time.monotonic() - started))


def summary(way: str, target: str, done: Packing, seconds: float) -> str:
    """What was written, in a line, and what was not."""
    before, after = done.model_bytes, done.packed_bytes
    if way == "unpack":
        before, after = after, before
    line = (
        f"{target}: {before:,} bytes became {after:,} ({after / before:.1%}) in {seconds:.1f} s; "
        f"{done.bits_a_weight:.2f} bits a sparse weight"
    )
    left_out = f"\nleft out: {', '.join(done.left_out)}" if done.left_out else ""
    return line + left_out


if __name__ == "__main__":
    sys.exit(run(main))
