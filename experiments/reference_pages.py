"""Writes reference pages, and tables in other pages, from the code that they describe.

Pages are docs/reference/options.md and those of the API; tables stand between markers.

    python -m experiments.reference_pages

A page that holds such tables keeps each between `<!-- NAME: written by ... -->` and
`<!-- end of NAME -->`; the text around them is written by hand.
"""

import ast
import dataclasses
import inspect
import re
from argparse import Action
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from autoprune import config
from autoprune.agents.baselines import BASELINES
from autoprune.agents.search import ALGORITHMS
from autoprune.cli.main import build_parser
from autoprune.cli.options import Parser
from autoprune.envs.observation import feature_table
from autoprune.envs.rewards import REWARDS
from autoprune.evaluation.importance import CRITERIA
from autoprune.files import write_text
from autoprune.results import Results

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
OPTIONS = DOCS / "reference" / "options.md"
API = DOCS / "reference" / "api"
HIDDEN = ("help", "config", "version", "subcommand", "print_config")
"""What every command line of this kind has."""

SECTIONS = {
    "The network": config.NetworkConfig,
    "The images": config.DataConfig,
    "The search": config.SearchConfig,
    "Where results go": config.OutputConfig,
}
"""Heading to the options without a prefix that belong there."""

PREFIXES = {
    "finetune": "Fine-tuning",
    "proxy": "How candidates are scored",
    "sparse": "Sparse training before the search",
    "removal": "How channels leave",
    "dimensions": "What depth, width and image size are worth",
    "latency": "What latency is measured with",
}
"""Prefix of an option's name to the heading of its section."""

ROOMS = (
    "autoprune",
    "structure",
    "costs",
    "tracing",
    "tracing/rules",
    "data",
    "evaluation",
    "training",
    "scaling",
    "deploy",
    "latency",
    "reporting",
    "pipeline",
    "pipeline/methods",
    "cli",
    "envs",
    "agents",
)
"""The rooms in the order of their floors: "autoprune" is the house's own modules."""

WRITERS = {
    "search": """preprocessing run model data seed budget agent method sparse_method
        sparse_strength sparse_epochs widths reconstructed baselines episodes
        evaluations seconds_search selection_accuracy selection_loss selection_images
        latency_model latency_kept finalists pareto dimensions
        macs params memory_bytes size_bytes macs_dense
        params_dense memory_bytes_dense size_bytes_dense macs_ratio budgets
        sparsity groups pinned counted""",
    "prune": "removal_method",
    "finetune": "finetune_epochs",
    "evaluate": "accuracy_dense accuracy_pruned accuracy test_images",
    "export": "onnx_max_relative_error",
    "run": "latency latency_setting latency_ms latency_ms_dense remarks",
    "every stage": "seconds seconds_total",
}
"""Command to the keys of results.json that its stage writes; `run` does them all."""

UNITS = {
    "_ms": "ms",
    "latency": "ms",
    "seconds": "s",
    "bytes": "bytes",
    "macs": "MACs of one image",
    "params": "parameters",
    "accuracy": "share, 0 to 1",
    "_loss": "nats",
    "_ratio": "share, 0 to 1",
    "sparsity": "share, 0 to 1",
    "error": "relative",
}
"""Part of a key to the unit of its value; the last one that is in it counts."""

INTRODUCTION = """\
# Options

Every option of the commands that work on a network: what it is called, what it is by
default, and what it means. This page is written from the code by
`experiments/reference_pages.py`. `autoprune COMMAND --help` says the same, and
`--config FILE.yaml` takes all of them as a file. A default of `null` means that the
command chooses; the text says how.
"""


def main() -> None:
    """Writes the page of options, those of the API, and the tables in other pages."""
    write_text(OPTIONS, options_page())
    print(OPTIONS)
    for path in pages_with_tables():
        write_text(path, with_tables(path.read_text(encoding="utf-8")))
        print(path)
    for room, text in api_pages().items():
        write_text(API / f"{room}.md", text)
        print(API / f"{room}.md")


def pages_with_tables() -> list[Path]:
    """The pages that keep tables between markers."""
    found = []
    for path in sorted(DOCS.rglob("*.md")):
        if "<!-- end of " in path.read_text(encoding="utf-8"):
            found.append(path)
    return found


def with_tables(text: str) -> str:
    """A page's text with every table between markers written anew."""
    for name, table in tables().items():
        pattern = rf"(<!-- {name}: [^>]*-->\n).*?(<!-- end of {name} -->)"
        text = re.sub(
            pattern,
            lambda match, table=table: f"{match[1]}\n{table}\n\n{match[2]}",
            text,
            flags=re.DOTALL,
        )
    return text


def tables() -> dict[str, str]:
    """Name of a marker to the table that stands there."""
    return {
        "features": feature_table(),
        "rewards": _rewards(),
        "commands": _commands(),
        "agents": _agents(),
        "criteria": _criteria(),
        "results": _results(),
        "rooms": _rooms(),
        "layers": _layers(),
    }


def options_page() -> str:
    """The page of all options, a section each with a table."""
    taken = _options_by_command()
    flat: dict[str, str] = {}
    for heading, stage in SECTIONS.items():
        for field in dataclasses.fields(stage):
            flat.setdefault(field.name, heading)
    sections: dict[str, dict[str, Action]] = {}
    for actions in taken.values():
        for name, action in actions.items():
            prefix = name.partition(".")[0]
            heading = PREFIXES.get(prefix) if "." in name else flat.get(name)
            known = sections.setdefault(heading or "Of single commands", {})
            known.setdefault(name, action)
    headings = [*SECTIONS, *PREFIXES.values(), "Of single commands"]
    parts = [INTRODUCTION]
    for heading in headings:
        if heading in sections:
            parts.append(f"\n## {heading}\n\n{_option_table(sections[heading], taken)}")
    return "".join(parts)


def _option_table(
    actions: Mapping[str, Action], taken: Mapping[str, Mapping[str, Action]]
) -> str:
    rows = []
    for name, action in actions.items():
        commands = [command for command, known in taken.items() if name in known]
        shown = f"`--{name}`" if action.option_strings else f"`{name.upper()}`"
        default = _default(action)
        listed = ", ".join(commands)
        rows.append([shown, default, _meaning(action), listed])
    return markdown_table(["option", "default", "meaning", "commands"], rows)


def _options_by_command() -> dict[str, dict[str, Action]]:
    """Command to its options by name, in the order of its help."""
    taken = {}
    for command, parser in _subparsers().items():
        known = {}
        for action in parser._actions:
            name = action.dest
            is_group = name in PREFIXES
            if name not in HIDDEN and not is_group and not name.startswith("print_"):
                known[name] = action
        taken[command] = known
    return taken


def _subparsers() -> dict[str, Parser]:
    """Command to its parser."""
    return dict(_subcommands()._name_parser_map)


def _subcommands() -> Any:
    """The action that holds the subcommands; Any, since argparse keeps them private."""
    for action in build_parser()._actions:
        if action.dest == "subcommand":
            return action
    raise AssertionError("the command line has subcommands")


def _default(action: Action) -> str:
    """A default as a configuration file would hold it."""
    value = action.default
    if not action.option_strings:
        return "-"
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if value == "":
        return "empty"
    return f"`{value}`"


def _meaning(action: Action) -> str:
    """A help text as one line that a cell of a table can hold."""
    text = " ".join((action.help or "").split())
    return text.replace("|", "\\|").replace("*", "\\*").replace("%%", "%")


def _commands() -> str:
    """The commands, and what each does."""
    rows = []
    for choice in _subcommands()._choices_actions:
        rows.append([f"`autoprune {choice.dest}`", choice.help or ""])
    return markdown_table(["command", "what it does"], rows).rstrip("\n")


def _rewards() -> str:
    """The rewards, what each is, and how it treats the budget."""
    rows = []
    for name, reward in REWARDS.items():
        budget = "used up" if reward.uses_up_budget else "a ceiling"
        rows.append([name, _first_sentence(reward.function), budget])
    return markdown_table(["name", "what it is", "budget"], rows).rstrip("\n")


def _agents() -> str:
    """What `--agent` takes."""
    rows = []
    for name, algorithm in ALGORITHMS.items():
        rows.append([name, f"learns, with {algorithm.__name__}'s networks"])
    for name, baseline in BASELINES.items():
        rows.append([name, _first_sentence(baseline)])
    return markdown_table(["name", "what it is"], rows).rstrip("\n")


def _criteria() -> str:
    """What `--criterion` takes."""
    return ", ".join(f"`{name}`" for name in CRITERIA)


def _results() -> str:
    """The keys of results.json."""
    writers = {}
    for command, keys in WRITERS.items():
        for key in keys.split():
            writers[key] = command
    rows = []
    meanings = _attribute_docstrings(Results)
    for field in dataclasses.fields(Results):
        kind = str(field.type).removesuffix(" | None").replace("typing.", "")
        unit = "-"
        for part, name in UNITS.items():
            if part in field.name and kind.startswith(("int", "float", "dict[str, fl")):
                unit = name
        meaning = meanings[field.name]
        rows.append(
            [f"`{field.name}`", f"`{kind}`", unit, writers[field.name], meaning]
        )
    header = ["key", "type", "unit", "written by", "meaning"]
    return markdown_table(header, rows).rstrip("\n")


def _attribute_docstrings(owner: type) -> dict[str, str]:
    """Field of a class to the string that stands below it."""
    (definition,) = ast.parse(inspect.getsource(owner)).body
    assert isinstance(definition, ast.ClassDef), "a class's source is its definition"
    found, name = {}, ""
    for statement in definition.body:
        if isinstance(statement, ast.AnnAssign) and isinstance(
            statement.target, ast.Name
        ):
            name = statement.target.id
        elif isinstance(statement, ast.Expr) and name:
            assert isinstance(statement.value, ast.Constant), "a docstring"
            found[name] = " ".join(str(statement.value.value).split())
            name = ""
    return found


def _layers() -> str:
    """The floors of the house, from the test that keeps them."""
    source = (ROOT / "tests" / "test_layers.py").read_text(encoding="utf-8")
    match = re.search(r"^LAYERS = (\(.*?^\))$", source, re.DOTALL | re.MULTILINE)
    assert match is not None, "tests/test_layers.py holds the list LAYERS"
    rows = []
    for floor, rooms in enumerate(ast.literal_eval(match[1])):
        rows.append([str(floor), ", ".join(f"`{room}`" for room in sorted(rooms))])
    return markdown_table(["floor", "rooms"], rows).rstrip("\n")


def _rooms() -> str:
    """Every module by its room, with the first sentence of its docstring."""
    parts = []
    for room in ROOMS:
        folder = ROOT / "autoprune"
        if room != "autoprune":
            folder = folder / room
        dotted = "autoprune" if room == "autoprune" else f"autoprune.{room}"
        rows = []
        for path in sorted(folder.glob("*.py")):
            summary = _summary(path)
            if path.name != "__init__.py":
                rows.append([f"`{path.stem}`", summary])
        heading = f"### `{dotted.replace('/', '.')}`"
        about = _summary(folder / "__init__.py")
        table = markdown_table(["module", "what it holds"], rows)
        parts.append(f"{heading}\n\n{about}\n\n{table}")
    return "\n".join(parts).rstrip("\n")


def api_pages() -> dict[str, str]:
    """Room to its page of the API, a directive for each module.

    The site's builder reads the docstrings; no module is imported for it.
    """
    index = ["# API", ""]
    index.append("Every public name, by room, from the docstrings of the code.")
    index += ["", "| room | what it holds |", "| --- | --- |"]
    pages = {}
    for room in ROOMS:
        if "/" in room:
            continue
        folder = ROOT / "autoprune"
        paths = sorted(folder.glob("*.py"))
        if room != "autoprune":
            folder = folder / room
            paths = sorted(folder.rglob("*.py"))
        modules = []
        for path in paths:
            parts = path.relative_to(ROOT).with_suffix("").parts
            if not parts[-1].startswith("__"):
                modules.append(".".join(parts))
        about = _summary(folder / "__init__.py")
        dotted = "autoprune" if room == "autoprune" else f"autoprune.{room}"
        directives = "".join(f"\n::: {module}\n" for module in modules)
        pages[room] = f"# `{dotted}`\n\n{about}\n{directives}"
        index.append(f"| [`{dotted}`]({room}.md) | {about} |")
    return {"index": "\n".join(index) + "\n"} | pages


def _summary(path: Path) -> str:
    """First paragraph of a module's docstring, in one line."""
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return " ".join(docstring.partition("\n\n")[0].split()).replace("|", "\\|")


def _first_sentence(function: object) -> str:
    """First paragraph of a function's docstring, in one line."""
    return " ".join((inspect.getdoc(function) or "").partition("\n\n")[0].split())


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    """Rows of cells as a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"


if __name__ == "__main__":
    main()
