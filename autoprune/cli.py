"""The `autoprune` command: the composition root, where core, environment and agents meet.

Heavy imports happen inside the commands, so that `--help` answers at once.
"""

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path

from jsonargparse import Namespace

from autoprune.config import NetworkConfig, OutputConfig, Settings, TraceConfig
from autoprune.errors import ExportError, UserError, check_known
from autoprune.options import (
    Parser,
    data_options,
    export_options,
    finetune_options,
    pick,
    prune_options,
    replay_options,
    run_options,
    search_options,
    settings_of,
    trace_options,
)


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; returns 0, or 1 if something failed, 2 for a user error, 130 after Ctrl-C."""
    try:
        options = build_parser().parse_args(arguments)
        COMMANDS[options.subcommand].run(options[options.subcommand])
        return 0
    except UserError as error:
        print(f"autoprune: error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        where = f" {error.filename!r}" if error.filename else ""
        print(f"autoprune: error: can't read or write{where} ({error.strerror or error})", file=sys.stderr)
        return 2
    except ExportError as error:
        print(f"autoprune: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("autoprune: interrupted; go on with --resume", file=sys.stderr)
        return 130


def build_parser() -> Parser:
    """The parser of all commands."""
    parser = Parser(
        prog="autoprune", description="Prune a trained PyTorch vision network: an agent finds how much where."
    )
    parser.add_argument("--version", action="version", version=_version())
    commands = parser.add_subcommands(required=True, dest="subcommand")
    for name, command in COMMANDS.items():
        sub = Parser(description=command.run.__doc__.splitlines()[0])
        command.options(sub)
        commands.add_subcommand(name, sub, help=command.run.__doc__.splitlines()[0])
    return parser


def _version() -> str:
    from importlib.metadata import version

    return f"autoprune {version('autoprune')}"


def _start(options: Namespace, prepare: Callable):
    """Workspace and run folder of a new run, or of the one to resume.

    Everything that can be wrong is found by `prepare(workspace)` before the folder is made.
    """
    from autoprune.compress import Workspace
    from autoprune.runs import start_run

    settings, output = settings_of(options), pick(options, OutputConfig)
    _check_names(settings, output)
    workspace = Workspace(settings)
    prepare(workspace)
    return workspace, start_run(settings, output.out, output.resume), output


def _check_names(settings: Settings, output: OutputConfig) -> None:
    """Refuses unknown names and impossible budgets before anything slow happens or is written."""
    from agents.baselines import check_baselines
    from agents.search import AGENTS
    from autoprune.allocation import Budget
    from autoprune.criteria import check_criterion
    from envs.rewards import reward_named

    check_known("agent", settings.search.agent, AGENTS)
    check_baselines(output.baselines)
    check_criterion(settings.search.criterion)
    reward_named(settings.search.reward)
    Budget.parse(settings.search.budget)


def _open(run: str):
    """Workspace and folder of an existing run."""
    from autoprune.compress import Workspace
    from autoprune.runs import RunFolder

    folder = RunFolder.open(run)
    return Workspace(Settings.from_dict(folder.read_config())), folder


def _finish(folder, as_json: bool) -> None:
    from autoprune.compress import summary
    from autoprune.console import print_results

    results = summary(folder)
    print_results(results)
    print(f"run folder: {folder.root}")
    if as_json:
        print(json.dumps(results))


def run(options: Namespace) -> None:
    """The whole job: search, prune, fine-tune, evaluate, export, report; without options, on the embedded network."""
    from autoprune import compress
    from autoprune.console import say

    workspace, folder, output = _start(options, _make_env)
    _search(workspace, folder, output)
    if not (folder.pruned / "plan.json").exists():
        compress.prune_stage(workspace, folder, say)
    if compress.read_plan(folder)["stage"] == "pruned":
        _finetune(workspace, folder)
    if "accuracy" not in folder.known_results:
        compress.evaluate_stage(workspace, folder)
    if not folder.onnx.exists():
        say("export: model.onnx, checked against PyTorch")
        compress.export_stage(workspace, folder)
    if "latency" not in folder.known_results:
        say("latency: dense and pruned, in PyTorch and ONNX Runtime")
        compress.latency_stage(workspace, folder, output.latency_batch)
    print(f"report: {compress.report_stage(folder)}")
    _finish(folder, output.json)


def search(options: Namespace) -> None:
    """Up to the allocation: an agent or baseline searches, the best finalist is chosen."""
    from autoprune import compress

    workspace, folder, output = _start(options, _make_env)
    _search(workspace, folder, output)
    print(f"report: {compress.report_stage(folder)}")
    _finish(folder, output.json)


def _search(workspace, folder, output: OutputConfig) -> None:
    """Baselines, then the agent; each is skipped when its results are there already."""
    from agents.baselines import check_baselines
    from autoprune.compress import timed
    from autoprune.console import say
    from autoprune.runs import RunFolder

    settings = workspace.settings
    network = settings.network.model
    env = _make_env(workspace)
    say(f"{network}: {len(workspace.groups)} prunable groups, {len(workspace.groups.pinned)} pinned")
    folder.add_results(run=str(folder.root), model=network, data=settings.data.data, seed=settings.search.seed)
    folder.add_results(budget=str(env.budget), agent=settings.search.agent)
    for name in check_baselines(output.baselines):
        known = folder.known_results.get("baselines", {})
        if name not in known and name != settings.search.agent:
            with timed(folder, f"baseline {name}"):
                result = _one_search(workspace, name, RunFolder(folder.root / "baselines" / name))
            entry = result.best.to_json() | {"evaluations": result.evaluations}
            entry["reward"] = max(episode.reward for episode in result.episodes)
            folder.add_results(baselines=known | {name: entry})
    if not folder.allocation.exists():
        with timed(folder, "search"):
            result = _one_search(workspace, settings.search.agent, folder)
        _keep(result, workspace, folder, env)


def _make_env(workspace):
    from autoprune.constraints import search_limits
    from envs.layer_pruning import LayerPruningEnv

    search = workspace.settings.search
    return LayerPruningEnv(
        workspace.model,
        workspace.groups,
        workspace.proxy(),
        search.budget,
        search.reward,
        max_sparsity=search.max_sparsity,
        accuracy_floor=search.accuracy_floor,
        **search_limits(workspace.groups, search),
    )


def _one_search(workspace, agent: str, folder):
    from agents.search import search
    from autoprune.console import progress

    folder.root.mkdir(parents=True, exist_ok=True)
    config = dataclasses.replace(workspace.settings.search, agent=agent)
    best = float("-inf")
    with progress(agent, config.episodes) as advance:

        def on_episode(episode) -> None:
            nonlocal best
            best = max(best, episode.reward)
            advance(f"best reward {best:.3f}")

        return search(_make_env(workspace), config, folder, on_episode)


def _keep(result, workspace, folder, env) -> None:
    """Stores what a search found; the allocation comes last, since its file says that the search is done."""
    from autoprune.compress import use_allocation

    if result.policy is not None:
        own = next(f for f in result.finalists if f.allocation.source == "policy")
        about = {"network": workspace.groups.fingerprint, "budget": str(env.budget), "allocation": own.allocation.kept}
        result.policy.save(folder.policy, **about)
    chosen = result.best
    folder.add_results(
        episodes=len(result.episodes),
        evaluations=result.evaluations,
        seconds_search=round(result.seconds, 2),
        finalists=[finalist.to_json() for finalist in result.finalists],
        selection_accuracy=chosen.selection.accuracy,
        selection_loss=chosen.selection.loss,
    )
    use_allocation(workspace, chosen.allocation, folder)


def _finetune(workspace, folder) -> None:
    from autoprune.compress import finetune_stage
    from autoprune.console import progress

    with progress("fine-tune", workspace.settings.finetune.epochs_for(len(workspace.splits.train))) as advance:
        finetune_stage(workspace, folder, lambda epoch, loss: advance(f"loss {loss:.4f}"))


def replay(options: Namespace) -> None:
    """Lets a learned policy act, without learning, on its own network or another one, at its own budget or another."""
    from agents.replay import Policy, replay
    from autoprune.compress import Workspace, costs_of
    from autoprune.console import print_results
    from autoprune.runs import write_json

    home, folder = _open(options.run)
    policy = Policy.load(folder.policy)
    workspace = Workspace(_elsewhere(home.settings, options))
    env = _make_env(workspace)
    allocation, info = replay(policy, env)
    uniform = env.proxy(dict(zip(workspace.costs.names, map(int, env.space.uniform(env.target)), strict=True)))
    settings = workspace.settings
    name = f"replay-{settings.network.model.replace(':', '-')}-{env.budget}.json".replace("=", "-")
    path = Path(options.out) if options.out else folder.root / name
    write_json(path, dataclasses.replace(allocation, source="policy").to_json())
    results = {"model": settings.network.model, "budget": str(env.budget), "agent": f"policy of {folder.root.name}"}
    results |= costs_of(workspace, allocation) | {"allocation": str(path)}
    results |= {"proxy_accuracy": info["accuracy"], "proxy_loss": info["loss"]}
    results |= {"proxy_accuracy_uniform": uniform.accuracy, "proxy_loss_uniform": uniform.loss}
    print_results(results)
    print(f"proxy accuracy {info['accuracy']:.2%}, uniform {uniform.accuracy:.2%}; allocation: {path}")
    if options.json:
        print(json.dumps({key: value for key, value in results.items() if not isinstance(value, list)}))


def _elsewhere(settings: Settings, options: Namespace) -> Settings:
    """The run's settings with another network, dataset, budget or limits of single groups."""
    network = settings.network
    if options.model:
        network = NetworkConfig(options.model)
    if options.weights:
        network = dataclasses.replace(network, weights=options.weights)
    data = dataclasses.replace(settings.data, data=options.data) if options.data else settings.data
    names = "budget", "exclude", "min_width", "round_to_for"
    asked = {name: options[name] for name in names if options[name] is not None}
    return dataclasses.replace(
        settings, network=network, data=data, search=dataclasses.replace(settings.search, **asked)
    )


def prune(options: Namespace) -> None:
    """Applies the allocation of RUN, or of a file in a new run, without searching."""
    from autoprune import compress
    from autoprune.allocation import Allocation
    from autoprune.console import say

    if bool(options.run) == bool(options.allocation):
        raise UserError("prune: give either RUN or --allocation FILE")
    if options.run:
        workspace, folder = _open(options.run)
    else:
        read = lambda workspace: Allocation.read(options.allocation, workspace.groups)  # noqa: E731
        workspace, folder, _ = _start(options, read)
        allocation = read(workspace)
        settings = workspace.settings
        folder.add_results(run=str(folder.root), model=settings.network.model, data=settings.data.data)
        folder.add_results(budget=allocation.budget, agent=allocation.source, evaluations=0)
        compress.use_allocation(workspace, allocation, folder)
    compress.prune_stage(workspace, folder, say)
    _finish(folder, options.json)


def finetune(options: Namespace) -> None:
    """Fine-tunes the pruned network of RUN; --resume goes on after the last finished epoch."""
    from autoprune.compress import Workspace

    workspace, folder = _open(options.run)
    if options.epochs is not None:
        settings = workspace.settings
        epochs = dataclasses.replace(settings.finetune, epochs=options.epochs)
        workspace = Workspace(dataclasses.replace(settings, finetune=epochs))
    if not options.resume:
        folder.finetune_checkpoint.unlink(missing_ok=True)
    _finetune(workspace, folder)
    _finish(folder, options.json)


def evaluate(options: Namespace) -> None:
    """Accuracy of the dense and the pruned network of RUN on the test split."""
    from autoprune.compress import evaluate_stage

    workspace, folder = _open(options.run)
    evaluate_stage(workspace, folder)
    _finish(folder, options.json)


def export(options: Namespace) -> None:
    """Writes the pruned network of RUN as ONNX, checked against PyTorch, or as a torch.export program."""
    from autoprune.compress import export_stage

    workspace, folder = _open(options.run)
    print(export_stage(workspace, folder, options.format))


def report(options: Namespace) -> None:
    """Writes report.html of RUN from what its folder holds."""
    from autoprune.compress import report_stage

    _, folder = _open(options.run)
    print(report_stage(folder))


def trace(options: Namespace) -> None:
    """Prints the groups of a network, what is pinned and why, and the share of MACs that can shrink."""
    import torch

    from autoprune.console import print_trace
    from autoprune.constraints import pinned_by_user
    from autoprune.models import MODELS, build, load_weights
    from autoprune.tracing import describe
    from autoprune.tracing import trace as trace_network

    config = pick(options, TraceConfig)
    model = build(config.model, config.n_classes)
    if config.weights:
        load_weights(model, config.weights)
    size = config.image_size or (32 if config.model in MODELS else 224)
    groups = pinned_by_user(trace_network(model, torch.zeros(1, 3, size, size)), config.excluded)
    description = {"model": config.model, **describe(groups)}
    print_trace(description)
    if options.json:
        print(json.dumps(description))


def data(options: Namespace) -> None:
    """Fetches a dataset and stores it once: cifar10."""
    from autoprune.console import say
    from autoprune.fetching import fetch

    print(fetch(options.name, say))


@dataclasses.dataclass(frozen=True)
class Command:
    """A verb of the command line: what it runs and which options it takes."""

    run: Callable[[Namespace], None]
    options: Callable[[Parser], None]


COMMANDS: dict[str, Command] = {
    "run": Command(run, search_options),
    "search": Command(search, search_options),
    "replay": Command(replay, replay_options),
    "prune": Command(prune, prune_options),
    "finetune": Command(finetune, finetune_options),
    "evaluate": Command(evaluate, run_options),
    "export": Command(export, export_options),
    "report": Command(report, run_options),
    "trace": Command(trace, trace_options),
    "data": Command(data, data_options),
}
