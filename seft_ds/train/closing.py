"""What a run says of itself when it begins and when its model is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from seft_ds.report.card import write_model_card
from seft_ds.report.facts import facts_of
from seft_ds.report.journal import JOURNAL_NAME, read_journal
from seft_ds.report.page import write_report
from seft_ds.targets import Target


def sparsity_line(targets: list[Target]) -> str:
    """How sparse the targets are, and what trains, in a line."""
    live, total = sum(t.target_live for t in targets), sum(t.numel for t in targets)
    patterns = sorted({f"{p[0]}:{p[1]}" for t in targets if (p := t.pattern)}) or ["unstructured"]
    return (
        f"{len(targets)} sparse weights, {', '.join(patterns)}: {live:,} of {total:,} live "
        f"({1 - live / total:.2%} sparse)"
    )


def describe_targets(targets: list[Target]) -> str:
    slots, total = sum(t.n_slots for t in targets), sum(t.numel for t in targets)
    return f"{sparsity_line(targets)}; {slots:,} slots train ({slots / total:.2%})"


def finish(output: Path, record: dict[str, Any], run_dir: Path | None = None) -> None:
    """Write report and model card, and say where everything is.

    Args:
        output: the model's folder.
        run_dir: where the journal is; default: there too.
    """
    run_dir = run_dir or output
    report = write_report(run_dir)
    write_model_card(output, record, facts_of(read_journal(run_dir / JOURNAL_NAME)))
    print(
        f"{record['live']:,} of {record['total']:,} target weights are live, "
        f"{record['sparsity']:.4%} sparse, recounted from the files\n"
        f"model:   {output}\nreport:  {report}\njournal: {run_dir / JOURNAL_NAME}",
        flush=True,
    )
