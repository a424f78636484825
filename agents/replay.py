"""Trained policies: saved, loaded, and put to work without learning.

A policy is a safetensors file and a JSON file; loading one executes no code.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import gymnasium
import numpy as np
import torch
from safetensors.torch import load_file, save_file
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.policies import BasePolicy
from torch import Tensor

from autoprune.agents.algorithms import ALGORITHMS
from autoprune.agents.policy_files import describe_policy
from autoprune.costs.allocation import Allocation
from autoprune.costs.budget import SingleBudget
from autoprune.envs.batch import BatchedEpisodes
from autoprune.envs.layer_pruning import LayerPruningEnv
from autoprune.envs.observation import (
    FEATURE_NAMES,
    STATIC,
    Observer,
    space_of,
)
from autoprune.errors import UserError, first_line
from autoprune.files import DIGEST, digest_of, write_atomically, write_json

SIMILARITY_SCALE = 0.3
"""Distance between two groups' features at which their similarity is exp(-1/2)."""
SAME_GROUP_DISTANCE = 0.05
"""Distance up to which two groups count as the same.

Features hold measurements, and two machines don't measure alike to the last bit.
"""
MIN_MEAN_SIMILARITY = 0.5
"""Least mean similarity of a network at which a learner goes on from a policy."""


@dataclass(frozen=True)
class Home:
    """The network that a policy was trained on, to be known again.

    Attributes:
        network: As `Observer.network`.
        groups: Names of the groups that the policy decided.
    """

    network: str
    groups: tuple[str, ...]

    @classmethod
    def of(cls, observer: Observer) -> "Home | None":
        """The network of an observer; None where it doesn't know its network.

        Args:
            observer: The network's observer.
        """
        if observer.network is None:
            return None
        return cls(observer.network, tuple(observer.group_names))

    def knows(self, observer: Observer) -> np.ndarray:
        """Which groups of a network are those that the policy decided, `(n_groups,)`.

        By name, since a network's own groups keep theirs, whatever they measure: under
        another budget, criterion or proxy the features of the same group differ.

        Args:
            observer: The network's observer.
        """
        is_same_network = observer.network == self.network
        known = [
            is_same_network and name in self.groups for name in observer.group_names
        ]
        return np.array(known, bool)


@dataclass(frozen=True)
class Policy:
    """A learned map from observation to action.

    Attributes:
        algorithm: The algorithm whose policy class it is, a key of `ALGORITHMS`.
        network: The policy itself.
        policy_kwargs: Arguments that build the network again.
        group_features: Features that never change of the groups that it was trained
            on, as `Observer.group_features`, `(n_groups, n_static)`; None if they are
            unknown.
        home: The network that it was trained on; None if that is unknown.
        features: The features that it sees, in order; None for the first ones, as many
            as its network takes.
    """

    algorithm: str
    network: BasePolicy
    policy_kwargs: dict
    group_features: np.ndarray | None = None
    home: "Home | None" = None
    features: tuple[str, ...] | None = None

    @property
    def inputs(self) -> list[str]:
        """The features that its network takes, in order; its space has one axis."""
        if self.features is not None:
            return list(self.features)
        n_features = sum(self.network.observation_space.shape or ())
        return FEATURE_NAMES[:n_features]

    @classmethod
    def from_learner(
        cls,
        algorithm: str,
        learner: BaseAlgorithm,
        policy_kwargs: dict,
        observer: Observer | None = None,
    ) -> "Policy":
        """Takes the policy out of a learner; later updates of the learner change it.

        Args:
            algorithm: Name of the agent, a key of `ALGORITHMS`.
            learner: The learner.
            policy_kwargs: What the learner built its policy with.
            observer: Of the network that it learned on, if that is to be known again.
        """
        if observer is None:
            return cls(algorithm, learner.policy, policy_kwargs)
        return cls(
            algorithm,
            learner.policy,
            policy_kwargs,
            observer.group_features,
            Home.of(observer),
            tuple(FEATURE_NAMES[column] for column in observer.columns),
        )

    def act(self, observation: np.ndarray) -> np.ndarray:
        """The deterministic action for an observation.

        Args:
            observation: One, `(n_features,)`, or a batch, `(n_lanes, n_features)`: all
                features, or those that the policy knows.

        Returns:
            The action, `(1,)` or `(n_lanes, 1)`, within [-1, 1].
        """
        inputs = self.inputs
        if observation.shape[-1] != len(inputs):
            columns = [FEATURE_NAMES.index(name) for name in inputs]
            observation = observation.take(columns, -1)
        action, _ = self.network.predict(observation, deterministic=True)
        return action

    def similarity(self, observer: Observer) -> np.ndarray:
        """How much each group of a network resembles one of the policy's training.

        Networks extrapolate wildly, so `make_actor` takes this as the weight of the
        policy's action. The groups that it was trained on have 1. Of the others, with d
        the distance of a group's features to the nearest known ones, it is
        exp(-(d / 0.3)^2 / 2), and 1 up to d = 0.05. Three groups at distance 0.01, 0.3
        and 0.9 have 1, 0.61 and 0.01.

        Args:
            observer: The network's observer.

        Returns:
            Similarities `(n_groups,)` within [0, 1]; all 1 if the policy doesn't say
            what it was trained on.
        """
        if self.group_features is None:
            return np.ones(len(observer.groups))
        is_known = np.zeros(len(observer.groups), bool)
        if self.home is not None:
            is_known = self.home.knows(observer)
        # Here, since the features of a network are partly measured.
        if is_known.all():
            return np.ones(len(observer.groups))
        # What the policy doesn't see makes no group strange to it.
        seen = [column for column, name in enumerate(STATIC) if name in self.inputs]
        known = self.group_features[:, seen]
        differences = observer.group_features[:, None, seen] - known
        # Of every group the nearest one of the training counts, however many there are.
        nearest = np.linalg.norm(differences, axis=-1).min(1)
        fading = np.exp(-0.5 * (nearest / SIMILARITY_SCALE) ** 2)
        is_known |= nearest <= SAME_GROUP_DISTANCE
        return np.where(is_known, 1.0, fading)

    def mean_similarity(self, observer: Observer) -> float:
        """The mean of `similarity` over a network's groups, within [0, 1]."""
        return float(self.similarity(observer).mean())

    def is_out_of_distribution(self, observer: Observer) -> bool:
        """Whether a network is too unlike the training for a learner to go on from."""
        return self.mean_similarity(observer) < MIN_MEAN_SIMILARITY

    def save(self, folder: Path, **about: object) -> None:
        """Writes `policy.safetensors` and `policy.json`.

        Args:
            folder: Where to; made if it isn't there.
            **about: More entries of the JSON, such as what it was trained on.
        """
        weights = {}
        for name, tensor in self.network.state_dict().items():
            # safetensors refuses tensors that share memory, as shared layers do.
            weights[name] = tensor.contiguous().clone()
        digests: list[str] = []

        def write(partial: Path) -> None:
            save_file(weights, partial)
            digests.append(digest_of(partial))

        write_atomically(folder / "policy.safetensors", write)
        description: dict[str, object] = {
            DIGEST: digests[0],
            "algorithm": self.algorithm,
            "policy_kwargs": self.policy_kwargs,
            "features": self.inputs,
        }
        if self.group_features is not None:
            # A column a feature, by name, so that the file says what they are.
            columns = dict(zip(STATIC, self.group_features.T.tolist(), strict=True))
            description["kinds"] = {
                name: column for name, column in columns.items() if name in self.inputs
            }
        if self.home is not None:
            description["home"] = {
                "network": self.home.network,
                "groups": list(self.home.groups),
            }
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
            return cls._from_description(description, folder)
        except Exception as error:  # a damaged file can fail in any of these steps
            reason = first_line(error)
            raise UserError(
                argument,
                f"the policy in {str(folder)!r} is damaged ({reason}); search anew",
            ) from error

    @classmethod
    def _from_description(cls, description: dict, folder: Path) -> "Policy":
        """Builds the network that a description tells of and fills in its weights."""
        algorithm = description["algorithm"]
        policy_kwargs = description["policy_kwargs"]
        action_space = gymnasium.spaces.Box(-1.0, 1.0, (1,), np.float32)
        policy_class = ALGORITHMS[algorithm].policy_aliases["MlpPolicy"]
        features = tuple(description["features"])
        network = policy_class(
            space_of(features), action_space, _no_learning, **policy_kwargs
        )
        weights = folder / "policy.safetensors"
        # Descriptions of earlier versions hold no digest.
        if DIGEST in description and description[DIGEST] != digest_of(weights):
            raise ValueError("policy.json is of other weights")
        network.load_state_dict(load_file(weights))
        group_features = None
        if "kinds" in description:
            group_features = _group_features(description["kinds"], features)
        home = None
        if "home" in description:
            told = description["home"]
            home = Home(str(told["network"]), tuple(told["groups"]))
        return cls(algorithm, network, policy_kwargs, group_features, home, features)

    def weights_for(
        self, learner: BasePolicy, features: list[str]
    ) -> dict[str, Tensor]:
        """The policy's weights, as a network of its class takes them.

        Features that the policy doesn't see get zeros, so the network acts as it does.

        Args:
            learner: The network.
            features: What it sees, in order.

        Returns:
            A state dict.
        """
        weights = dict(self.network.state_dict())
        inputs = self.inputs
        for name, fresh in learner.state_dict().items():
            weight = weights[name]
            if weight.shape == fresh.shape:
                continue
            # Critics take the action behind the observation.
            widened = torch.zeros_like(fresh)
            widened[:, len(features) :] = weight[:, len(inputs) :]
            for column, feature in enumerate(features):
                if feature in inputs:
                    widened[:, column] = weight[:, inputs.index(feature)]
            weights[name] = widened
        return weights


def _no_learning(progress: float) -> float:
    """The learning rate of a policy that only acts."""
    return 0.0


def _group_features(
    columns: dict[str, list[float]], features: tuple[str, ...]
) -> np.ndarray:
    """Features `(n_groups, n_static)` from the columns of `policy.json`, by name.

    Those that the policy doesn't see are 0.
    """
    static = [name for name in STATIC if name in features]
    if not isinstance(columns, dict) or columns.keys() != set(static):
        raise ValueError(f"kinds that aren't told by {', '.join(static)}")
    n_groups = len(columns[static[0]])
    rows = []
    for name in STATIC:
        rows.append(np.array(columns.get(name, np.zeros(n_groups)), float))
    return np.column_stack(rows)


def make_actor(
    policy: Policy, env: LayerPruningEnv
) -> Callable[[BatchedEpisodes], np.ndarray]:
    """Makes what `BatchedEpisodes.rollout` takes: a policy without learning or chance.

    Where groups are unlike those of its training, its actions are mixed with those of a
    `GreedyAllocator`: at similarity 0.6 the action is 0.6 times the policy's plus 0.4
    times the allocator's. The allocator's measurements are evaluations of the
    environment's proxy; if the policy knows all groups, none are made.

    Args:
        policy: A trained policy.
        env: Where it acts.

    Returns:
        A function from lanes to their actions for the current group, `(n_lanes,)`.
    """
    similarity = policy.similarity(env.observer)
    greedy_allocator = None
    if (similarity < 1).any():
        # It measures here and not at the first step, so that a resumed search, which
        # may not need it any more, pays for the same evaluations.
        greedy_allocator = env.greedy_allocator

    def act(batch: BatchedEpisodes) -> np.ndarray:
        learned = policy.act(batch.observe())[:, 0]
        weight = similarity[batch.state.index]
        if weight == 1:
            return learned
        assert greedy_allocator is not None, "made if any similarity is below 1"
        sparsities = greedy_allocator.suggest(batch.state)
        greedy = batch.actions_of(sparsities, fallback=weight * learned)
        # The action space is float32.
        return (weight * learned + (1 - weight) * greedy).astype(np.float32)

    return act


def replay(
    policy: Policy, env: gymnasium.Env, budget: str | SingleBudget | None = None
) -> tuple[Allocation, dict]:
    """Lets a policy act for one episode, without learning or chance.

    On groups unlike those of its training a greedy allocator helps; see `make_actor`.

    Args:
        policy: A trained policy; the network and the budget may differ from those that
            it was trained on.
        env: A `LayerPruningEnv`, wrapped or not.
        budget: Another budget for this episode; None keeps the environment's, of a
            range the middle.

    Returns:
        The allocation, and the last step's info with its costs and proxy score.
    """
    bare = env.unwrapped
    assert isinstance(bare, LayerPruningEnv), "a policy's observations are this one's"
    env.reset(options={"budget": budget or bare.budget.at_position(0.5)})
    act = make_actor(policy, bare)
    info: dict = {}
    is_done = False
    while not is_done:
        # Wrappers may count or record steps, so the episode is walked through them.
        _, _, is_done, _, info = env.step(act(bare.episode))
    return info["allocation"], info
