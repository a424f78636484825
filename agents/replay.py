"""Policies as files, and policies at work: safetensors + JSON in, an allocation out; no code is executed by loading."""

import json
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import gymnasium
import numpy as np
from safetensors.torch import load_file, save_file
from stable_baselines3 import DDPG, PPO, SAC, TD3
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.policies import BasePolicy

from autoprune.allocation import Allocation, Budget
from autoprune.errors import UserError, missing_package
from autoprune.runs import write_atomically, write_json
from envs.observation import FEATURES, OBSERVATION_SPACE

ALGORITHMS: dict[str, type[BaseAlgorithm]] = {"dyna": PPO, "ppo": PPO, "sac": SAC, "td3": TD3, "ddpg": DDPG}
"""Learners of Stable-Baselines3 by agent; "tqc" among them where sb3-contrib is installed."""
OPTIONAL = {"tqc": "sb3-contrib"}
"""Agents that need a package of their own."""
with suppress(ImportError):
    from sb3_contrib import TQC

    ALGORITHMS["tqc"] = TQC


@dataclass(frozen=True)
class Policy:
    """A learned map from observation to action.

    Attributes:
        algorithm: The algorithm whose policy class it is.
        network: The policy itself.
        policy_kwargs: How to build it again.
    """

    algorithm: str
    network: BasePolicy
    policy_kwargs: dict

    @classmethod
    def of(cls, algorithm: str, learner: BaseAlgorithm, policy_kwargs: dict) -> "Policy":
        """The policy of a learner."""
        return cls(algorithm, learner.policy, policy_kwargs)

    def act(self, observation: np.ndarray) -> np.ndarray:
        """The deterministic action, `(1,)`."""
        return self.network.predict(observation, deterministic=True)[0]

    def save(self, folder: Path, **about: object) -> None:
        """Writes `policy.safetensors` and `policy.json`; `about` is stored beside."""
        weights = {name: tensor.contiguous().clone() for name, tensor in self.network.state_dict().items()}
        write_atomically(folder / "policy.safetensors", lambda path: save_file(weights, path))
        description = {"algorithm": self.algorithm, "policy_kwargs": self.policy_kwargs, "features": _feature_names()}
        write_json(folder / "policy.json", description | about)

    @classmethod
    def load(cls, folder: Path, flag: str = "RUN") -> "Policy":
        """Reads a saved policy.

        Args:
            folder: Where `save` wrote it.
            flag: What the message of an error starts with.

        Raises:
            UserError: If it is missing, damaged, or was trained on other observations.
        """
        description = describe_policy(folder, flag)
        try:
            algorithm, kwargs = description["algorithm"], description["policy_kwargs"]
            action_space = gymnasium.spaces.Box(-1.0, 1.0, (1,), np.float32)
            policy_class = ALGORITHMS[algorithm].policy_aliases["MlpPolicy"]
            network = policy_class(OBSERVATION_SPACE, action_space, lambda _: 0.0, **kwargs)
            network.load_state_dict(load_file(folder / "policy.safetensors"))
        except Exception as error:  # a damaged file can fail in any of these steps
            reason = (str(error).splitlines() or [""])[0]
            raise UserError(f"{flag}: the policy in {str(folder)!r} is damaged ({reason}); search anew") from error
        return cls(algorithm, network, kwargs)


def describe_policy(folder: Path, flag: str = "RUN") -> dict:
    """The JSON beside a saved policy; raises a `UserError` if there is none, or none that can be used here."""
    path = folder / "policy.json"
    if not path.is_file():
        learners = " or ".join(ALGORITHMS)
        raise UserError(f"{flag}: no policy in {str(folder)!r}; baselines learn none, search with --agent {learners}")
    try:
        description = json.loads(path.read_text())
        features = description["features"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{flag}: {str(path)!r} is damaged ({error!r}); search anew") from error
    if features != _feature_names():
        raise UserError(
            f"{flag}: the policy in {str(folder)!r} was trained on other observations; train it with this version"
        )
    check_installed(description.get("algorithm"), flag)
    return description


def check_installed(agent: str, flag: str) -> None:
    """Raises a `UserError` if an agent needs a package that isn't there."""
    if agent in OPTIONAL and agent not in ALGORITHMS:
        raise missing_package(flag, agent, OPTIONAL[agent])


def _feature_names() -> list[str]:
    return [feature.name for feature in FEATURES]


def replay(policy: Policy, env: gymnasium.Env, budget: str | Budget | None = None) -> tuple[Allocation, dict]:
    """Lets a policy act once, without learning or chance.

    Args:
        policy: A trained policy; the network and the budget may differ from those that it was trained on.
        env: A `LayerPruningEnv`.
        budget: Another budget for this episode; None keeps the environment's.

    Returns:
        The allocation, and the last step's info with its costs and proxy score.
    """
    observation, info = env.reset(options={"budget": budget} if budget else None)
    done = False
    while not done:
        observation, _, done, _, info = env.step(policy.act(observation))
    return info["allocation"], info
