"""The steps that commands share: beginning a run, its stages with their progress on the
terminal, ending a command.

Part of the composition root, as cli.py is: heavy imports happen inside.
"""

import json
from collections.abc import Callable
from pathlib import Path

from jsonargparse import Namespace

from autoprune.cli.options import pick, settings_of
from autoprune.config import OutputConfig, Settings


def start(options: Namespace, prepare: Callable):
    """Workspace and run folder of a new run, or of the one to resume.

    Everything that can be wrong is found by `prepare(workspace)` before the folder is
    made.
    """
    from autoprune.pipeline.context import Workspace
    from autoprune.runs import RunFolder, start_run

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
    """Refuses unknown names and impossible budgets before anything slow happens or is
    written.
    """
    from autoprune.agents.baselines import check_baselines
    from autoprune.agents.policies import starting_policy
    from autoprune.agents.search import check_agent
    from autoprune.costs.budget import parse_budget
    from autoprune.envs.rewards import reward_named
    from autoprune.evaluation.importance import check_criterion
    from autoprune.pipeline.methods.registry import FITTED, check_removal
    from autoprune.training.sparse import check_sparse

    check_removal(settings)  # first: of masks and blocks it says which agents there are
    check_agent(
        settings.search.agent, parse_budget(settings.search.budget), others=[FITTED]
    )
    check_baselines(output.baselines, settings.search.agent)
    check_criterion(settings.search.criterion)
    check_sparse(settings.sparse.method)
    reward_named(settings.search.reward)
    if not output.resume:  # a run that goes on has a copy
        starting_policy(settings.search.agent, settings.search.policy)


def open_run(run: str):
    """Workspace and folder of an existing run."""
    from autoprune.pipeline.context import Workspace
    from autoprune.runs import RunFolder

    folder = RunFolder.open(run)
    return Workspace.of_run(folder), folder


def prepare(workspace) -> None:
    """Finds what can be wrong with network, images and budget."""
    from autoprune.cli.search_stage import make_env
    from autoprune.pipeline.methods.registry import removal

    decided = removal(workspace, None)
    if decided.is_searched:
        make_env(workspace)
    decided.check()


def train_sparsely(workspace, folder):
    """The workspace whose network is to be pruned, after sparse training where the
    settings ask for it.
    """
    from autoprune.pipeline.stages import sparse_stage
    from autoprune.reporting.console import progress

    settings = workspace.settings
    if settings.sparse.method == "none":
        return workspace
    epochs = settings.sparse_training.epochs_for(len(workspace.splits.train))
    with progress(settings.sparse.method, epochs) as advance:
        return sparse_stage(
            workspace, folder, lambda epoch, loss: advance(f"loss {loss:.4f}")
        )


def decide(workspace, folder, output: OutputConfig) -> None:
    """What goes: it is searched, or decided at once."""
    from autoprune.cli.search_stage import search_stage
    from autoprune.costs.budget import parse_budget
    from autoprune.pipeline.methods.registry import removal
    from autoprune.pipeline.stages import keep_order

    settings, network = workspace.settings, workspace.settings.network.model
    folder.add_results(
        run=str(folder.root),
        model=network,
        data=settings.data.data,
        seed=settings.search.seed,
    )
    folder.add_results(
        budget=str(parse_budget(settings.search.budget)), agent=settings.search.agent
    )
    keep_order(workspace, folder)
    decided = removal(workspace, folder)
    if decided.is_searched:
        search_stage(workspace, folder, output.baselines)
    elif not decided.is_decided:
        _decide_without_search(workspace, folder, decided.n_steps)


def _decide_without_search(workspace, folder, n_steps: int) -> None:
    from autoprune.pipeline.stages import decide_stage
    from autoprune.reporting.console import progress

    if not n_steps:
        return decide_stage(workspace, folder, lambda note: None)
    with progress(workspace.settings.search.agent, n_steps) as advance:
        decide_stage(workspace, folder, advance)


def prune(workspace, folder) -> None:
    """Prunes, after the training that some ways of removing channels need."""
    from autoprune.pipeline.methods.registry import removal
    from autoprune.pipeline.stages import prune_stage
    from autoprune.reporting.console import progress, say

    epochs = removal(workspace, folder).epochs
    if not epochs:
        return prune_stage(workspace, folder, say, lambda epoch, loss: None)
    with progress(workspace.settings.removal.method, epochs) as advance:
        prune_stage(
            workspace, folder, say, lambda epoch, loss: advance(f"loss {loss:.4f}")
        )


def finetune(workspace, folder) -> None:
    from autoprune.pipeline.stages import finetune_stage
    from autoprune.reporting.console import progress

    with progress(
        "fine-tune", workspace.settings.finetune.epochs_for(len(workspace.splits.train))
    ) as advance:
        finetune_stage(
            workspace, folder, lambda epoch, loss: advance(f"loss {loss:.4f}")
        )


def finish(folder, as_json: bool) -> None:
    """What every command that adds to a run ends with: a report that is true again, and
    the results.
    """
    from autoprune.pipeline.stages import report_stage, summary
    from autoprune.reporting.console import print_results

    print(f"report: {report_stage(folder)}")
    results = summary(folder)
    print_results(results)
    print(f"run folder: {folder.root}")
    if as_json:
        print(json.dumps(results))
