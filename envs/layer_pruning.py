"""LayerPruningEnv: one step a group, an allocation that meets its budget at the end."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from typing import Any, ClassVar

import gymnasium
import numpy as np
from gymnasium import spaces
from torch import nn

from autoprune.costs.allocation import Allocation, SearchSpace
from autoprune.costs.budget import Budget, BudgetRange, parse_budget
from autoprune.costs.cost import CostTable
from autoprune.envs.batch import BatchedEpisodes
from autoprune.envs.greedy_allocator import GreedyAllocator
from autoprune.envs.observation import OBSERVATION_SPACE, Observer
from autoprune.envs.rewards import Outcome, reward_named
from autoprune.errors import UserError
from autoprune.evaluation.evaluate import Evaluation
from autoprune.evaluation.proxy import ProxyAccuracy
from autoprune.structure.groups import Groups, own_tensors
from autoprune.tracing.trace import trace


class LayerPruningEnv(gymnasium.Env):
    """Walks a network group by group; each action is a sparsity, the last one ends the
    episode with a scored network.

    ## Description
    A trained network has groups of channels that can only be pruned together. An
    episode decides the share of channels to remove from each, in the order of the
    forward pass. When all are decided, a sub-model is sliced, recalibrated and scored
    on the proxy split.

    ## Action Space
    `Box(-1, 1, (1,))`, mapped to the feasible sparsity interval: -1 is its lowest
    sparsity, 1 its highest, 0 the *uniform-to-go* sparsity, the one that would meet the
    budget if this and all later groups got the same; linear in between. The wish is
    rounded to an allowed count; so every action is valid, and 0 all the way is uniform
    pruning. What was executed stands in `info["executed_action"]`, as an action, for
    the learner to store.

    ## Observation Space
    `Box(0, 1, (21,))`, the features of `autoprune.envs.observation.FEATURES`; they
    describe the group that the *next* action is for.
    `autoprune.envs.observation.feature_table()` prints index, name, bounds and meaning;
    `docs/environment.md` holds it.

    ## Rewards
    0 until the last step, then the chosen function of `autoprune.envs.rewards.REWARDS`
    of proxy score and MACs saved.

    ## Starting State
    The first group, nothing pruned. `reset(options={"budget": "macs=40%"})` sets
    another target for the episode; it has to be of the metric that the environment was
    made for. A range of budgets is drawn from uniformly.

    ## Episode End
    Terminates after the last group, within the budget; what rounding left of it is
    spent by growing groups by single rounding steps, so the cost is below the target by
    less than the cheapest possible step. Never truncates. Under a reward that searches
    the cost itself (`accuracy_guaranteed`) the budget is a ceiling only and nothing is
    grown.

    ## Info
    Each step: `group`, `sparsity` and `executed_action` of the step just taken. Last
    step also: `allocation`, `macs`, `cost` (of the budgeted metric), `target`,
    `accuracy`, `loss`.

    ## Arguments
    See below.

    ## Version History
    * v0: first version.

    Args:
        model: The dense network; never changed.
        groups: Its trace; made here if None.
        proxy: Scores allocations of that network.
        budget: Cost not to exceed, e.g. "macs=50%"; absolute numbers work too. From a
            range, "macs=30%..80%", every episode draws its own.
        reward: A name of `REWARDS`.
        round_to: Kept counts are multiples of it; one number, or group to number.
        max_sparsity: Largest share of a group that may go.
        accuracy_floor: For the reward `accuracy_guaranteed`.
        min_width: Least channels that a group keeps; one number, or group to number.
        costs: What allocations cost; from the groups if None.
        render_mode: None, or "rgb_array" for a picture of the allocation so far.

    Raises:
        UserError: If the groups are another network's, nothing can be pruned, or the
            budget can't be reached.
    """

    metadata: ClassVar[dict[str, Any]] = {
        "render_modes": ["rgb_array"],
        "render_fps": 4,
    }

    def __init__(  # noqa: PLR0913, the arguments are Gymnasium keyword arguments
        self,
        model: nn.Module,
        groups: Groups | None = None,
        proxy: ProxyAccuracy | None = None,
        budget: str | Budget | BudgetRange = "macs=50%",
        reward: str = "weighted_sum",
        round_to: int | Mapping[str, int] = 2,
        max_sparsity: float = 0.9,
        accuracy_floor: float = 0.8,
        min_width: int | Mapping[str, int] = 1,
        costs: CostTable | None = None,
        render_mode: str | None = None,
    ):
        if proxy is None:
            raise UserError(
                "proxy",
                "the environment needs a ProxyAccuracy of the network to score "
                "allocations",
            )
        self.groups = trace(model, proxy.example) if groups is None else groups
        _check_network(model, self.groups, proxy)
        self.budget = parse_budget(budget)
        self.reward = reward_named(reward)
        self.accuracy_floor = accuracy_floor
        self.render_mode = render_mode
        costs = costs or CostTable(self.groups)
        self.space = SearchSpace(
            costs, self.budget.metric, round_to, max_sparsity, min_width
        )
        self._macs_dense = self.space.costs.macs(self.space.costs.dense)
        tightest = self.space.uniform(self.target_of(self.budget.at(0)))
        self.proxy = proxy.suited_to(self.counts(tightest))
        self.observer = Observer(self.groups, self.space, self.proxy)
        self.action_space = spaces.Box(-1.0, 1.0, (1,), np.float32)
        self.observation_space = OBSERVATION_SPACE
        self._start(self.budget.at(0))

    def reset(
        self, *, seed: int | None = None, options: dict | None = None
    ) -> tuple[np.ndarray, dict]:
        """Starts an episode; `options={"budget": ...}` sets its target, else a range is
        drawn from.
        """
        super().reset(seed=seed)
        asked = (options or {}).get("budget")
        self._start(
            Budget.parse(asked) if asked else self.budget.at(self.np_random.random())
        )
        return self.episode.observe()[0], {"budget": str(self.episode_budget)}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        """Prunes the current group by the feasible sparsity that `action` stands for."""
        if self.episode.is_over:
            raise RuntimeError("step() after the episode's end; call reset() first")
        group = self.groups[self.episode.state.index].name
        (executed,), (sparsity,) = self.episode.step(
            np.asarray(action, np.float64).reshape(-1)[:1]
        )
        info, reward = (
            {
                "group": group,
                "sparsity": float(sparsity),
                "executed_action": float(executed),
            },
            0.0,
        )
        if self.episode.is_over:
            (reward,), (outcome,) = self.score(self.episode, [self.episode_budget])
            info |= outcome
        return (
            self.episode.observe()[0],
            float(reward),
            self.episode.is_over,
            False,
            info,
        )

    def render(self) -> np.ndarray | None:
        """The allocation so far, uint8 `(height, width, 3)`; undecided groups are drawn
        dense.
        """
        if self.render_mode is None:
            return None
        from autoprune.reporting.figures import allocation_bars, render_rgb

        dense, kept = (
            self.space.costs.dense.tolist(),
            self.episode.state.kept[0].tolist(),
        )
        return render_rgb(
            allocation_bars([group.name for group in self.groups], dense, kept)
        )

    @cached_property
    def greedy_allocator(self) -> GreedyAllocator:
        """What helps a policy where it doesn't know the network; it measures once, when
        it is first asked for.
        """
        return GreedyAllocator(self.space, self._losses)

    def _losses(self, kept: np.ndarray) -> np.ndarray:
        """Proxy losses `(n,)` of allocations `(n, n_groups)`."""
        return np.array(
            [
                score.loss
                for score in self.proxy.score_all([self.counts(row) for row in kept])
            ]
        )

    @property
    def target(self) -> int:
        """The episode's budget as an absolute cost."""
        return int(self.episode.state.targets[0])

    @property
    def bounds(self) -> tuple[float, float]:
        """Lowest and highest feasible sparsity of the current group."""
        lowest, highest = self.episode.state.bounds
        return float(lowest[0]), float(highest[0])

    def action_of(self, sparsity: float, otherwise: float = 0.0) -> float:
        """The action that stands for a sparsity of the current group, as far as that is
        feasible.

        Args:
            sparsity: Share of channels to remove.
            otherwise: What to return where a whole side of the interval is one point,
                so that any action would do.
        """
        return float(
            self.episode.actions_of(np.array([sparsity]), np.array([otherwise]))[0]
        )

    def start_episodes(self, budgets: Sequence[Budget]) -> BatchedEpisodes:
        """Lanes of this environment, one a budget, at the start of their episodes.

        Raises:
            UserError: If a budget is of another metric or can't be reached.
        """
        targets = np.array([self.target_of(budget) for budget in budgets])
        batch = BatchedEpisodes(self.space, self.observer, self.reward.uses_up_budget)
        batch.start(targets)
        return batch

    def target_of(self, budget: Budget) -> int:
        """A budget as an absolute cost.

        Raises:
            UserError: If it is of another metric than the environment's or can't be
                reached.
        """
        if budget.metric != self.space.metric:
            raise UserError(
                "budget",
                f"this environment budgets {self.space.metric}, got {budget}; "
                f"make another one for it",
            )
        target = budget.target(self.space.costs)
        self.space.check(target, budget)
        return target

    def counts(self, kept: np.ndarray) -> dict[str, int]:
        """Group to kept channels, from an array in the order of the groups."""
        return dict(zip(self.space.costs.names, map(int, kept), strict=True))

    def score(
        self, batch: BatchedEpisodes, budgets: Sequence[Budget], block: int = 0
    ) -> tuple[np.ndarray, list[dict]]:
        """Rewards `(n_lanes,)` of finished walks, scored side by side, and what is told
        about each.

        Args:
            walks: Episodes that are over.
            budgets: What each was walked for.
            block: Which block of images scores them, see `ProxyAccuracy.block_of`.
        """
        counts = [self.counts(kept) for kept in batch.state.kept]
        rewards, infos = [], []
        for lane, evaluation in enumerate(self.proxy.score_all(counts, block)):
            kept = batch.state.kept[lane]
            macs = self.space.costs.macs(kept)
            rewards.append(self.reward_of(evaluation, macs))
            allocation = Allocation(
                counts[lane], self.groups.fingerprint, str(budgets[lane])
            )
            costs = {
                "macs": macs,
                "cost": self.space.cost(kept),
                "target": int(batch.state.targets[lane]),
            }
            infos.append({"allocation": allocation, **costs, **asdict(evaluation)})
        return np.array(rewards), infos

    def reward_of(self, evaluation: Evaluation, macs: int) -> float:
        """The reward of a network with that score and cost."""
        return self.reward.function(
            Outcome(evaluation, macs, self._macs_dense, self.accuracy_floor)
        )

    def _start(self, budget: Budget) -> None:
        self.episode, self.episode_budget = self.start_episodes([budget]), budget


def _check_network(model: nn.Module, groups: Groups, proxy: ProxyAccuracy) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in own_tensors(model).items()}
    # A trace may hold buffers that the model lacks, never parameters.
    differ = any(groups.shapes.get(name) != shape for name, shape in shapes.items())
    if (
        differ
        or not groups.parameters <= shapes.keys()
        or proxy.groups.fingerprint != groups.fingerprint
    ):
        raise UserError(
            "groups",
            "model, groups and proxy are of different networks; trace the "
            "model that you pass",
        )
    if not len(groups):
        reasons = "; ".join(
            sorted({f"{group.name}: {group.pinned}" for group in groups.pinned})[:3]
        )
        raise UserError(
            "model", f"nothing can be pruned ({reasons}); see `autoprune trace`"
        )
