"""Reads the documentation's code blocks and runs them as a reader would, in one process.

A page is Markdown. A fenced block in `sh` holds commands, one in `python` is executed
with the names of the page's earlier blocks, and a block with a `title` becomes a file of
that name. A comment right above a block changes how it is tested, and a reader doesn't
see it:

    <!-- tested with: --episodes 2 --epochs 1 -->     appended to commands that take it
    <!-- tested with: EPOCHS = 1 -->                  replaces that line of Python
    <!-- not run: it downloads a dataset -->          isn't run, and why
"""

import contextlib
import os
import re
import runpy
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]
BEGINNING = ("run", "search", "prune --allocation")
"""How commands begin that take the options of `SMALL` and of `tested with`."""
SMALL = (
    "--max_train_images 64 --max_test_images 32 --calibration_images 32 "
    "--proxy_images 32 --selection_images 32 --proxy.images 16 --proxy.blocks 1"
)
"""Few images, for every command that begins a run."""

_BLOCK = re.compile(
    r"(?:<!-- (?P<how>tested with|not run): (?P<what>[^>]*?) -->\n+)?"
    r"^(?P<indent> *)```(?P<language>\w+)(?: title=\"(?P<title>[^\"]+)\")?\n"
    r"(?P<text>.*?)^(?P=indent)```$",
    flags=re.DOTALL | re.MULTILINE,
)


@dataclass(frozen=True)
class Block:
    """One fenced block of a page.

    Attributes:
        language: "sh", "python" or another one, which isn't run.
        text: What a reader sees.
        title: Name of the file that it becomes; empty if it is none.
        tested_with: How the test makes it smaller; empty if not at all.
        not_run: Why it isn't run; empty if it is.
    """

    language: str
    text: str
    title: str = ""
    tested_with: str = ""
    not_run: str = ""


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page, in order."""
    found = []
    for match in _BLOCK.finditer(page.read_text(encoding="utf-8")):
        indent, how = match["indent"], match["how"]
        lines = [line.removeprefix(indent) for line in match["text"].splitlines()]
        block = Block(
            match["language"],
            "\n".join(lines) + "\n",
            match["title"] or "",
            match["what"] if how == "tested with" else "",
            match["what"] if how == "not run" else "",
        )
        found.append(block)
    return found


def commands(block: Block) -> list[str]:
    """The commands of a block in `sh`, continued lines joined, comments left out."""
    text = block.text.replace("\\\n", " ")
    lines = [re.sub(r"(^|\s)#.*", "", line).strip() for line in text.splitlines()]
    return [line for line in lines if line]


def run_page(page: Path) -> dict[str, Any]:
    """Runs a page's blocks in the current folder; returns the names that they made."""
    names: dict[str, Any] = {"__name__": page.stem.replace("-", "_")}
    for block in blocks(page):
        if block.not_run:
            continue
        if block.title:
            path = Path(block.title)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(_smaller(block), encoding="utf-8")
        elif block.language == "python":
            code = compile(_smaller(block), f"{page.name}", "exec")
            exec(code, names)  # our own text
        elif block.language == "sh":
            for command in commands(block):
                run_command(command, block.tested_with)
    return names


def _smaller(block: Block) -> str:
    """A block's Python with the assignments that the test makes smaller."""
    text = block.text
    for assignment in filter(None, block.tested_with.split("; ")):
        name = assignment.partition(" = ")[0]
        text, n_replaced = re.subn(
            rf"^(\s*){re.escape(name)} = .*$",
            rf"\g<1>{assignment}",
            text,
            flags=re.MULTILINE,
        )
        assert n_replaced == 1, f"no line assigns {name}"
    return text


def run_command(command: str, tested_with: str = "") -> None:
    """Runs one command of a page; "NAME=VALUE" before it and "> FILE" at its end count.

    Args:
        command: `autoprune ...`, or `python FILE`.
        tested_with: Further options, for commands that take them.
    """
    command, _, target = command.partition(" > ")
    words = shlex.split(command)
    if words[:3] == ["python", "-m", "autoprune"]:
        words = ["autoprune", *words[3:]]
    variables = {}
    while "=" in words[0]:
        name, _, value = words.pop(0).partition("=")
        variables[name] = value
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.dict(os.environ, variables))
        if target:
            stream = stack.enter_context(Path(target).open("w", encoding="utf-8"))
            stack.enter_context(contextlib.redirect_stdout(stream))
        if words[0] == "autoprune":
            begins = " ".join(words[1:]).startswith(BEGINNING)
            further = f"{SMALL} {tested_with}" if begins else ""
            _run_autoprune([*words[1:], *shlex.split(further)])
        elif words[0] == "python" and len(words) > 1 and words[1].endswith(".py"):
            stack.enter_context(_arguments(words[1:]))
            runpy.run_path(words[1], run_name="__main__")
        else:
            raise AssertionError(f"no test can run {command!r}; say why: <!-- not run")


def _run_autoprune(arguments: list[str]) -> None:
    from autoprune.cli.main import main

    try:
        code = main(arguments)
    except SystemExit as stopped:
        code = stopped.code
    assert not code, f"autoprune {shlex.join(arguments)} ended with {code}"


@contextlib.contextmanager
def _arguments(words: list[str]) -> Iterator[None]:
    kept = sys.argv
    sys.argv = words
    try:
        yield
    finally:
        sys.argv = kept
