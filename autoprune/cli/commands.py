"""What each command of `autoprune` does, with the options that `options.py` gives it.

Part of the composition root: heavy imports happen inside the functions.
"""

import dataclasses
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import Namespace

from autoprune.cli import opening, stages
from autoprune.cli.options import pick, prune_options
from autoprune.cli.parser import Parser
from autoprune.cli.presets import methods_table
from autoprune.config import NetworkConfig, Settings, TraceConfig
from autoprune.errors import UserError, check_known

if TYPE_CHECKING:
    from autoprune.pipeline.context import RunContext

FORMATS = ("onnx", "torch")
"""What `export` writes."""


def run(options: Namespace) -> None:
    """The whole job: search, prune, fine-tune, evaluate, export, report."""
    with opening.start(options, opening.prepare) as job:
        stages.run_stages(job)
        stages.finish(job, options.json)
    if job.failed is not None:
        # Only now, when all else is written and reported; the exit code still says that
        # something failed.
        raise job.failed


def search(options: Namespace) -> None:
    """Up to the allocation: an agent or baseline searches, the best is chosen."""
    with opening.start(options, opening.prepare) as job:
        stages.run_stages(job, until="decide")
        stages.finish(job, options.json)


def replay(options: Namespace) -> None:
    """Lets a learned policy act, on its own network or another, at any budget."""
    # Here and below: what imports torch is imported by the command that needs it, so
    # that neither `--help` nor who mistyped a name need wait for it.
    from autoprune.agents.policy_files import describe_policy, find_policy
    from autoprune.cli.checks import check_settings
    from autoprune.runs import RunFolder, file_stem

    place = find_policy(options.policy, "policy")
    describe_policy(place, "policy")
    run = RunFolder(place.parent)
    # Shipped policies, and those in folders of their own, belong to no run.
    is_of_run = run.policy == place and run.config.is_file()
    trained_with = Settings.from_dict(run.read_config()) if is_of_run else Settings()
    settings = _with_given_options(trained_with, options)
    check_settings(settings)

    from autoprune.agents.replay import Policy
    from autoprune.cli.search_stage import act, make_env
    from autoprune.files import write_json
    from autoprune.pipeline.context import RunContext
    from autoprune.reporting.console import print_results

    policy = Policy.load(place, "policy")
    context = RunContext(settings)
    # What a run has of its own network, trained or measured, says nothing of another.
    if is_of_run and options.model is None and options.weights is None:
        trained = RunContext.of_run(run)
        parts = trained.parts
        # As the run was started with it, unless the options say otherwise now.
        if settings.data.preprocessing != trained.settings.data.preprocessing:
            parts = dataclasses.replace(parts, preprocessing=None)
        context = dataclasses.replace(trained, settings=settings, parts=parts)
    env = make_env(context)
    model = settings.network.model
    budget = str(env.budget)
    if options.out:
        path = Path(options.out)
    else:
        # Not beside the policy: a shipped one lies in the installed package.
        home = run.root if is_of_run else Path("runs")
        first = "replay" if is_of_run else place.name
        path = home / f"{file_stem(first, model, budget)}.json"
    # From before the work, so that it isn't done in vain.
    with opening.hold_place_of(path):
        written, results, words = act(policy, context, env)
        write_json(path, written)
    name = run.root.name if is_of_run else place.name
    kind = "pareto" if "front" in written else "allocation"
    results = {
        "model": model,
        "budget": budget,
        "agent": f"policy of {name}",
        **results,
        kind: str(path),
    }
    print_results(results)
    print(f"{words}: {path}")
    if options.json:
        summary = {}
        for key, value in results.items():
            # The tables of groups stay out of a line that scripts read.
            if not isinstance(value, list):
                summary[key] = value
        print(json.dumps(summary))


def _with_given_options(settings: Settings, options: Namespace) -> Settings:
    """Settings with what the options of `replay_options` ask for.

    Another network doesn't keep the weights of the one before.
    """
    flat = dict(vars(options))
    if flat["model"] is not None and flat["weights"] is None:
        flat["weights"] = NetworkConfig.weights
    return dataclasses.replace(
        settings,
        network=_replace_given(settings.network, flat),
        data=_replace_given(settings.data, flat),
        search=_replace_given(settings.search, flat),
        proxy=_replace_given(settings.proxy, vars(options.proxy)),
    )


def _replace_given(stage: Any, options: dict[str, Any]) -> Any:
    """One stage of the settings, with those of its fields that were given."""
    given = {}
    for field in dataclasses.fields(stage):
        # An option called like the field of a stage but for something else.
        if field.name == "policy":
            continue
        if options.get(field.name) is not None:
            given[field.name] = options[field.name]
    return dataclasses.replace(stage, **given)


def policies(options: Namespace) -> None:
    """Lists the policies that autoprune ships: algorithm, network, budgets."""
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
    # Neither or both: the parser can't rule that out, as RUN is optional to it.
    if bool(options.run) == bool(options.allocation):
        raise UserError(None, "prune takes either RUN or --allocation FILE; give one")
    begin = _decided_run if options.run else _run_of_allocation
    with begin(options) as job:
        stages.prune(job)
        stages.finish(job, options.json)


@contextmanager
def _decided_run(options: Namespace) -> Iterator[stages.Job]:
    """The run that `prune RUN` goes on with."""
    from autoprune.pipeline.methods.registry import method_of

    _check_alone(options)
    with opening.hold_run(options.run) as job:
        if not method_of(job.settings).is_decided(job.folder):
            raise UserError(
                "run",
                f"{options.run!r} has decided nothing yet; go on with: autoprune "
                f"run --resume --out {options.run}",
            )
        yield job


@contextmanager
def _run_of_allocation(options: Namespace) -> Iterator[stages.Job]:
    """A new run that begins with the allocation of a file."""
    from autoprune.costs.allocation import Allocation
    from autoprune.pipeline.methods.registry import method_of
    from autoprune.runs import RunFolder

    path = options.allocation
    if options.resume and options.out:
        kept = RunFolder(Path(options.out)).allocation
        # The run's own copy: the file that it began with may have changed since.
        path = str(kept) if kept.is_file() else path
    _check_single(options, Path(path))

    def prepare(context: "RunContext") -> None:
        # Read before the run has a folder, so that a wrong file leaves none behind.
        Allocation.read(path, context.groups)
        opening.check_latency(context)
        method_of(context.settings).check(context)

    with opening.start(options, prepare) as job:
        from autoprune.pipeline.stages import keep_order, use_allocation

        stages.run_stages(job, until="sparse")
        # Once more, now for the network that sparse training may have left.
        allocation = Allocation.read(path, job.context.groups)
        # Before the allocation, whose depth counts blocks in this order.
        keep_order(job.context, job.folder)
        job.folder.add_results(
            run=str(job.folder.root),
            model=job.settings.network.model,
            data=job.settings.data.data,
            budget=allocation.budget,
            agent=allocation.source,
            evaluations=0,
        )
        # Last, since the allocation's file says that the run has decided.
        use_allocation(job.context, allocation, job.folder)
        yield job


def _check_alone(options: Namespace) -> None:
    """Refuses options of a new run beside an existing one, whose settings count."""
    # Compared with a parser's own defaults: the options don't say which were typed.
    parser = Parser()
    prune_options(parser)
    defaults = dict(parser.get_defaults().items())
    for name, value in options.items():
        # A default that was typed looks like one that wasn't, so it passes.
        if name not in defaults or name in ("run", "json") or value == defaults[name]:
            continue
        raise UserError(
            name,
            f"RUN is pruned with the settings that it was started with; leave --{name} "
            f"out, or prune in a new run with "
            f"--allocation {options.run}/allocation.json",
        )


def _check_single(options: Namespace, path: Path) -> None:
    """Refuses what goes with no single allocation.

    Granularities that have none, ranges and fronts, methods that decide by the budget.
    """
    from autoprune.costs.budget import BudgetRange, parse_budget
    from autoprune.pipeline.methods.registry import (
        PRUNING_METHODS,
        TRAINED_PRUNERS,
        entry_of,
    )

    # From what makes every allocation useless to what is wrong with this one; the file
    # is opened last.
    pruner = TRAINED_PRUNERS.get(options.removal.method)
    if pruner is not None and not pruner.takes_allocations:
        others = [name for name, p in TRAINED_PRUNERS.items() if p.takes_allocations]
        raise UserError(
            "removal.method",
            f"{options.removal.method} decides by itself how much goes where, got an "
            f"--allocation beside it; use {' or '.join(others)}",
        )
    if options.sparse.method == "gsm" and options.sparse.share is None:
        raise UserError(
            "sparse.share",
            "gsm takes the budget's share, and an allocation has none; "
            "give one in (0, 1]",
        )
    if not entry_of(options.granularity).takes_allocations:
        fitting = [name for name, e in PRUNING_METHODS.items() if e.takes_allocations]
        raise UserError(
            "granularity",
            f"an allocation is for {' or '.join(fitting)}, got {options.granularity}; "
            f"for that give a RUN of autoprune search "
            f"--granularity {options.granularity}",
        )
    # The default budget passes, which nobody can tell from none; the allocation's own
    # counts.
    if isinstance(parse_budget(options.budget), BudgetRange):
        raise UserError(
            "budget",
            f"prune applies one allocation, got the range {options.budget}; leave "
            f"--budget out, the allocation knows its own",
        )
    if not path.is_file():
        raise UserError("allocation", f"no file {str(path)!r}")
    # A look at the text is enough: what is no allocation otherwise is refused when it
    # is read.
    if '"front"' in path.read_text("utf-8", errors="replace"):
        raise UserError(
            "allocation",
            f"{str(path)!r} holds a whole front; give one of its points: the "
            f"allocation that autoprune replay RUN --budget macs=40% writes, or an "
            f'entry of "front" as a file of its own',
        )


def finetune(options: Namespace) -> None:
    """Fine-tunes the pruned network of RUN, or goes on with that."""
    with opening.hold_run(options.run) as job:
        given = {"epochs": options.epochs, "lr": options.finetune.lr}
        settings = job.settings
        config = _replace_given(settings.finetune, given)
        if config != settings.finetune:
            settings = dataclasses.replace(settings, finetune=config)
            # In memory only: config.yaml keeps what the run was started with.
            job.dense = dataclasses.replace(job.dense, settings=settings)
        if not options.resume:
            # A finished training leaves its checkpoint, and with it this one would end
            # at once.
            job.folder.finetune_checkpoint.unlink(missing_ok=True)
        stages.finetune(job)
        stages.finish(job, options.json)


def evaluate(options: Namespace) -> None:
    """Accuracy of the dense and the pruned network of RUN on the test split."""
    with opening.hold_run(options.run) as job:
        from autoprune.pipeline.stages import evaluate_stage

        evaluate_stage(job.context, job.folder)
        stages.finish(job, options.json)


def export(options: Namespace) -> None:
    """Writes the pruned network of RUN as ONNX, or as a torch.export program."""
    check_known("format", options.format, FORMATS)
    with opening.hold_run(options.run) as job:
        from autoprune.pipeline.stages import export_stage, report_stage

        written = export_stage(job.context, job.folder, options.format)
        # results.json has got a number more, so the page is written anew.
        report_stage(job.folder)
        _print_file(written, options.json)


def report(options: Namespace) -> None:
    """Writes report.html of RUN from what its folder holds."""
    with opening.hold_run(options.run) as job:
        from autoprune.pipeline.stages import report_stage

        _print_file(report_stage(job.folder), options.json)


def compare(options: Namespace) -> None:
    """Compares finished runs: a table, and a page with all of them on one plot."""
    from autoprune.reporting.comparison import (
        HEADERS,
        comparison_rows,
        differences,
        latency_settings,
        open_runs,
        write_comparison,
    )
    from autoprune.reporting.console import print_comparison

    runs = open_runs(options.runs)
    path = Path(options.runs[0]).parent / "comparison.html"
    if options.out is not None:
        path = Path(options.out)
    write_comparison(runs, path)
    differing = differences(runs)
    rows = comparison_rows(runs)
    print_comparison(HEADERS, rows, latency_settings(runs), differing)
    print(f"page: {path}")
    if options.json:
        compared = [run.to_json() for run in runs]
        summary = {"runs": compared, "differences": differing, "page": str(path)}
        print(json.dumps(summary))


def _print_file(path: Path, as_json: bool) -> None:
    print(path)
    if as_json:
        print(json.dumps({"file": str(path)}))


def trace(options: Namespace) -> None:
    """Prints the groups of a network, what is pinned and why, and the share of MACs."""
    from autoprune.data.known_models import check_model
    from autoprune.data.places import NONE, split_weights

    config = pick(options, TraceConfig)
    check_model(config.model)
    weights = None if config.weights == NONE else config.weights
    if weights is not None:
        split_weights(weights)

    import torch

    from autoprune.costs.constraints import pin_excluded
    from autoprune.data.checkpoints import load_weights
    from autoprune.data.models import MODELS, build
    from autoprune.data.preprocessing_sources import preprocessing_of
    from autoprune.reporting.console import print_trace
    from autoprune.tracing.trace import describe
    from autoprune.tracing.trace import trace as trace_network

    model = build(config.model, config.n_classes)
    if weights is not None:
        load_weights(model, weights)
    preprocessing = preprocessing_of(
        model, config, config.model, config.weights, config.n_classes
    )
    # What the CIFAR networks and most others were made for.
    usual = (32, 32) if config.model in MODELS else (224, 224)
    size = preprocessing.size or usual
    example = torch.zeros(1, preprocessing.channels, *size)
    groups = trace_network(model, example)
    # The patterns are of names that only a trace gives.
    groups = pin_excluded(groups, config.excluded)
    description = {"model": config.model, **describe(groups)}
    print_trace(description)
    if options.json:
        print(json.dumps(description))


def data(options: Namespace) -> None:
    """Fetches a dataset and stores it once: cifar10."""
    from autoprune.names import DATASETS

    DATASETS.check(options.name, "name")

    from autoprune.data.fetching import fetch
    from autoprune.reporting.console import say

    print(fetch(options.name, say))
