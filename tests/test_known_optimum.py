"""Where the best allocation is known by enumeration the default agent finds it, and needs its observation to do so.

Found means: the policy's own allocation, not only the best that was ever tried, loses at most 1 % of what can be gained
over uniform pruning, `(loss - best) / (uniform - best) <= 0.01`. A share of the gain, since a share of the loss would
change when a constant is added to it, and a network that can't be pruned badly would make everybody pass.
"""

import itertools
from functools import cache

import numpy as np
import pytest
from toys import fake_env

from agents.baselines import walk
from agents.dyna import train_dyna
from agents.lanes import Recorder
from agents.replay import Policy, replay
from autoprune.config import SearchConfig
from envs.layer_pruning import LayerPruningEnv

SEEDS, N_EPISODES = range(5), 60
WEIGHTS = np.array([0.2, 1.0, 0.1])
"""Damage of each group: neighbours differ, so that no common sparsity is good."""


def damage(kept: np.ndarray) -> float:
    """Grows with the octaves by which each group shrinks, and once more where two neighbours shrink together."""
    octaves = np.log2(np.array([12, 16, 8]) / kept)
    return float(WEIGHTS @ octaves**2 + 0.1 * octaves[:-1] @ octaves[1:])


def pruning_env() -> LayerPruningEnv:
    return fake_env("three", damage, budget="macs=50%", round_to=1)


@cache
def optimum() -> tuple[float, float]:
    """The lowest loss of any allocation within the budget, and that of uniform pruning."""
    env = pruning_env()
    every = np.array(list(itertools.product(*env.space.levels)))
    affordable = every[env.space.costs.macs(every) <= env.target]
    assert len(affordable) > 500
    return min(map(damage, affordable)), walk(env, lambda _: 0.0)["loss"]


def lost(loss: float) -> float:
    """Share of the possible gain over uniform pruning that a loss leaves."""
    best, uniform = optimum()
    return (loss - best) / (uniform - best)


def blind_env(shown: np.ndarray) -> LayerPruningEnv:
    """Whoever looks sees the same."""
    env = pruning_env()
    env.observer.observe = lambda state: np.repeat(shown[None], len(state.kept), 0)
    return env


@cache
def trained(seed: int) -> tuple[Policy, float]:
    """The policy, and the lowest loss that its search has seen."""
    recorder = Recorder(pruning_env(), SearchConfig(episodes=N_EPISODES, seed=seed))
    return train_dyna(recorder), min(episode.evaluation.loss for episode in recorder.episodes)


def own_loss(policy: Policy, env: LayerPruningEnv) -> float:
    return replay(policy, env)[1]["loss"]


def mean_observation(policy: Policy) -> np.ndarray:
    env = pruning_env()
    rows = [env.reset()[0]]
    for _ in env.groups:
        rows.append(env.step(policy.act(rows[-1]))[0])
    return np.mean(rows[:-1], 0)


def test_uniform_pruning_is_far_from_the_optimum_and_the_optimum_is_known():
    best, uniform = optimum()
    assert 0 < best < 0.6 * uniform


@pytest.mark.parametrize("seed", SEEDS)
def test_the_default_agent_finds_the_known_optimum(seed):
    policy, best_seen = trained(seed)
    assert lost(best_seen) <= 0.01
    assert lost(own_loss(policy, pruning_env())) <= 0.01


def test_no_policy_that_ignores_its_observation_can_pass():
    # Without chance and without an observation a policy is one action, the same for every group.
    losses = [walk(pruning_env(), lambda _, action=action: action)["loss"] for action in np.linspace(-1, 1, 401)]
    assert min(map(lost, losses)) > 0.1


@pytest.mark.parametrize("seed", SEEDS)
def test_the_learned_policy_fails_when_it_is_shown_its_mean_observation_all_the_time(seed):
    policy, _ = trained(seed)
    assert lost(own_loss(policy, blind_env(mean_observation(policy)))) > 0.1


def test_an_agent_that_is_trained_blindfolded_fails():
    shown = mean_observation(trained(0)[0])
    env = blind_env(shown)
    policy = train_dyna(Recorder(env, SearchConfig(episodes=N_EPISODES)))
    assert lost(own_loss(policy, env)) > 0.1
