"""A search as a stage of a run: its environment, baselines, agent and results."""

import dataclasses
import shlex
from functools import partial
from typing import Any

from autoprune.agents.finalists import find_front
from autoprune.agents.pareto import front_to_json
from autoprune.agents.policies import starting_policy
from autoprune.agents.recorder import Episode, Recorder
from autoprune.agents.replay import Policy, replay
from autoprune.agents.search import SearchResult, search
from autoprune.agents.searchers import parse_baselines
from autoprune.cli.kept_promise import keep_promise
from autoprune.config import SearchConfig, Settings
from autoprune.costs.budget import AnyBudget, BudgetRange, parse_budget
from autoprune.envs.layer_pruning import LayerPruningEnv
from autoprune.files import write_json
from autoprune.pipeline.budgeted import allocation_reached
from autoprune.pipeline.context import RunContext
from autoprune.pipeline.latency_budget import budgets_latency
from autoprune.pipeline.stages import timed, use_allocation
from autoprune.reporting.console import print_front, progress, say
from autoprune.reporting.wording import widths_text
from autoprune.runs import RunFolder


def make_env(context: RunContext) -> LayerPruningEnv:
    """The environment that the settings describe, with a fresh proxy.

    The proxy reconstructs candidates if the settings or the tightest budget say so.

    Raises:
        UserError: If nothing can be pruned, a pattern means nothing, or the budget
            can't be reached.
    """
    return _env(context, parse_budget(context.settings.search.budget))


def _env(context: RunContext, budget: AnyBudget) -> LayerPruningEnv:
    """The environment for another budget than the settings'."""
    search = context.settings.search
    return LayerPruningEnv.with_suited_proxy(
        context.model,
        context.groups,
        context.proxy(),
        budget,
        reward=search.reward,
        max_sparsity=search.max_sparsity,
        accuracy_floor=search.accuracy_floor,
        costs=context.costs,
        **context.limits,
    )


def missing_baselines(
    settings: Settings, folder: RunFolder, baselines: str | None
) -> list[str]:
    """The baselines that a run is yet to search.

    Args:
        settings: The run's agent and budget.
        folder: The run.
        baselines: Names with commas between them, "none", or None for those that the
            agent needs.

    Returns:
        Their names. None under a range of budgets: there uniform pruning is the line
        that the front is drawn against, which needs no search.
    """
    # Asked of the settings, as an environment would load network and images.
    if isinstance(parse_budget(settings.search.budget), BudgetRange):
        return []
    agent = settings.search.agent
    known = folder.read_results().baselines or {}
    names = parse_baselines(baselines, agent)
    return [name for name in names if name not in known and name != agent]


def search_stage(context: RunContext, folder: RunFolder, baselines: str | None) -> None:
    """Baselines, then the agent; each is skipped when its results are there already.

    Args:
        context: Network, images and trace.
        folder: The run.
        baselines: As for `missing_baselines`.
    """
    settings = context.settings
    env = make_env(context)
    say(
        f"{settings.network.model}: {len(context.groups)} prunable groups, "
        f"{len(context.groups.pinned)} pinned"
    )
    say(f"widths: {widths_text(context.widths)}")
    # Written before the search, since only this environment knows what "auto" came to.
    folder.add_results(
        reconstructed=env.proxy.reconstructs,
        widths=context.widths,
    )
    if env.proxy.reconstructs and settings.proxy.reconstruct == "auto":
        say(
            f"{env.budget}: uniform pruning leaves less than a guess; candidates are "
            f"judged with weights solved anew"
        )
    for name in missing_baselines(settings, folder, baselines):
        _search_baseline(context, folder, name)
    # The agent is done; somebody came back for further baselines.
    if folder.allocation.exists():
        return
    _warn_if_out_of_distribution(env, settings.search, folder)
    front = None
    with timed(folder, "search"):
        result = _search_with_progress(context, env, settings.search.agent, folder)
        if result.front:
            front = front_to_json(result.front, result.uniform, env)
    _keep(result, front, context, folder, env)


def _search_baseline(context: RunContext, folder: RunFolder, name: str) -> None:
    """Searches one baseline in a folder of its own and adds it to the results."""
    with timed(folder, f"baseline {name}"):
        result = _search_with_progress(
            context,
            # An environment of its own, whose proxy remembers nothing: each searcher
            # pays for all that it evaluates.
            make_env(context),
            name,
            # Log and checkpoints of two searches in one folder would be taken for one.
            RunFolder(folder.root / "baselines" / name),
        )
    entry = result.best.to_json()
    entry["evaluations"] = result.evaluations
    entry["reward"] = max(episode.reward for episode in result.episodes)
    # Read only now, since a search may take long and the results may have grown.
    known = folder.read_results().baselines or {}
    folder.add_results(baselines=known | {name: entry})


def _warn_if_out_of_distribution(
    env: LayerPruningEnv, config: SearchConfig, folder: RunFolder
) -> None:
    """Says so where the policy to start from knows little of this network."""
    # Looked up for this warning alone; the search looks it up by itself.
    start = starting_policy(config.agent, config.policy, folder.start)
    if start is not None and start.is_out_of_distribution(env.observer):
        say(
            f"--policy: {config.policy!r} was trained on groups unlike most of this "
            f"network's (it knows {start.mean_similarity(env.observer):.0%} of them); "
            f"it acts in the first episodes only, mixed with an allocator that "
            f"measures what each group is worth, and the agent learns anew"
        )


def _search_with_progress(
    context: RunContext, env: LayerPruningEnv, agent: str, folder: RunFolder
) -> SearchResult:
    """Runs one agent or baseline with a bar on the terminal."""
    # A baseline's folder isn't there before its first search.
    folder.root.mkdir(parents=True, exist_ok=True)
    config = context.settings.search
    if agent != config.agent:
        # What is left out is for the agent alone.
        config = dataclasses.replace(config, agent=agent, policy="", hyperparameters={})
    is_range = isinstance(env.budget, BudgetRange)
    best = float("-inf")
    with progress(agent, config.episodes) as advance:

        def on_episode(episode: Episode) -> None:
            nonlocal best
            best = max(best, episode.reward)
            if is_range:
                # Rewards of different budgets don't compare, so none is the best.
                advance(f"{episode.allocation.budget}: {episode.reward:.3f}")
            else:
                advance(f"best reward {best:.3f}")

        def on_pause(activity: str) -> None:
            # By no step: practice between two episodes is no episode.
            advance(activity, 0)

        result = search(env, config, folder, on_episode, on_pause)
        if is_range:
            advance(f"front of {len(result.front)} points", 0)
        else:
            advance(f"best reward {best:.3f}", 0)
        return result


def _keep(
    result: SearchResult,
    front: dict[str, Any] | None,
    context: RunContext,
    folder: RunFolder,
    env: LayerPruningEnv,
) -> None:
    """Stores what a search found.

    The allocation comes last, since its file says that the search is done.
    """
    if result.policy is not None:
        # Before the allocation, which would tell a resumed run that nothing is missing.
        _save_policy(result.policy, context, folder, env)
    # Of a front the run goes on with one point, and only that is measured.
    finalists = result.finalists if front is None else [result.best]
    if budgets_latency(context.settings):
        finalists, latency = keep_promise(context, partial(_env, context), finalists)
        folder.add_results(latency_kept=latency)
    chosen = finalists[0]
    folder.add_results(
        episodes=len(result.episodes),
        evaluations=result.evaluations,
        seconds_search=round(result.seconds, 2),
        selection_accuracy=chosen.selection.accuracy,
        selection_loss=chosen.selection.loss,
        selection_images=len(context.splits.selection),
    )
    if front is not None:
        _keep_front(result, front, context, folder, env)
    else:
        rows = [finalist.to_json() for finalist in finalists]
        folder.add_results(finalists=rows)
    # A kill before this repeats the end of the search, from its log.
    use_allocation(context, chosen.allocation, folder)


def _save_policy(
    policy: Policy, context: RunContext, folder: RunFolder, env: LayerPruningEnv
) -> None:
    """Stores a policy, with what it was trained on and its own allocation.

    Under a range of budgets that is the allocation for the middle one.
    """
    settings = context.settings
    allocation, _ = replay(policy, env, env.budget.at_position(0.5))
    about = {
        "trained_on": f"{settings.network.model} on {settings.data.data}",
        "budget": str(env.budget),
    }
    if settings.search.policy:
        about["start"] = settings.search.policy
    policy.save(
        folder.policy,
        **about,
        network=context.groups.fingerprint,
        allocation=allocation.kept,
    )


def _keep_front(
    result: SearchResult,
    front: dict[str, Any],
    context: RunContext,
    folder: RunFolder,
    env: LayerPruningEnv,
) -> None:
    """Stores the Pareto front of a range, and tells how to go on from any point."""
    # The file before its path: results.json names nothing that isn't there.
    write_json(folder.pareto, front)
    folder.add_results(pareto=str(folder.pareto))
    print_front(front)
    share = result.best.cost / front["dense"]
    say(
        f"the run goes on with the front's knee, at {share:.1%}; all points: "
        f"{folder.pareto}"
    )
    # Between the points of the front only a policy can tell what to do.
    if result.policy is None:
        return
    # Any budget of the range would do: it is an example.
    other_budget = env.budget.at_position(0.2)
    file = folder.root / "another.json"
    say(
        f"another budget: autoprune replay {folder.root} --budget {other_budget} "
        f"--out {file}"
    )
    # An allocation is for one network and its groups, which the command has to name
    # again.
    flags = _flags_of(context.settings)
    say(
        f"and then: autoprune prune --allocation {file}{flags} --out NEW_RUN; "
        f"autoprune finetune NEW_RUN"
    )


FLAGS_OF_SEARCH = ("exclude", "criterion", "granularity")
"""Options of a search that decide what an allocation means."""


def _flags_of(settings: Settings) -> str:
    """The options that say what network, data and groups are meant, but defaults."""
    defaults = Settings()
    flags = ""
    for stage, names in (
        ("network", list(vars(defaults.network))),
        ("data", list(vars(defaults.data))),
        ("search", FLAGS_OF_SEARCH),
    ):
        for name in names:
            value = getattr(getattr(settings, stage), name)
            # Defaults would only make the command longer.
            if value != getattr(getattr(defaults, stage), name):
                flags += f" --{name} {shlex.quote(str(value))}"
    return flags


def act(
    policy: Policy, context: RunContext, env: LayerPruningEnv
) -> tuple[dict[str, Any], dict[str, Any], str]:
    """What a policy does without learning.

    For one budget its allocation, with costs and scores beside those of uniform
    pruning; for a range the front of what it does at the budgets of it, uniform pruning
    in the places where that is better.

    Args:
        policy: A trained policy.
        context: Network, images and trace.
        env: The environment in which it acts.

    Returns:
        What is to be written, results, and the results in words.
    """
    similarity = round(policy.mean_similarity(env.observer), 3)
    if similarity < 1:
        say(
            f"the policy decides to {similarity:.0%}: not all groups are like those it "
            f"knows; the rest is up to an allocator that measures what each is worth"
        )
    if isinstance(env.budget, BudgetRange):
        written, results, words = _act_on_range(policy, context, env)
    else:
        written, results, words = _act_once(policy, context, env)
    results["familiar"] = similarity
    return written, results, words


def _act_once(
    policy: Policy, context: RunContext, env: LayerPruningEnv
) -> tuple[dict[str, Any], dict[str, Any], str]:
    allocation, info = replay(policy, env)
    # What anybody gets without a policy, as a measure for the policy's.
    uniform = env.proxy(env.counts(env.space.uniform(env.target)))
    results = context.costs_of(allocation.kept)
    reached = allocation_reached(allocation.budget, env.space.costs, allocation.kept)
    if reached:
        results["budgets"] = reached
    results["proxy_accuracy"] = info["accuracy"]
    results["proxy_loss"] = info["loss"]
    results["proxy_accuracy_uniform"] = uniform.accuracy
    results["proxy_loss_uniform"] = uniform.loss
    words = (
        f"proxy accuracy {info['accuracy']:.2%}, uniform {uniform.accuracy:.2%}; "
        f"allocation"
    )
    written = dataclasses.replace(allocation, source="policy").to_json()
    return written, results, words


def _act_on_range(
    policy: Policy, context: RunContext, env: LayerPruningEnv
) -> tuple[dict[str, Any], dict[str, Any], str]:
    recorder = Recorder(env, context.settings.search)
    points, uniform = find_front(recorder, policy)
    front = front_to_json(points, uniform, env)
    print_front(front)
    n_points = len(front["front"])
    return front, {"points": n_points}, f"front of {n_points} points"
