"""Which options each command takes, generated from the config dataclasses.

Imports no torch.
"""

import dataclasses
from typing import Any, TypeVar

from jsonargparse import Namespace, set_parsing_settings

from autoprune.cli.parser import Parser
from autoprune.config import (
    DataConfig,
    DimensionsConfig,
    FinetuneConfig,
    LatencyConfig,
    NetworkConfig,
    OutputConfig,
    ProxyConfig,
    RemovalConfig,
    SearchConfig,
    Settings,
    SparseConfig,
    TraceConfig,
)
from autoprune.pipeline.methods.registry import (
    PRUNING_METHODS,
    SLICE,
    TRAINED_PRUNERS,
)

# The help of an option is the string below its field, so the two can't differ.
set_parsing_settings(
    docstring_parse_attribute_docstrings=True,
    add_print_completion_argument=True,
)

Config = TypeVar("Config")
ACTS_ONLY: set[str | int] = {
    "granularity",
    "agent",
    "policy",
    "hyperparameters",
    "episodes",
    "seed",
    "finalists",
    "checkpoint_every",
}
"""Options of a search that mean nothing to a policy that only acts, on channels."""


def search_options(parser: Parser) -> None:
    """Everything that a new run needs: a field of every stage's dataclass."""
    parser.add_argument(
        "--config",
        action="config",
        help="YAML file with any of these options, or config.yaml of a run.",
    )
    parser.add_argument(
        "--method",
        type=str | None,
        default=None,
        help="A method of the field, as defaults for other options; "
        "`autoprune methods` lists them.",
    )
    # What nearly every run sets has no prefix; stages that seldom need a word do.
    for config in (NetworkConfig, DataConfig, SearchConfig):
        parser.add_class_arguments(config)
    # Both are flags here, which take no value.
    parser.add_class_arguments(OutputConfig, skip={"resume", "json"})
    parser.add_argument(
        "--resume",
        action="store_true",
        help="Go on with the run in --out where it was interrupted.",
    )
    _json_option(parser)
    parser.add_argument(
        "--epochs",
        type=int | None,
        default=None,
        help="Epochs of fine-tuning (null: 10, or on a small dataset as many as make "
        "600 steps, at most 30).",
    )
    # --epochs has no prefix, so that it is the same in `autoprune finetune`.
    parser.add_class_arguments(FinetuneConfig, "finetune", skip={"epochs"})
    # One --seed for search and proxy; `settings_of` hands it on.
    parser.add_class_arguments(ProxyConfig, "proxy", skip={"seed"})
    parser.add_class_arguments(SparseConfig, "sparse")
    parser.add_class_arguments(RemovalConfig, "removal")
    parser.add_class_arguments(DimensionsConfig, "dimensions")
    parser.add_class_arguments(LatencyConfig, "latency")
    # These two depend on the registry, which a docstring can't read.
    _set_help(parser, "granularity", _granularity_help())
    _set_help(parser, "removal.method", _removal_help())


def _set_help(parser: Parser, name: str, text: str) -> None:
    # argparse shows its options nowhere else.
    for action in parser._actions:
        if action.dest == name:
            action.help = text


def _granularity_help() -> str:
    """What can be removed and who decides it, from the registry's entries."""
    parts = []
    for name, entry in PRUNING_METHODS.items():
        part = f"{name}: {entry.removes}"
        if entry.agents is not None:
            part += f" (agent {' or '.join(entry.agents)}"
            if entry.criteria is not None:
                part += f"; criterion {' or '.join(entry.criteria)}"
            part += ")"
        parts.append(part)
    return f"What is removed. {'; '.join(parts)}."


def _removal_help() -> str:
    """How units can leave, from the registry's entries."""
    parts = [f"{SLICE}: at once"]
    for name, entry in TRAINED_PRUNERS.items():
        parts.append(f"{name}: {entry.how} ({', '.join(entry.granularities)})")
    return f"How units leave; all but {SLICE} train first. {'; '.join(parts)}."


def _json_option(parser: Parser) -> None:
    parser.add_argument(
        "--json",
        action="store_true",
        help="Print one JSON object as the last line of stdout.",
    )


def verbosity_options(parser: Parser) -> None:
    """How much a command says."""
    parser.add_argument(
        "-q",
        "--quiet",
        action="store_true",
        help="Print results and errors only.",
    )
    parser.add_argument(
        "-v",
        "--verbose",
        action="store_true",
        help="Print every step, and every stage with its time.",
    )


def pick(options: Namespace, config: type[Config]) -> Config:
    """The dataclass that a command's flat options describe.

    Args:
        options: The command's options.
        config: The dataclass; fields that are no options keep their defaults.
    """
    fields: Any = dataclasses.fields(config)  # pyright: ignore[reportArgumentType]
    given = {}
    for field in fields:
        # Some fields are no options of this command; those keep their defaults.
        if field.name in options:
            given[field.name] = options[field.name]
    return config(**given)


def settings_of(options: Namespace) -> Settings:
    """The settings that the options of `search_options` describe.

    Args:
        options: The command's options.
    """
    return Settings(
        network=pick(options, NetworkConfig),
        data=pick(options, DataConfig),
        search=pick(options, SearchConfig),
        # Sampled channels follow the seed of the search.
        proxy=ProxyConfig(**vars(options.proxy), seed=options.seed),
        finetune=FinetuneConfig(**vars(options.finetune), epochs=options.epochs),
        sparse=SparseConfig(**vars(options.sparse)),
        removal=RemovalConfig(**vars(options.removal)),
        dimensions=DimensionsConfig(**vars(options.dimensions)),
        latency=LatencyConfig(**vars(options.latency)),
    )


def run_options(parser: Parser) -> None:
    """An existing run."""
    parser.add_argument("run", help="Folder of the run.")
    _json_option(parser)


def replay_options(parser: Parser) -> None:
    """A policy, and where it shall act.

    The defaults are its run's settings, without a run those of `autoprune run`.
    """
    parser.add_argument(
        "policy",
        help="A run, the name of a shipped policy, or a policy's folder. Options that "
        "aren't given are as in the run, or, for a policy of no run, as `autoprune "
        "run` has them.",
    )
    _json_option(parser)
    for config in (NetworkConfig, DataConfig, SearchConfig):
        names: set[str | int] = {field.name for field in dataclasses.fields(config)}
        # A policy that only acts searches nothing.
        parser.add_class_arguments(config, skip=ACTS_ONLY & names)
    parser.add_class_arguments(ProxyConfig, "proxy", skip={"seed"})
    # None tells what wasn't given.
    defaults = dict(parser.get_defaults().items())
    for name in ("json", "policy"):
        defaults.pop(name, None)
    parser.set_defaults(dict.fromkeys(defaults))
    parser.add_argument(
        "--out",
        type=str | None,
        default=None,
        help="File for the allocation, or for the front of a range (default: in the "
        "run folder, else in runs/).",
    )


def prune_options(parser: Parser) -> None:
    """An existing run, or an allocation and all that a new run needs."""
    # Optional, as --allocation takes its place; `commands.prune` refuses both and
    # neither.
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
        "--finetune.lr",
        type=float | None,
        default=None,
        help="Highest learning rate (default: as the run was started).",
    )
    parser.add_argument(
        "--resume", action="store_true", help="Go on after the last finished epoch."
    )


def export_options(parser: Parser) -> None:
    """An existing run, the format."""
    run_options(parser)
    parser.add_argument("--format", type=str, default="onnx", help="onnx or torch.")


def compare_options(parser: Parser) -> None:
    """Finished runs, the page's file."""
    parser.add_argument(
        "runs", nargs="+", type=str, help="Folders of two or more finished runs."
    )
    parser.add_argument(
        "--out",
        type=str | None,
        default=None,
        help="File for the page (default: comparison.html beside the first run).",
    )
    _json_option(parser)


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
