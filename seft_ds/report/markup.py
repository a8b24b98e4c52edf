"""What the page is made of: its style sheet, sections, figures and tables, and quantities in words."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

CSS = """
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
.wide:focus-visible { outline:2px solid var(--c1) }
.bar { display:block; height:7px; min-width:1px; border-radius:2px; margin:2px 0 }
td.bars { min-width:56px; width:40% } .half { max-width:640px }
.text td { text-align:left; white-space:normal; overflow-wrap:anywhere } .text th { text-align:left }
.wide + .figures { margin-top:1.4rem }
span.key { display:inline-block; width:14px; margin:0 2px 0 8px }
.planned { background:var(--c2) } .measured { background:var(--c1) }
table { border-collapse:collapse; width:100%; font-size:.8rem; font-variant-numeric:tabular-nums }
th,td { padding:5px 8px; text-align:right; white-space:nowrap; border-bottom:1px solid var(--line) }
th:first-child,td:first-child { text-align:left } thead th { background:var(--box); font-weight:600 }
tbody tr:last-child td { border-bottom:0 } .narrow { max-width:420px }
pre { background:var(--box); border-radius:8px; padding:12px; font-size:.8rem; white-space:pre-wrap;
  overflow-wrap:anywhere; margin:.4rem 0 } summary { cursor:pointer; padding:.3rem 0 }
"""

Figure = tuple[str, str, str]  # caption, note, svg and what stands below it


def section(title: str, body: str) -> str:
    """A part of the page with its heading."""
    return f"\n<section><h2>{escape(title)}</h2>{body}</section>"


def figures(shown: list[Figure]) -> str:
    """Figures side by side where the page is wide enough."""
    if not shown:
        return "<p class='soft'>Nothing was recorded yet.</p>"
    return "<div class='figures'>" + "".join(map(_figure, shown)) + "</div>"


def _figure(figure: Figure) -> str:
    caption, note, svg = figure
    note = f"<small>{escape(note)}</small>"
    return f"<figure><figcaption>{escape(caption)}{note}</figcaption>{svg}</figure>"


def table(head: Sequence[str], rows: Sequence[Sequence[Any]], css: str = "wide") -> str:
    """A table in a box that scrolls by itself where the page is narrow, by keyboard too."""
    top = "".join(f"<th scope='col'>{escape(name)}</th>" for name in head)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows
    )
    inner = f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"
    return f"<div class='{css}' tabindex='0'>{inner}</div>"


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
