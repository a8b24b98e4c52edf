"""The parts of the report: each takes the facts of a run and gives HTML."""

from __future__ import annotations

import json
import shlex
from html import escape
from typing import Any

from seft_ds.report import plots
from seft_ds.report.facts import (
    CHURN_KEYS,
    Facts,
    by_projection,
    churn,
    deviations,
    eval_points,
    memory_rows,
    number,
    overlap,
    per_step,
    update_sizes,
)
from seft_ds.report.heatmap import Number, heatmap, numbers_table
from seft_ds.report.markup import Figure, duration, figures, size_text, table

_MIB = 2**20


def course(facts: Facts) -> list[Figure]:
    """Loss, evaluations, and the first updates of fresh slots."""
    found = []
    if facts.losses:
        svg = plots.loss_curve(facts.losses, eval_points(facts))
        note = "training loss" + (", evaluations on the right-hand axis" if facts.evals else "")
        found.append(("Loss", note, svg))
    updates = [(f["step"], number(f.get("largest_update"))) for f in facts.fresh]
    if updates:
        bounds = [(f["step"], 2 * number(f.get("learning_rate"))) for f in facts.fresh]
        over = sum(u > b for (_, u), (_, b) in zip(updates, bounds))
        note = f"in the step after an event; above the line in {over} of {len(updates)}"
        found.append(("Fresh updates", note, plots.fresh_updates(updates, bounds)))
    return found


def evolution(facts: Facts) -> str:
    """What events and exchanges changed, where, and what they cost."""
    shown: list[Figure] = []
    before = ""
    if facts.events:
        before = _exchanges(facts)
        shown += _events(facts)
    else:
        before = (
            "<p class='soft'>No event took place: the topology is the one the run started with.</p>"
        )
    unreached = facts.end.get("unreached")
    if isinstance(unreached, str):
        before += f"<p>{escape(unreached[:1].upper() + unreached[1:])}.</p>"
    layers, projections, sizes = update_sizes(facts)
    if layers:
        note = "root mean square of what the slots held at the end have learnt"
        least = min(value for row in sizes for value in row)
        shown.append(_heatmap("Update sizes", note, layers, projections, sizes, _scientific, least))
    return before + (figures(shown) if shown else "")


def _events(facts: Facts) -> list[Figure]:
    off, last = deviations(facts), facts.last_step
    worst = max((abs(value) for _, value in off), default=0)
    note = "0 after every event" if not worst else f"up to {worst:,} weights off"
    shown = [("Live count", note, plots.live_deviation(off, facts.is_global, last))] if off else []
    shares = overlap(facts)
    if shares:
        note = f"{100 * shares[-1][1]:.2f} % of the weights that were live at the start are live at the end"
        shown.append(("Overlap with the first mask", note, plots.mask_overlap(shares, last)))
    for key, note in (
        ("revived", "dead weights that came alive, over all events, in % of the live ones"),
        ("pruned", "live weights pruned to keep the count, over all events, in % of the live ones"),
    ):
        layers, projections, percent = churn(facts, key)
        if layers:
            shown.append(_heatmap(key.capitalize(), note, layers, projections, percent, _percent))
    seconds = per_step(facts.events, "seconds")
    sent = [(step, value / _MIB) for step, value in per_step(facts.events, "bytes")]
    if len(seconds) > 1:
        note = "time and traffic of each step that had any"
        shown.append(("Cost of events", note, plots.event_cost(seconds, sent, last)))
    return shown


def _heatmap(
    caption: str,
    note: str,
    layers: list[int],
    projections: list[str],
    values: list[list[float]],
    written: Number,
    least: float = 0.0,
) -> Figure:
    head, rows = numbers_table(layers, projections, values, written)
    below = f"<details><summary>Numbers</summary>{table(head, rows)}</details>"
    what = f"{caption}, {note}"
    return caption, note, heatmap(layers, projections, values, what, written, least) + below


def _percent(value: float) -> str:
    return f"{value:.3g} %"


def _scientific(value: float) -> str:
    return f"{value:.2e}" if value else "0"


def _exchanges(facts: Facts) -> str:
    """A row an exchange, where there were any."""
    if not facts.exchanges:
        return ""
    keys = ("exchanged", "most", "paying")
    rows = [
        [f"{e['step']:,}", *(f"{int(number(e.get(key))):,}" for key in keys)]
        + [duration(number(e.get("seconds"))), size_text(number(e.get("bytes")))]
        for e in facts.exchanges
    ]
    return (
        "<p>Exchanges: pruned weights that came back with the dense model's values, for as many live ones "
        "that were worth less.</p>"
        + table(
            ["step", "exchanged", "at most", "would have paid", "time", "traffic"],
            rows,
            "wide half",
        )
    )


def memory(facts: Facts) -> str:
    """The plan beside what was measured, a row a part."""
    rows = memory_rows(facts)
    if not rows:
        return "<p class='soft'>Not recorded: it is measured when training ends.</p>"
    most = max([value for row in rows for value in row[1:] if value] or [1.0])
    body = ""
    for part, planned, measured in rows:
        cells = "".join(f"<td>{_size(value)}</td>" for value in (planned, measured))
        bars = _bar("planned", planned, most) + _bar("measured", measured, most)
        body += f"<tr><td>{escape(part)}</td>{cells}<td class='bars' aria-hidden='true'>{bars}</td></tr>"
    peak = number(facts.memory.get("peak_bytes"))
    of = escape(str(facts.memory.get("peak_of") or "process"))
    note = f" Peak of the {of}: {size_text(peak)}." if peak else ""
    head = "".join(f"<th scope='col'>{name}</th>" for name in ("part", "planned", "measured", ""))
    return (
        "<p>Of rank 0, the most that each part held. Parts that come and go within a step are planned as "
        f"estimates and not measured one by one.{note}</p>"
        "<p class='soft'><span class='bar planned key'></span> planned "
        "<span class='bar measured key'></span> measured</p>"
        f"<div class='wide half' tabindex='0'><table><thead><tr>{head}</tr></thead>"
        f"<tbody>{body}</tbody></table></div>"
    )


def _size(value: float | None) -> str:
    return "–" if value is None else size_text(value)


def _bar(kind: str, value: float | None, most: float) -> str:
    return (
        ""
        if value is None
        else f"<i class='bar {kind}' style='width:{100 * value / most:.2f}%'></i>"
    )


def targets(facts: Facts) -> str:
    """Counts per projection, and every weight as it was at the start."""
    rows = by_projection(facts)
    if not rows:
        return "<p class='soft'>The journal names no targets.</p>"
    counts = ["tensors", "weights", "live", "live_after", "slots", "events", *CHURN_KEYS]
    total = {"projection": "all"} | {key: sum(row[key] for row in rows) for key in counts}
    cells = [
        [row["projection"], *(f"{row[key]:,}" for key in counts[:4]), _sparsity(row)]
        + [f"{row[key]:,}" for key in counts[4:]]
        for row in [*rows, total]
    ]
    head = [
        "projection",
        "tensors",
        "weights",
        "live, first",
        "live, last",
        "sparsity, last",
        *counts[4:],
    ]
    every = [
        [t["name"], "×".join(map(str, t.get("shape") or [])), f"{int(number(t.get('live'))):,}"]
        + [f"{int(number(t.get('slots'))):,}"]
        for t in facts.targets
    ]
    return (
        table(head, cells)
        + f"<details><summary>All {len(every)} tensors at the start</summary>"
        + table(["tensor", "shape", "live", "slots"], every)
        + "</details>"
    )


def _sparsity(row: dict[str, Any]) -> str:
    return f"{100 * (1 - row['live_after'] / row['weights']):.2f} %" if row["weights"] else ""


def circumstances(facts: Facts) -> str:
    """The command to start it again, what it ran on, and every setting."""
    run = facts.run
    command = run.get("command") or "not recorded"
    if isinstance(command, list):
        command = " ".join(map(str, command))
    hardware = {"hardware": run["hardware"]} if run.get("hardware") else {}
    machine = run["machine"] if isinstance(run.get("machine"), dict) else {}
    versions = hardware | machine | (run.get("versions") or {})
    started = f" It was started at {escape(str(run['time']))}." if run.get("time") else ""
    own = {**(run.get("config") or {}), **(run.get("arguments") or {})}
    settings = [("Settings of the method and of training", own)]
    if run.get("resolved"):
        settings.append(("Everything that was set, defaults included", run["resolved"]))
    return (
        f"<p>The command that runs it again, from the same folder.{started}</p>"
        f"<pre>{escape(in_lines(str(command)))}</pre><p>Environment</p>"
        + table(["what", "is"], list(versions.items()) or [("none", "")], "wide half text")
        + "".join(_details(title, value) for title, value in settings)
    )


def in_lines(command: str) -> str:
    """A command with a line for each flag, as a shell takes it; unchanged if its quotes don't match."""
    try:
        words = shlex.split(command)
    except ValueError:
        return command
    lines: list[list[str]] = [[]]
    for word in words:
        if word.startswith("--") and any(w.endswith(".py") for w in lines[0]):
            lines.append([])
        lines[-1].append(word)
    return " \\\n  ".join(map(shlex.join, lines))


def _details(title: str, value: Any) -> str:
    text = json.dumps(value, indent=2, ensure_ascii=False)
    return f"<details><summary>{escape(title)}</summary><pre>{escape(text)}</pre></details>"
