"""Policies as files, and policies at work: safetensors + JSON in, an allocation out; no
code is executed by loading.
"""

import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import gymnasium
import numpy as np
from safetensors.torch import load_file, save_file
from stable_baselines3 import DDPG, PPO, SAC, TD3
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.policies import BasePolicy

from autoprune.costs.allocation import Allocation
from autoprune.costs.budget import Budget
from autoprune.envs.batch import BatchedEpisodes
from autoprune.envs.layer_pruning import LayerPruningEnv
from autoprune.envs.observation import FEATURES, OBSERVATION_SPACE, STATIC, Observer
from autoprune.errors import UserError, missing_package
from autoprune.runs import write_atomically, write_json

ALGORITHMS: dict[str, type[BaseAlgorithm]] = {
    "dyna": PPO,
    "ppo": PPO,
    "sac": SAC,
    "td3": TD3,
    "ddpg": DDPG,
}
"""Learners of Stable-Baselines3 by agent; "tqc" among them where sb3-contrib is
installed.
"""
OPTIONAL = {
    "tqc": ("sb3_contrib", "sb3-contrib"),
    "evolution": ("cma", "cma"),
    "tpe": ("optuna", "optuna"),
}
"""Agents and baselines that need a package of their own: the module, and what to
install.
"""
with suppress(ImportError):
    from sb3_contrib import TQC

    ALGORITHMS["tqc"] = TQC

FAMILIAR = 0.3
"""Distance between two groups' kinds at which a policy's word for one still counts 0.6
for the other.
"""
THE_SAME = 0.05
"""Distance up to which they count as one: two machines don't measure the same to the
last bit.
"""
FAMILIAR_ENOUGH = 0.5
"""Share of a network's groups that a policy should know for a learner to go on from it.
On ResNet-56, of which the shipped ones know 73 %, three of five then ended ahead of a
search from scratch and none far behind; on a VGG, 38 %, one, and four far behind; on a
MobileNet, 4 %, SAC's at 0.729 for 0.574 where it only led the first batch.
"""


@dataclass(frozen=True)
class Policy:
    """A learned map from observation to action.

    Attributes:
        algorithm: The algorithm whose policy class it is.
        network: The policy itself.
        policy_kwargs: How to build it again.
        kinds: Of the groups that it was trained on (`Observer.kinds`), `(n_groups,
            n_static)`; None if nobody knows.
    """

    algorithm: str
    network: BasePolicy
    policy_kwargs: dict
    group_features: np.ndarray | None = None

    @classmethod
    def of(
        cls,
        algorithm: str,
        learner: BaseAlgorithm,
        policy_kwargs: dict,
        group_features: np.ndarray | None = None,
    ) -> "Policy":
        """The policy of a learner."""
        return cls(algorithm, learner.policy, policy_kwargs, group_features)

    def act(self, observation: np.ndarray) -> np.ndarray:
        """The deterministic action, `(1,)`."""
        return self.network.predict(observation, deterministic=True)[0]

    def similarity(self, observer: Observer) -> np.ndarray:
        """How far the policy's word counts for each group of a network, `(n_groups,)`
        within [0, 1].

        1 for a group like one that it was trained on, less the less it is like any.
        Networks extrapolate wildly: the policies of a ResNet-20, whose blocks may be
        cut to an eighth, leave a MobileNet at chance.
        """
        if self.group_features is None:
            return np.ones(len(observer.groups))
        nearest = np.linalg.norm(
            observer.group_features[:, None] - self.group_features, axis=-1
        ).min(1)
        return np.where(
            nearest <= THE_SAME, 1.0, np.exp(-0.5 * (nearest / FAMILIAR) ** 2)
        )

    def mean_similarity(self, observer: Observer) -> float:
        """How much of a network the policy knows: the mean of its `similarity`."""
        return float(self.similarity(observer).mean())

    def is_out_of_distribution(self, observer: Observer) -> bool:
        """Whether it knows too little of a network to be learned on from there."""
        return self.mean_similarity(observer) < FAMILIAR_ENOUGH

    def save(self, folder: Path, **about: object) -> None:
        """Writes `policy.safetensors` and `policy.json`; `about` is stored beside."""
        weights = {
            name: tensor.contiguous().clone()
            for name, tensor in self.network.state_dict().items()
        }
        write_atomically(
            folder / "policy.safetensors", lambda path: save_file(weights, path)
        )
        description = {
            "algorithm": self.algorithm,
            "policy_kwargs": self.policy_kwargs,
            "features": _feature_names(),
        }
        if self.group_features is not None:
            description["kinds"] = dict(
                zip(STATIC, self.group_features.T.tolist(), strict=True)
            )
        write_json(folder / "policy.json", description | about)

    @classmethod
    def load(cls, folder: Path, argument: str = "run") -> "Policy":
        """Reads a saved policy.

        Args:
            folder: Where `save` wrote it.
            argument: The argument that it came by, for messages.

        Raises:
            UserError: If it is missing, damaged, or was trained on other observations.
        """
        description = describe_policy(folder, argument)
        try:
            algorithm, kwargs = description["algorithm"], description["policy_kwargs"]
            action_space = gymnasium.spaces.Box(-1.0, 1.0, (1,), np.float32)
            policy_class = ALGORITHMS[algorithm].policy_aliases["MlpPolicy"]
            network = policy_class(
                OBSERVATION_SPACE, action_space, lambda _: 0.0, **kwargs
            )
            network.load_state_dict(load_file(folder / "policy.safetensors"))
            group_features = (
                _group_features(description["kinds"])
                if "kinds" in description
                else None
            )
        except Exception as error:  # a damaged file can fail in any of these steps
            reason = (str(error).splitlines() or [""])[0]
            raise UserError(
                argument,
                f"the policy in {str(folder)!r} is damaged ({reason}); search anew",
            ) from error
        return cls(algorithm, network, kwargs, group_features)


def _group_features(columns: dict[str, list[float]]) -> np.ndarray:
    if not isinstance(columns, dict) or columns.keys() != set(STATIC):
        raise ValueError(f"kinds that aren't told by {', '.join(STATIC)}")
    return np.column_stack([np.array(columns[name], float) for name in STATIC])


def describe_policy(folder: Path, argument: str = "run") -> dict:
    """The JSON beside a saved policy; raises a `UserError` if there is none, or none
    that can be used here.
    """
    path = folder / "policy.json"
    if not path.is_file():
        learners = " or ".join(ALGORITHMS)
        raise UserError(
            argument,
            f"no policy in {str(folder)!r}; baselines learn none, search with "
            f"agent {learners}",
        )
    try:
        description = json.loads(path.read_text())
        features, algorithm = description["features"], description["algorithm"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            argument, f"{str(path)!r} is damaged ({error!r}); search anew"
        ) from error
    if features != _feature_names():
        raise UserError(
            argument,
            f"the policy in {str(folder)!r} was trained on other observations; "
            f"train it with this version",
        )
    check_installed(algorithm, argument)
    if algorithm not in ALGORITHMS:
        reason = f"no agent is called {algorithm!r}"
        raise UserError(
            argument,
            f"the policy in {str(folder)!r} is damaged ({reason}); search anew",
        )
    return description


def check_installed(agent: str, argument: str) -> None:
    """Raises a `UserError` if an agent or baseline needs a package that isn't there."""
    module, package = OPTIONAL.get(agent, (None, None))
    if module is not None and find_spec(module) is None:
        raise missing_package(argument, agent, package)


def _feature_names() -> list[str]:
    return [feature.name for feature in FEATURES]


def acting(
    policy: Policy, env: LayerPruningEnv
) -> Callable[[BatchedEpisodes], np.ndarray]:
    """What a policy does in an environment without learning or chance, as something to
    `follow`.

    Where groups are unlike those that it was trained on, its actions are mixed with
    those of a `Guide`, as far as it can't be trusted there. The guide's measurements
    are evaluations of the environment's proxy.
    """
    similarity = policy.similarity(env.observer)
    greedy_allocator = (
        env.greedy_allocator if (similarity < 1).any() else None
    )  # measures already here, so that a resumed search does it too

    def act(batch: BatchedEpisodes) -> np.ndarray:
        learned, share = (
            policy.act(batch.observe())[:, 0],
            similarity[batch.state.index],
        )
        if share == 1:
            return learned
        guided = batch.actions_of(
            greedy_allocator.suggest(batch.state), otherwise=share * learned
        )
        return (share * learned + (1 - share) * guided).astype(np.float32)

    return act


def replay(
    policy: Policy, env: gymnasium.Env, budget: str | Budget | None = None
) -> tuple[Allocation, dict]:
    """Lets a policy act once, without learning or chance; on groups unlike those that
    it knows, with a guide.

    Args:
        policy: A trained policy; the network and the budget may differ from those that
            it was trained on.
        env: A `LayerPruningEnv`, wrapped or not.
        budget: Another budget for this episode; None keeps the environment's, of a
            range the middle.

    Returns:
        The allocation, and the last step's info with its costs and proxy score.
    """
    bare: LayerPruningEnv = env.unwrapped
    env.reset(options={"budget": budget or bare.budget.at(0.5)})
    act, done = acting(policy, bare), False
    while not done:
        _, _, done, _, info = env.step(act(bare.episode))
    return info["allocation"], info
