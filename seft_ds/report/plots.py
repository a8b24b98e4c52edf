"""Figures as inline SVG text that takes its colours from the page, so that light and dark both work.

matplotlib draws with marker colours, which are then replaced by CSS: lines of text and axes become
`currentColor`, series become `var(--c1)` ... Text stays text, in the page's own font. Figures are
drawn at about the width of a phone, so that their text is readable there without zooming.
"""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Mapping, Sequence
from io import StringIO
from typing import Any

# Marker colours, unlikely to be produced by anything else, and what the page makes of them.
INK, ONE, TWO, THREE = "#0a0b0c", "#0a0b01", "#0a0b02", "#0a0b03"
_CSS = {INK: "currentColor", ONE: "var(--c1)", TWO: "var(--c2)", THREE: "var(--c3)"}
_WIDTH_INCHES = 4.4
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "seft",
    "font.size": 9,
    "font.family": "sans-serif",
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.facecolor": "none",
    "axes.formatter.useoffset": False,
    "figure.facecolor": "none",
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": INK,
    "grid.alpha": 0.12,
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.6,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "text.parse_math": False,  # names of weights and tasks may hold a $
}
_MOST_POINTS = 1500
# Legends stand above their figure, where they hide nothing.
_ABOVE: dict[str, Any] = {
    "loc": "lower left", "bbox_to_anchor": (0, 1), "ncols": 2, "borderaxespad": 0, "columnspacing": 1,
}  # fmt: skip
Points = Sequence[tuple[int, float]]


def loss_curve(losses: Points, evals: Mapping[str, Points]) -> str:
    """Training loss over steps, its running mean, and evaluation values on an axis of their own."""

    def draw(figure: Any) -> None:
        axes = _axes(figure, "step", "training loss")
        steps, values = zip(*thin(losses))
        many = len(losses) > 30
        axes.plot(
            steps, values, color=ONE, alpha=0.35 if many else 1, lw=1, marker="" if many else "."
        )
        if many:
            axes.plot(*zip(*thin(running_mean(losses))), color=ONE, label="running mean")
        shown = dict(list(evals.items())[:3])  # more would not be told apart
        if shown:
            right = axes.twinx()
            right.spines["right"].set_visible(True)
            for (name, points), color in zip(shown.items(), (TWO, THREE, INK)):
                right.plot(*zip(*points), color=color, marker="o", ms=4, lw=1, ls="--", label=name)
            right.set_ylabel(next(iter(shown)) if len(shown) == 1 else "evaluations")
            lines = [axes.get_lines()[-1], *right.get_lines()]
            axes.legend(lines, ["training loss", *shown], **_ABOVE)

    return _svg(draw, "loss", "Training loss over steps, with evaluations")


def live_deviation(points: Points, is_global: bool, last_step: int) -> str:
    """Live weights minus target after each step with events, over the whole run."""

    def draw(figure: Any) -> None:
        axes = _axes(figure, "step", "live − target (weights)")
        axes.axhline(0, color=TWO, lw=1, ls="--", label="target")
        what = "sum over all weights" if is_global else "weight furthest off"
        axes.plot(*zip(*thin(points)), color=ONE, marker=".", ms=4, lw=1, label=what)
        reach = max(1, *(abs(value) for _, value in points)) * 1.25
        axes.set_xlim(0, last_step)
        axes.set_ylim(-reach, reach)
        axes.legend(**_ABOVE)

    return _svg(draw, "live", "Live weights minus target after every event")


def mask_overlap(points: Sequence[tuple[int, float]], last_step: int) -> str:
    """Share of the first live weights that are live still, in %, over the whole run."""

    def draw(figure: Any) -> None:
        axes = _axes(figure, "step", "% of the first mask")
        steps, shares = zip(*thin(points))
        percent = [100 * s for s in shares]
        axes.step([*steps, last_step], [*percent, percent[-1]], where="post", color=ONE)
        axes.plot(steps, percent, color=ONE, ls="", marker=".", ms=4)
        axes.set_xlim(0, last_step)
        low = 100 * min(shares)
        axes.set_ylim(max(0.0, low - 0.15 * (100 - low) - 0.1), 100 + 0.05 * (100 - low) + 0.05)

    return _svg(draw, "overlap", "Share of the first live weights that are live after each event")


def fresh_updates(updates: Points, bounds: Points) -> str:
    """Largest update of a fresh slot in the step after an event, against 2 x learning rate."""

    def draw(figure: Any) -> None:
        axes = _axes(figure, "step", "update size")
        axes.plot(*zip(*thin(bounds)), color=TWO, lw=1.2, ls="--", label="2 × learning rate")
        axes.plot(
            *zip(*thin(updates)), color=ONE, ls="", marker=".", ms=5, label="largest fresh update"
        )
        axes.set_ylim(bottom=0)
        axes.legend(**_ABOVE)

    return _svg(draw, "fresh", "Largest fresh update against twice the learning rate")


def event_cost(seconds: Points, mebibytes: Points, last_step: int) -> str:
    """Time and traffic of the events, per step that had any."""

    def draw(figure: Any) -> None:
        above, below = figure.subplots(2, 1, sharex=True)
        for axes, points, color, label in (
            (above, seconds, ONE, "seconds"),
            (below, mebibytes, THREE, "MiB"),
        ):
            axes.grid(True)
            axes.plot(*zip(*thin(points)), color=color, marker=".", ms=3, lw=1)
            axes.set_ylabel(label)
            axes.set_ylim(bottom=0)
        below.set_xlim(0, last_step)
        below.xaxis.get_major_locator().set_params(integer=True)
        below.set_xlabel("step")

    return _svg(draw, "cost", "Seconds and MiB of events per step", 3.2)


def thin(points: Points, most: int = _MOST_POINTS) -> list[tuple[float, float]]:
    """At most `most` points: means of equal runs of neighbours, or the points themselves."""
    run = -(-len(points) // most)
    if run <= 1:
        return [(float(x), float(y)) for x, y in points]
    blocks = [points[i : i + run] for i in range(0, len(points), run)]
    return [(sum(x for x, _ in b) / len(b), sum(y for _, y in b) / len(b)) for b in blocks]


def running_mean(points: Points) -> list[tuple[int, float]]:
    """Exponential mean over about a twentieth of the points, without a start at zero."""
    keep = 1 - min(1.0, 20 / len(points))
    mean, weight, out = 0.0, 0.0, []
    for step, value in points:
        mean, weight = keep * mean + value, keep * weight + 1
        out.append((step, mean / weight))
    return out


def _axes(figure: Any, xlabel: str, ylabel: str) -> Any:
    axes = figure.add_subplot()
    axes.grid(True)
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.xaxis.get_major_locator().set_params(integer=True)
    return axes


def _svg(
    draw: Callable[[Any], None], name: str, description: str, height_inches: float = 2.8
) -> str:
    """One figure as an <svg> element that is safe to put beside others in a page."""
    import matplotlib  # here: every rank imports this module, one draws, at the end
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH_INCHES, height_inches), layout="constrained")
        draw(figure)
        out = StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None})
    return inline(out.getvalue(), re.sub(r"\W+", "-", name), description)


def inline(svg: str, name: str, description: str) -> str:
    """matplotlib's SVG document as an element: no prolog, own ids, colours of the page."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", svg).replace("xlink:href", "href")
    svg = re.sub(r'(\sid="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    # The element scales with its box: only the view box stays of matplotlib's size.
    svg = re.sub(r'(<svg[^>]*?)\swidth="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?)\sheight="[^"]*"', r"\1", svg, count=1)
    svg = svg.replace("<svg", f'<svg role="img" aria-label="{html.escape(description)}"', 1)
    svg = re.sub(r"font-family: [^;]*; ", "", svg)
    for marker, css in _CSS.items():
        svg = svg.replace(marker, css)
    return svg.strip()
