"""`report.html`: one file that tells a run, from its journal alone.

It opens without a network (figures, styles and all are inline, there is no script), follows the
reader's light or dark setting, and is readable at the width of a phone: wide tables scroll in their
own box. Everything that comes from the journal is escaped.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from seft_ds.report import plots
from seft_ds.report.facts import (
    CHURN_KEYS,
    Facts,
    by_projection,
    churn,
    deviations,
    facts_of,
    live_totals,
    number,
    per_step,
    total_weights,
)
from seft_ds.report.journal import JOURNAL_NAME, read_journal

REPORT_NAME = "report.html"
_MIB = 2**20

_CSS = """
:root { color-scheme: light dark; --paper:#fcfcfb; --ink:#1c2024; --soft:#5f6770; --line:#dfe2e6;
  --box:#f3f4f5; --c1:#2563b0; --c2:#c2410c; --c3:#15803d; --bad:#b42318; --good:#15803d; }
@media (prefers-color-scheme: dark) { :root { --paper:#15181b; --ink:#e6e8ea; --soft:#9aa3ac;
  --line:#30363c; --box:#1e2226; --c1:#6aa7f0; --c2:#f59e5b; --c3:#5cc489; --bad:#ff8a7a;
  --good:#5cc489; } }
* { box-sizing:border-box }
body { margin:0; background:var(--paper); color:var(--ink);
  font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif }
main { max-width:1180px; margin:0 auto; padding:24px 16px 64px }
h1 { font-size:1.5rem; margin:0; overflow-wrap:anywhere }
h2 { font-size:1.1rem; margin:2.2rem 0 .7rem; padding-top:.7rem; border-top:1px solid var(--line) }
p { margin:.35rem 0; max-width:75ch } .soft { color:var(--soft) }
.bad { color:var(--bad) } .good { color:var(--good) }
dl.facts { display:grid; grid-template-columns:repeat(auto-fill,minmax(158px,1fr)); gap:10px;
  margin:1.2rem 0 0 }
dl.facts > div { background:var(--box); border-radius:8px; padding:10px 12px }
dl.facts dt { color:var(--soft); font-size:.8rem } dl.facts dd { margin:0; font-weight:600;
  font-size:1.05rem; overflow-wrap:anywhere; font-variant-numeric:tabular-nums }
dl.facts small { display:block; font-weight:400; color:var(--soft); font-size:.8rem }
.figures { display:grid; grid-template-columns:repeat(auto-fit,minmax(min(100%,440px),1fr));
  gap:26px 40px }
figure { margin:0; min-width:0 } figure svg { display:block; width:100%; height:auto; max-width:560px }
figcaption { font-weight:600; font-size:.95rem } figcaption small { display:block; font-weight:400;
  color:var(--soft); font-size:.85rem; margin-bottom:4px }
.wide { overflow-x:auto; border:1px solid var(--line); border-radius:8px }
table { border-collapse:collapse; width:100%; font-size:.8rem; font-variant-numeric:tabular-nums }
th,td { padding:5px 8px; text-align:right; white-space:nowrap; border-bottom:1px solid var(--line) }
th:first-child,td:first-child { text-align:left } thead th { background:var(--box); font-weight:600 }
tbody tr:last-child td { border-bottom:0 } .narrow { max-width:420px }
pre { background:var(--box); border-radius:8px; padding:12px; font-size:.8rem; white-space:pre-wrap;
  overflow-wrap:anywhere; margin:.4rem 0 } summary { cursor:pointer; padding:.3rem 0 }
"""


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
    sections = [
        _headline(facts, title),
        _section("Course of the run", _figures(_course_figures(facts))),
        _section("Evolution of the topology", _evolution(facts)),
        _section("Targets", _targets(facts)),
        _section("How it was run", _circumstances(facts)),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}: sparse fine-tuning</title><style>{_CSS}</style></head>"
        f"<body><main>\n{''.join(sections)}</main></body></html>\n"
    )


def _headline(facts: Facts, title: str) -> str:
    model = str(facts.run.get("model") or "unknown model")
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
    for name, points in list(_evals(facts).items())[:3]:
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


Figure = tuple[str, str, str]  # caption, note, svg


def _course_figures(facts: Facts) -> list[Figure]:
    figures = []
    if facts.losses:
        svg = plots.loss_curve(facts.losses, _evals(facts))
        note = "training loss" + (", evaluations on the right-hand axis" if facts.evals else "")
        figures.append(("Loss", note, svg))
    updates = [(f["step"], number(f.get("largest_update"))) for f in facts.fresh]
    if updates:
        bounds = [(f["step"], 2 * number(f.get("learning_rate"))) for f in facts.fresh]
        over = sum(u > b for (_, u), (_, b) in zip(updates, bounds))
        note = f"in the step after an event; above the line in {over} of {len(updates)}"
        figures.append(("Fresh updates", note, plots.fresh_updates(updates, bounds)))
    return figures


def _evolution(facts: Facts) -> str:
    if not facts.events:
        return (
            "<p class='soft'>No event took place: the topology is the one the run started with.</p>"
        )
    off = deviations(facts)
    worst = max(abs(value) for _, value in off)
    note = "0 after every event" if not worst else f"up to {worst:,} weights off"
    figures = [("Live count", note, plots.live_deviation(off, facts.is_global))]
    seconds = per_step(facts.events, "seconds")
    sent = [(step, value / _MIB) for step, value in per_step(facts.events, "bytes")]
    figures.append(("Cost of events", "time and traffic per step", plots.event_cost(seconds, sent)))
    for key, note in (
        ("revived", "dead weights that came alive, over all events"),
        ("pruned", "live weights pruned to keep the count, over all events"),
    ):
        layers, projections, percent = churn(facts, key)
        if layers:
            svg = plots.churn_heatmap(layers, projections, percent, key)
            figures.append((key.capitalize(), note, svg))
    return _figures(figures)


def _targets(facts: Facts) -> str:
    rows = by_projection(facts)
    if not rows:
        return "<p class='soft'>The journal names no targets.</p>"
    counts = ["tensors", "weights", "live", "slots", "events", *CHURN_KEYS]
    total = {"projection": "all"} | {key: sum(row[key] for row in rows) for key in counts}
    cells = [
        [row["projection"], *(f"{row[key]:,}" for key in counts[:3]), _sparsity(row)]
        + [f"{row[key]:,}" for key in counts[3:]]
        for row in [*rows, total]
    ]
    head = ["projection", *counts[:2], "live", "sparsity", *counts[3:]]
    every = [
        [t["name"], "×".join(map(str, t.get("shape") or [])), f"{int(number(t.get('live'))):,}"]
        + [f"{int(number(t.get('slots'))):,}"]
        for t in facts.targets
    ]
    return (
        _table(head, cells)
        + f"<details><summary>All {len(every)} tensors at the start</summary>"
        + _table(["tensor", "shape", "live", "slots"], every)
        + "</details>"
    )


def _sparsity(row: dict[str, Any]) -> str:
    return f"{100 * (1 - row['live'] / row['weights']):.2f} %" if row["weights"] else ""


def _circumstances(facts: Facts) -> str:
    command = facts.run.get("command") or "not recorded"
    if isinstance(command, list):
        command = " ".join(map(str, command))
    hardware = {"hardware": facts.run["hardware"]} if facts.run.get("hardware") else {}
    versions = hardware | (facts.run.get("versions") or {})
    settings = {**(facts.run.get("config") or {}), **(facts.run.get("arguments") or {})}
    config = json.dumps(settings, indent=2, ensure_ascii=False)
    return (
        f"<p>Command</p><pre>{escape(str(command))}</pre>"
        + "<p>Environment</p>"
        + _table(["package", "version"], list(versions.items()) or [("none", "")], "wide narrow")
        + f"<details><summary>Resolved configuration</summary><pre>{escape(config)}</pre></details>"
    )


def _evals(facts: Facts) -> dict[str, list[tuple[int, float]]]:
    """{name: [(step, value)]} of the finite evaluation values."""
    out: dict[str, list[tuple[int, float]]] = {}
    for record in facts.evals:
        if record.get("value") is not None:
            out.setdefault(str(record.get("name")), []).append(
                (record["step"], number(record["value"]))
            )
    return out


def _section(title: str, body: str) -> str:
    return f"\n<section><h2>{escape(title)}</h2>{body}</section>"


def _figures(figures: list[Figure]) -> str:
    if not figures:
        return "<p class='soft'>Nothing was recorded yet.</p>"
    return "<div class='figures'>" + "".join(map(_figure, figures)) + "</div>"


def _figure(figure: Figure) -> str:
    caption, note, svg = figure
    note = f"<small>{escape(note)}</small>"
    return f"<figure><figcaption>{escape(caption)}{note}</figcaption>{svg}</figure>"


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]], css: str = "wide") -> str:
    top = "".join(f"<th>{escape(name)}</th>" for name in head)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f"<div class='{css}'><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>"


def duration(seconds: float) -> str:
    """1.2 s, 3 min 20 s, 2 h 5 min."""
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60:,} h {minutes % 60} min"


def size_text(size_bytes: float) -> str:
    """A size in the unit that suits it: B, KiB, MiB or GiB."""
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if size_bytes >= factor:
            return f"{size_bytes / factor:.3g} {unit}"
    return f"{size_bytes:.0f} B"
