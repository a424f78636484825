"""The `autoprune` command: the composition root, where core, environment and agents meet.

Heavy imports happen inside the commands, so that `--help` answers at once.
"""

import dataclasses
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

from jsonargparse import Namespace

from autoprune.config import NetworkConfig, OutputConfig, SearchConfig, Settings, TraceConfig
from autoprune.errors import ExportError, UserError
from autoprune.methods import method_named, methods_table
from autoprune.options import (
    Parser,
    data_options,
    export_options,
    finetune_options,
    list_options,
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
        options = _parse(arguments)
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


def _parse(arguments: list[str] | None) -> Namespace:
    """The options; with a `--method` or a `--policy` read once more, with the defaults that follow from it."""
    options = build_parser().parse_args(arguments)
    defaults = _implied(options[options.subcommand])
    return build_parser(defaults).parse_args(arguments) if defaults else options


def _implied(options: Namespace) -> dict[str, object]:
    """Defaults that follow from what is given: those of a method; else a policy is gone on with by its own agent."""
    if options.get("method"):
        return method_named(options.method).defaults
    if options.get("policy") and options.get("agent") == SearchConfig.agent:
        from agents.policies import agent_of
        from autoprune.runs import RunFolder

        is_resumed = options.resume and options.out
        return {"agent": agent_of(options.policy, RunFolder(Path(options.out)).start if is_resumed else None)}
    return {}


def build_parser(defaults: Mapping[str, object] = MappingProxyType({})) -> Parser:
    """The parser of all commands; `defaults` follow from a method or a policy, for the commands that take one."""
    parser = Parser(
        prog="autoprune", description="Prune a trained PyTorch vision network: an agent finds how much where."
    )
    parser.add_argument("--version", action="version", version=_version())
    commands = parser.add_subcommands(required=True, dest="subcommand")
    for name, command in COMMANDS.items():
        sub = Parser(description=command.run.__doc__.splitlines()[0])
        command.options(sub)
        if command.options in (search_options, prune_options):
            sub.set_defaults(dict(defaults))
        commands.add_subcommand(name, sub, help=command.run.__doc__.splitlines()[0])
    return parser


def _version() -> str:
    from importlib.metadata import version

    return f"autoprune {version('autoprune')}"


def _start(options: Namespace, prepare: Callable):
    """Workspace and run folder of a new run, or of the one to resume.

    Everything that can be wrong is found by `prepare(workspace)` before the folder is made.
    """
    from autoprune.runs import RunFolder, start_run
    from autoprune.workspace import Workspace

    settings, output = settings_of(options), pick(options, OutputConfig)
    _check_names(settings, output)
    written = RunFolder(Path(output.out)).blocks if output.resume else None
    workspace = Workspace(settings, blocks=written)
    prepare(workspace)
    folder = start_run(settings, output.out, output.resume)
    if options.method:
        folder.add_results(method=options.method)
    return workspace, folder, output


def _check_names(settings: Settings, output: OutputConfig) -> None:
    """Refuses unknown names and impossible budgets before anything slow happens or is written."""
    from agents.baselines import check_baselines
    from agents.policies import starting_policy
    from agents.search import check_agent
    from autoprune.criteria import check_criterion
    from autoprune.granularities import FITTED, check_removal
    from autoprune.sparse import check_sparse
    from envs.rewards import reward_named

    check_agent(settings.search.agent, others=[FITTED])
    check_baselines(output.baselines, settings.search.agent)
    check_criterion(settings.search.criterion)
    check_sparse(settings.sparse.method)
    reward_named(settings.search.reward)
    check_removal(settings)
    if not output.resume:  # a run that goes on has a copy
        starting_policy(settings.search.agent, settings.search.policy)


def _open(run: str):
    """Workspace and folder of an existing run."""
    from autoprune.runs import RunFolder
    from autoprune.workspace import Workspace

    folder = RunFolder.open(run)
    return Workspace.of_run(folder), folder


def _finish(folder, as_json: bool) -> None:
    """What every command that adds to a run ends with: a report that is true again, and the results."""
    from autoprune.compress import report_stage, summary
    from autoprune.console import print_results

    print(f"report: {report_stage(folder)}")
    results = summary(folder)
    print_results(results)
    print(f"run folder: {folder.root}")
    if as_json:
        print(json.dumps(results))


def run(options: Namespace) -> None:
    """The whole job: search, prune, fine-tune, evaluate, export, report; without options, on the embedded network."""
    from autoprune import compress
    from autoprune.console import say

    workspace, folder, output = _start(options, _prepare)
    workspace = _train_sparsely(workspace, folder)
    _decide(workspace, folder, output)
    if not (folder.pruned / "plan.json").exists():
        _prune(workspace, folder)
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
    _finish(folder, output.json)


def search(options: Namespace) -> None:
    """Up to the allocation: an agent or baseline searches, the best finalist is chosen."""
    workspace, folder, output = _start(options, _prepare)
    workspace = _train_sparsely(workspace, folder)
    _decide(workspace, folder, output)
    _finish(folder, output.json)


def _train_sparsely(workspace, folder):
    """The workspace whose network is to be pruned, after sparse training where the settings ask for it."""
    from autoprune.compress import sparse_stage
    from autoprune.console import progress

    settings = workspace.settings
    if settings.sparse.method == "none":
        return workspace
    epochs = settings.sparse_training.epochs_for(len(workspace.splits.train))
    with progress(settings.sparse.method, epochs) as advance:
        return sparse_stage(workspace, folder, lambda epoch, loss: advance(f"loss {loss:.4f}"))


def _prepare(workspace) -> None:
    """Finds what can be wrong with network, images and budget."""
    from agents.stage import make_env
    from autoprune.granularities import removal

    decided = removal(workspace, None)
    if decided.is_searched:
        make_env(workspace)
    decided.check()


def _decide(workspace, folder, output: OutputConfig) -> None:
    """What goes: it is searched, or decided at once."""
    from agents.stage import search_stage
    from autoprune.budget import parse_budget
    from autoprune.compress import keep_order
    from autoprune.granularities import removal

    settings, network = workspace.settings, workspace.settings.network.model
    folder.add_results(run=str(folder.root), model=network, data=settings.data.data, seed=settings.search.seed)
    folder.add_results(budget=str(parse_budget(settings.search.budget)), agent=settings.search.agent)
    keep_order(workspace, folder)
    decided = removal(workspace, folder)
    if decided.is_searched:
        search_stage(workspace, folder, output.baselines)
    elif not decided.is_decided:
        _decide_without_search(workspace, folder, decided.n_steps)


def _decide_without_search(workspace, folder, n_steps: int) -> None:
    from autoprune.compress import decide_stage
    from autoprune.console import progress

    if not n_steps:
        return decide_stage(workspace, folder, lambda note: None)
    with progress(workspace.settings.search.agent, n_steps) as advance:
        decide_stage(workspace, folder, advance)


def _prune(workspace, folder) -> None:
    """Prunes, after the training that some ways of removing channels need."""
    from autoprune.compress import prune_stage
    from autoprune.console import progress, say
    from autoprune.granularities import removal

    epochs = removal(workspace, folder).epochs
    if not epochs:
        return prune_stage(workspace, folder, say, lambda epoch, loss: None)
    with progress(workspace.settings.removal.method, epochs) as advance:
        prune_stage(workspace, folder, say, lambda epoch, loss: advance(f"loss {loss:.4f}"))


def _finetune(workspace, folder) -> None:
    from autoprune.compress import finetune_stage
    from autoprune.console import progress

    with progress("fine-tune", workspace.settings.finetune.epochs_for(len(workspace.splits.train))) as advance:
        finetune_stage(workspace, folder, lambda epoch, loss: advance(f"loss {loss:.4f}"))


def replay(options: Namespace) -> None:
    """Lets a learned policy act, without learning, on its own network or another one, at its own budget or another."""
    from agents.policies import find_policy
    from agents.replay import Policy
    from agents.stage import act, make_env
    from autoprune.console import print_results
    from autoprune.runs import RunFolder, file_stem, write_json
    from autoprune.workspace import Workspace

    place = find_policy(options.policy, "POLICY")
    policy = Policy.load(place, "POLICY")
    run = RunFolder(place.parent)
    is_of_run = run.policy == place and run.config.is_file()
    trained = Workspace.of_run(run) if is_of_run else Workspace(Settings())
    settings = _elsewhere(trained.settings, options)
    # What a run has of its own network, trained or measured, says nothing of another one.
    workspace = dataclasses.replace(trained, settings=settings) if options.model is None else Workspace(settings)
    env = make_env(workspace)
    settings, name = workspace.settings, run.root.name if is_of_run else place.name
    stem = file_stem("replay" if is_of_run else name, settings.network.model, str(env.budget))
    path = Path(options.out) if options.out else (run.root if is_of_run else Path("runs")) / f"{stem}.json"
    written, results, last = act(policy, workspace, env)
    write_json(path, written)
    results = {"model": settings.network.model, "budget": str(env.budget), "agent": f"policy of {name}"} | results
    results |= {"pareto" if "front" in written else "allocation": str(path)}
    print_results(results)
    print(f"{last}: {path}")
    if options.json:
        print(json.dumps({key: value for key, value in results.items() if not isinstance(value, list)}))


def _elsewhere(settings: Settings, options: Namespace) -> Settings:
    """Settings with what the options of `replay_options` ask for; another network doesn't keep these weights."""
    flat = {name: value for name, value in vars(options).items() if name not in ("policy", "proxy")}
    if flat["model"] is not None and flat["weights"] is None:
        flat["weights"] = NetworkConfig.weights
    stages = {"network": flat, "data": flat, "search": flat, "proxy": vars(options.proxy)}
    return dataclasses.replace(settings, **{name: _asked(settings, name, given) for name, given in stages.items()})


def _asked(settings: Settings, stage: str, given: dict):
    """One stage of the settings, with the options that were given."""
    old = getattr(settings, stage)
    known = {field.name for field in dataclasses.fields(old)}
    return dataclasses.replace(old, **{k: v for k, v in given.items() if k in known and v is not None})


def policies(options: Namespace) -> None:
    """Lists the policies that autoprune ships: algorithm, what they were trained on, their budgets."""
    from agents.policies import shipped_table
    from autoprune.console import print_policies

    rows = shipped_table()
    print_policies(rows)
    if options.json:
        print(json.dumps({"policies": rows}))


def methods(options: Namespace) -> None:
    """Lists the methods of the field that --method names: kind, granularity, paper."""
    from autoprune.console import print_methods

    rows = methods_table()
    print_methods(rows)
    if options.json:
        print(json.dumps({"methods": rows}))


def prune(options: Namespace) -> None:
    """Applies the allocation of RUN, or of a file in a new run, without searching."""
    from autoprune import compress
    from autoprune.allocation import Allocation
    from autoprune.granularities import removal

    if bool(options.run) == bool(options.allocation):
        raise UserError("prune: give either RUN or --allocation FILE")
    if options.run:
        workspace, folder = _open(options.run)
    else:
        _check_single(options)

        def prepare(workspace) -> None:
            Allocation.read(options.allocation, workspace.groups)
            removal(workspace, None).check()

        workspace, folder, _ = _start(options, prepare)
        workspace = _train_sparsely(workspace, folder)
        allocation = Allocation.read(options.allocation, workspace.groups)
        settings = workspace.settings
        compress.keep_order(workspace, folder)
        folder.add_results(run=str(folder.root), model=settings.network.model, data=settings.data.data)
        folder.add_results(budget=allocation.budget, agent=allocation.source, evaluations=0)
        compress.use_allocation(workspace, allocation, folder)
    _prune(workspace, folder)
    _finish(folder, options.json)


def _check_single(options: Namespace) -> None:
    """Refuses other granularities, ranges and whole fronts where one allocation is meant."""
    from autoprune.budget import BudgetRange, parse_budget

    if options.granularity not in ("channel", "dimensions"):
        raise UserError(
            f"--granularity: an allocation is for channel or dimensions, got {options.granularity}; for that give "
            f"a RUN of autoprune search --granularity {options.granularity}"
        )
    if isinstance(parse_budget(options.budget), BudgetRange):
        raise UserError(
            f"--budget: prune applies one allocation, got the range {options.budget}; leave --budget out, "
            "the allocation knows its own"
        )
    path = Path(options.allocation)
    if path.is_file() and '"front"' in path.read_text(encoding="utf-8", errors="replace"):
        raise UserError(
            f"--allocation: {options.allocation!r} holds a whole front; give one of its points: the allocation that "
            'autoprune replay RUN --budget macs=40% writes, or an entry of "front" as a file of its own'
        )


def finetune(options: Namespace) -> None:
    """Fine-tunes the pruned network of RUN; --resume goes on after the last finished epoch."""
    workspace, folder = _open(options.run)
    if options.epochs is not None:
        settings = workspace.settings
        epochs = dataclasses.replace(settings.finetune, epochs=options.epochs)
        workspace = dataclasses.replace(workspace, settings=dataclasses.replace(settings, finetune=epochs))
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
    from autoprune.compress import export_stage, report_stage

    workspace, folder = _open(options.run)
    print(export_stage(workspace, folder, options.format))
    report_stage(folder)


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
    "policies": Command(policies, list_options),
    "methods": Command(methods, list_options),
}
