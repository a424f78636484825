"""What each command of `autoprune` does, with the options that `options.py` gives it.

Part of the composition root, as cli.py is: heavy imports happen inside.
"""

import dataclasses
import json
from pathlib import Path

from jsonargparse import Namespace

from autoprune.cli import steps
from autoprune.cli.options import Parser, pick, prune_options
from autoprune.cli.presets import methods_table
from autoprune.config import NetworkConfig, Settings, TraceConfig
from autoprune.errors import ExportError, UserError


def run(options: Namespace) -> None:
    """The whole job: search, prune, fine-tune, evaluate, export, report; without
    options, on the embedded network.
    """
    from autoprune.pipeline import stages
    from autoprune.reporting.console import say

    failed = None
    workspace, folder, output = steps.start(options, steps.prepare)
    workspace = steps.train_sparsely(workspace, folder)
    steps.decide(workspace, folder, output)
    if not (folder.pruned / "plan.json").exists():
        steps.prune(workspace, folder)
    if stages.read_plan(folder)["stage"] == "pruned":
        steps.finetune(workspace, folder)
    if "accuracy" not in folder.known_results:
        stages.evaluate_stage(workspace, folder)
    if not folder.onnx.exists():
        say("export: model.onnx, checked against PyTorch")
        try:
            stages.export_stage(workspace, folder)
        except (
            ExportError
        ) as error:  # what was pruned and trained is still to be reported
            failed = error
    if "latency" not in folder.known_results:
        say("latency: dense and pruned")
        stages.latency_stage(workspace, folder, output.latency_batch)
    steps.finish(folder, output.json)
    if failed is not None:
        raise failed


def search(options: Namespace) -> None:
    """Up to the allocation: an agent or baseline searches, the best finalist is chosen."""
    workspace, folder, output = steps.start(options, steps.prepare)
    workspace = steps.train_sparsely(workspace, folder)
    steps.decide(workspace, folder, output)
    steps.finish(folder, output.json)


def replay(options: Namespace) -> None:
    """Lets a learned policy act, without learning, on its own network or another one,
    at its own budget or another.
    """
    from autoprune.agents.policies import find_policy
    from autoprune.agents.replay import Policy
    from autoprune.cli.search_stage import act, make_env
    from autoprune.pipeline.context import Workspace
    from autoprune.reporting.console import print_results
    from autoprune.runs import RunFolder, file_stem, write_json

    place = find_policy(options.policy, "policy")
    policy = Policy.load(place, "policy")
    run = RunFolder(place.parent)
    is_of_run = run.policy == place and run.config.is_file()
    trained = Workspace.of_run(run) if is_of_run else Workspace(Settings())
    settings = _elsewhere(trained.settings, options)
    # What a run has of its own network, trained or measured, says nothing of another
    # one.
    is_own = options.model is None and options.weights is None
    workspace = (
        dataclasses.replace(trained, settings=settings)
        if is_own
        else Workspace(settings)
    )
    env = make_env(workspace)
    settings, name = workspace.settings, run.root.name if is_of_run else place.name
    stem = file_stem(
        "replay" if is_of_run else name, settings.network.model, str(env.budget)
    )
    path = (
        Path(options.out)
        if options.out
        else (run.root if is_of_run else Path("runs")) / f"{stem}.json"
    )
    written, results, last = act(policy, workspace, env)
    write_json(path, written)
    results = {
        "model": settings.network.model,
        "budget": str(env.budget),
        "agent": f"policy of {name}",
    } | results
    results |= {"pareto" if "front" in written else "allocation": str(path)}
    print_results(results)
    print(f"{last}: {path}")
    if options.json:
        print(
            json.dumps(
                {
                    key: value
                    for key, value in results.items()
                    if not isinstance(value, list)
                }
            )
        )


def _elsewhere(settings: Settings, options: Namespace) -> Settings:
    """Settings with what the options of `replay_options` ask for; another network
    doesn't keep these weights.
    """
    flat = {
        name: value
        for name, value in vars(options).items()
        if name not in ("policy", "proxy")
    }
    if flat["model"] is not None and flat["weights"] is None:
        flat["weights"] = NetworkConfig.weights
    stages = {
        "network": flat,
        "data": flat,
        "search": flat,
        "proxy": vars(options.proxy),
    }
    return dataclasses.replace(
        settings,
        **{name: _asked(settings, name, given) for name, given in stages.items()},
    )


def _asked(settings: Settings, stage: str, given: dict):
    """One stage of the settings, with the options that were given."""
    old = getattr(settings, stage)
    known = {field.name for field in dataclasses.fields(old)}
    return dataclasses.replace(
        old, **{k: v for k, v in given.items() if k in known and v is not None}
    )


def policies(options: Namespace) -> None:
    """Lists the policies that autoprune ships: algorithm, what they were trained on,
    their budgets.
    """
    from autoprune.agents.policies import shipped_table
    from autoprune.reporting.console import print_policies

    rows = shipped_table()
    print_policies(rows)
    if options.json:
        print(json.dumps({"policies": rows}))


def methods(options: Namespace) -> None:
    """Lists the methods of the field that --method names: kind, granularity, paper."""
    from autoprune.reporting.console import print_methods

    rows = methods_table()
    print_methods(rows)
    if options.json:
        print(json.dumps({"methods": rows}))


def prune(options: Namespace) -> None:
    """Applies the allocation of RUN, or of a file in a new run, without searching."""
    from autoprune.costs.allocation import Allocation
    from autoprune.pipeline import stages
    from autoprune.pipeline.methods.registry import removal

    if bool(options.run) == bool(options.allocation):
        raise UserError("prune", "give either RUN or --allocation FILE")
    if options.run:
        _check_alone(options)
        workspace, folder = steps.open_run(options.run)
        if not removal(workspace, folder).is_decided:
            raise UserError(
                "run",
                f"{options.run!r} has decided nothing yet; go on with: autoprune "
                f"run --resume --out {options.run}",
            )
    else:
        _check_single(options)

        def prepare(workspace) -> None:
            Allocation.read(options.allocation, workspace.groups)
            removal(workspace, None).check()

        workspace, folder, _ = steps.start(options, prepare)
        workspace = steps.train_sparsely(workspace, folder)
        allocation = Allocation.read(options.allocation, workspace.groups)
        settings = workspace.settings
        stages.keep_order(workspace, folder)
        folder.add_results(
            run=str(folder.root), model=settings.network.model, data=settings.data.data
        )
        folder.add_results(
            budget=allocation.budget, agent=allocation.source, evaluations=0
        )
        stages.use_allocation(workspace, allocation, folder)
    steps.prune(workspace, folder)
    steps.finish(folder, options.json)


def _check_alone(options: Namespace) -> None:
    """Refuses options of a new run beside an existing one, whose settings count."""
    parser = Parser()
    prune_options(parser)
    usual = dict(parser.get_defaults().items())
    given = [
        name
        for name, value in options.items()
        if value != usual[name] and name not in ("run", "json")
    ]
    if given:
        raise UserError(
            given[0],
            f"RUN is pruned with the settings that it was started with; "
            f"leave --{given[0]} out, or "
            f"prune in a new run with --allocation {options.run}/allocation.json",
        )


def _check_single(options: Namespace) -> None:
    """Refuses what goes with no single allocation: granularities, ranges, fronts,
    methods that decide by budget.
    """
    from autoprune.costs.budget import BudgetRange, parse_budget

    if options.removal.method == "resrep":
        raise UserError(
            "removal.method",
            "resrep decides by itself how much goes where, got an "
            "--allocation beside it; "
            "use compactors, which do the same for an allocation",
        )
    if options.sparse.method == "gsm" and options.sparse.share is None:
        raise UserError(
            "sparse.share",
            "gsm takes the budget's share, and an allocation has none; "
            "give one in (0, 1]",
        )
    if options.granularity not in ("channel", "dimensions"):
        raise UserError(
            "granularity",
            f"an allocation is for channel or dimensions, got "
            f"{options.granularity}; for that give "
            f"a RUN of autoprune search --granularity {options.granularity}",
        )
    if isinstance(parse_budget(options.budget), BudgetRange):
        raise UserError(
            "budget",
            f"prune applies one allocation, got the range {options.budget}; "
            f"leave --budget out, "
            "the allocation knows its own",
        )
    path = Path(options.allocation)
    if path.is_file() and '"front"' in path.read_text(
        encoding="utf-8", errors="replace"
    ):
        raise UserError(
            "allocation",
            f"{options.allocation!r} holds a whole front; give one of "
            f"its points: the allocation that "
            'autoprune replay RUN --budget macs=40% writes, or an entry of "front" as '
            "a file of its own",
        )


def finetune(options: Namespace) -> None:
    """Fine-tunes the pruned network of RUN; --resume goes on after the last finished
    epoch.
    """
    workspace, folder = steps.open_run(options.run)
    if options.epochs is not None:
        settings = workspace.settings
        epochs = dataclasses.replace(settings.finetune, epochs=options.epochs)
        workspace = dataclasses.replace(
            workspace, settings=dataclasses.replace(settings, finetune=epochs)
        )
    if not options.resume:
        folder.finetune_checkpoint.unlink(missing_ok=True)
    steps.finetune(workspace, folder)
    steps.finish(folder, options.json)


def evaluate(options: Namespace) -> None:
    """Accuracy of the dense and the pruned network of RUN on the test split."""
    from autoprune.pipeline.stages import evaluate_stage

    workspace, folder = steps.open_run(options.run)
    evaluate_stage(workspace, folder)
    steps.finish(folder, options.json)


def export(options: Namespace) -> None:
    """Writes the pruned network of RUN as ONNX, checked against PyTorch, or as a
    torch.export program.
    """
    from autoprune.pipeline.stages import export_stage, report_stage

    workspace, folder = steps.open_run(options.run)
    written = export_stage(workspace, folder, options.format)
    report_stage(folder)
    _print_file(written, options.json)


def report(options: Namespace) -> None:
    """Writes report.html of RUN from what its folder holds."""
    from autoprune.pipeline.stages import report_stage

    _, folder = steps.open_run(options.run)
    _print_file(report_stage(folder), options.json)


def _print_file(path: Path, as_json: bool) -> None:
    print(path)
    if as_json:
        print(json.dumps({"file": str(path)}))


def trace(options: Namespace) -> None:
    """Prints the groups of a network, what is pinned and why, and the share of MACs
    that can shrink.
    """
    import torch

    from autoprune.costs.constraints import pinned_by_user
    from autoprune.data.models import MODELS, build, load_weights
    from autoprune.reporting.console import print_trace
    from autoprune.tracing.trace import describe
    from autoprune.tracing.trace import trace as trace_network

    config = pick(options, TraceConfig)
    model = build(config.model, config.n_classes)
    if config.weights:
        load_weights(model, config.weights)
    size = config.image_size or (32 if config.model in MODELS else 224)
    groups = pinned_by_user(
        trace_network(model, torch.zeros(1, 3, size, size)), config.excluded
    )
    description = {"model": config.model, **describe(groups)}
    print_trace(description)
    if options.json:
        print(json.dumps(description))


def data(options: Namespace) -> None:
    """Fetches a dataset and stores it once: cifar10."""
    from autoprune.data.fetching import fetch
    from autoprune.reporting.console import say

    print(fetch(options.name, say))
