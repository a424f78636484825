"""Dyna: an agent that practises on predicted rewards between the real episodes.

What an action does to an allocation is known and costs microseconds; only the score of
a finished network is expensive. So after each batch of real episodes a Gaussian process
learns to predict the reward of an allocation, and PPO practises on hundreds of episodes
that end with its prediction. Then the policy proposes many allocations, and variations
of the best ones known are added; of all these, those are evaluated for which draws from
the process are highest. Sutton 1991 ("Dyna") learns a model of the whole environment
and lets every real step train the policy too; here real episodes reach the policy
through the model alone.

An allocation's score doesn't depend on the budget that it was made for. So under a
range of budgets every evaluation teaches about all of them.
"""

import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import cast

import numpy as np
import torch
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.ppo import PPO

from autoprune.agents.cost_baseline import CostBaseline
from autoprune.agents.recorder import LANES, Recorder, is_near_budget
from autoprune.agents.replay import Policy, make_actor
from autoprune.agents.sb3_env import SB3VecEnv
from autoprune.agents.surrogate import Surrogate
from autoprune.agents.training import make_learner, policy_of
from autoprune.costs.budget import BudgetRange, SingleBudget, chebyshev_budgets
from autoprune.envs.batch import BatchedEpisodes, fixed_policy
from autoprune.envs.layer_pruning import LayerPruningEnv

MODEL_EPISODES = 64
"""Predicted episodes between two updates."""
PROPOSALS = 150
"""Episodes that the policy proposes for a batch."""
VARIATIONS = 100
"""Changed copies that are proposed too."""
PARENTS = 10
"""Allocations that are varied at each budget: so many of the most promising ones."""
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
    """Lanes whose finished networks aren't scored: their rewards are predicted.

    Under a range of budgets that are used up the reward is how much better than usual
    at its cost a network is expected to be.

    Args:
        env: The real environment, for its arithmetic.
        n_lanes: Number of episodes that step together.

    Attributes:
        surrogate: Predicts the rewards.
        cost_baseline: What reward is usual at a cost; None where rewards are predicted
            as they are.
    """

    def __init__(self, env: LayerPruningEnv, n_lanes: int) -> None:
        super().__init__(env, n_lanes)
        likeness = np.column_stack([env.observer.static[name] for name in ALIKE_IN])
        self.surrogate = Surrogate(
            env.space.costs.dense, env.space.low, env.space.cost, likeness
        )
        self.cost_baseline: CostBaseline | None = None
        self.generator = np.random.default_rng(0)

    def next_budgets(self) -> list[SingleBudget]:
        """Spread over the range."""
        offset = self.generator.random()
        return chebyshev_budgets(self.env.budget, self.num_envs, offset)

    def rewards(self) -> np.ndarray:
        """What the surrogate expects of the finished networks, `(n_lanes,)`."""
        return self.surrogate.mean(self.batch.state.kept)

    def learn_from(self, recorder: Recorder) -> None:
        """Fits the surrogate to everything evaluated so far."""
        kept, rewards, blocks = recorder.distinct_evaluations
        self.cost_baseline = recorder.cost_baseline
        if self.cost_baseline is not None:
            # The trend along the cost would drown all else.
            costs = self.env.space.cost(kept)
            rewards = self.cost_baseline.to_relative(rewards, costs)
        self.surrogate.fit(kept, rewards, blocks)

    def predict_rewards(self, kept: np.ndarray) -> np.ndarray:
        """Expected rewards `(n,)` of allocations `(n, n_groups)`."""
        rewards = self.surrogate.mean(kept)
        if self.cost_baseline is None:
            return rewards
        return self.cost_baseline.to_absolute(rewards, self.env.space.cost(kept))


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
            batch is its, mixed with the greedy allocator's if it hardly knows this
            network. The learner itself begins anew.

    Returns:
        The policy after the last update.
    """
    env = recorder.env
    model_env = ModelEnv(env, MODEL_EPISODES)
    # A resumed search practises from the start, and would write everything twice.
    if log is not None:
        shutil.rmtree(log / "dyna", ignore_errors=True)
    seed = recorder.config.seed
    changes = recorder.config.hyperparameters
    learner = make_learner(
        "dyna", model_env, len(env.groups), seed, log, changes=changes
    )
    learner = cast(PPO, learner)
    recorder.predict_rewards = model_env.predict_rewards
    warm_start = _make_warm_start(start, env) if start is not None else None
    while recorder.remaining:
        budgets = recorder.budgets(min(LANES, recorder.remaining))
        if recorder.episodes:
            batch = _choose_episodes(learner, model_env, budgets, recorder)
        else:
            batch = _first_episodes(learner, env, budgets, warm_start)
        recorder.score(batch, budgets, len(budgets))
        model_env.learn_from(recorder)
        _practise(learner, UPDATES)
    if isinstance(env.budget, BudgetRange):
        recorder.on_pause("practising for all budgets")
        _practise(learner, PRACTICE, _FadingRate())
    learner.logger.close()
    return policy_of("dyna", learner, changes=changes)


def _practise(learner: PPO, updates: int, *callbacks: BaseCallback) -> None:
    """Updates the policy on predicted episodes."""
    steps = updates * MODEL_EPISODES * learner.n_steps
    learner.learn(steps, [_Spread(), *callbacks], reset_num_timesteps=False)


class _Spread(BaseCallback):
    """Keeps the policy's spread from vanishing, so that it goes on trying things.

    Practice stores the sampled action, not the executed one: rounding belongs to the
    environment, and the gradient of a policy's return is about the sample. Stored as
    executed, an action that was rounded many deviations away makes the ratio of new to
    old policy explode.
    """

    def _on_rollout_start(self) -> None:
        log_std = cast(torch.Tensor, self.model.policy.log_std)  # PPO's has one
        log_std.data.clamp_(min=math.log(LEAST_STD))

    def _on_step(self) -> bool:
        return True


class _FadingRate(BaseCallback):
    """Lets the learning rate fall to 0 by the last update, so the policy settles."""

    def _on_training_start(self) -> None:
        self._first_timestep = self.model.num_timesteps
        self._rate = self.model.lr_schedule(1.0)

    def _on_rollout_start(self) -> None:
        n_done = self.model.num_timesteps - self._first_timestep
        n_steps = self.model._total_timesteps - self._first_timestep
        share_done = n_done / n_steps

        def schedule(_: float) -> float:
            return self._rate * (1 - share_done)

        self.model.lr_schedule = schedule

    def _on_step(self) -> bool:
        return True


def _make_warm_start(
    start: Policy, env: LayerPruningEnv
) -> Callable[[BatchedEpisodes], np.ndarray]:
    """How a policy to start from acts in the first batch.

    One that hardly knows this network is mixed with the greedy allocator. One that
    knows most groups isn't, since the allocator's measurements would be missing later.
    """
    if start.is_out_of_distribution(env.observer):
        return make_actor(start, env)

    def policy(batch: BatchedEpisodes) -> np.ndarray:
        return start.act(batch.observe())[:, 0]

    return policy


def _first_episodes(
    learner: PPO,
    env: LayerPruningEnv,
    budgets: Sequence[SingleBudget],
    warm_start: Callable[[BatchedEpisodes], np.ndarray] | None,
) -> BatchedEpisodes:
    """The episodes before anything is known.

    Every other lane belongs to the policy to start from, if there is one. Among these
    lanes the first one of each budget takes the deterministic action; all others
    sample. Without such a policy the same lanes are all the learner's.
    """
    is_first_of_budget = [
        budget not in budgets[:lane] for lane, budget in enumerate(budgets)
    ]
    is_even = np.arange(len(budgets)) % 2 == 0
    is_deterministic = np.array(is_first_of_budget) & is_even
    policy = _sampling_policy(learner, is_deterministic, warm_start, is_even)
    return env.start_episodes(budgets).rollout(policy)


def _choose_episodes(
    learner: PPO,
    model_env: ModelEnv,
    budgets: Sequence[SingleBudget],
    recorder: Recorder,
) -> BatchedEpisodes:
    """Of many proposals the most promising new one for each budget, at its end.

    Promising is what is best by a draw from the surrogate's posterior. Thompson 1933: a
    draw for each lane tries what may be good in proportion to the belief that it is.
    """
    env = recorder.env
    # A seed for each batch: a resumed search draws what an uninterrupted one does.
    seed = recorder.config.seed * 100_003 + len(recorder.episodes)
    proposed = _propose(learner, env, budgets)
    generator = np.random.default_rng(seed)
    varied = _vary(proposed.state.kept, model_env, budgets, recorder, generator)
    kept = np.concatenate([proposed.state.kept, varied.state.kept])
    targets = np.concatenate([proposed.state.targets, varied.state.targets])
    draws = model_env.surrogate.sample(
        kept, len(budgets), torch.Generator().manual_seed(seed)
    )
    # Different counts can be one network, where blocks are removed.
    keys = [env.proxy.key(env.counts(row)) for row in kept]
    known = {env.proxy.key(episode.allocation.kept) for episode in recorder.episodes}
    chosen: list[int] = []
    for draw, budget in zip(draws, budgets, strict=True):
        is_candidate = targets == env.target_of(budget)
        is_new = is_candidate & np.array([key not in known for key in keys])
        # Where the lane's budget has no new proposal, the one that promises most is
        # evaluated again.
        if is_new.any():
            is_candidate = is_new
        place = int(np.where(is_candidate, draw, -np.inf).argmax())
        chosen.append(place)
        # Another lane of the same budget takes another one.
        known.add(keys[place])
    # They are executed again in the lanes of their budgets, which ends at
    # the same counts.
    sparsities = 1 - kept[chosen] / env.space.costs.dense
    return env.start_episodes(budgets).rollout(fixed_policy(sparsities))


def _propose(
    learner: PPO, env: LayerPruningEnv, budgets: Sequence[SingleBudget]
) -> BatchedEpisodes:
    """Episodes of the policy, as many for each budget; the first is deterministic."""
    n_each = PROPOSALS // len(budgets)
    repeated = [budget for budget in budgets for _ in range(n_each)]
    is_deterministic = np.arange(len(repeated)) % n_each == 0
    policy = _sampling_policy(learner, is_deterministic)
    return env.start_episodes(repeated).rollout(policy)


def _vary(
    proposed: np.ndarray,
    model_env: ModelEnv,
    budgets: Sequence[SingleBudget],
    recorder: Recorder,
    generator: np.random.Generator,
) -> BatchedEpisodes:
    """Changed copies of the most promising allocations, as many for each budget.

    The policy generalises over groups and so finds its way early; what sets a single
    group apart is found here.

    Worked example: a parent of three groups has sparsities 0.5, 0.2 and 0.4. A copy
    that changes the second by a draw of +0.1 has 0.5, 0.3 and 0.4, which costs less
    than the budget; all three are lowered by the same number until it is met, say to
    0.47, 0.27 and 0.37, and rounded to counts by the environment.

    Args:
        proposed: Allocations that the policy proposes, `(n, n_groups)`; they and all
            evaluated ones can be parents.
        model_env: Knows what promises most.
        budgets: One for each lane.
        recorder: The evaluated episodes.
        generator: What chance comes from.
    """
    env = recorder.env
    space = env.space
    evaluated = [episode.counts for episode in recorder.episodes]
    # Once each, since a policy proposes the same again and again.
    pool = np.unique([*proposed, *evaluated], axis=0)
    order = np.argsort(-model_env.surrogate.mean(pool), kind="stable")
    pool = pool[order]
    costs = space.cost(pool)
    n_each = VARIATIONS // len(budgets)
    parents = []
    for budget in budgets:
        # What was evaluated for another budget can be close to this one too.
        best = pool[is_near_budget(env, costs, budget)][:PARENTS]
        parents.append(generator.choice(best, n_each))
    repeated = [budget for budget in budgets for _ in range(n_each)]
    batch = env.start_episodes(repeated)
    sparsities = 1 - np.concatenate(parents) / space.costs.dense
    sparsities += _changes(sparsities.shape, generator)
    if batch.uses_up_budget:
        sparsities = space.shift_to_targets(sparsities, batch.state.targets)
    return batch.rollout(fixed_policy(sparsities))


def _changes(shape: tuple[int, ...], generator: np.random.Generator) -> np.ndarray:
    """What is added to sparsities `(n, n_groups)`: 0 for most groups of a row."""
    n_rows, n_groups = shape
    column = (n_rows, 1)
    # The order of the draws decides what a seed finds.
    chances = generator.random(shape)
    is_changed = chances < generator.choice(CHANGED, column) / n_groups
    steps = generator.normal(0, generator.choice(STEPS, column), shape)
    return is_changed * steps


def _sampling_policy(
    learner: PPO,
    is_deterministic: np.ndarray,
    warm_start: Callable[[BatchedEpisodes], np.ndarray] | None = None,
    is_warm: np.ndarray | None = None,
) -> Callable[[BatchedEpisodes], np.ndarray]:
    """The learner's policy, for `rollout`.

    Args:
        learner: The learner.
        is_deterministic: Lanes that take the policy's mode, `(n_lanes,)`; the others
            sample.
        warm_start: A policy to act in its place in some lanes, with the learner's
            spread around its actions; None for none.
        is_warm: These lanes, `(n_lanes,)`.
    """

    def policy(batch: BatchedEpisodes) -> np.ndarray:
        observations = torch.from_numpy(batch.observer.seen(batch.observe()))
        with torch.no_grad():
            actions = learner.policy.get_distribution(observations)
            mode = actions.mode()[:, 0].numpy()
            # In every lane: which ones use it must not change the draws.
            sampled = actions.sample()[:, 0].numpy()
        if warm_start is not None and is_warm is not None:
            offset = np.where(is_warm, warm_start(batch) - mode, 0)
            mode = mode + offset
            sampled = sampled + offset
        return np.where(is_deterministic, mode, sampled)

    return policy
