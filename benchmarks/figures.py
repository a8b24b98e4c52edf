"""The figures of docs/concepts.md: one event on a small weight, and when the weights of a run have theirs.

    python benchmarks/figures.py        # writes docs/images/event.svg and docs/images/waves.svg

The second is drawn from `seft_ds.schedule`. Both follow the reader's light or dark setting.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from seft_ds.schedule import Schedule

IMAGES = Path(__file__).resolve().parent.parent / "docs" / "images"
STYLE = """<style>
svg { color: #1c2024; --live: #9db8d8; --dead: #eef0f2; --edge: #c4cad0; --slot: #c2410c;
  --new: #15803d; --gone: #b42318 }
@media (prefers-color-scheme: dark) { svg { color: #e6e8ea; --live: #3c5f88; --dead: #1e2226; --edge: #3a4148;
  --slot: #f59e5b; --new: #5cc489; --gone: #ff8a7a } }
text { font: 12px system-ui, sans-serif; fill: currentColor } .b { font-weight: 600 }
</style>"""
CELL = 26
COLUMNS = 8
# Row by row: . dead, o live, S slot. Small letters of a change: d dropped, g grown, p pruned, r revived.
BEFORE = ["o..oS.o.", "oS.o..oo", ".o..S..o", "o..o.oS."]
MARKED = ["o..oD.o.", "oS.g..oo", ".pr.D..o", "o..o.oS."]
AFTER = ["o..oo.o.", "oS.S..oo", "..S.o..o", "o..o.oS."]


def grid(rows: Sequence[str], left: float, top: float) -> str:
    """Cells of one weight. Every letter is explained in the legend."""
    parts = []
    for y, row in enumerate(rows):
        for x, kind in enumerate(row):
            at = (left + x * CELL, top + y * CELL)
            alive = kind not in ".r"
            parts.append(
                f'<rect x="{at[0]:g}" y="{at[1]:g}" width="{CELL - 3}" height="{CELL - 3}" rx="3" '
                f'fill="var(--{"live" if alive else "dead"})" stroke="var(--edge)"/>'
            )
            parts += _mark(kind, *at)
    return "".join(parts)


def _mark(kind: str, x: float, y: float) -> list[str]:
    ring = {"S": "slot", "D": "gone", "g": "new", "r": "new"}.get(kind)
    size = CELL - 3
    found = []
    if ring is not None:
        dash = ' stroke-dasharray="4 3"' if kind in "Dgr" else ""
        found.append(
            f'<rect x="{x + 3:g}" y="{y + 3:g}" width="{size - 6}" height="{size - 6}" rx="2" fill="none" '
            f'stroke="var(--{ring})" stroke-width="2.5"{dash}/>'
        )
    if kind == "p":
        found.append(
            f'<path d="M{x + 5:g} {y + 5:g}l{size - 10} {size - 10}m0 {10 - size}l{10 - size} {size - 10}" '
            'stroke="var(--gone)" stroke-width="2.5"/>'
        )
    return found


def live(rows: Sequence[str]) -> int:
    return sum(cell not in ".r" for row in rows for cell in row)


def event() -> str:
    """Before, the decision, and after: as many live weights and slots as before."""
    step, top = COLUMNS * CELL + 42, 30
    titles = ("before", "what is chosen", "after")
    parts = []
    for i, (title, rows) in enumerate(zip(titles, (BEFORE, MARKED, AFTER), strict=True)):
        left = 8 + i * step
        count = "" if i == 1 else f": {live(rows)} live, {''.join(rows).count('S')} slots"
        parts.append(f'<text class="b" x="{left}" y="18">{title}{count}</text>')
        parts.append(grid(rows, left, top))
    base = top + len(BEFORE) * CELL + 12
    legend = [
        ("o", "live, frozen"),
        (".", "dead: exactly 0"),
        ("S", "slot: trains"),
        ("D", "dropped: smallest |δ|"),
        ("g", "grown on a live weight"),
        ("r", "grown on a dead one"),
        ("p", "pruned: least sensitive, no slot"),
    ]
    for i, (kind, words) in enumerate(legend):
        x, y = 8 + (i % 4) * 186, base + (i // 4) * (CELL + 6)
        parts.append(grid([kind], x, y))
        parts.append(f'<text x="{x + CELL + 5}" y="{y + 16}">{words}</text>')
    return _svg(8 + 3 * step - 30, base + 2 * (CELL + 6), parts, "One event on a small weight")


def waves(weights: int = 6, interval: int = 12, window: int = 4, steps: int = 60) -> str:
    """A row a weight, a column a step: where its window is open, and its events."""
    schedule = Schedule(
        total_steps=steps, interval=interval, window=window, drop_fraction=0.3, stop=0.8,
        n_targets=weights, waves=True,
    )  # fmt: skip
    left, top, wide, high = 74, 26, 10.5, 20
    parts = ['<text class="b" x="8" y="16">step</text>']
    for step in range(1, steps + 1):
        x = left + (step - 1) * wide
        if step % 10 == 0:
            parts.append(f'<text x="{x:g}" y="16" text-anchor="middle">{step}</text>')
        due = schedule.due(step)
        for i in range(weights):
            y = top + i * high
            is_open = schedule.in_window(i, step)
            fill = "slot" if i in due else "live" if is_open else "dead"
            parts.append(
                f'<rect x="{x:g}" y="{y:g}" width="{wide - 1.5:g}" height="{high - 3}" fill="var(--{fill})"/>'
            )
    parts += [f'<text x="8" y="{top + i * high + 13}">weight {i}</text>' for i in range(weights)]
    y = top + weights * high + 8
    for x, fill, words in (
        (left, "live", "window: its gradients are scored"),
        (left + 220, "slot", "event, at the end of that step"),
        (left + 430, "dead", "it only trains"),
    ):
        parts.append(f'<rect x="{x}" y="{y}" width="12" height="12" fill="var(--{fill})"/>')
        parts.append(f'<text x="{x + 18}" y="{y + 11}">{words}</text>')
    return _svg(
        left + steps * wide + 8, y + 22, parts, "Windows and events of six weights over a run"
    )


def _svg(width: float, height: float, parts: list[str], title: str) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" role="img" '
        f'aria-label="{title}"><title>{title}</title>{STYLE}{"".join(parts)}</svg>\n'
    )


def figures() -> dict[str, str]:
    """{file name: content}."""
    return {"event.svg": event(), "waves.svg": waves()}


def main() -> None:
    argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0]).parse_args()
    IMAGES.mkdir(exist_ok=True)
    for name, text in figures().items():
        (IMAGES / name).write_text(text, encoding="utf-8")
        print(IMAGES / name)


if __name__ == "__main__":
    main()
