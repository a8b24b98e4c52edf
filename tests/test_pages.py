"""Parts of the pages that scripts write are what those scripts would write."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import figures, hardware_table, headline, repair
from benchmarks.blocks import put_block, split_at_block


def test_a_block_is_replaced_and_nothing_else(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    begin, end = "<!-- x: begin -->", "<!-- x: end -->"
    page.write_text(f"above\n{begin}\nold\n{end}\nbelow\n")
    put_block(page, "x", "new\nlines")
    assert page.read_text() == f"above\n{begin}\nnew\nlines\n{end}\nbelow\n"
    assert split_at_block(page, "x")[1] == "new\nlines"
    for broken in (f"{end}\n{begin}\n", f"{begin}\n", f"{begin}\n{begin}\n{end}\n"):
        page.write_text(broken)
        with pytest.raises(ValueError, match="in this order"):
            put_block(page, "x", "text")


def test_the_pages_show_the_results_that_are_in_the_files() -> None:
    for page, name, text in headline.blocks():
        assert split_at_block(page, name)[1] == text, (
            f"run python benchmarks/headline.py ({page.name})"
        )


@pytest.mark.parametrize("name", ["repair", *headline.OTHERS])
def test_the_results_are_those_of_the_cells(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid = f"benchmarks/grids/smollm2_{'cpu' if name == 'repair' else name}.yaml"
    monkeypatch.chdir(headline.ROOT)  # the table names its grid as it was given
    table, numbers = tmp_path / f"{name}.md", tmp_path / f"{name}.csv"
    repair.main(
        [grid, "--work", "docs/results/runs", "--report", "--table", str(table),
         "--csv", str(numbers), "--figure", str(tmp_path / "figure.png")]
    )  # fmt: skip
    for made in (table, numbers):
        assert made.read_text() == (headline.RESULTS / made.name).read_text(), made.name


def test_the_readme_shows_what_the_planner_says_of_gpus() -> None:
    readme = hardware_table.ROOT / "README.md"
    assert split_at_block(readme, hardware_table.BLOCK)[1] == hardware_table.table(), (
        "run python benchmarks/hardware_table.py --write"
    )


def test_the_figures_are_those_of_the_script() -> None:
    for name, text in figures.figures().items():
        assert (figures.IMAGES / name).read_text() == text, "run python benchmarks/figures.py"
    before, after = figures.BEFORE, figures.AFTER
    assert figures.live(before) == figures.live(after)  # or the figure would show something else
    assert "".join(before).count("S") == "".join(after).count("S")
