"""A heatmap of layers and projections as inline SVG, and the same numbers as a table.

Each cell is a rectangle of the page's first series colour, more opaque for more, so that it reads on light
and on dark paper alike; a pointer that rests on it shows its value. Who can't see it reads the table. The
view box is about as wide as a phone, so that the labels are readable there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape

_WIDTH, _LABELS, _ROW, _TOP, _BOTTOM = 340.0, 62.0, 17.0, 4.0, 40.0
_FAINTEST = 0.05  # opacity of 0: the cell is there
_MOST_TICKS = 10
Number = Callable[[float], str]


def heatmap(
    layers: Sequence[int],
    projections: Sequence[str],
    values: Sequence[Sequence[float]],  # [projection][layer], 0 or more
    what: str,
    number: Number,
    least: float = 0.0,
) -> str:
    """The figure. what: the quantity, in a few words; number: how a value of it is written; least: palest."""
    top = max((max(row) for row in values if row), default=least)
    reach = (top - least) or 1.0
    cell = (_WIDTH - _LABELS) / max(len(layers), 1)
    bottom = _TOP + _ROW * len(projections)
    parts = [
        f'<svg role="img" viewBox="0 0 {_WIDTH:g} {bottom + _BOTTOM:g}" '
        f'aria-label="{escape(f"Heatmap: {what}, per layer and projection; the table has the numbers")}">'
    ]
    for y, (projection, row) in enumerate(zip(projections, values, strict=True)):
        middle = _TOP + _ROW * (y + 0.5)
        name = escape(projection.rsplit(".", 1)[-1][:14])
        parts.append(_text(_LABELS - 4, middle + 3, name, "end"))
        for x, value in enumerate(row):
            title = escape(f"layer {layers[x]}, {projection}: {number(value)}")
            opacity = _FAINTEST + (1 - _FAINTEST) * (value - least) / reach
            parts.append(
                f'<rect x="{_LABELS + x * cell:.2f}" y="{_TOP + y * _ROW:g}" width="{0.94 * cell:.2f}" '
                f'height="{0.94 * _ROW:.2f}" fill="var(--c1)" fill-opacity="{opacity:.3f}">'
                f"<title>{title}</title></rect>"
            )
    stride = max(1, -(-len(layers) // _MOST_TICKS))
    for x in range(0, len(layers), stride):
        parts.append(_text(_LABELS + (x + 0.47) * cell, bottom + 11, str(layers[x]), "middle"))
    return "".join([*parts, *_scale(bottom + 20, number(least), number(top)), "</svg>"])


def numbers_table(
    layers: Sequence[int],
    projections: Sequence[str],
    values: Sequence[Sequence[float]],
    number: Number,
) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the same numbers, a row a layer."""
    head = ["layer", *(p.rsplit(".", 1)[-1] for p in projections)]
    rows = [[str(n), *(number(row[x]) for row in values)] for x, n in enumerate(layers)]
    return head, rows


def _scale(y: float, least: str, most: str) -> list[str]:
    """What pale and full mean, below the layers' numbers."""
    steps, left, width = 16, _LABELS + 40, 96.0
    parts = [_text(_LABELS, y + 11, "layer", "start"), _text(left + 26, y + 11, least, "end")]
    for i in range(steps):
        opacity = _FAINTEST + (1 - _FAINTEST) * i / (steps - 1)
        parts.append(
            f'<rect x="{left + 30 + i * width / steps:.2f}" y="{y + 3:g}" width="{width / steps:.2f}" '
            f'height="9" fill="var(--c1)" fill-opacity="{opacity:.3f}"/>'
        )
    return [*parts, _text(left + 34 + width, y + 11, most, "start")]


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="9" fill="currentColor" '
        f'text-anchor="{anchor}">{text}</text>'
    )
