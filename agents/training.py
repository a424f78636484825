"""Stable-Baselines3 learners on the pruning environment.

Three things differ from a stock training run. What the environment executed, not what
the policy asked for, is what the learner stores. Every policy starts at action 0, which
is uniform pruning, with a spread of about 0.2 in sparsity. And off-policy learners see
whole-episode returns, since the only reward comes at the end.
"""

import math
from collections.abc import Mapping
from operator import attrgetter
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import Logger, configure
from stable_baselines3.common.noise import NormalActionNoise, VectorizedActionNoise
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.vec_env import VecEnv
from torch import nn

from autoprune.agents.algorithms import ALGORITHMS
from autoprune.agents.checkpoint import restore_learner, save_learner
from autoprune.agents.recorder import LANES, START_STD, Recorder
from autoprune.agents.replay import Policy, make_actor
from autoprune.agents.sb3_env import RecordedVecEnv, SB3VecEnv
from autoprune.agents.settings import hyperparameters
from autoprune.envs.observation import FEATURE_NAMES


def make_learner(
    name: str,
    lanes: VecEnv,
    n_steps: int,
    seed: int,
    log: Path | None = None,
    start: Policy | None = None,
    changes: Mapping[str, Any] | None = None,
) -> BaseAlgorithm:
    """A learner whose deterministic policy is uniform pruning, or the one given.

    Args:
        name: A key of `ALGORITHMS`.
        lanes: Episodes that step together, on which it learns.
        n_steps: Steps of an episode.
        seed: Seed of weights and exploration.
        log: Folder of TensorBoard events; the learner's go into one of its name.
        start: A trained policy of the same class to start from.
        changes: As for `hyperparameters`.
    """
    settings = hyperparameters(name, changes)
    differences = settings.pop("from_a_policy", {})
    if start is not None:
        settings["policy_kwargs"] = start.policy_kwargs
        rate = differences.get("learning_rate", settings["learning_rate"])
        settings["learning_rate"] = rate
    std = settings.pop("exploration_std", None)
    actor_rate = settings.pop("actor_learning_rate", None)
    # What `_callbacks` reads; no argument of the learner.
    settings.pop("last_exploration_std", None)
    settings = _with_schedule(settings, n_steps, lanes.num_envs)
    if std is not None:
        settings["action_noise"] = VectorizedActionNoise(_noise(std), lanes.num_envs)
    learner = ALGORITHMS[name]("MlpPolicy", lanes, seed=seed, device="cpu", **settings)
    # Stable-Baselines3's own would open a file with each call of learn, or leave a
    # folder in the temporary one.
    if log is None:
        learner.set_logger(Logger(None, []))
    else:
        learner.set_logger(configure(str(log / name), ["tensorboard"]))
    if start is None:
        _start_at_uniform(learner)
    else:
        _start_from(start, learner, differences)
    if actor_rate is not None:
        _set_actor_rate(learner, actor_rate)
    _fuse_optimizers(learner)
    return learner


def _with_schedule(settings: dict, n_steps: int, n_lanes: int) -> dict:
    """Turns the settings that count per episode into those that count steps.

    Args:
        settings: As in the file; changed.
        n_steps: Steps of an episode.
        n_lanes: Episodes that step together.
    """
    updates_per_step = settings.pop("updates_per_step", None)
    if updates_per_step is None:
        # On-policy: an update after each batch of episodes.
        # At least two steps: a single one has no advantage beside others.
        batch_size = max(2, n_lanes * n_steps // settings.pop("n_minibatches"))
        return settings | {"n_steps": n_steps, "batch_size": batch_size}
    # Off-policy: the same rhythm, and n-step returns as long as an episode.
    return settings | {
        "train_freq": (n_steps, "step"),
        "gradient_steps": updates_per_step * n_steps * n_lanes,
        "n_steps": n_steps,
    }


def _noise(std: float) -> NormalActionNoise:
    """Exploration noise of one lane."""
    return NormalActionNoise(np.zeros(1), np.full(1, std))


@torch.no_grad()
def _start_at_uniform(learner: BaseAlgorithm) -> None:
    """Shrinks the last layer of an off-policy actor, so that it acts close to 0.

    PPO's is initialised that small already.
    """
    actor = getattr(learner, "actor", None)
    if actor is None:
        return
    last = actor.mu
    if not isinstance(last, nn.Linear):
        # A sequence that ends with an activation.
        linears = [module for module in last if isinstance(module, nn.Linear)]
        last = linears[-1]
    # Not to 0: then no gradient would reach the layers before.
    last.weight *= 0.01
    last.bias.zero_()
    if isinstance(getattr(actor, "log_std", None), nn.Linear):
        actor.log_std.weight *= 0.01
        actor.log_std.bias.fill_(math.log(START_STD))
    # The copy that targets are computed with has to start there too.
    target = getattr(learner, "actor_target", None)
    if target is not None:
        target.load_state_dict(actor.state_dict())


def _start_from(start: Policy, learner: BaseAlgorithm, differences: dict) -> None:
    """Takes a policy over, critics included.

    Args:
        start: The policy.
        learner: A fresh learner of its class.
        differences: What the algorithm's settings want to be different; they may keep
            the learner's fresh critic, or set the policy's spread.
    """
    lanes = learner.get_env()
    assert isinstance(lanes, SB3VecEnv), "make_learner gave it one"
    features = [FEATURE_NAMES[column] for column in lanes.env.observer.columns]
    weights = start.weights_for(learner.policy, features)
    if not differences.get("keeps_critic", True):
        for key, value in learner.policy.state_dict().items():
            if "value_net" in key:
                weights[key] = value
    learner.policy.load_state_dict(weights)
    if "spread" in differences:
        log_std = cast(torch.Tensor, learner.policy.log_std)  # PPO's alone has one
        log_std.data.fill_(math.log(differences["spread"]))


def _set_actor_rate(learner: BaseAlgorithm, rate: float) -> None:
    """Gives an off-policy actor a learning rate of its own.

    At the critic's rate the actor runs to the end of its range before the critic has
    seen enough; there every action is executed as the same bound, and nothing new is
    ever tried.

    Args:
        learner: A learner with an actor.
        rate: The actor's learning rate.
    """
    # Which algorithms have an actor isn't in the type of their base class.
    actor = cast(Any, learner).actor
    # Stable-Baselines3 sets one rate for all optimisers before every update.
    set_all = learner._update_learning_rate

    def set_rates(
        optimizers: list[torch.optim.Optimizer] | torch.optim.Optimizer,
    ) -> None:
        set_all(optimizers)
        for group in actor.optimizer.param_groups:
            group["lr"] = rate

    learner._update_learning_rate = set_rates


def _fuse_optimizers(learner: BaseAlgorithm) -> None:
    """Takes Adam's fused kernel, which is several times as fast on small networks."""
    names, _ = learner._get_torch_save_params()
    for name in names:
        if name.endswith("optimizer"):
            for group in attrgetter(name)(learner).param_groups:
                group["fused"] = True


class ExecutedAction(BaseCallback):
    """Puts the executed action where the learner is about to store what it asked for.

    For on-policy learners the log-probability is computed anew, so that the first ratio
    of new to old policy is 1.
    """

    def _on_step(self) -> bool:
        actions = [[info["executed_action"]] for info in self.locals["infos"]]
        executed = np.array(actions, dtype=np.float32)
        if not isinstance(self.model, OnPolicyAlgorithm):
            self.locals["buffer_actions"][:] = executed
            return True
        # In place: the caller's local variables are what gets stored.
        self.locals["actions"][:] = executed
        with torch.no_grad():
            _, log_prob, _ = self.model.policy.evaluate_actions(
                self.locals["obs_tensor"], torch.from_numpy(executed)
            )
        self.locals["log_probs"].copy_(log_prob)
        return True


class FadingNoise(BaseCallback):
    """Lets a deterministic policy's exploration shrink from roll-out to roll-out.

    It falls linearly from the first to the last roll-out, so that late episodes are
    near what the actor has learned.

    Args:
        first: Standard deviation at the start.
        last: At the end.
    """

    def __init__(self, first: float, last: float) -> None:
        super().__init__()
        self.first = first
        self.last = last

    def _on_rollout_start(self) -> None:
        remaining = self.model._current_progress_remaining
        std = self.last + (self.first - self.last) * remaining
        # Only learners with this noise get this callback.
        noise = cast(VectorizedActionNoise, cast(Any, self.model).action_noise)
        noise.noises = [_noise(std) for _ in range(self.model.n_envs)]

    def _on_step(self) -> bool:
        return True


class Checkpoints(BaseCallback):
    """Saves the learner between roll-outs.

    That is the one moment at which the last update is over and no episode is open.

    Args:
        recorder: Says how many episodes are over, and how often to save.
        path: The file; None saves nothing.
    """

    def __init__(self, recorder: Recorder, path: Path | None) -> None:
        super().__init__()
        self.recorder = recorder
        self.path = path
        self.n_saved = len(recorder.episodes)

    def _on_rollout_start(self) -> None:
        if self.path is None:
            return
        n_done = len(self.recorder.episodes)
        if n_done >= self.n_saved + self.recorder.config.checkpoint_every:
            save_learner(self.model, n_done, self.path)
            self.n_saved = n_done

    def _on_step(self) -> bool:
        return True


def train(
    name: str,
    recorder: Recorder,
    checkpoint: Path | None = None,
    log: Path | None = None,
    start: Policy | None = None,
) -> Policy:
    """Trains an agent for as many episodes as the recorder asks for.

    Goes on from the checkpoint if there is one.

    Args:
        name: A key of `ALGORITHMS`.
        recorder: Environment, configuration, and where episodes go.
        checkpoint: File of the learner's state.
        log: Folder for TensorBoard events.
        start: A trained policy to start from. One that hardly knows this network's
            groups only acts in the first batch, mixed with the greedy allocator, and
            the learner begins anew.

    Returns:
        The policy after the last update.

    Raises:
        UserError: If the checkpoint is damaged.
    """
    config = recorder.config
    n_steps = len(recorder.env.groups)
    warm_start = None
    if start is not None and start.is_out_of_distribution(recorder.env.observer):
        warm_start = make_actor(start, recorder.env)
        start = None
    # At least two: of a single step no advantage can be told.
    n_lanes = min(LANES, max(2, config.episodes))
    lanes = RecordedVecEnv(recorder, n_lanes, warm_start)
    learner = make_learner(
        name, lanes, n_steps, config.seed, log, start, config.hyperparameters
    )
    n_done = 0
    if checkpoint is not None and checkpoint.exists():
        n_done = restore_learner(learner, checkpoint)
    recorder.resume_at(n_done)
    if recorder.remaining:
        n_batches = -(-recorder.remaining // n_lanes)
        learner.learn(
            n_batches * n_lanes * n_steps,
            _callbacks(name, recorder, checkpoint),
            log_interval=1,
            reset_num_timesteps=n_done == 0,
        )
    # Events are written by a thread of their own, which ends here.
    learner.logger.close()
    return policy_of(name, learner, start, config.hyperparameters)


def _callbacks(
    name: str, recorder: Recorder, checkpoint: Path | None
) -> list[BaseCallback]:
    """What is called while an algorithm learns."""
    settings = hyperparameters(name, recorder.config.hyperparameters)
    callbacks: list[BaseCallback] = [
        ExecutedAction(),
        Checkpoints(recorder, checkpoint),
    ]
    if "exploration_std" in settings:
        first = settings["exploration_std"]
        callbacks.append(FadingNoise(first, settings["last_exploration_std"]))
    return callbacks


def policy_of(
    name: str,
    learner: BaseAlgorithm,
    start: Policy | None = None,
    changes: Mapping[str, Any] | None = None,
) -> Policy:
    """The policy of a learner.

    Args:
        name: A key of `ALGORITHMS`.
        learner: A learner on an `SB3VecEnv`.
        start: The policy that it was made from, if any.
        changes: As for `hyperparameters`.
    """
    kwargs = hyperparameters(name, changes)["policy_kwargs"]
    if start:
        kwargs = start.policy_kwargs
    lanes = learner.get_env()
    assert isinstance(lanes, SB3VecEnv), "make_learner gave it one"
    return Policy.from_learner(name, learner, kwargs, lanes.env.observer)
