"""Dyna: an agent that learns from imagined episodes between the real ones.

What an action does to an allocation is known and costs microseconds; only the score of
a finished network is expensive. So after each batch of real episodes a Gaussian process
learns to predict the reward of an allocation, and PPO practises on hundreds of episodes
that end with its prediction. Of many episodes that the policy then proposes, and of
variations of the most promising, those are evaluated for which draws from the process
promise most. Sutton 1991 ("Dyna") learns a model of the whole environment and lets
every real step train the policy too; here real episodes reach the policy through the
model alone.

An allocation's score doesn't depend on the budget that it was made for. So under a
range of budgets every evaluation teaches about all of them.
"""

import math
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback

from autoprune.agents.recorder import LANES, Recorder, near
from autoprune.agents.replay import Policy, acting
from autoprune.agents.sb3_env import SB3VecEnv
from autoprune.agents.surrogate import CostBaseline, Surrogate
from autoprune.agents.training import make_learner, policy_of
from autoprune.costs.budget import Budget, BudgetRange, chebyshev_spaced
from autoprune.envs.batch import BatchedEpisodes, fixed_policy
from autoprune.envs.layer_pruning import LayerPruningEnv

MODEL_EPISODES = 64
"""Imagined episodes between two updates."""
PROPOSALS = 150
"""Episodes that the policy proposes for a batch."""
VARIATIONS, PARENTS = 100, 10
"""Changed copies that are proposed too, and of how many of the most promising
allocations.
"""
CHANGED = (2, 4, 8)
"""Groups that a variation changes, on average; every number is as likely."""
STEPS = (0.08, 0.15, 0.3)
"""Standard deviations of these changes, in sparsity."""
UPDATES = 3
"""Policy updates between two batches."""
PRACTICE = 400
"""Updates after the last batch of a range of budgets, at a rate that falls to 0: there
the policy is what remains.
"""
ALIKE_IN = ("n_layers", "width", "macs_share", "sensitivity")
"""Features of the observation by which the surrogate knows what one group tells about
another.
"""
LEAST_STD = 0.1
"""The policy's spread doesn't fall below this, as a share of the feasible interval's
half.
"""


class ModelEnv(SB3VecEnv):
    """Lanes whose finished networks are not scored but predicted.

    Under a range of budgets that are used up the reward is how much better than usual
    at its cost a network is expected to be.

    Args:
        env: The real environment, for its arithmetic.
        n_lanes: Episodes at once.
    """

    def __init__(self, env: LayerPruningEnv, n_lanes: int):
        super().__init__(env, n_lanes)
        likeness = np.column_stack([env.observer.static[name] for name in ALIKE_IN])
        self.surrogate = Surrogate(
            env.space.costs.dense, env.space.low, env.space.cost, likeness
        )
        self.cost_baseline: CostBaseline | None = None
        self.generator = np.random.default_rng(0)

    def next_budgets(self) -> list[Budget]:
        """Spread over the range."""
        return chebyshev_spaced(self.env.budget, self.num_envs, self.generator.random())

    def rewards(self) -> np.ndarray:
        """What the surrogate expects."""
        return self.surrogate.mean(self.batch.state.kept)

    def learn_from(self, recorder: Recorder) -> None:
        """Fits the surrogate to everything evaluated so far; a walk that was repeated
        has told nothing new.
        """
        kept, rewards, blocks = recorder.evaluated
        self.cost_baseline = recorder.cost_baseline
        if self.cost_baseline is not None:
            rewards = self.cost_baseline.relative(rewards, self.env.space.cost(kept))
        self.surrogate.fit(kept, rewards, blocks)

    def expected(self, kept: np.ndarray) -> np.ndarray:
        """Expected rewards `(n,)` of allocations `(n, n_groups)`."""
        rewards, costs = self.surrogate.mean(kept), self.env.space.cost(kept)
        return (
            rewards
            if self.cost_baseline is None
            else self.cost_baseline.absolute(rewards, costs)
        )


def train_dyna(
    recorder: Recorder, log: Path | None = None, start: Policy | None = None
) -> Policy:
    """Trains the agent for as many episodes as the recorder asks for.

    There is nothing to checkpoint: a resumed search practises again, which takes
    seconds, and pays for no score twice. Its events begin anew as well.

    Args:
        recorder: Environment, configuration, and where episodes go.
        log: Folder for TensorBoard events.
        start: A policy of any algorithm to start from: every other episode of the first
            batch is its, mixed with the guide's if it is a stranger. Dyna learns more
            from what they earn than from the policy itself. A learner that went on from
            it was narrower: after 100 evaluations from a ResNet-20's policy the loss on
            ResNet-56 was 0.289 +- 0.011 for 0.259 +- 0.009 so and 0.273 +- 0.039 from
            nothing.

    Returns:
        The policy after the last update.
    """
    n_steps = len(recorder.env.groups)
    model_env = ModelEnv(recorder.env, MODEL_EPISODES)
    if log is not None:
        shutil.rmtree(log / "dyna", ignore_errors=True)
    learner = make_learner("dyna", model_env, n_steps, recorder.config.seed, log)
    recorder.expected = model_env.expected
    warm_start = _leading(start, recorder.env) if start is not None else None
    while recorder.remaining:
        budgets = recorder.budgets(min(LANES, recorder.remaining))
        if recorder.episodes:
            batch = _promising(learner, model_env, budgets, recorder)
        else:
            batch = _first(learner, budgets, warm_start)
        recorder.score(batch, budgets, len(budgets))
        model_env.learn_from(recorder)
        _practise(learner, UPDATES)
    if isinstance(recorder.env.budget, BudgetRange):
        recorder.on_pause("practising for all budgets")
        _practise(learner, PRACTICE, _FadingRate())
    learner.logger.close()
    return policy_of("dyna", learner)


def _practise(learner: BaseAlgorithm, updates: int, *callbacks: BaseCallback) -> None:
    steps = updates * MODEL_EPISODES * learner.n_steps
    learner.learn(steps, [_Spread(), *callbacks], reset_num_timesteps=False)


class _Spread(BaseCallback):
    """Keeps the policy trying things.

    Practice stores the sampled action, not the executed one: rounding belongs to the
    environment, and the gradient of a policy's return is about the sample. Stored as
    executed, an action that was rounded many deviations away blows the ratio of new to
    old policy up.
    """

    def _on_rollout_start(self) -> None:
        self.model.policy.log_std.data.clamp_(min=math.log(LEAST_STD))

    def _on_step(self) -> bool:
        return True


class _FadingRate(BaseCallback):
    """Lets the learning rate fall to 0 until the last update, so that the policy
    settles.
    """

    def _on_training_start(self) -> None:
        self._first, self._rate = self.model.num_timesteps, self.model.lr_schedule(1.0)

    def _on_rollout_start(self) -> None:
        done = (self.model.num_timesteps - self._first) / (
            self.model._total_timesteps - self._first
        )
        self.model.lr_schedule = lambda _: self._rate * (1 - done)

    def _on_step(self) -> bool:
        return True


def _leading(
    start: Policy, env: LayerPruningEnv
) -> Callable[[BatchedEpisodes], np.ndarray]:
    """What a policy to start from does in the first batch: a stranger's deeds are mixed
    with the guide's.

    Not those of one that knows most groups, since the guide's measurements are missing
    later.
    """
    if start.is_out_of_distribution(env.observer):
        return acting(start, env)
    return lambda batch: start.act(batch.observe())[:, 0]


def _first(
    learner: BaseAlgorithm,
    budgets: list[Budget],
    warm_start: Callable[[BatchedEpisodes], np.ndarray] | None,
) -> BatchedEpisodes:
    """Before anything is known: samples of the policy, and what it thinks best for
    every budget or every other one.

    Where there is something that leads, these and half of the samples are its.
    """
    is_new = np.array(
        [budget not in budgets[:lane] for lane, budget in enumerate(budgets)]
    )
    is_even = np.arange(len(budgets)) % 2 == 0
    return _walked(learner, budgets, is_new & is_even, warm_start, is_even)


def _promising(
    learner: BaseAlgorithm,
    model_env: ModelEnv,
    budgets: list[Budget],
    recorder: Recorder,
) -> BatchedEpisodes:
    """Of many proposals, one a budget: the best new one by a draw from the posterior.

    Thompson 1933: a draw for each lane tries what may be good in proportion to the
    belief that it is.
    """
    seed = recorder.config.seed * 100_003 + len(recorder.episodes)
    proposed = [budget for budget in budgets for _ in range(PROPOSALS // len(budgets))]
    own = _walked(
        learner, proposed, np.arange(len(proposed)) % (PROPOSALS // len(budgets)) == 0
    ).state
    varied = _variations(
        own.kept, model_env, budgets, recorder, np.random.default_rng(seed)
    ).state
    kept, targets = (
        np.concatenate([getattr(own, name), getattr(varied, name)])
        for name in ("kept", "targets")
    )
    draws = model_env.surrogate.samples(
        kept, len(budgets), torch.Generator().manual_seed(seed)
    )
    env = recorder.env
    keys = [env.proxy.key(env.counts(row)) for row in kept]
    known = {env.proxy.key(episode.allocation.kept) for episode in recorder.episodes}
    chosen: list[int] = []
    for draw, budget in zip(draws, budgets, strict=True):
        fits = targets == env.target_of(budget)
        new = fits & np.array([key not in known for key in keys])
        # Where the lane's budget has no new proposal, the one that promises most is
        # walked again.
        chosen.append(int(np.where(new if new.any() else fits, draw, -np.inf).argmax()))
        known.add(keys[chosen[-1]])
    return env.start_episodes(budgets).rollout(
        fixed_policy(1 - kept[chosen] / env.space.costs.dense)
    )


def _variations(
    proposed: np.ndarray,
    model_env: ModelEnv,
    budgets: list[Budget],
    recorder: Recorder,
    generator: np.random.Generator,
) -> BatchedEpisodes:
    """Changed copies of what promises most within a budget, evaluated or proposed by
    the policy, as many a budget.

    The policy generalises over groups and so finds its way early; what sets a single
    group apart is found here.
    """
    env, space = recorder.env, recorder.env.space
    pool = np.unique(
        [*proposed, *(episode.counts for episode in recorder.episodes)], axis=0
    )
    pool = pool[np.argsort(-model_env.surrogate.mean(pool), kind="stable")]
    costs, n = space.cost(pool), VARIATIONS // len(budgets)
    parents = [
        generator.choice(pool[near(env, costs, budget)][:PARENTS], n)
        for budget in budgets
    ]
    batch = env.start_episodes([budget for budget in budgets for _ in range(n)])
    sparsities = 1 - np.concatenate(parents) / space.costs.dense
    shape, column = sparsities.shape, (len(sparsities), 1)
    is_changed = generator.random(shape) < generator.choice(CHANGED, column) / shape[1]
    changes = is_changed * generator.normal(0, generator.choice(STEPS, column), shape)
    sparsities += changes
    return batch.rollout(
        fixed_policy(
            space.shifted(sparsities, batch.state.targets)
            if batch.uses_up_budget
            else sparsities
        )
    )


def _walked(
    learner: BaseAlgorithm,
    budgets: list[Budget],
    is_best: np.ndarray,
    warm_start: Callable[[BatchedEpisodes], np.ndarray] | None = None,
    is_led: np.ndarray | None = None,
) -> BatchedEpisodes:
    """Episodes of the policy, or in some lanes of what leads: sampled, or in marked
    lanes the deterministic one.
    """
    env = learner.get_env().env

    def act(batch: BatchedEpisodes) -> np.ndarray:
        observations = batch.observe()
        with torch.no_grad():
            actions = learner.policy.get_distribution(torch.from_numpy(observations))
            best, tried = (
                values[:, 0].numpy() for values in (actions.mode(), actions.sample())
            )
        if warm_start is not None:
            away = np.where(is_led, warm_start(batch) - best, 0)
            best, tried = best + away, tried + away
        return np.where(is_best, best, tried)

    return env.start_episodes(budgets).rollout(act)
