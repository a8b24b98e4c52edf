"""Imports point one way, and few places know DeepSpeed, other ranks, or transformers."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent / "seft_ds"
# Each may import what stands in an earlier row, and its own row's other modules.
LAYERS = [
    [
        "beginning",
        "json_file",
        "tensor_files",
        "config",
        "schedule",
        "naming",
        "targets",
        "memory",
        "errors",
        "signals",
        "launching",
        "devices",
        "console",
        "command_line",
        "bars",
    ],
    ["sparse", "optim"],
    ["distributed"],
    ["zero"],
    ["prune", "baselines", "checkpoint"],
    ["api"],
    ["report"],
    ["train", "evaluate"],
]
LEVEL = {name: i for i, row in enumerate(LAYERS) for name in row}
FILES = sorted(p for p in ROOT.rglob("*.py") if p != ROOT / "__init__.py")


def part(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    """Dotted names that a file imports anywhere, functions included."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{a.name}" for a in node.names}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_one_way(path: Path) -> None:
    mine = part(path)
    assert mine in LEVEL, f"{mine} has no place in the layers"
    for name in imports(path):
        if name.startswith("seft_ds."):
            other = name.split(".")[1]
            assert LEVEL.get(other, 99) <= LEVEL[mine], f"{path.name} imports {name}"
            if mine == "report":
                assert other == "report", "report reads only the journal"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_who_knows_whom(path: Path) -> None:
    mine, relative = part(path), str(path.relative_to(ROOT))
    for name in imports(path):
        top = name.split(".")[0]
        if top == "deepspeed" or name.startswith("torch.distributed"):
            assert mine in ("zero", "distributed"), f"{relative} imports {name}"
        if top in ("transformers", "trl"):
            allowed = mine in ("train", "evaluate", "baselines") or relative in (
                "prune/calibrate.py",
                "prune/empty.py",
                "checkpoint/export.py",
                "checkpoint/load.py",
                "checkpoint/model_files.py",
            )
            assert allowed, f"{relative} imports {name}"
        if mine in ("sparse", "optim"):
            kernel = top == "triton" and relative == "sparse/triton_slot_grad.py"
            assert top in ("torch", "seft_ds", "__future__") or kernel or not _third_party(top), (
                name
            )


SCRIPTS = sorted((ROOT.parent / "launch").glob("*.py"))


@pytest.mark.parametrize("path", [*FILES, *SCRIPTS], ids=lambda p: p.name)
def test_text_files_say_their_encoding(path: Path) -> None:
    """Or a run in a legacy locale reads other words, and can't write some."""
    assert not guesses_encoding(path.read_text(encoding="utf-8")), path


def guesses_encoding(code: str) -> list[int]:
    """Lines that open a text file in the encoding of whatever locale it is run in."""
    found = []
    for node in ast.walk(ast.parse(code)):
        if not isinstance(node, ast.Call) or any(k.arg == "encoding" for k in node.keywords):
            continue
        name = getattr(node.func, "attr", getattr(node.func, "id", ""))
        of_path = isinstance(node.func, ast.Attribute) and len(node.args) == (name == "write_text")
        own = (
            isinstance(getattr(node.func, "value", None), ast.Name) and node.args
        )  # perplexity.read_text
        modes = [a.value for a in node.args if isinstance(a, ast.Constant)]
        if name in ("read_text", "write_text"):
            found += [node.lineno] * (of_path and not (name == "read_text" and own))
        elif name == "open" and isinstance(node.func, ast.Name):
            found += [node.lineno] * (not any("b" in str(mode) for mode in modes))
    return found


def test_a_guessed_encoding_would_be_seen() -> None:
    guessed = "open(p)\nopen(p, 'w')\np.read_text()\n(p / 'x').write_text(t)\n"
    assert guesses_encoding(guessed) == [1, 2, 3, 4]
    said = "open(p, 'rb')\np.read_text(encoding='utf-8')\nother.read_text(p)\nread_text(p)\n"
    assert guesses_encoding(said) == []


def _third_party(name: str) -> bool:
    import sys

    return name not in sys.stdlib_module_names


def test_the_rule_can_fail() -> None:
    assert "deepspeed" in {n.split(".")[0] for n in imports(ROOT / "zero" / "initialize.py")}
    assert LEVEL["sparse"] < LEVEL["zero"]
