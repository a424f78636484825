"""The `autoprune` command: its parser, the table of its commands, its exit codes.

This room is the composition root, where core, environment and agents meet. Heavy
imports happen inside its functions, so that `--help` answers at once.
"""

import dataclasses
import sys
from collections.abc import Callable, Mapping
from functools import cache, partial
from pathlib import Path
from types import MappingProxyType

from jsonargparse import Namespace

from autoprune import __version__
from autoprune.cli import commands
from autoprune.cli.memory import keep_freed_memory
from autoprune.cli.options import (
    compare_options,
    data_options,
    export_options,
    finetune_options,
    list_options,
    prune_options,
    replay_options,
    run_options,
    search_options,
    trace_options,
    verbosity_options,
)
from autoprune.cli.parser import Parser, options_of
from autoprune.cli.presets import method_named
from autoprune.config import SearchConfig
from autoprune.errors import (
    PACKAGES_OF_RUN,
    ExportError,
    UserError,
    in_one_line,
    needs_run_extra,
)
from autoprune.reporting.verbosity import Verbosity, verbosity


def main(arguments: list[str] | None = None) -> int:
    """Runs one command.

    Args:
        arguments: The command line; None for the process's own.

    Returns:
        The exit code: 0, or 1 if something failed, 2 for a user error, 130 after
        Ctrl-C.
    """
    # First, since glibc's settings hold for what is allocated from then on.
    keep_freed_memory()
    # Errors of the parser come before there is a command.
    command = None
    try:
        options = _parse(arguments)
        command = options.subcommand
        _set_verbosity(options[command])
        COMMANDS[command].run(options[command])
        return 0
    # A full disk or a missing permission is no bug, so it gets a line and no traceback.
    except (UserError, OSError) as error:
        message = in_one_line(error, partial(_flag, command))
        print(f"autoprune: error: {message}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        if error.name not in PACKAGES_OF_RUN:
            raise
        print(f"autoprune: error: {needs_run_extra(error.name)}", file=sys.stderr)
        return 2
    # The command line was right, so the exit code isn't 2.
    except ExportError as error:
        print(f"autoprune: error: {error}", file=sys.stderr)
        return 1
    # What was finished is in the run folder; 130 is the shell's code for Ctrl-C.
    except KeyboardInterrupt:
        print(
            "autoprune: interrupted; a run goes on with --resume and --out",
            file=sys.stderr,
        )
        return 130


def _set_verbosity(options: Namespace) -> None:
    if options.quiet and options.verbose:
        raise UserError("quiet", "goes with no --verbose; give one of them")
    level = Verbosity.NORMAL
    if options.quiet:
        level = Verbosity.QUIET
    elif options.verbose:
        level = Verbosity.VERBOSE
    verbosity.set(level)


def _flag(command: str | None, argument: str) -> str:
    """What a user of the command line calls an argument of the library.

    Args:
        command: The subcommand that was running; None before it is known.
        argument: The argument's name, such as "proxy.images".

    Returns:
        "--proxy.images" for an option, "RUN" for a positional argument, else the name
        as it is. Those of the running command come first: `replay` takes POLICY where
        `run` takes --policy.
    """
    # An error names arguments of the library, whoever raised it; only parsers know what
    # is a flag.
    others = [name for name in COMMANDS if name != command]
    for name in [command, *others] if command else others:
        # argparse shows its options nowhere else.
        for action in _parser_of(name).commands[name]._actions:
            if action.dest == argument:
                return f"--{argument}" if action.option_strings else argument.upper()
    return argument


def _parse(arguments: list[str] | None) -> Namespace:
    """The options, read once more where something given sets other defaults."""
    words = _with_hyperparameters(sys.argv[1:] if arguments is None else arguments)
    given = None
    for word in words:
        # The options before a command take no values.
        if not word.startswith("-"):
            given = word
            break
    # A parser that has printed a completion can't be used again.
    is_completion = any(word.startswith("--print_completion") for word in words)
    parser = build_parser(given) if is_completion else _parser_of(given)
    options = parser.parse_args(words)
    defaults = _implied_defaults(options.subcommand, options[options.subcommand])
    if not defaults:
        return options
    # As defaults and in a second pass, so that whatever was typed still counts more.
    return build_parser(given, defaults).parse_args(words)


def _with_hyperparameters(words: list[str]) -> list[str]:
    """A command line with a file of hyperparameters replaced by what it holds.

    So the run's config has them, whatever becomes of the file.
    """
    option = "--hyperparameters"
    replaced = []
    for place, word in enumerate(words):
        before, equals, value = word.partition("=")
        if before == option and equals and Path(value).is_file():
            word = f"{option}={Path(value).read_text(encoding='utf-8')}"
        elif place and words[place - 1] == option and Path(word).is_file():
            word = Path(word).read_text(encoding="utf-8")
        replaced.append(word)
    return replaced


@cache
def _parser_of(given: str | None) -> Parser:
    """The parser of a command line, without defaults that follow from what is given."""
    # Kept, since an error asks it for the names of flags.
    return build_parser(given)


def _implied_defaults(command: str, options: Namespace) -> dict[str, object]:
    """Defaults that follow from what is given.

    Those of the run that goes on; else of a method; else a policy is gone on with by
    its own agent.
    """
    if options.get("resume") and options.get("out"):
        # First, since the run's config holds what its method stood for.
        return _options_of_run(command, options.out)
    if options.get("method"):
        return method_named(options.method).defaults
    if options.get("policy") and options.get("agent") == SearchConfig.agent:
        from autoprune.agents.policy_files import agent_of

        return {"agent": agent_of(options.policy)}
    return {}


def _options_of_run(command: str, root: str) -> dict[str, object]:
    """What a run was started with, so that only what differs need be given.

    Args:
        command: The command that goes on with it, which may lack some of the options
            of the one that began.
        root: Its folder.

    Raises:
        UserError: If there is no run.
    """
    from autoprune.runs import RunFolder

    stored = options_of(RunFolder.open(root, "out").read_config())
    known = {name.lstrip("-") for name in _parser_of(command).commands[command].options}
    return {name: value for name, value in stored.items() if name in known}


def build_parser(
    given: str | None = None, defaults: Mapping[str, object] = MappingProxyType({})
) -> Parser:
    """The parser of all commands.

    Args:
        given: The only command to get its options, since adding all of them takes a
            while; None for all.
        defaults: Of its options those whose default follows from the others.
    """
    parser = Parser(
        prog="autoprune",
        description="Prune a trained PyTorch vision network: an agent finds how much "
        "where.",
    )
    parser.add_argument(
        "--version", action="version", version=f"autoprune {__version__}"
    )
    subcommands = parser.add_subcommands(required=True, dest="subcommand")
    parser.commands = {}
    for name, command in COMMANDS.items():
        subparser = Parser(description=command.help)
        if given is None or name == given:
            command.options(subparser)
            verbosity_options(subparser)
        if name == given:
            subparser.set_defaults(dict(defaults))
        parser.commands[name] = subparser
        subcommands.add_subcommand(name, subparser, help=command.help)
    return parser


@dataclasses.dataclass(frozen=True)
class Command:
    """A verb of the command line.

    Attributes:
        run: What it does; the first line of its docstring is the help.
        options: Adds the options that it takes.
    """

    run: Callable[[Namespace], None]
    options: Callable[[Parser], None]

    @property
    def help(self) -> str:
        """One line that says what it does."""
        docstring = self.run.__doc__ or ""
        return docstring.splitlines()[0]


COMMANDS: dict[str, Command] = {
    "run": Command(commands.run, search_options),
    "search": Command(commands.search, search_options),
    "replay": Command(commands.replay, replay_options),
    "prune": Command(commands.prune, prune_options),
    "finetune": Command(commands.finetune, finetune_options),
    "evaluate": Command(commands.evaluate, run_options),
    "export": Command(commands.export, export_options),
    "report": Command(commands.report, run_options),
    "compare": Command(commands.compare, compare_options),
    "trace": Command(commands.trace, trace_options),
    "data": Command(commands.data, data_options),
    "policies": Command(commands.policies, list_options),
    "methods": Command(commands.methods, list_options),
}
