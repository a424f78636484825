"""What an agent has to beat, through the same door: the same environment, the same
evaluations, the same finalists.

Each baseline walks episodes of a `Recorder` and stops after the evaluations that it
asks for at the latest.
"""

from collections.abc import Callable, Iterator
from math import sqrt

import gymnasium
import numpy as np

from autoprune.agents.rankings import ONE_SHOT
from autoprune.agents.recorder import LANES, START_STD, Recorder
from autoprune.agents.replay import check_installed
from autoprune.envs.batch import BatchedEpisodes, fixed_policy, uniform_policy
from autoprune.envs.layer_pruning import LayerPruningEnv
from autoprune.errors import check_known

GRID = 200
"""Steps into which the dynamic program divides the budget."""


def uniform(recorder: Recorder) -> None:
    """One episode: the same sparsity everywhere."""
    recorder.run_episodes(uniform_policy, 1)


def random(recorder: Recorder) -> None:
    """Every sparsity drawn uniformly from its feasible interval."""
    generator = np.random.default_rng(recorder.config.seed)

    def act(batch: BatchedEpisodes) -> np.ndarray:
        lowest, highest = batch.state.bounds
        return batch.actions_of(
            generator.uniform(lowest, highest), np.zeros(len(lowest))
        )

    while recorder.remaining:
        recorder.run_episodes(act, min(LANES, recorder.remaining))


def sensitivity(recorder: Recorder) -> None:
    """Prunes each group alone at several sparsities, then solves for the best sum of
    damages under the budget.

    The damage of a network is taken as the sum over groups of its growth in loss, or of
    the growth's root; a dynamic program finds the cheapest sum for either. Costs
    multiply between neighbouring groups, so the program's additive budget is searched
    until the real cost meets the target. With too few evaluations to prune each group
    once, it knows nothing and is uniform.
    """
    core = recorder.env
    n_levels = min(
        9, (recorder.remaining - 3) // len(core.groups)
    )  # besides: the dense network and two solutions
    if n_levels < 1:
        return uniform(recorder)
    levels = [_pick(levels, n_levels) for levels in core.space.levels]
    damages = _damages(core, levels)
    for transform in (lambda damage: damage, sqrt):
        table = [[transform(max(0.0, damage)) for damage in row] for row in damages]
        sparsities = 1 - _allocate(core, levels, table) / core.space.costs.dense
        recorder.run_episodes(fixed_policy(sparsities[None]), 1)


def evolution(recorder: Recorder) -> None:
    """CMA-ES (Hansen 2016, arXiv 1604.00772) over the actions of a whole episode,
    starting at uniform.

    Raises:
        UserError: If the package cma isn't installed.
    """
    check_installed("evolution", "agent")
    import cma

    n_groups = len(recorder.env.groups)
    options = {
        "bounds": [-1, 1],
        "popsize": LANES,
        "seed": recorder.config.seed + 1,
        "verbose": -9,
    }
    # The package can't search a line.
    strategy = cma.CMAEvolutionStrategy(np.zeros(max(2, n_groups)), START_STD, options)
    while recorder.remaining:
        population = strategy.ask()
        wishes = np.array(population)[: recorder.remaining]
        rewards = recorder.run_episodes(
            lambda batch, wishes=wishes: wishes[:, batch.state.index], len(wishes)
        )
        if len(rewards) == len(population):
            strategy.tell(population, (-rewards).tolist())


def tpe(recorder: Recorder) -> None:
    """The tree-structured Parzen estimator (Bergstra et al. 2011) of Optuna over the
    actions of a whole episode.

    Raises:
        UserError: If the package optuna isn't installed.
    """
    check_installed("tpe", "agent")
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    sampler = optuna.samplers.TPESampler(
        multivariate=True, constant_liar=True, seed=recorder.config.seed
    )
    study = optuna.create_study(direction="maximize", sampler=sampler)
    study.enqueue_trial({str(index): 0.0 for index in range(len(recorder.env.groups))})
    while recorder.remaining:
        trials = [study.ask() for _ in range(min(LANES, recorder.remaining))]

        def act(batch: BatchedEpisodes, trials: list = trials) -> np.ndarray:
            return np.array(
                [trial.suggest_float(str(batch.state.index), -1, 1) for trial in trials]
            )

        for trial, reward in zip(
            trials, recorder.run_episodes(act, len(trials)).tolist(), strict=True
        ):
            study.tell(trial, reward)


BASELINES: dict[str, Callable[[Recorder], None]] = {
    "uniform": uniform,
    "random": random,
    "sensitivity": sensitivity,
    "evolution": evolution,
    "tpe": tpe,
    **ONE_SHOT,
}


AT_ONCE = ("uniform", "sensitivity", "global", "cost_aware")
"""Those that decide by what they measure once: no chance is in them, and no search."""
USUAL = ("uniform", "random", "sensitivity")


def check_baselines(text: str | None, agent: str) -> list[str]:
    """The baselines in "uniform,random" or "none"; where nothing is said, those that an
    agent's search is held against.

    Args:
        text: Names with commas between them, "none", or None for the usual ones, which
            an allocator that decides at once doesn't need.
        agent: What they are for.

    Raises:
        UserError: If a name is unknown, with the nearest known ones, or what it needs
            isn't installed.
    """
    if text is None:
        return [] if agent in AT_ONCE else list(USUAL)
    names = [] if text == "none" else [name.strip() for name in text.split(",")]
    for name in names:
        check_known("baseline", name, BASELINES, "baselines", ", or none")
        check_installed(name, "baselines")
    return names


def run_episode(env: gymnasium.Env, action: Callable[[int], float]) -> dict:
    """One episode of actions chosen by position; returns the last info."""
    env.reset()
    done, position, info = False, 0, {}
    while not done:
        _, _, done, _, info = env.step(np.array([action(position)], dtype=np.float32))
        position += 1
    return info


def _pick(levels: np.ndarray, n_levels: int) -> np.ndarray:
    """Up to `n_levels` allowed counts below dense, evenly spread, and dense."""
    pruned = levels[:-1]
    chosen = np.unique(
        np.linspace(0, len(pruned) - 1, min(n_levels, len(pruned))).round().astype(int)
    )
    return np.append(pruned[chosen], levels[-1]) if len(pruned) else levels


def _damages(core: LayerPruningEnv, levels: list[np.ndarray]) -> list[list[float]]:
    """Per group and level the loss above the dense network's when only that group is
    pruned.
    """
    dense = core.space.costs.dense
    alone = [
        core.counts(_with(dense, index, count))
        for index, row in enumerate(levels)
        for count in row
    ]
    base, *losses = [
        evaluation.loss
        for evaluation in core.proxy.score_all([core.counts(dense), *alone])
    ]
    damages = iter(loss - base for loss in losses)
    return [[next(damages) for _ in row] for row in levels]


def _allocate(
    core: LayerPruningEnv, levels: list[np.ndarray], damages: list[list[float]]
) -> np.ndarray:
    """The counts with the smallest sum of damages whose real cost meets the target."""
    cost, dense = core.space.cost, core.space.costs.dense
    target = core.target_of(core.budget.at(0.5))
    alone = [
        np.array([cost(_with(dense, index, n)) for n in row])
        for index, row in enumerate(levels)
    ]
    savings = [cost(dense) - row for row in alone]
    best = np.array([row[0] for row in levels])
    for needed in _needs(cost(dense) - target, sum(row.max() for row in savings)):
        counts = _knapsack(levels, damages, savings, needed)
        if cost(counts) <= target:
            return counts
        best = counts
    return best


def _needs(least: int, most: int) -> Iterator[float]:
    """Savings to ask of the additive program, growing until the real cost, with its
    products, meets the budget.
    """
    yield from np.linspace(0.5 * least, most, 60)


def _with(dense: np.ndarray, index: int, count: int) -> np.ndarray:
    kept = dense.copy()
    kept[index] = count
    return kept


def _knapsack(levels, damages, savings, needed: float) -> np.ndarray:
    """Smallest sum of damages with savings of at least `needed`, on a grid of `GRID`
    units.
    """
    unit = max(needed, 1) / GRID
    best = np.full(GRID + 1, np.inf)
    best[0] = 0.0
    choices = []
    for row, saved in zip(damages, savings, strict=True):
        following, choice = (
            np.full(GRID + 1, np.inf),
            np.zeros((GRID + 1, 2), dtype=int),
        )
        for level, (damage, units) in enumerate(
            zip(row, (saved / unit).astype(int), strict=True)
        ):
            for before in np.flatnonzero(np.isfinite(best)):
                after = min(GRID, before + units)
                if best[before] + damage < following[after]:
                    following[after], choice[after] = (
                        best[before] + damage,
                        (level, before),
                    )
        best = following
        choices.append(choice)
    at = int(np.flatnonzero(np.isfinite(best))[-1])
    counts = []
    for row, choice in zip(reversed(levels), reversed(choices), strict=True):
        level, at = choice[at]
        counts.append(row[level])
    return np.array(counts[::-1])
