"""Recount a sparse model directory from its files alone, and say whether its record holds.

    python launch/verify.py DIR [--all]

Exit status: 0 if every live count, pattern and digest holds, 1 if any does not (each is named),
2 if there is nothing to check (no directory, no sparsity.json, damaged JSON).
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from seft_ds.checkpoint.verify import TargetCheck, VerifyResult, verify
from seft_ds.command_line import FlagParser
from seft_ds.console import run
from seft_ds.json_file import printable


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line, verify, print; returns the exit status."""
    parser = FlagParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("directory", help="a model directory that holds a sparsity.json")
    parser.add_argument("--all", action="store_true", help="a line for every tensor")
    try:
        options = parser.parse_args(arguments)
        result = verify(options.directory)
    except ValueError as error:
        print(f"error: {printable(str(error), 2000)}", file=sys.stderr)
        return 2
    print(table(result.targets, every=options.all))
    for problem in result.problems:
        print(f"wrong: {printable(problem, 2000)}")
    print(summary(result))
    return 0 if result.ok else 1


def projection_of(name: str) -> str:
    """`self_attn.q_proj` of `model.layers.3.self_attn.q_proj.weight`: what layers have in common."""
    name = name.removesuffix(".weight")
    return re.split(r"\.\d+\.", name)[-1]


def table(checks: list[TargetCheck], every: bool) -> str:
    """Counts as aligned text, a line per projection or (`every`) per tensor."""
    groups: dict[str, list[TargetCheck]] = {}
    for check in checks:
        groups.setdefault(check.name if every else projection_of(check.name), []).append(check)
    rows = [
        ("tensor" if every else "projection", "tensors", "weights", "live", "sparsity", "holds")
    ]
    for name, members in groups.items():
        live, total = sum(max(c.live, 0) for c in members), sum(c.total for c in members)
        bad = sum(bool(c.problems) for c in members)
        rows.append(
            (
                name,
                str(len(members)),
                str(total),
                str(live),
                f"{1 - live / max(total, 1):.4%}",
                "yes" if not bad else f"no ({bad})",
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0])] + [c.rjust(w) for c, w in zip(row[1:], widths[1:])])
        for row in rows
    )


def summary(result: VerifyResult) -> str:
    """One closing line."""
    counts = f"{result.live} of {result.total} target weights live"
    sparsity = f"sparsity {1 - result.live / max(result.total, 1):.4%}"
    verdict = "holds" if result.ok else f"DOES NOT HOLD ({len(result.problems)} problems)"
    pattern = printable(str(result.record.get("pattern")), 80)
    return f"{result.directory}: {counts}, {sparsity}, pattern {pattern}: {verdict}"


if __name__ == "__main__":
    sys.exit(run(main))
