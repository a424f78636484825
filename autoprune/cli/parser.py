"""A parser that speaks in one line, offers the nearest name, and reads a run's config.

Imports no torch.
"""

import re
import sys
from collections.abc import Iterable
from typing import Any, NoReturn, TypeGuard

import yaml
from jsonargparse import ArgumentParser, Namespace

from autoprune.config import Settings
from autoprune.errors import nearest_names

FORMER_OPTIONS = ("latency_batch",)
"""Options that earlier versions kept in a run's config, and that decided no result."""
PLAIN_MESSAGES = {
    r"^the following arguments are required: (\w+)\.(\w+)$": (
        r"\1: \2 is missing; see `autoprune \1 --help`"
    ),
    r"^expected \"subcommand\" .* not provided.$": (
        "give a command; see `autoprune --help`"
    ),
    r"^argument subcommand: invalid choice: '(.*)' \(choose from .*$": (
        r"no command \1; see `autoprune --help`"
    ),
    r"^Parser key \"([\w.]+)\": ": r"--\1: ",
    r"Expected a <class '(\w+)'>\. Got value: ": r"expected \1, got ",
    # An option that may be left open.
    r"Does not validate against any of the Union subtypes "
    r"Subtypes: \[<class '(\w+)'>, <class 'NoneType'>\] .* Given value: ": (
        r"expected \1, got "
    ),
    r"^--hyperparameters: expected dict, got (.*)$": r"--hyperparameters: no file '\1'",
    r"^Subcommand '(\w+)' does not accept option '([\w.]+)'$": (
        r"no option \2 of `autoprune \1`; see `autoprune \1 --help`"
    ),
    r"^unrecognized arguments: (--?[\w.-]+)(=| |$).*$": r"no option \1; see --help",
}
"""Messages of jsonargparse, which speak of configuration files, to plain ones."""
UNKNOWN = re.compile(r"^no (command|option) (\S+?);? ")
"""Of the plain messages those about a name that nobody knows."""


class Parser(ArgumentParser):
    """Reports a wrong command line in one line and ends with exit code 2.

    Attributes:
        commands: Command to its parser, of the parser that has commands.
    """

    commands: dict[str, "Parser"]

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Prints what is wrong with the command line, and ends.

        Args:
            message: What jsonargparse says.
            ex: Where it comes from.
        """
        # The library's messages may run over several lines; a bad command ends with
        # one.
        text = " ".join(str(message).split())
        for pattern, plain in PLAIN_MESSAGES.items():
            text = re.sub(pattern, plain, text)
        unknown = UNKNOWN.match(text)
        if unknown:
            kind, name = unknown.groups()
            known = self.commands if kind == "command" else self._known_options()
            similar = similar_options(name, known)
            if similar:
                # In front of where to read on: one word is usually all it takes.
                offered = f"; did you mean {' or '.join(similar)}? See"
                text = text.replace("; see", offered, 1)
        print(f"autoprune: error: {text}", file=sys.stderr)
        sys.exit(2)

    def parse_string(self, content: str, *arguments: Any, **options: Any) -> Namespace:
        """Takes options from a file's text, or from that of a run's config.yaml.

        Args:
            content: The text.
            *arguments: As in jsonargparse.
            **options: As in jsonargparse.
        """
        try:
            loaded = yaml.safe_load(content)
        except yaml.YAMLError:
            # jsonargparse says what is wrong with it.
            loaded = None
        if is_config_of_run(loaded):
            content = yaml.safe_dump(options_of(loaded))
        return super().parse_string(content, *arguments, **options)

    @property
    def options(self) -> list[str]:
        """The options as they are typed, such as "--budget"."""
        typed = []
        # argparse shows its options nowhere else.
        for action in self._actions:
            typed.extend(action.option_strings)
        return typed

    def _known_options(self) -> list[str]:
        """The options of the command that was given, else of this parser."""
        for argument in getattr(self, "args", []):
            if argument in getattr(self, "commands", {}):
                return self.commands[argument].options
        return self.options


def similar_options(name: str, known: Iterable[str]) -> list[str]:
    """Known options, or commands, like a given one.

    A prefix is easily forgotten: for `--lr` these are `--finetune.lr` and the others
    that end so, for `--budgt` it is `--budget`.

    Args:
        name: As given, with or without dashes.
        known: As they are typed.
    """
    plain = {option.lstrip("-"): option for option in known}
    bare = name.lstrip("-")
    similar = [option for option in plain if option.rpartition(".")[2] == bare]
    similar = similar or nearest_names(bare, plain)
    # As it was given: what stands in a file has no dashes.
    return [plain[option] if name.startswith("-") else option for option in similar]


def is_config_of_run(content: Any) -> TypeGuard[dict[str, Any]]:
    """Whether it is what config.yaml of a run holds, and not options by their names.

    Args:
        content: Of a YAML file.
    """
    if not isinstance(content, dict):
        return False
    return all(isinstance(content.get(stage), dict) for stage in ("network", "search"))


def options_of(config: dict[str, Any]) -> dict[str, Any]:
    """The options of `autoprune run` that a run's config stands for.

    Args:
        config: What config.yaml holds.

    Raises:
        UserError: If it is of another version.
    """
    # Beside the settings the config holds what decides no result, such as baselines.
    options = dict(config.get("options", {}))
    for name in FORMER_OPTIONS:
        options.pop(name, None)
    return Settings.from_dict(config).arguments | options
