"""What an agent has to beat: the same environment, evaluations and finalists.

Each baseline plays episodes of a `Recorder` and stops, at the latest, after as many
evaluations as the recorder asks for. `BASELINES` names them all;
`autoprune.agents.search` says how one is added.
"""

from collections.abc import Callable
from math import sqrt

import numpy as np

from autoprune.agents.rankings import cost_aware, eagleeye, global_ranking
from autoprune.agents.recorder import LANES, START_STD, Recorder
from autoprune.agents.searchers import check_installed
from autoprune.envs.batch import BatchedEpisodes, fixed_policy, uniform_policy
from autoprune.envs.layer_pruning import LayerPruningEnv

GRID = 200
"""Steps into which the dynamic program divides the budget."""
MAX_LEVELS = 9
"""Most sparsities at which `sensitivity` prunes each group alone."""


def uniform(recorder: Recorder) -> None:
    """One episode: the same sparsity everywhere."""
    recorder.run_episodes(uniform_policy, 1)


def random(recorder: Recorder) -> None:
    """Every sparsity drawn uniformly from its feasible interval."""
    generator = np.random.default_rng(recorder.config.seed)

    def act(batch: BatchedEpisodes) -> np.ndarray:
        lowest, highest = batch.state.bounds
        # Uniform in sparsity, and not in the action, whose sides differ in width.
        sparsities = generator.uniform(lowest, highest)
        return batch.actions_of(sparsities, np.zeros(len(lowest)))

    while recorder.remaining:
        recorder.run_episodes(act, min(LANES, recorder.remaining))


def sensitivity(recorder: Recorder) -> None:
    """Prunes each group alone, then solves for the least sum of damages.

    The damage of a network is taken as the sum over groups of its growth in loss, or of
    the growth's root; a dynamic program finds the allocation with the least sum for
    either. Costs multiply between neighbouring groups, so the program's additive budget
    is searched until the real cost meets the target. With too few evaluations to prune
    each group once, it knows nothing and is uniform.
    """
    env = recorder.env
    # Three evaluations go elsewhere: to the dense network and to two solutions.
    n_levels = min(MAX_LEVELS, (recorder.remaining - 3) // len(env.groups))
    if n_levels < 1:
        return uniform(recorder)
    levels = [_spread_levels(allowed, n_levels) for allowed in env.space.levels]
    growths = []
    for row in _damages(env, levels):
        # On few images some pruning seems to help; no root is taken of that.
        growths.append([max(0.0, damage) for damage in row])
    roots = []
    for row in growths:
        roots.append([sqrt(growth) for growth in row])
    # Which of the two adds up better depends on the network, so both are tried.
    for damages in (growths, roots):
        counts = _allocate(env, levels, damages)
        sparsities = 1 - counts / env.space.costs.dense
        recorder.run_episodes(fixed_policy(sparsities[None]), 1)


def evolution(recorder: Recorder) -> None:
    """CMA-ES over the actions of a whole episode, starting at uniform.

    Hansen 2016, arXiv 1604.00772, as the package cma has it.

    Raises:
        UserError: If the package cma isn't installed.
    """
    check_installed("evolution", "agent")
    import cma

    options = {
        "bounds": [-1, 1],
        "popsize": LANES,
        # The package takes seed 0 for "by the clock".
        "seed": recorder.config.seed + 1,
        "verbose": -9,
    }
    # The package can't search a line, so one group gets a second, unused coordinate.
    n_coordinates = max(2, len(recorder.env.groups))
    strategy = cma.CMAEvolutionStrategy(np.zeros(n_coordinates), START_STD, options)
    while recorder.remaining:
        population = strategy.ask()
        actions = np.array(population)[: recorder.remaining]

        def act(batch: BatchedEpisodes, actions: np.ndarray = actions) -> np.ndarray:
            return actions[:, batch.state.index]

        rewards = recorder.run_episodes(act, len(actions))
        # The package minimises, and takes nothing less than a whole population; the
        # last one may be cut short.
        if len(rewards) == len(population):
            strategy.tell(population, (-rewards).tolist())


def tpe(recorder: Recorder) -> None:
    """The tree-structured Parzen estimator over the actions of a whole episode.

    Bergstra et al. 2011, as Optuna has it; the first trial is uniform pruning.

    Raises:
        UserError: If the package optuna isn't installed.
    """
    check_installed("tpe", "agent")
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    # Multivariate, since groups share a budget; constant_liar, since ten trials are
    # asked for before the first one is told.
    sampler = optuna.samplers.TPESampler(
        multivariate=True, constant_liar=True, seed=recorder.config.seed
    )
    study = optuna.create_study(direction="maximize", sampler=sampler)
    study.enqueue_trial({str(index): 0.0 for index in range(len(recorder.env.groups))})
    while recorder.remaining:
        trials = [study.ask() for _ in range(min(LANES, recorder.remaining))]

        def act(
            batch: BatchedEpisodes, trials: list[optuna.Trial] = trials
        ) -> np.ndarray:
            name = str(batch.state.index)
            return np.array([trial.suggest_float(name, -1, 1) for trial in trials])

        rewards = recorder.run_episodes(act, len(trials)).tolist()
        for trial, reward in zip(trials, rewards, strict=True):
            study.tell(trial, reward)


BASELINES: dict[str, Callable[[Recorder], None]] = {
    "uniform": uniform,
    "random": random,
    "sensitivity": sensitivity,
    "evolution": evolution,
    "tpe": tpe,
    "global": global_ranking,
    "cost_aware": cost_aware,
    "eagleeye": eagleeye,
}
"""Name to what plays the episodes of a recorder."""


def _spread_levels(allowed: np.ndarray, n_levels: int) -> np.ndarray:
    """Up to `n_levels` counts below dense, evenly spread, and dense.

    Args:
        allowed: The counts that a group may keep, ascending, the last one dense.
        n_levels: Of 4, 8, ..., 28 and 32 two levels give 4, 28 and 32.
    """
    pruned = allowed[:-1]
    if not len(pruned):
        return allowed
    places = np.linspace(0, len(pruned) - 1, min(n_levels, len(pruned)))
    chosen = np.unique(places.round().astype(int))
    return np.append(pruned[chosen], allowed[-1])


def _damages(env: LayerPruningEnv, levels: list[np.ndarray]) -> list[list[float]]:
    """The loss above the dense network's when one group alone is pruned.

    Args:
        env: The environment, whose proxy scores.
        levels: The counts to try, a group a row.

    Returns:
        A number for each of `levels`.
    """
    dense = env.space.costs.dense
    # In one call, since the proxy scores candidates side by side.
    candidates = [env.counts(dense)]
    for index, row in enumerate(levels):
        for count in row:
            candidates.append(env.counts(_with_count(dense, index, count)))
    # The first one is the dense network's.
    base, *losses = [score.loss for score in env.proxy.score_all(candidates)]
    damages = []
    start = 0
    for row in levels:
        of_group = losses[start : start + len(row)]
        damages.append([loss - base for loss in of_group])
        start += len(row)
    return damages


def _allocate(
    env: LayerPruningEnv, levels: list[np.ndarray], damages: list[list[float]]
) -> np.ndarray:
    """The counts with the least sum of damages whose real cost meets the target.

    Args:
        env: The environment: its budget and what allocations cost.
        levels: The counts that a group may keep, a group a row, ascending.
        damages: A number for each of them.

    Returns:
        Counts `(n_groups,)`; if none meets the target, those that come closest.
    """
    cost = env.space.cost
    dense = env.space.costs.dense
    target = env.target_of(env.budget.at_position(0.5))
    savings = []
    for index, row in enumerate(levels):
        costs = [cost(_with_count(dense, index, count)) for count in row]
        savings.append(cost(dense) - np.array(costs))
    best = np.array([row[0] for row in levels])
    least = cost(dense) - target
    most = sum(row.max() for row in savings)
    # Added up, savings of neighbouring groups count twice what both remove, or miss
    # nothing: how much to ask for so that the real cost fits is found by trying.
    for needed in np.linspace(0.5 * least, most, 60):
        counts = _knapsack(levels, damages, savings, needed)
        if cost(counts) <= target:
            return counts
        best = counts
    return best


def _with_count(dense: np.ndarray, index: int, count: int) -> np.ndarray:
    """The dense counts `(n_groups,)` with another one for a single group."""
    kept = dense.copy()
    kept[index] = count
    return kept


def _knapsack(
    levels: list[np.ndarray],
    damages: list[list[float]],
    savings: list[np.ndarray],
    needed: float,
) -> np.ndarray:
    """The counts with the least sum of damages whose savings add up to enough.

    A dynamic program over savings on a grid of `GRID` units. For example, two groups
    may keep 4 or 8 channels; 4 save 60 and 50 and do damages of 0.3 and 0.2. If 50 are
    needed, the second group alone is cut: (8, 4), damage 0.2. If 100 are needed, both
    are: (4, 4), damage 0.5.

    Args:
        levels: The counts that a group may keep, a group a row.
        damages: A number for each of them.
        savings: What each of them saves, next to dense.
        needed: The least sum of savings.

    Returns:
        Counts `(n_groups,)`; those with the most savings if none are enough.
    """
    unit = max(needed, 1) / GRID
    # Entry u: the least damage of the groups so far with savings of u units; the last
    # entry stands for that many or more.
    best = np.full(GRID + 1, np.inf)
    best[0] = 0.0
    choices = []
    for row, saved in zip(damages, savings, strict=True):
        # Rounded down, so that a sum on the grid is never more than what is saved.
        units = (saved / unit).astype(int)
        best, choice = _with_group(best, row, units)
        choices.append(choice)
    # From the last group back, along the choices that led here.
    total = int(np.flatnonzero(np.isfinite(best))[-1])
    counts = []
    for row, choice in zip(reversed(levels), reversed(choices), strict=True):
        level, total = choice[total]
        counts.append(row[level])
    return np.array(counts[::-1])


def _with_group(
    best: np.ndarray, damages: list[float], units: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """One step of the dynamic program: a further group.

    Args:
        best: Least damage `(GRID + 1,)` by units saved, without the group.
        damages: The group's damage, a number a level.
        units: What a level saves.

    Returns:
        Least damage `(GRID + 1,)` with the group, and for each entry the level that it
        takes and the units saved before, `(GRID + 1, 2)`.
    """
    following = np.full(GRID + 1, np.inf)
    choice = np.zeros((GRID + 1, 2), dtype=int)
    for level, (damage, saved) in enumerate(zip(damages, units, strict=True)):
        for before in np.flatnonzero(np.isfinite(best)):
            after = min(GRID, before + saved)
            # Strictly less: among equals the level with fewer channels stays.
            if best[before] + damage < following[after]:
                following[after] = best[before] + damage
                choice[after] = level, before
    return following, choice
