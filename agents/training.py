"""Stable-Baselines3 learners on the pruning environment.

Three things differ from a stock training run. What the environment executed, not what
the policy wished, is what the learner stores. Every policy starts at action 0, which is
uniform pruning, with a spread of about 0.2 in sparsity. And off-policy learners see
whole-episode returns, since the only reward comes at the end.
"""

import math
from operator import attrgetter
from pathlib import Path

import numpy as np
import torch
import yaml
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import Logger, configure
from stable_baselines3.common.noise import NormalActionNoise, VectorizedActionNoise
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.vec_env import VecEnv
from torch import nn

from autoprune.agents.checkpoint import restore_learner, save_learner
from autoprune.agents.recorder import LANES, START_STD, Recorder
from autoprune.agents.replay import ALGORITHMS, Policy, acting
from autoprune.agents.sb3_env import RecordedVecEnv


def hyperparameters(name: str) -> dict:
    """The settings of an algorithm, from `agents/hyperparameters/NAME.yaml`;
    `from_a_policy` says what differs then.
    """
    return yaml.safe_load(
        (Path(__file__).parent / "hyperparameters" / f"{name}.yaml").read_text()
    )


def make_learner(
    name: str,
    lanes: VecEnv,
    n_steps: int,
    seed: int,
    log: Path | None = None,
    start: Policy | None = None,
) -> BaseAlgorithm:
    """A learner whose first deterministic policy is uniform pruning, or the one that it
    starts from.

    Args:
        name: A key of `ALGORITHMS`.
        lanes: What it learns on.
        n_steps: Steps of an episode.
        seed: Seed of weights and exploration.
        log: Folder of TensorBoard events; the learner's go into one of its name.
        start: A trained policy of the same class.
    """
    settings = hyperparameters(name)
    differences = settings.pop("from_a_policy", {})
    if start is not None:
        settings["policy_kwargs"] = start.policy_kwargs
        settings["learning_rate"] = differences.get(
            "learning_rate", settings["learning_rate"]
        )
    updates = settings.pop("updates_per_step", None)
    std, actor_rate = (
        settings.pop("exploration_std", None),
        settings.pop("actor_learning_rate", None),
    )
    settings.pop("last_exploration_std", None)
    if updates is None:
        batch_size = lanes.num_envs * n_steps // settings.pop("n_minibatches")
        settings |= {"n_steps": n_steps, "batch_size": batch_size}
    else:
        gradient_steps = updates * n_steps * lanes.num_envs
        settings |= {
            "train_freq": (n_steps, "step"),
            "gradient_steps": gradient_steps,
            "n_steps": n_steps,
        }
    if std is not None:
        settings["action_noise"] = VectorizedActionNoise(_noise(std), lanes.num_envs)
    learner = ALGORITHMS[name]("MlpPolicy", lanes, seed=seed, device="cpu", **settings)
    # Stable-Baselines3's own would open a file with each call of learn, or leave a
    # folder in the temporary one.
    learner.set_logger(
        Logger(None, []) if log is None else configure(str(log / name), ["tensorboard"])
    )
    if start is None:
        _start_at_uniform(learner)
    else:
        _start_from(start, learner, differences)
    if actor_rate is not None:
        _set_actor_rate(learner, actor_rate)
    _fuse_optimizers(learner)
    return learner


def _noise(std: float) -> NormalActionNoise:
    return NormalActionNoise(np.zeros(1), np.full(1, std))


@torch.no_grad()
def _start_at_uniform(learner: BaseAlgorithm) -> None:
    """Shrinks the last layer of an off-policy actor; PPO's is initialised that small
    already.
    """
    actor = getattr(learner, "actor", None)
    if actor is None:
        return
    last = (
        actor.mu
        if isinstance(actor.mu, nn.Linear)
        else [m for m in actor.mu if isinstance(m, nn.Linear)][-1]
    )
    last.weight *= 0.01
    last.bias.zero_()
    if isinstance(getattr(actor, "log_std", None), nn.Linear):
        actor.log_std.weight *= 0.01
        actor.log_std.bias.fill_(math.log(START_STD))
    target = getattr(learner, "actor_target", None)
    if target is not None:
        target.load_state_dict(actor.state_dict())


def _start_from(start: Policy, learner: BaseAlgorithm, differences: dict) -> None:
    """Takes a policy over, critics included, but for what the algorithm's settings want
    to be different.
    """
    taken, own = start.network.state_dict(), learner.policy.state_dict()
    if not differences.get("keeps_critic", True):
        taken |= {key: value for key, value in own.items() if "value_net" in key}
    learner.policy.load_state_dict(taken)
    if "spread" in differences:
        learner.policy.log_std.data.fill_(math.log(differences["spread"]))


def _set_actor_rate(learner: BaseAlgorithm, rate: float) -> None:
    """Gives an off-policy actor a learning rate of its own.

    At the critic's rate the actor runs to the end of its range before the critic has
    seen enough; there every wish is executed as the same bound, and nothing new is ever
    tried.
    """
    set_all = learner._update_learning_rate

    def set_rates(optimizers: list[torch.optim.Optimizer]) -> None:
        set_all(optimizers)
        for group in learner.actor.optimizer.param_groups:
            group["lr"] = rate

    learner._update_learning_rate = set_rates


def _fuse_optimizers(learner: BaseAlgorithm) -> None:
    """Takes Adam's fused kernel, with which a step of networks this small takes a
    quarter of the time.
    """
    states, _ = learner._get_torch_save_params()
    for name in states:
        if name.endswith("optimizer"):
            for group in attrgetter(name)(learner).param_groups:
                group["fused"] = True


class ExecutedAction(BaseCallback):
    """Puts the executed action where the learner is about to store the wished one.

    For on-policy learners the log-probability is computed anew, so that the first ratio
    of new to old policy is 1.
    """

    def _on_step(self) -> bool:
        executed = np.array(
            [[info["executed_action"]] for info in self.locals["infos"]],
            dtype=np.float32,
        )
        if isinstance(self.model, OnPolicyAlgorithm):
            self.locals["actions"][:] = executed
            with torch.no_grad():
                _, log_prob, _ = self.model.policy.evaluate_actions(
                    self.locals["obs_tensor"], torch.from_numpy(executed)
                )
            self.locals["log_probs"].copy_(log_prob)
        else:
            self.locals["buffer_actions"][:] = executed
        return True


class FadingNoise(BaseCallback):
    """Lets a deterministic policy's exploration shrink linearly from the first to the
    last roll-out.

    Late episodes are then near what the actor has learned, and after 50 episodes on a
    toy of four groups DDPG's own allocation was better for it. It isn't a gain
    everywhere: after 300 on five groups neither the actor's allocation nor the best one
    found was better than with noise that stays.

    Args:
        first: Standard deviation at the start.
        last: At the end.
    """

    def __init__(self, first: float, last: float):
        super().__init__()
        self.first, self.last = first, last

    def _on_rollout_start(self) -> None:
        std = (
            self.last
            + (self.first - self.last) * self.model._current_progress_remaining
        )
        self.model.action_noise.noises = [_noise(std) for _ in range(self.model.n_envs)]

    def _on_step(self) -> bool:
        return True


class Checkpoints(BaseCallback):
    """Saves the learner between roll-outs: the one moment at which the last update is
    over and no episode is open.
    """

    def __init__(self, recorder: Recorder, path: Path | None):
        super().__init__()
        self.recorder, self.path = recorder, path
        self.saved = len(recorder.episodes)

    def _on_rollout_start(self) -> None:
        done = len(self.recorder.episodes)
        if (
            self.path is not None
            and done >= self.saved + self.recorder.config.checkpoint_every
        ):
            save_learner(self.model, done, self.path)
            self.saved = done

    def _on_step(self) -> bool:
        return True


def train(
    name: str,
    recorder: Recorder,
    checkpoint: Path | None = None,
    log: Path | None = None,
    start: Policy | None = None,
) -> Policy:
    """Trains an agent for as many episodes as the recorder asks for, going on from the
    checkpoint if there is one.

    Args:
        name: A key of `ALGORITHMS`.
        recorder: Environment, configuration, and where episodes go.
        checkpoint: File of the learner's state.
        log: Folder for TensorBoard events.
        start: A trained policy to start from. A stranger to the network only leads the
            first batch, with the guide's help: learners that went on from one ended far
            behind those that began anew.

    Returns:
        The policy after the last update.

    Raises:
        UserError: If the checkpoint is damaged.
    """
    config, n_steps = recorder.config, len(recorder.env.groups)
    warm_start = None
    if start is not None and start.is_out_of_distribution(recorder.env.observer):
        warm_start, start = acting(start, recorder.env), None
    lanes = RecordedVecEnv(
        recorder, min(LANES, max(2, config.episodes)), warm_start
    )  # of a single step no advantage can be told
    learner = make_learner(name, lanes, n_steps, config.seed, log, start)
    done = (
        restore_learner(learner, checkpoint)
        if checkpoint is not None and checkpoint.exists()
        else 0
    )
    recorder.resume_at(done)
    if recorder.remaining:
        n_batches = -(-recorder.remaining // lanes.num_envs)
        callbacks: list[BaseCallback] = [
            ExecutedAction(),
            Checkpoints(recorder, checkpoint),
        ]
        settings = hyperparameters(name)
        if "exploration_std" in settings:
            callbacks.append(
                FadingNoise(
                    settings["exploration_std"], settings["last_exploration_std"]
                )
            )
        steps = n_batches * lanes.num_envs * n_steps
        learner.learn(steps, callbacks, log_interval=1, reset_num_timesteps=done == 0)
    learner.logger.close()
    return policy_of(name, learner, start)


def policy_of(name: str, learner: BaseAlgorithm, start: Policy | None = None) -> Policy:
    """The policy of a learner, maybe one that was made from `start`."""
    kwargs = start.policy_kwargs if start else hyperparameters(name)["policy_kwargs"]
    return Policy.of(
        name, learner, kwargs, learner.get_env().env.observer.group_features
    )
