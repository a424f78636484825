"""The latency model of a run: the run's own, that of this machine, or a new one."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from autoprune.config import Settings
from autoprune.costs.budget import has_metric, parse_budget
from autoprune.costs.cost import CostTable
from autoprune.costs.search_space import SearchSpace
from autoprune.errors import ExportError, UserError
from autoprune.files import write_json
from autoprune.latency.cache import ModelCache
from autoprune.latency.engine_protocol import Setting
from autoprune.latency.engines import check_setting, engine_named, setting_of
from autoprune.latency.kernels import WorkTable
from autoprune.latency.model import LatencyModel
from autoprune.latency.profiling import (
    LARGEST_ERROR,
    N_FITTED,
    N_UNSEEN,
    NetworkTimer,
    profile_latency,
)
from autoprune.reporting.console import progress, say
from autoprune.runs import RunFolder

if TYPE_CHECKING:
    from autoprune.pipeline.context import RunContext

METRIC = "latency"
"""What the metric is called in budgets."""


def budgets_latency(settings: Settings) -> bool:
    """Whether a run has a budget of time, alone or beside others.

    Args:
        settings: The run's.
    """
    return has_metric(parse_budget(settings.search.budget), METRIC)


def latency_model_of(context: "RunContext", costs: CostTable) -> LatencyModel:
    """The latency model that a run's budget is about.

    What a run began with stays, whatever the machine does later: its allocations meet
    the budget by that model.

    Args:
        context: The run.
        costs: Its costs, without latency.

    Raises:
        UserError: If the engine can't be used or gives other answers, or timings are so
            uneven that no model fits.
    """
    work = WorkTable(context.groups, costs)
    if context.latency is not None and context.latency.exists():
        return _stored_model(context.latency, work)
    setting = setting_of(context.settings.latency)
    check_setting(setting)
    engine = engine_named(setting.engine)
    search = context.settings.search
    limits = context.coarsest_limits
    space = SearchSpace(costs, "macs", max_sparsity=search.max_sparsity, **limits)
    cache = ModelCache(context.groups, space, engine, setting)
    model = cache.read(work)
    if model is not None:
        return model
    timer = network_timer(context, setting)
    with progress(f"latency model ({setting})", N_FITTED + N_UNSEEN) as advance:
        profile = profile_latency(timer, space, on_network=_by_number(advance))
    model = profile.model
    if model.error.median > LARGEST_ERROR:
        say(
            f"latency: the model predicts networks it hasn't seen to "
            f"{model.error.median:.1%} (median), more than {LARGEST_ERROR:.0%}; what "
            f"is chosen is measured all the same"
        )
    cache.write(model)
    return model


def _stored_model(path: Path, work: WorkTable) -> LatencyModel:
    """The model that a run began with.

    Raises:
        UserError: If its file is damaged.
    """
    stored = RunFolder(path.parent).read_json(path)
    try:
        return LatencyModel.from_json(stored, work)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            "run", f"{str(path)!r} is damaged ({error!r}); start the run anew"
        ) from error


def network_timer(context: "RunContext", setting: Setting) -> NetworkTimer:
    """What times pruned networks of a run beside its dense one.

    Args:
        context: The run.
        setting: Engine, batch, threads and precision.

    Raises:
        UserError: If the engine can't run the network, or gives other answers.
    """
    engine = engine_named(setting.engine)
    example = context.splits.example
    try:
        return NetworkTimer(context.model, context.groups, example, engine, setting)
    except ExportError as error:
        raise UserError(
            "latency.engine",
            f"{setting.engine} can't run this network ({error}); choose another "
            f"engine, or budget macs",
        ) from error


def _by_number(advance: Callable[..., None]) -> Callable[[int], None]:
    """What a measurement calls to advance a bar by several networks."""
    return lambda n_networks: advance("", n_networks)


def profile_stage(context: "RunContext", folder: RunFolder) -> None:
    """Keeps the latency model of a run, so that a resumed one goes on with it.

    Args:
        context: The run.
        folder: Its folder.
    """
    model = context.latency_model
    folder.add_results(
        latency_model={
            **vars(model.setting),
            "tile": model.fit.rounding.tile,
            "dense_ms": 1e3 * model.dense_seconds,
            "error_median": model.error.median,
            "error_95": model.error.largest,
            "networks": model.n_fitted + model.error.n_networks,
        }
    )
    # The file comes last: it says that the stage is done.
    write_json(folder.latency_model, model.to_json())
