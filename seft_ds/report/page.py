"""`report.html`: one file that tells a run, from its journal alone.

It opens without a network (figures, styles and all are inline, there is no script), follows the
reader's light or dark setting, and is readable at the width of a phone: wide tables scroll in their
own box. Everything that comes from the journal is escaped, and the page's own policy forbids a browser to
load or run anything.
"""

from __future__ import annotations

from html import escape
from pathlib import Path

from seft_ds.report import sections
from seft_ds.report.facts import (
    Facts,
    base_name,
    deviations,
    eval_points,
    facts_of,
    live_totals,
    number,
    total_weights,
)
from seft_ds.report.journal import JOURNAL_NAME, read_journal
from seft_ds.report.markup import CSS, duration, figures, section, size_text

REPORT_NAME = "report.html"
# Nothing from outside, no scripts; styles are inline, and the icon is an empty data URL, because a browser
# would ask a server for one.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"


def write_report(run_dir: str | Path) -> Path:
    """Write `report.html` into a run directory from its journal; returns the file's path.

    Raises ValueError if there is no journal or it is damaged before its last line.
    """
    run_dir = Path(run_dir)
    facts = facts_of(read_journal(run_dir / JOURNAL_NAME))
    path = run_dir / REPORT_NAME
    path.write_text(page(facts, run_dir.resolve().name), encoding="utf-8")
    return path


def page(facts: Facts, title: str) -> str:
    """The whole HTML document."""
    parts = [
        _headline(facts, title),
        section("Course of the run", figures(sections.course(facts))),
        section("Evolution of the topology", sections.evolution(facts)),
        section("Memory", sections.memory(facts)),
        section("Targets", sections.targets(facts)),
        section("How it was run", sections.circumstances(facts)),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<link rel="icon" href="data:,">'
        f"<title>{escape(title)}: sparse fine-tuning</title><style>{CSS}</style></head>"
        f"<body><main>\n{''.join(parts)}</main></body></html>\n"
    )


def _headline(facts: Facts, title: str) -> str:
    model = base_name(str(facts.run.get("model") or "unknown model"))
    cells = [_live_cell(facts), _loss_cell(facts), *_eval_cells(facts), *_time_cells(facts)]
    boxes = "".join(
        f'<div><dt>{escape(name)}</dt><dd class="{tone}">{escape(value)}'
        f"<small>{escape(note)}</small></dd></div>"
        for name, value, note, tone in [_sparsity_cell(facts), *cells, _setup_cell(facts)]
    )
    state = "" if facts.end else " The run has not ended, or it was cut off."
    resumed = f" Started {facts.starts} times." if facts.starts > 1 else ""
    return (
        f"<h1>{escape(title)}</h1><p class='soft'>Sparsity evolution fine-tuning of "
        f"<strong>{escape(model)}</strong>.{resumed}{state}</p><dl class='facts'>{boxes}</dl>"
    )


Cell = tuple[str, str, str, str]  # name, value, note, CSS class


def _sparsity_cell(facts: Facts) -> Cell:
    live, _ = live_totals(facts)
    total = total_weights(facts)
    if live is None or not total:
        return "Sparsity", "unknown", "no targets in the journal", ""
    return "Sparsity", f"{100 * (1 - live / total):.3f} %", f"of {total:,} target weights", ""


def _live_cell(facts: Facts) -> Cell:
    live, target = live_totals(facts)
    if live is None or target is None:
        return "Live count", "unknown", "", ""
    off_events = sum(off != 0 for _, off in deviations(facts))
    if live == target and not off_events:
        also = ", after every event too" if facts.events else ""
        return "Live count exact", "yes", f"{live:,} of {target:,}{also}", "good"
    return "Live count exact", "no", f"{live:,} of {target:,}; {off_events} steps off", "bad"


def _loss_cell(facts: Facts) -> Cell:
    losses = facts.losses
    if not losses:
        return "Training loss", "none", "no step with a loss", ""
    lost = facts.steps_not_finite
    note = f"step {losses[0][0]:,} to {losses[-1][0]:,}"
    if lost:
        return "Training loss", f"{losses[0][1]:.4g} → ?", f"not finite in {lost} steps", "bad"
    return "Training loss", f"{losses[0][1]:.4g} → {losses[-1][1]:.4g}", note, ""


def _eval_cells(facts: Facts) -> list[Cell]:
    cells = []
    for name, points in list(eval_points(facts).items())[:3]:
        value = (
            f"{points[0][1]:.4g} → {points[-1][1]:.4g}"
            if len(points) > 1
            else f"{points[0][1]:.4g}"
        )
        cells.append((name, value, f"at step {points[-1][0]:,}", ""))
    return cells


def _time_cells(facts: Facts) -> list[Cell]:
    tokens = sum(number(s.get("tokens")) for s in facts.steps)
    speed = f"{tokens / facts.seconds:,.0f} tokens/s" if tokens and facts.seconds else ""
    share = 100 * facts.event_seconds / facts.seconds if facts.seconds else 0.0
    each = facts.event_bytes / max(len(facts.events), 1)
    spent = duration(facts.event_seconds)
    return [
        ("Time", duration(facts.seconds), f"{facts.last_step:,} steps, {speed}".rstrip(", "), ""),
        (
            "Time in events",
            f"{share:.1f} %",
            f"{spent}, {facts.changes('event') or '0 events'}",
            "",
        ),
        (
            "Traffic of events",
            size_text(facts.event_bytes),
            f"{size_text(each)} an event",
            "",
        ),
    ]


def _setup_cell(facts: Facts) -> Cell:
    run = facts.run
    ranks = run.get("ranks")
    value = "unknown" if ranks is None else f"{ranks} rank" + ("" if ranks == 1 else "s")
    stage = run.get("zero_stage")
    parts = ["" if stage is None else f"ZeRO-{stage}", str(run.get("dtype") or "")]
    return "Ran on", value, ", ".join(part for part in parts if part), ""
