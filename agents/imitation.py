"""Teaching a learner to act as something else does, before rewards teach it more."""

from collections.abc import Callable

import numpy as np
import torch
from stable_baselines3.common.base_class import BaseAlgorithm

from agents.replay import Policy, acting
from autoprune.allocation import spread_to_learn
from envs.layer_pruning import LayerPruningEnv
from envs.walks import Walks

LANES, STEPS, BATCH, RATE = 64, 600, 256, 3e-3
"""Episodes that show how it is done, and the fit to them."""
STRAYING = 0.3
"""Spread of what three of four of these do instead, so that the learner knows its way back, too."""
KNOWN = 0.5
"""Mean trust from which a policy starts a search alone: what the guide adds isn't worth an evaluation a group there."""


def guided_measurements(start: Policy, env: LayerPruningEnv) -> int:
    """How many evaluations the guide takes before a search that starts from a policy; 0 on networks that it knows."""
    return 0 if start.trust(env.observer).mean() >= KNOWN else len(env.groups) + 1


def begin_as(start: Policy, learner: BaseAlgorithm, env: LayerPruningEnv, seed: int) -> None:
    """Lets a learner that has taken over a policy begin with what that does without learning: with the guide's help.

    On a network that the policy mostly knows, this does nothing. Else the guide measures, and the learner's
    deterministic action is fitted to the two's mixture. Alone, a policy can be lost on another network, and a search
    from there, too. A resumed search measures again, like the sensitivity: that takes seconds.
    """
    if guided_measurements(start, env):
        imitate(learner, acting(start, env), env, seed)


def imitate(learner: BaseAlgorithm, act: Callable[[Walks], np.ndarray], env: LayerPruningEnv, seed: int) -> None:
    """Fits a learner's deterministic action to what `act` wishes, by least squares on episodes under its budgets.

    Critics and spread stay as they are. Nothing is evaluated but what `act` asks for.
    """
    generator, policy = np.random.default_rng(seed), learner.policy
    observations, wishes = _shown(act, env, generator)
    optimizer = torch.optim.Adam(policy.parameters(), RATE)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, STEPS)
    for _ in range(STEPS):
        some = torch.from_numpy(generator.integers(0, len(wishes), BATCH))
        loss = (policy._predict(observations[some], deterministic=True)[:, 0] - wishes[some]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    optimizer.zero_grad()
    if hasattr(learner, "actor_target"):
        learner.actor_target.load_state_dict(learner.actor.state_dict())


def _shown(
    act: Callable[[Walks], np.ndarray], env: LayerPruningEnv, generator: np.random.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Observations `(n, n_features)` of episodes, in which most stray, and what `act` wishes there, `(n,)`."""
    seen, wished = [], []
    strays = np.arange(LANES) % 4 > 0

    def shown(walks: Walks) -> np.ndarray:
        seen.append(walks.observe())
        wished.append(act(walks))
        return wished[-1] + STRAYING * strays * generator.standard_normal(LANES)

    env.walks(spread_to_learn(env.budget, LANES, 0.5)).follow(shown)
    return torch.from_numpy(np.concatenate(seen)), torch.from_numpy(np.concatenate(wished).astype(np.float32))
