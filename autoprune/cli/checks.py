"""What can be refused before PyTorch is imported: names, budgets, folders and files.

Importing PyTorch takes seconds, and whoever mistyped a name shouldn't wait for it. What
only network and images can tell is checked by `autoprune.cli.opening.prepare`.
"""

from pathlib import Path

from autoprune.agents.policy_files import check_start
from autoprune.agents.searchers import check_agent, parse_baselines
from autoprune.agents.settings import check_hyperparameters
from autoprune.config import OutputConfig, Settings
from autoprune.costs.budget import parse_budget
from autoprune.data.known_models import check_model
from autoprune.data.places import no_dataset, weights_named
from autoprune.errors import check_known
from autoprune.names import CRITERIA, DATASETS, ENGINES, REWARDS, SPARSE_METHODS
from autoprune.pipeline.methods.registry import check_methods, further_agents


def check_settings(settings: Settings) -> None:
    """Refuses unknown names and impossible budgets.

    Args:
        settings: Of a run, or of a policy that is to act.

    Raises:
        UserError: For the first thing that is wrong.
    """
    search = settings.search
    # First, since it says which agents masks and blocks have.
    check_methods(settings)
    check_agent(search.agent, parse_budget(search.budget), others=further_agents())
    # After the methods, which say what criteria a granularity has at all.
    CRITERIA.check(search.criterion)
    check_known(
        "method",
        settings.sparse.method,
        ["none", *SPARSE_METHODS.known],
        "sparse.method",
    )
    REWARDS.check(search.reward)
    ENGINES.check(settings.latency.engine, "latency.engine")
    check_model(settings.network.model)
    check_data(settings.data.data)
    network = settings.network
    weights_named(network.model, network.weights, settings.data.data)


def check_new(settings: Settings, output: OutputConfig) -> None:
    """Refuses what else a new run, or one that goes on, can't have.

    Args:
        settings: The run's.
        output: Where it goes, and its baselines.

    Raises:
        UserError: For the first thing that is wrong.
    """
    parse_baselines(output.baselines, settings.search.agent)
    search = settings.search
    check_hyperparameters(search.agent, search.hyperparameters, bool(search.policy))
    # A run that goes on has a copy of the policy that it started from.
    if not output.resume:
        check_start(search.agent, search.policy)


def check_data(name: str) -> None:
    """Refuses images that are neither a dataset nor a folder.

    Args:
        name: As `DataConfig.data`.

    Raises:
        UserError: If it is neither; the nearest dataset is offered.
    """
    if name in DATASETS.known or Path(name).is_dir():
        return
    raise no_dataset(name)
