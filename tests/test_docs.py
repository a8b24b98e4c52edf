"""What the pages say can be done: commands have flags that their scripts know, links lead somewhere, and the
messages of docs/troubleshooting.md are the code's own."""

from __future__ import annotations

import ast
import functools
import importlib
import re
import shlex
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "ds_configs/README.md"])
# Pages that put three dots where a command goes on, or a message has something of the run.
DOTS = "…"
STARTERS = ("python", "deepspeed", "torchrun", "srun")


def code_of(text: str) -> list[str]:
    """Lines of fenced and indented blocks, and code spans; lines that go on are joined."""
    found, fenced, kind = [], False, ""
    for line in text.splitlines():
        if line.lstrip().startswith("```"):
            fenced, kind = not fenced, line.strip().strip("`")
        elif fenced and kind in ("", "bash", "sh") or not fenced and line.startswith("    "):
            found.append(line.strip())
        elif not fenced:
            found += re.findall(r"`([^`]+)`", line)
    return re.sub(r"\\\n\s*", " ", "\n".join(found)).split("\n")


def commands_of(text: str) -> list[tuple[str, list[str]]]:
    """(script of launch/, its flags) of every command that starts one."""
    found = []
    for line in code_of(text):
        line = re.sub(r"\s#.*", "", line)
        match = re.match(rf"(?:{'|'.join(STARTERS)})\b[^|>]*?\blaunch/(\w+)\.py\b(.*)", line)
        if match is not None:
            flags = re.findall(r"(?<![\w-])--([\w.-]+)", match[2])
            found.append((match[1], flags))
    return found


COMMANDS = [
    (page, script, flags) for page in PAGES for script, flags in commands_of(page.read_text())
]


@functools.cache
def known_flags(script: str) -> frozenset[str]:
    """Names of a script's flags, from its own parser's help; that of finetune.py is in the library."""
    if script == "finetune":
        from transformers import HfArgumentParser

        from seft_ds.train import arguments as a

        kinds = [a.MethodArguments, a.ModelArguments, a.DataArguments, a.RunArguments]
        parser = HfArgumentParser(kinds)  # type: ignore[arg-type]
        names = {o.lstrip("-") for action in parser._actions for o in action.option_strings}
        return frozenset(names | {"config"})  # a recipe, taken out before the parser sees the rest
    module = importlib.import_module(f"launch.{script}")
    said: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"launch/{script}.py", "--help"])
        patch.setattr(sys.stdout, "write", lambda text: said.append(text) or len(text))
        with pytest.raises(SystemExit):
            module.main()
    return frozenset(re.findall(r"(?<![\w-])--([\w.-]+)", "".join(said)))


def test_every_command_of_the_pages_has_known_flags() -> None:
    assert len(COMMANDS) > 15
    unknown = [
        f"{page.name}: launch/{script}.py --{flag}"
        for page, script, flags in COMMANDS
        for flag in flags
        if flag not in known_flags(script)
        and not (flag.startswith("seft.") and script in ("finetune", "plan"))
    ]
    assert not unknown, unknown


def test_settings_of_the_method_that_pages_name_exist() -> None:
    from seft_ds.config import SeftConfig

    used = {name for page in PAGES for name in re.findall(r"--seft\.([a-z_]+)", page.read_text())}
    assert used and used <= set(SeftConfig.model_fields)


def test_a_wrong_flag_would_be_seen() -> None:
    text = "x\n\n```\npython launch/verify.py DIR \\\n   --all --al  # --not\n```\n`python launch/pack.py`"
    assert commands_of(text) == [("verify", ["all", "al"]), ("pack", [])]
    assert "all" in known_flags("verify") and "al" not in known_flags("verify")


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_and_scripts_of_a_page_exist(page: Path) -> None:
    text = page.read_text()
    links = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", re.sub(r"`[^`]*`", "", text))
    local = [link for link in links if "://" not in link and not link.startswith("mailto:")]
    missing = [link for link in local if not (page.parent / link).exists()]
    named = re.findall(
        r"\b((?:launch|benchmarks|tests|ds_configs)/[\w/]+\.(?:py|yaml|json|sh))\b", text
    )
    missing += [name for name in named if not (ROOT / name).exists() and "NAME" not in name]
    assert not missing, missing


@functools.cache
def literals() -> list[str]:
    """Every text of the code; what an f-string fills in is a NUL."""
    found = []
    for path in [*(ROOT / "seft_ds").rglob("*.py"), *(ROOT / "launch").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = (v.value if isinstance(v, ast.Constant) else "\0" for v in node.values)
                found.append("".join(str(part) for part in parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def messages() -> list[str]:
    """Those that docs/troubleshooting.md explains: the headings in backticks."""
    text = (ROOT / "docs/troubleshooting.md").read_text()
    return re.findall(r"^#{3,4} `(.+)`$", text, flags=re.MULTILINE)


def in_code(message: str) -> bool:
    """Whether one text of the code has all parts of a message, in order."""
    parts = [re.escape(part.strip()) for part in message.split(DOTS) if part.strip()]
    pattern = re.compile(".*".join(parts), flags=re.DOTALL)
    return any(pattern.search(literal) for literal in literals())


def test_the_messages_that_are_explained_are_the_codes_own() -> None:
    explained = messages()
    assert len(explained) >= 20 and len(set(explained)) == len(explained)
    gone = [message for message in explained if not in_code(message)]
    assert not gone, gone
    assert not in_code("a message that … nobody wrote")


def test_shell_quoting_of_the_commands_is_whole() -> None:
    for page in PAGES:
        for line in code_of(page.read_text()):
            if line.startswith(STARTERS) and "launch/" in line:
                shlex.split(line.replace("...", ""), comments=True)
