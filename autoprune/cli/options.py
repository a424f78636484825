"""Which options each command takes, generated from the config dataclasses. Imports no
torch.
"""

import dataclasses
import re
import sys

from jsonargparse import ArgumentParser, Namespace, set_parsing_settings

from autoprune.config import (
    DataConfig,
    DimensionsConfig,
    FinetuneConfig,
    NetworkConfig,
    OutputConfig,
    ProxyConfig,
    RemovalConfig,
    SearchConfig,
    Settings,
    SparseConfig,
    TraceConfig,
)

set_parsing_settings(docstring_parse_attribute_docstrings=True)


PLAINLY = {
    r"^the following arguments are required: (\w+)\.(\w+)$": r"\1: \2 is missing; see `autoprune \1 --help`",
    r"^expected \"subcommand\" .* not provided.$": "give a command; see `autoprune --help`",
}
"""What jsonargparse says in the words of its configuration files, as a command line
would.
"""


class Parser(ArgumentParser):
    """Reports a wrong command line in one line and ends with exit code 2."""

    def error(self, message, ex=None):
        text = " ".join(str(message).split())
        for pattern, plainly in PLAINLY.items():
            text = re.sub(pattern, plainly, text)
        print(f"autoprune: error: {text}", file=sys.stderr)
        sys.exit(2)


def search_options(parser: Parser) -> None:
    """Network, data, search, output, fine-tuning, proxy, sparse training, removal and
    dimensions.
    """
    parser.add_argument(
        "--config", action="config", help="YAML file with any of these options."
    )
    text = "A method of the field, as defaults for other options; `autoprune methods` lists them."
    parser.add_argument("--method", type=str | None, default=None, help=text)
    for config in (NetworkConfig, DataConfig, SearchConfig):
        parser.add_class_arguments(config)
    parser.add_class_arguments(OutputConfig, skip={"resume", "json"})
    parser.add_argument(
        "--resume",
        action="store_true",
        help="Go on with the run in --out where it was interrupted.",
    )
    _json_option(parser)
    text = "Epochs of fine-tuning (null: 10, or on a small dataset as many as make 600 steps, at most 30)."
    parser.add_argument("--epochs", type=int | None, default=None, help=text)
    parser.add_class_arguments(FinetuneConfig, "finetune", skip={"epochs"})
    parser.add_class_arguments(ProxyConfig, "proxy", skip={"seed"})
    parser.add_class_arguments(SparseConfig, "sparse")
    parser.add_class_arguments(RemovalConfig, "removal")
    parser.add_class_arguments(DimensionsConfig, "dimensions")


def _json_option(parser: Parser) -> None:
    parser.add_argument(
        "--json",
        action="store_true",
        help="Print one JSON object as the last line of stdout.",
    )


def pick(options: Namespace, config: type, **fixed: object):
    """The dataclass that a command's flat options describe."""
    names = {field.name for field in dataclasses.fields(config)} - set(fixed)
    return config(**{name: options[name] for name in names if name in options}, **fixed)


def settings_of(options: Namespace) -> Settings:
    """The settings that the options of `search_options` describe."""
    return Settings(
        pick(options, NetworkConfig),
        pick(options, DataConfig),
        pick(options, SearchConfig),
        ProxyConfig(**vars(options.proxy), seed=options.seed),
        FinetuneConfig(**vars(options.finetune), epochs=options.epochs),
        SparseConfig(**vars(options.sparse)),
        RemovalConfig(**vars(options.removal)),
        DimensionsConfig(**vars(options.dimensions)),
    )


def run_options(parser: Parser) -> None:
    """An existing run."""
    parser.add_argument("run", help="Folder of the run.")
    _json_option(parser)


LEARNING = {
    "granularity",
    "agent",
    "policy",
    "episodes",
    "seed",
    "finalists",
    "checkpoint_every",
}
"""Options of a search that mean nothing to a policy that only acts, on channels."""


def replay_options(parser: Parser) -> None:
    """A policy, and where it shall act; the defaults are its run's settings, without a
    run those of `autoprune run`.
    """
    text = "A run, the name of a shipped policy, or a policy's folder. Options that aren't given are as in the run, or, "
    parser.add_argument(
        "policy", help=f"{text}for a policy of no run, as `autoprune run` has them."
    )
    _json_option(parser)
    for config in (NetworkConfig, DataConfig, SearchConfig):
        parser.add_class_arguments(
            config, skip=LEARNING & {field.name for field in dataclasses.fields(config)}
        )
    parser.add_class_arguments(ProxyConfig, "proxy", skip={"seed"})
    parser.set_defaults(
        {
            name: None
            for name in parser.get_defaults().clone().keys()
            if name not in ("json", "policy")
        }
    )
    text = "File for the allocation, or for the front of a range (default: in the run folder, else in runs/)."
    parser.add_argument("--out", type=str | None, default=None, help=text)


def prune_options(parser: Parser) -> None:
    """An existing run, or an allocation and all that a new run needs."""
    parser.add_argument("run", nargs="?", default=None, help="Folder of the run.")
    parser.add_argument(
        "--allocation",
        type=str | None,
        default=None,
        help="JSON file with the channels to keep.",
    )
    search_options(parser)


def finetune_options(parser: Parser) -> None:
    """An existing run, its epochs."""
    run_options(parser)
    parser.add_argument(
        "--epochs",
        type=int | None,
        default=None,
        help="Epochs (default: as the run was started).",
    )
    parser.add_argument(
        "--resume", action="store_true", help="Go on after the last finished epoch."
    )


def export_options(parser: Parser) -> None:
    """An existing run, the format."""
    run_options(parser)
    parser.add_argument("--format", type=str, default="onnx", help="onnx or torch.")


def list_options(parser: Parser) -> None:
    """Nothing but the form of the answer."""
    _json_option(parser)


def trace_options(parser: Parser) -> None:
    """A network."""
    parser.add_class_arguments(TraceConfig)
    _json_option(parser)


def data_options(parser: Parser) -> None:
    """A dataset."""
    parser.add_argument("name", help="Name of the dataset.")
