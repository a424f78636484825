"""A search as a stage of a run: the environment of its settings, baselines and agent,
and what is kept of them.
"""

import dataclasses
import shlex

from autoprune.agents.baselines import check_baselines
from autoprune.agents.finalists import front
from autoprune.agents.pareto import pareto
from autoprune.agents.policies import starting_policy
from autoprune.agents.recorder import Episode, Recorder
from autoprune.agents.replay import Policy, replay
from autoprune.agents.search import SearchResult, search
from autoprune.config import SearchConfig, Settings
from autoprune.costs.budget import BudgetRange
from autoprune.envs.layer_pruning import LayerPruningEnv
from autoprune.pipeline.context import Workspace
from autoprune.pipeline.stages import timed, use_allocation
from autoprune.reporting.console import print_front, progress, say
from autoprune.runs import RunFolder, write_json


def make_env(workspace: Workspace) -> LayerPruningEnv:
    """The environment that the settings describe, with a fresh proxy.

    Raises:
        UserError: If nothing can be pruned, a pattern means nothing, or the budget
            can't be reached.
    """
    search = workspace.settings.search
    return LayerPruningEnv(
        workspace.model,
        workspace.groups,
        workspace.proxy(),
        search.budget,
        search.reward,
        max_sparsity=search.max_sparsity,
        accuracy_floor=search.accuracy_floor,
        costs=workspace.costs,
        **workspace.limits,
    )


def search_stage(
    workspace: Workspace, folder: RunFolder, baselines: str | None
) -> None:
    """Baselines, then the agent; each is skipped when its results are there already.

    Args:
        workspace: Network, images and trace.
        folder: The run.
        baselines: Names with commas between them, "none", or None for those that the
            agent needs.
    """
    settings, env = workspace.settings, make_env(workspace)
    say(
        f"{settings.network.model}: {len(workspace.groups)} prunable groups, "
        f"{len(workspace.groups.pinned)} pinned"
    )
    agent = settings.search.agent
    folder.add_results(reconstructed=env.proxy.reconstructs)
    if env.proxy.reconstructs and settings.proxy.reconstruct == "auto":
        say(
            f"{env.budget}: uniform pruning leaves less than a guess; candidates are "
            f"judged with weights solved anew"
        )
    # Under a range uniform pruning is the line that the front is drawn against; it
    # needs no search.
    for name in (
        check_baselines(baselines, agent)
        if not isinstance(env.budget, BudgetRange)
        else []
    ):
        known = folder.known_results.get("baselines", {})
        if name not in known and name != agent:
            with timed(folder, f"baseline {name}"):
                result = _one_search(
                    workspace,
                    make_env(workspace),
                    name,
                    RunFolder(folder.root / "baselines" / name),
                )
            entry = result.best.to_json() | {"evaluations": result.evaluations}
            entry["reward"] = max(episode.reward for episode in result.episodes)
            folder.add_results(baselines=known | {name: entry})
    if not folder.allocation.exists():
        _warn_of_strangeness(env, settings.search, folder)
        with timed(folder, "search"):
            result = _one_search(workspace, env, agent, folder)
            found = pareto(result.front, result.uniform, env) if result.front else None
        _keep(result, found, workspace, folder, env)


def _warn_of_strangeness(
    env: LayerPruningEnv, config: SearchConfig, folder: RunFolder
) -> None:
    start = starting_policy(config.agent, config.policy, folder.start)
    if start is not None and start.is_out_of_distribution(env.observer):
        say(
            f"--policy: {config.policy!r} was trained on groups unlike most of this "
            f"network's (it knows "
            f"{start.familiarity(env.observer):.0%} of them); it leads the first "
            f"episodes, together with a guide that "
            f"measures what each group is worth, and the agent learns anew"
        )


def _one_search(
    workspace: Workspace, env: LayerPruningEnv, agent: str, folder: RunFolder
) -> SearchResult:
    folder.root.mkdir(parents=True, exist_ok=True)
    own = workspace.settings.search
    config = (
        own if agent == own.agent else dataclasses.replace(own, agent=agent, policy="")
    )
    best, is_range = float("-inf"), isinstance(env.budget, BudgetRange)
    with progress(agent, config.episodes) as advance:

        def on_episode(episode: Episode) -> None:
            nonlocal best
            best = max(best, episode.reward)
            advance(
                f"{episode.allocation.budget}: {episode.reward:.3f}"
                if is_range
                else f"best reward {best:.3f}"
            )

        result = search(env, config, folder, on_episode, lambda what: advance(what, 0))
        advance(
            f"front of {len(result.front)} points"
            if is_range
            else f"best reward {best:.3f}",
            0,
        )
        return result


def _keep(
    result: SearchResult,
    found: dict | None,
    workspace: Workspace,
    folder: RunFolder,
    env: LayerPruningEnv,
) -> None:
    """Stores what a search found; the allocation comes last, since its file says that
    the search is done.
    """
    if result.policy is not None:
        _save_policy(result.policy, workspace, folder, env)
    chosen = result.best
    folder.add_results(
        episodes=len(result.episodes),
        evaluations=result.evaluations,
        seconds_search=round(result.seconds, 2),
        selection_accuracy=chosen.selection.accuracy,
        selection_loss=chosen.selection.loss,
        selection_images=len(workspace.splits.selection),
    )
    if found is not None:
        _keep_front(result, found, workspace, folder, env)
    else:
        folder.add_results(
            finalists=[finalist.to_json() for finalist in result.finalists]
        )
    use_allocation(workspace, chosen.allocation, folder)


def _save_policy(
    policy: Policy, workspace: Workspace, folder: RunFolder, env: LayerPruningEnv
) -> None:
    """Stores a policy, with what it was trained on and its own allocation, under a
    range that of the middle budget.
    """
    settings = workspace.settings
    allocation, _ = replay(policy, env, env.budget.at(0.5))
    about = {
        "trained_on": f"{settings.network.model} on {settings.data.data}",
        "budget": str(env.budget),
    }
    if settings.search.policy:
        about["start"] = settings.search.policy
    policy.save(
        folder.policy,
        **about,
        network=workspace.groups.fingerprint,
        allocation=allocation.kept,
    )


def _keep_front(
    result: SearchResult,
    found: dict,
    workspace: Workspace,
    folder: RunFolder,
    env: LayerPruningEnv,
) -> None:
    """Stores the Pareto front that a search of a range found, and tells how to go on
    from any point of it.
    """
    write_json(folder.pareto, found)
    folder.add_results(pareto=str(folder.pareto))
    print_front(found)
    share = result.best.cost / found["dense"]
    say(
        f"the run goes on with the front's knee, at {share:.1%}; all points: "
        f"{folder.pareto}"
    )
    if result.policy is not None:
        between, file = env.budget.at(0.2), folder.root / "another.json"
        say(
            f"another budget: autoprune replay {folder.root} --budget {between} --out "
            f"{file}"
        )
        flags = _flags(workspace.settings)
        say(
            f"and then: autoprune prune --allocation {file}{flags} --out NEW_RUN; "
            f"autoprune finetune NEW_RUN"
        )


def _flags(settings: Settings) -> str:
    """The options that say which network, data, groups and channels are meant, where
    they aren't the usual ones.
    """
    usual, others = Settings(), {}
    stages = {
        "network": vars(usual.network),
        "data": vars(usual.data),
        "search": ("exclude", "criterion", "granularity"),
    }
    for stage, names in stages.items():
        own, default = getattr(settings, stage), getattr(usual, stage)
        others |= {
            name: getattr(own, name)
            for name in names
            if getattr(own, name) != getattr(default, name)
        }
    return "".join(
        f" --{name} {shlex.quote(str(value))}" for name, value in others.items()
    )


def act(
    policy: Policy, workspace: Workspace, env: LayerPruningEnv
) -> tuple[dict, dict, str]:
    """What a policy does without learning: what is to be written, results, and them in
    words.

    For one budget its allocation, with costs and scores beside those of uniform
    pruning; for a range the front of what it does at the budgets of it, uniform pruning
    in the places where that is better.
    """
    familiar = round(policy.mean_similarity(env.observer), 3)
    if familiar < 1:
        say(
            f"policy trusted to {familiar:.0%}: not all groups are like those it "
            f"knows; a guide has its say"
        )
    written, results, words = (
        _act_on_range if isinstance(env.budget, BudgetRange) else _act_once
    )(policy, workspace, env)
    return written, results | {"familiar": familiar}, words


def _act_once(
    policy: Policy, workspace: Workspace, env: LayerPruningEnv
) -> tuple[dict, dict, str]:
    allocation, info = replay(policy, env)
    uniform = env.proxy(env.counts(env.space.uniform(env.target)))
    results = workspace.costs_of(allocation.kept)
    results |= {"proxy_accuracy": info["accuracy"], "proxy_loss": info["loss"]}
    results |= {
        "proxy_accuracy_uniform": uniform.accuracy,
        "proxy_loss_uniform": uniform.loss,
    }
    words = f"proxy accuracy {info['accuracy']:.2%}, uniform {uniform.accuracy:.2%}; allocation"
    return dataclasses.replace(allocation, source="policy").to_json(), results, words


def _act_on_range(
    policy: Policy, workspace: Workspace, env: LayerPruningEnv
) -> tuple[dict, dict, str]:
    found = pareto(*front(Recorder(env, workspace.settings.search), policy), env)
    print_front(found)
    return (
        found,
        {"points": len(found["front"])},
        f"front of {len(found['front'])} points",
    )
