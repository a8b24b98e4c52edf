"""Parts of Markdown pages that a script writes: between `<!-- NAME: begin -->` and `<!-- NAME: end -->`."""

from __future__ import annotations

from pathlib import Path


def split_at_block(page: Path, name: str) -> tuple[str, str, str]:
    """(what is before the block, its text, what is behind it); the markers are in neither.

    Raises:
        ValueError: the file has not each marker once, in order.
    """
    old = page.read_text(encoding="utf-8")
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    if old.count(begin) != 1 or old.count(end) != 1 or old.index(begin) > old.index(end):
        raise ValueError(f"{page} needs the lines {begin} and {end}, once each and in this order")
    before, rest = old.split(begin)
    inside, after = rest.split(end)
    return before, inside.strip("\n"), after


def put_block(page: Path, name: str, text: str) -> None:
    """Write `text` into the block; ValueError as `split_at_block`."""
    before, _, after = split_at_block(page, name)
    markers = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    page.write_text(f"{before}{markers[0]}\n{text}\n{markers[1]}{after}", encoding="utf-8")
