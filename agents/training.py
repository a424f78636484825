"""Stable-Baselines3 learners on the pruning environment.

Three things differ from a stock training run. What the environment executed, not what the policy wished, is what the
learner stores. Every policy starts at action 0, which is uniform pruning, with a spread of about 0.2 in sparsity. And
off-policy learners see whole-episode returns, since the only reward comes at the end.
"""

import math
from pathlib import Path

import gymnasium
import numpy as np
import torch
import yaml
from stable_baselines3 import DDPG, PPO, SAC, TD3
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.noise import NormalActionNoise
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from torch import nn

from agents.checkpoint import restore_learner, save_learner
from agents.replay import Policy
from autoprune.config import SearchConfig

ALGORITHMS: dict[str, type[BaseAlgorithm]] = {"ppo": PPO, "sac": SAC, "td3": TD3, "ddpg": DDPG}
START_STD = 0.4
"""Spread of the first actions, as a share of the feasible interval's half: about 0.2 in sparsity."""


def hyperparameters(name: str) -> dict:
    """The settings of an algorithm, from `agents/hyperparameters/NAME.yaml`."""
    return yaml.safe_load((Path(__file__).parent / "hyperparameters" / f"{name}.yaml").read_text())


def make_learner(
    name: str, env: gymnasium.Env, n_steps: int, config: SearchConfig, log: Path | None = None
) -> BaseAlgorithm:
    """A learner whose first deterministic policy is uniform pruning.

    Args:
        name: A key of `ALGORITHMS`.
        env: The environment, monitored or not.
        n_steps: Steps of an episode.
        config: Seed and number of episodes.
        log: Folder for TensorBoard events.
    """
    settings = hyperparameters(name)
    updates, episodes = settings.pop("updates_per_step", None), settings.pop("episodes_per_update", None)
    std, actor_rate = settings.pop("exploration_std", None), settings.pop("actor_learning_rate", None)
    if episodes is not None:
        episodes = max(2, min(episodes, config.episodes))
        settings |= {"n_steps": episodes * n_steps, "batch_size": episodes * n_steps}
    if updates is not None:
        settings |= {"train_freq": (1, "episode"), "gradient_steps": updates * n_steps, "n_steps": n_steps}
    if std is not None:
        settings["action_noise"] = NormalActionNoise(np.zeros(1), np.full(1, std))
    tensorboard = str(log) if log is not None else None
    learner = ALGORITHMS[name](
        "MlpPolicy", env, seed=config.seed, device="cpu", tensorboard_log=tensorboard, **settings
    )
    if log is None:
        learner.set_logger(Logger(None, []))  # Stable-Baselines3's own would leave a folder in the temporary one
    _start_at_uniform(learner)
    if actor_rate is not None:
        _set_actor_rate(learner, actor_rate)
    return learner


@torch.no_grad()
def _start_at_uniform(learner: BaseAlgorithm) -> None:
    """Shrinks the last layer of an off-policy actor; PPO's is initialised that small already."""
    actor = getattr(learner, "actor", None)
    if actor is None:
        return
    last = actor.mu if isinstance(actor.mu, nn.Linear) else [m for m in actor.mu if isinstance(m, nn.Linear)][-1]
    last.weight *= 0.01
    last.bias.zero_()
    if isinstance(getattr(actor, "log_std", None), nn.Linear):
        actor.log_std.weight *= 0.01
        actor.log_std.bias.fill_(math.log(START_STD))
    target = getattr(learner, "actor_target", None)
    if target is not None:
        target.load_state_dict(actor.state_dict())


def _set_actor_rate(learner: BaseAlgorithm, rate: float) -> None:
    """Gives an off-policy actor a learning rate of its own.

    At the critic's rate the actor runs to the end of its range before the critic has seen enough; there every wish is
    executed as the same bound, and nothing new is ever tried.
    """
    set_all = learner._update_learning_rate

    def set_rates(optimizers: list[torch.optim.Optimizer]) -> None:
        set_all(optimizers)
        for group in learner.actor.optimizer.param_groups:
            group["lr"] = rate

    learner._update_learning_rate = set_rates


class ExecutedAction(BaseCallback):
    """Puts the executed action where the learner is about to store the wished one.

    For on-policy learners the log-probability is computed anew, so that the first ratio of new to old policy is 1.
    """

    def _on_step(self) -> bool:
        executed = np.array([[info["executed_action"]] for info in self.locals["infos"]], dtype=np.float32)
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


class Episodes(BaseCallback):
    """Ends the training after a number of episodes, and checkpoints the learner between roll-outs."""

    def __init__(self, n_episodes: int, every: int, checkpoint: Path | None, done: int):
        super().__init__()
        self.n_episodes, self.every, self.checkpoint = n_episodes, every, checkpoint
        self.done = self.saved = done

    def _on_rollout_start(self) -> None:
        # The one moment at which the last update is over and the environment stands at an episode's start.
        if self.checkpoint is not None and self.done >= self.saved + self.every:
            save_learner(self.model, self.done, self.checkpoint)
            self.saved = self.done

    def _on_step(self) -> bool:
        self.done += int(self.locals["dones"].sum())
        # Stopping inside a roll-out discards it, so at the end of one the learner stops by itself, after its update.
        return self.done < self.n_episodes or self.model.num_timesteps % self.model.n_steps == 0


def train(
    name: str,
    env: gymnasium.Env,
    config: SearchConfig,
    checkpoint: Path | None = None,
    log: Path | None = None,
) -> Policy:
    """Trains an agent for `config.episodes` episodes, going on from the checkpoint if there is one.

    Args:
        name: A key of `ALGORITHMS`.
        env: A `LayerPruningEnv`, possibly wrapped; a wrapper with `resume_at(episode)` is told where it goes on.
        config: Episodes, seed, checkpoint interval.
        checkpoint: File of the learner's state.
        log: Folder for TensorBoard events.

    Returns:
        The policy after the last update.

    Raises:
        UserError: If the checkpoint is damaged.
    """
    n_steps = len(env.unwrapped.groups)
    learner = make_learner(name, env, n_steps, config, log)
    done = restore_learner(learner, checkpoint) if checkpoint is not None and checkpoint.exists() else 0
    if hasattr(env, "resume_at"):
        env.resume_at(done)
    if done < config.episodes:
        callbacks = [ExecutedAction(), Episodes(config.episodes, config.checkpoint_every, checkpoint, done)]
        remaining = (config.episodes - done) * n_steps
        learner.learn(remaining, callbacks, log_interval=1, tb_log_name=name, reset_num_timesteps=done == 0)
    return Policy.of(name, learner, hyperparameters(name)["policy_kwargs"])
