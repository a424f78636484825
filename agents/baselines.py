"""What an agent has to beat, through the same door: the same environment, the same evaluations, the same finalists.

Each baseline walks episodes of `env` and stops after `config.episodes` evaluations at the latest.
"""

from collections.abc import Callable, Iterator
from math import sqrt

import gymnasium
import numpy as np

from autoprune.config import SearchConfig
from autoprune.errors import check_known
from autoprune.proxy import ProxyAccuracy
from envs.layer_pruning import LayerPruningEnv

GRID = 200
"""Steps into which the dynamic program divides the budget."""


def uniform(env: gymnasium.Env, config: SearchConfig) -> None:
    """One episode: the same sparsity everywhere."""
    walk(env, lambda position: 0.0)


def random(env: gymnasium.Env, config: SearchConfig) -> None:
    """Every sparsity drawn uniformly from its feasible interval, `config.episodes` times."""
    generator = np.random.default_rng(config.seed)
    core: LayerPruningEnv = env.unwrapped

    def action(position: int) -> float:
        return core.action_of(generator.uniform(*core.bounds))

    for _ in range(config.episodes):
        walk(env, action)


def sensitivity(env: gymnasium.Env, config: SearchConfig) -> None:
    """Prunes each group alone at several sparsities, then solves for the best sum of damages under the budget.

    The damage of a network is taken as the sum over groups of its growth in loss, or of the growth's root; a dynamic
    program finds the cheapest sum for either. Costs multiply between neighbouring groups, so the program's additive
    budget is searched until the real cost meets the target. With too few evaluations to prune each group once, it
    knows nothing and is uniform.
    """
    core: LayerPruningEnv = env.unwrapped
    n_levels = min(9, (config.episodes - 3) // len(core.groups))  # besides: the dense network and two solutions
    if n_levels < 1:
        return uniform(env, config)
    levels = [_pick(levels, n_levels) for levels in core.space.levels]
    damages = _damages(core.proxy, core.space.costs.names, core.space.costs.dense, levels)
    for transform in (lambda damage: damage, sqrt):
        table = [[transform(max(0.0, damage)) for damage in row] for row in damages]
        wish = _allocate(core, levels, table)
        walk(env, lambda position, wish=wish: core.action_of(1 - wish[position] / core.space.costs.dense[position]))


BASELINES: dict[str, Callable[[gymnasium.Env, SearchConfig], None]] = {
    "uniform": uniform,
    "random": random,
    "sensitivity": sensitivity,
}


def check_baselines(text: str) -> list[str]:
    """The baselines in "uniform,random" or "none"; raises a `UserError` that offers the nearest for an unknown one."""
    names = [] if text == "none" else [name.strip() for name in text.split(",")]
    for name in names:
        check_known("baseline", name, BASELINES, "baselines", ", or none")
    return names


def walk(env: gymnasium.Env, action: Callable[[int], float]) -> dict:
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
    chosen = np.unique(np.linspace(0, len(pruned) - 1, min(n_levels, len(pruned))).round().astype(int))
    return np.append(pruned[chosen], levels[-1]) if len(pruned) else levels


def _damages(proxy: ProxyAccuracy, names: list[str], dense: np.ndarray, levels: list[np.ndarray]) -> list[list[float]]:
    """Per group and level the loss above the dense network's when only that group is pruned."""
    channels = dict(zip(names, map(int, dense), strict=True))
    base = proxy(channels).loss
    return [
        [proxy(channels | {name: int(n)}).loss - base for n in row] for name, row in zip(names, levels, strict=True)
    ]


def _allocate(core: LayerPruningEnv, levels: list[np.ndarray], damages: list[list[float]]) -> np.ndarray:
    """The counts with the smallest sum of damages whose real cost meets the target."""
    cost, dense, target = core.space.cost, core.space.costs.dense, core.target
    alone = [np.array([cost(_with(dense, index, n)) for n in row]) for index, row in enumerate(levels)]
    savings = [cost(dense) - row for row in alone]
    best = np.array([row[0] for row in levels])
    for needed in _needs(cost(dense) - target, sum(row.max() for row in savings)):
        counts = _knapsack(levels, damages, savings, needed)
        if cost(counts) <= target:
            return counts
        best = counts
    return best


def _needs(least: int, most: int) -> Iterator[float]:
    """Savings to ask of the additive program, growing until the real cost, with its products, meets the budget."""
    yield from np.linspace(0.5 * least, most, 60)


def _with(dense: np.ndarray, index: int, count: int) -> np.ndarray:
    kept = dense.copy()
    kept[index] = count
    return kept


def _knapsack(levels, damages, savings, needed: float) -> np.ndarray:
    """Smallest sum of damages with savings of at least `needed`, on a grid of `GRID` units."""
    unit = max(needed, 1) / GRID
    best = np.full(GRID + 1, np.inf)
    best[0] = 0.0
    choices = []
    for row, saved in zip(damages, savings, strict=True):
        following, choice = np.full(GRID + 1, np.inf), np.zeros((GRID + 1, 2), dtype=int)
        for level, (damage, units) in enumerate(zip(row, (saved / unit).astype(int), strict=True)):
            for before in np.flatnonzero(np.isfinite(best)):
                after = min(GRID, before + units)
                if best[before] + damage < following[after]:
                    following[after], choice[after] = best[before] + damage, (level, before)
        best = following
        choices.append(choice)
    at = int(np.flatnonzero(np.isfinite(best))[-1])
    counts = []
    for row, choice in zip(reversed(levels), reversed(choices), strict=True):
        level, at = choice[at]
        counts.append(row[level])
    return np.array(counts[::-1])
