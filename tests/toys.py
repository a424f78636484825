"""Tiny networks, a proxy that costs nothing, and a trained digits network, for the
tests of envs and agents.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import gymnasium
import numpy as np
import torch
from stable_baselines3.common.base_class import BaseAlgorithm
from torch import Tensor, nn

from autoprune.agents.dyna import ModelEnv
from autoprune.agents.recorder import Recorder
from autoprune.agents.replay import Policy
from autoprune.agents.sb3_env import RecordedVecEnv
from autoprune.agents.settings import hyperparameters
from autoprune.agents.training import make_learner
from autoprune.config import DataConfig, FinetuneConfig, ProxyConfig, SearchConfig
from autoprune.costs.budget import Budget
from autoprune.costs.cost import CostTable
from autoprune.data.datasets import Splits, load
from autoprune.data.models import build
from autoprune.data.networks import conv_bn
from autoprune.envs.layer_pruning import LayerPruningEnv
from autoprune.evaluation.evaluate import Evaluation
from autoprune.evaluation.importance import importance
from autoprune.evaluation.proxy import ProxyAccuracy
from autoprune.structure.groups import Groups
from autoprune.tracing.trace import trace
from autoprune.training.loop import finetune

Loss = Callable[[np.ndarray], float]


@dataclass
class FakeProxy:
    """Has what the environment and the searches use of a `ProxyAccuracy`, but takes its
    loss from a formula.

    Attributes:
        groups: The network's trace.
        example: One input.
        loss_of: Kept counts in group order, `(n_groups,)`, to loss; accuracy is
            exp(-loss).
        importance: Scores per group; by default the later channels of each group count
            more.
    """

    groups: Groups
    example: Tensor
    loss_of: Loss
    evaluations: int = 0
    cache: dict[tuple[int, ...], Evaluation] = field(default_factory=dict)
    importance: dict[str, Tensor] = field(init=False)

    def __post_init__(self):
        self.importance = {
            group.name: torch.linspace(0.5, 1.5, group.channels)
            for group in self.groups
        }

    def block_of(self, batch: int) -> int:
        return 0

    @property
    def sensitivity(self) -> np.ndarray:
        return np.linspace(2.0, 0.1, len(self.groups))

    def __call__(self, kept: Mapping[str, int]) -> Evaluation:
        return self.score_all([kept])[0]

    def suited_to(self, kept: Mapping[str, int]) -> "FakeProxy":
        return self

    def score_all(
        self, allocations: Sequence[Mapping[str, int]], block: int = 0
    ) -> list[Evaluation]:
        for kept in allocations:
            if self.key(kept) not in self.cache:
                self.evaluations += 1
                self.cache[self.key(kept)] = self.evaluate(kept)
        return [self.cache[self.key(kept)] for kept in allocations]

    def select_all(self, allocations: Sequence[Mapping[str, int]]) -> list[Evaluation]:
        return [self.evaluate(kept) for kept in allocations]

    def survey_all(
        self, allocations: Sequence[Mapping[str, int]], batches: int = 0
    ) -> list[Evaluation]:
        return self.select_all(allocations)

    def evaluate(self, kept: Mapping[str, int]) -> Evaluation:
        loss = float(
            self.loss_of(np.array([kept[name] for name in self.groups.channels]))
        )
        return Evaluation(float(np.exp(-loss)), loss)

    def restore(self, kept: Mapping[str, int], evaluation: Evaluation) -> None:
        self.cache[self.key(kept)] = evaluation

    def key(self, kept: Mapping[str, int]) -> tuple[int, ...]:
        return tuple(kept[name] for name in self.groups.channels)


def chain(*widths: int, seed: int = 0, n_classes: int = 10) -> nn.Module:
    """Convolutions in a row, each with its own prunable group, then a linear head; for
    images of 16x16.
    """
    torch.manual_seed(seed)
    pairs = zip((3, *widths), widths, strict=False)
    body = [
        conv_bn(n_in, n_out, stride=2 if index < 2 else 1)
        for index, (n_in, n_out) in enumerate(pairs)
    ]
    return nn.Sequential(
        *body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], n_classes)
    )


@dataclass(frozen=True)
class Stairs:
    """A made-up latency: a constant, steps of 8 channels, and a knee at half of a
    group's channels, behind which a step costs three times as much.

    Attributes:
        dense: Channels of the groups, `(n_groups,)`.
        constant: What an empty network takes.
    """

    dense: np.ndarray
    constant: int = 100

    def __call__(self, kept):
        if not isinstance(kept, np.ndarray):
            raise TypeError("tests ask with arrays")
        steps, knee = -(-kept // 8), -(-self.dense // 16)
        times = (steps + 2 * np.maximum(steps - knee, 0)).astype(np.int64)
        cost = self.constant + (times * (100 + 7 * np.arange(len(self.dense)))).sum(-1)
        return cost if cost.ndim else int(cost)

    def continuous(self, kept):
        steps, knee = kept / 8, self.dense / 16
        times = steps + 2 * np.maximum(steps - knee, 0)
        return self.constant + (times * (100 + 7 * np.arange(len(self.dense)))).sum(-1)


def costs_with_latency(name: str = "chain") -> CostTable:
    """The costs of one of the `traced` networks, which know a made-up latency."""
    costs = CostTable(traced(name)[1])
    return costs.with_metric("latency", Stairs(costs.dense))


@functools.cache
def traced(name: str) -> tuple[nn.Module, Groups, Tensor]:
    """A network with its trace and an example: "chain", "wide", "three", "one", or a
    name of `autoprune.data.models`.
    """
    own = {
        "chain": (8, 16, 12, 16),
        "wide": (16, 40, 24, 48, 32),
        "one": (16,),
        "three": (24, 32, 16),
    }
    torch.manual_seed(0)
    model = chain(*own[name]) if name in own else build(name)
    example = torch.randn(1, 3, 16 if name in own else 32, 16 if name in own else 32)
    return model, trace(model, example), example


def fake_proxy(
    name: str = "chain", loss_of: Loss = lambda kept: 1 / kept.sum()
) -> FakeProxy:
    """A fresh fake proxy of one of the `traced` networks."""
    _, groups, example = traced(name)
    return FakeProxy(groups, example, loss_of)


def fake_env(
    name: str = "chain", loss_of: Loss = lambda kept: 1 / kept.sum(), **options
) -> LayerPruningEnv:
    """An environment of one of the `traced` networks, milliseconds an episode.

    Widths are multiples of 2 where nothing else is said, on whatever processor.
    """
    model, groups, _ = traced(name)
    options = {"round_to": 2} | options
    return LayerPruningEnv(model, groups, fake_proxy(name, loss_of), **options)


def target_env(
    name: str = "chain", budget: str = "macs=50%", scale: float = 20.0, **options
) -> LayerPruningEnv:
    """An environment whose best allocation, on the budget's surface and far from
    uniform, is known: loss 0 there.
    """
    space = fake_env(name, budget=budget, **options).space
    offsets = np.random.default_rng(0).permutation(
        np.linspace(-0.35, 0.35, len(space.costs.dense))
    )
    target = Budget.parse(budget).target(space.costs)
    best = space.allocate(target, lambda index, uniform: uniform + offsets[index])

    def loss(kept: np.ndarray) -> float:
        return scale * float((((kept - best) / space.costs.dense) ** 2).mean())

    return fake_env(name, loss, budget=budget, **options)


@functools.cache
def digits() -> tuple[nn.Module, Groups, Splits]:
    """A network trained on digits for a few seconds, so that it matters what is pruned
    where.
    """
    splits = load(DataConfig(data="digits"))
    model = chain(8, 16, 16)
    finetune(
        model,
        splits.train,
        FinetuneConfig(epochs=8, batch_size=64, lr=0.1, distillation=0.0, bf16="off"),
    )
    return model, trace(model, splits.example), splits


def digits_proxy(**parts) -> ProxyAccuracy:
    """A fresh real proxy of the digits network; `parts` replace splits."""
    model, groups, splits = digits()
    splits = replace(splits, **parts)
    config = ProxyConfig(images=100, recalibration_images=100, bf16="off")
    return ProxyAccuracy(
        model, groups, importance("l1", model, groups, splits.train), splits, config
    )


def digits_env(budget: str = "macs=50%", **options) -> LayerPruningEnv:
    """The environment of the digits network with a fresh real proxy."""
    model, groups, _ = digits()
    options = {"round_to": 2} | options
    return LayerPruningEnv.with_suited_proxy(
        model, groups, digits_proxy(), budget, **options
    )


def learner_of(
    name: str, start: Policy | None = None, env: LayerPruningEnv | None = None
) -> BaseAlgorithm:
    """An agent's untrained learner on a toy, at uniform pruning or at `start`."""
    recorder = Recorder(env or fake_env(), SearchConfig())
    lanes = ModelEnv(recorder.env, 10) if name == "dyna" else RecordedVecEnv(recorder)
    return make_learner(name, lanes, len(recorder.env.groups), 0, start=start)


def some_policy(name: str = "ppo") -> Policy:
    """Its actions are far from zero and differ between observations, without training
    it.
    """
    policy = Policy.from_learner(
        name, learner_of(name), hyperparameters(name)["policy_kwargs"]
    )
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in policy.network.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return policy


def run_episode(env: gymnasium.Env, action: Callable[[int], float]) -> dict:
    """One episode of actions chosen by the group's position; returns the last info."""
    env.reset()
    done, position, info = False, 0, {}
    while not done:
        _, _, done, _, info = env.step(np.array([action(position)], dtype=np.float32))
        position += 1
    return info
