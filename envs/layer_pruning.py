"""The environment: a step for each group, then an allocation within its budget."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cached_property, partial
from typing import Any, ClassVar

import gymnasium
import numpy as np
from gymnasium import spaces
from torch import nn

from autoprune.config import AUTO, check_multiple
from autoprune.costs.allocation import Allocation
from autoprune.costs.budget import (
    AnyBudget,
    SingleBudget,
    parse_budget,
    parse_single,
)
from autoprune.costs.cost import CostTable
from autoprune.costs.search_space import SearchSpace
from autoprune.costs.widths import finest_needed, suited_multiples, tile_of_processor
from autoprune.envs.batch import BatchedEpisodes
from autoprune.envs.greedy_allocator import GreedyAllocator
from autoprune.envs.networks import check_network, network_named, suited_proxy
from autoprune.envs.observation import OBSERVATION_SPACE, Observer
from autoprune.envs.rewards import Outcome, reward_named
from autoprune.errors import UserError
from autoprune.evaluation.evaluate import Evaluation
from autoprune.evaluation.proxy_protocol import Proxy
from autoprune.structure.groups import Groups
from autoprune.tracing.trace import trace


class LayerPruningEnv(gymnasium.Env):
    """Decides how much of each group of channels to remove, group by group.

    ## Description
    A trained network has groups of channels that can only be pruned together. An
    episode decides the share of channels to remove from each, in the order of the
    forward pass. When all are decided, a sub-model is sliced, recalibrated and scored
    on the proxy split.

    ## Action Space
    `Box(-1, 1, (1,))`, mapped to the feasible sparsity interval: -1 is its lowest
    sparsity, 1 its highest, 0 the *uniform-to-go* sparsity, the one that would meet the
    budget if this and all later groups got the same; linear in between. The sparsity is
    rounded to an allowed count, so every action is valid, and an episode of zeros is
    uniform pruning. What was executed stands in `info["executed_action"]`, as an
    action, for the learner to store.

    ## Observation Space
    `Box(0, 1, (22,))`, the features of `autoprune.envs.observation.FEATURES`; they
    describe the group that the *next* action is for.
    `autoprune.envs.observation.feature_table()` prints index, name, bounds and meaning;
    `docs/reference/environment.md` holds it.

    ## Rewards
    0 until the last step, then the chosen function of `autoprune.envs.rewards.REWARDS`
    of proxy score and MACs saved. Higher is better.

    ## Starting State
    The first group, nothing pruned. `reset(options={"budget": "macs=40%"})` sets
    another target for the episode; it has to be of the metric that the environment was
    made for; several budgets stay as they are. A range of budgets is drawn from
    uniformly.

    ## Episode End
    Terminates after the last group, within the budget; what rounding left of it is
    spent by growing groups by single rounding steps, so the cost is below the target by
    less than the cheapest possible step. Never truncates. Under a reward that searches
    the cost itself (`accuracy_guaranteed`) the budget is a ceiling only and nothing is
    grown.

    ## Info
    Each step: `group`, `sparsity` and `executed_action` of the step just taken. Last
    step also: `allocation`, `macs`, `cost` (of the budgeted metric; of several the
    joint one), `target`, `costs` (every budgeted metric to its cost), `accuracy`,
    `loss`.

    ## Arguments
    See below.

    ## Version History
    * v0: first version.

    Args:
        model: The dense network, never changed; or its name: "resnet20", or
            `package.module:factory`. With a name trace and proxy are made here.
        groups: Its trace; made here if None.
        proxy: Scores allocations of that network; kept as it is. To have candidates
            reconstructed where a tight budget asks for it, see `with_suited_proxy`.
        budget: Cost not to exceed, e.g. "macs=50%" or "size=5MB"; or several that are
            all to be met, "macs=50%,size=5MB". From a range, "macs=30%..80%", every
            episode draws its own.
        reward: A name of `REWARDS`.
        round_to: Kept counts are multiples of it; one number, or group to number. From
            "auto" they suit this machine's processor, see
            `autoprune.costs.widths.tile_of_processor`; for the same environment on any
            machine give a number.
        max_sparsity: Largest share of a group that may go.
        accuracy_floor: For the reward `accuracy_guaranteed`.
        min_width: Least channels that a group keeps; one number, or group to number.
        costs: What allocations cost; from the groups if None. A budget of latency
            needs costs that know it, see `CostTable.with_metric`.
        render_mode: None, or "rgb_array" for a picture of the allocation so far.
        data: The images of a network that is given by name: "sample", "cifar10", or a
            folder.

    Raises:
        UserError: If the groups are another network's, nothing can be pruned, or the
            budget can't be reached.
    """

    # Gymnasium declares it on instances, though every environment sets it on the class.
    metadata: ClassVar[dict[str, Any]] = {  # pyright: ignore[reportIncompatibleVariableOverride]
        "render_modes": ["rgb_array"],
        "render_fps": 4,
    }

    def __init__(  # noqa: PLR0913, the arguments are Gymnasium keyword arguments
        self,
        model: nn.Module | str = "resnet20",
        groups: Groups | None = None,
        proxy: Proxy | None = None,
        budget: str | AnyBudget = "macs=50%",
        reward: str = "weighted_sum",
        round_to: int | str | Mapping[str, int] = AUTO,
        max_sparsity: float = 0.9,
        accuracy_floor: float = 0.8,
        min_width: int | Mapping[str, int] = 1,
        costs: CostTable | None = None,
        render_mode: str | None = None,
        data: str = "sample",
    ) -> None:
        # By name everything is chosen here; what is passed as an object stays as it is.
        is_named = isinstance(model, str)
        if isinstance(model, str):
            if groups is not None or proxy is not None:
                raise UserError(
                    "model",
                    f"groups and proxy are of a network, got the name {model!r}; pass "
                    f"that network as model",
                )
            model, groups, proxy = network_named(model, data)
        if proxy is None:
            raise UserError(
                "proxy",
                "the environment needs a ProxyAccuracy of the network to score "
                "allocations",
            )
        self.groups = trace(model, proxy.example) if groups is None else groups
        check_network(model, self.groups, proxy)
        self.budget = parse_budget(budget)
        self.reward = reward_named(reward)
        self.accuracy_floor = accuracy_floor
        self.render_mode = render_mode
        costs = self.budget.with_metrics(costs or CostTable(self.groups))
        tightest = self.budget.at_position(0)
        if isinstance(round_to, str):
            check_multiple(round_to)
            round_to = self._suited_multiples(costs, tightest, max_sparsity, min_width)
        self.space = SearchSpace(
            costs, self.budget.metric, round_to, max_sparsity, min_width
        )
        self._macs_dense = costs.macs(costs.dense)
        # Refuses a budget that can't be reached before networks are scored for it.
        self.target_of(tightest)
        self.proxy = suited_proxy(proxy, self.space, self.budget) if is_named else proxy
        self.observer = Observer(self.groups, self.space, self.proxy, model)
        self.action_space = spaces.Box(-1.0, 1.0, (1,), np.float32)
        self.observation_space = OBSERVATION_SPACE
        # An episode from the start, so that `target` and `bounds` mean something.
        self._start(tightest)

    def _suited_multiples(
        self,
        costs: CostTable,
        tightest: SingleBudget,
        max_sparsity: float,
        min_width: int | Mapping[str, int],
    ) -> dict[str, int]:
        """What "auto" stands for here: group to multiple."""
        widths = min_width
        if isinstance(widths, int):
            widths = dict.fromkeys(costs.names, widths)
        suited = partial(
            suited_multiples,
            self.groups,
            max_sparsity=max_sparsity,
            min_width=widths,
        )
        tile = tile_of_processor().channels
        return finest_needed(suited, tile, costs, tightest, max_sparsity, widths)

    @classmethod
    def with_suited_proxy(
        cls,
        model: nn.Module,
        groups: Groups | None,
        proxy: Proxy,
        budget: str | AnyBudget = "macs=50%",
        **options: Any,
    ) -> "LayerPruningEnv":
        """An environment whose proxy suits its tightest budget, see `suited_proxy`.

        Args:
            model: The dense network.
            groups: Its trace; made here if None.
            proxy: Scores allocations of that network, or says which proxy to take.
            budget: As for the constructor.
            **options: Further arguments of the constructor.

        Raises:
            UserError: As the constructor.
        """
        # The environment knows the search space, so it is made before the choice.
        env = cls(model, groups, proxy, budget, **options)
        suited = suited_proxy(proxy, env.space, env.budget)
        if suited is proxy:
            return env
        return cls(model, env.groups, suited, budget, **options)

    def reset(
        self, *, seed: int | None = None, options: dict | None = None
    ) -> tuple[np.ndarray, dict]:
        """Starts an episode.

        Args:
            seed: Seeds what budgets of a range are drawn with.
            options: `{"budget": ...}` sets this episode's target.

        Returns:
            The first observation, and the episode's budget as info.

        Raises:
            UserError: If that budget is of another metric or can't be reached; the
                episode before goes on untouched.
        """
        super().reset(seed=seed)
        text = (options or {}).get("budget")
        if text:
            budget = parse_single(text)
        else:
            budget = self.budget.at_position(self.np_random.random())
        self._start(budget)
        return self.episode.observe()[0], {"budget": str(self.episode_budget)}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        """Prunes the current group by the sparsity that an action stands for.

        Args:
            action: A number in [-1, 1], `(1,)`.

        Returns:
            Observation `(n_features,)`, reward, whether the episode is over, False
            since it is never truncated, and info.
        """
        if self.episode.is_over:
            raise RuntimeError("step() after the episode's end; call reset() first")
        group = self.groups[self.episode.state.index]
        # Learners pass `(1,)`, people often a plain number.
        numbers = np.asarray(action, np.float64).reshape(-1)
        executed, sparsities = self.episode.step(numbers[:1])
        info: dict[str, Any] = {
            "group": group.name,
            "sparsity": float(sparsities[0]),
            "executed_action": float(executed[0]),
        }
        reward = 0.0
        if self.episode.is_over:
            rewards, outcomes = self.score(self.episode, [self.episode_budget])
            reward = float(rewards[0])
            info |= outcomes[0]
        observation = self.episode.observe()[0]
        return observation, reward, self.episode.is_over, False, info

    def render(self) -> np.ndarray | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The allocation so far, uint8 `(height, width, 3)`; None without a mode.

        Groups that aren't decided yet are drawn dense.
        """
        if self.render_mode is None:
            return None
        # Matplotlib takes long to import, and few episodes are drawn.
        from autoprune.reporting.figures import allocation_bars, render_rgb

        names = [group.name for group in self.groups]
        dense = self.space.costs.dense.tolist()
        kept = self.episode.state.kept[0].tolist()
        return render_rgb(allocation_bars(names, dense, kept))

    @cached_property
    def greedy_allocator(self) -> GreedyAllocator:
        """What helps a policy where it doesn't know the network.

        It measures once, when it is first asked for.
        """
        return GreedyAllocator(self.space, self._losses)

    def _losses(self, kept: np.ndarray) -> np.ndarray:
        """Proxy losses `(n,)` of allocations `(n, n_groups)`."""
        allocations = [self.counts(row) for row in kept]
        evaluations = self.proxy.score_all(allocations)
        return np.array([evaluation.loss for evaluation in evaluations])

    @property
    def target(self) -> int:
        """The episode's budget as an absolute cost."""
        return int(self.episode.state.targets[0])

    @property
    def bounds(self) -> tuple[float, float]:
        """Lowest and highest feasible sparsity of the current group."""
        lowest, highest = self.episode.state.bounds
        return float(lowest[0]), float(highest[0])

    def action_of(self, sparsity: float, fallback: float = 0.0) -> float:
        """The action that stands for a sparsity of the current group.

        Args:
            sparsity: Share of channels to remove; clipped to what is feasible.
            fallback: What to return where a whole side of the interval is one point, so
                that any action would do.
        """
        actions = self.episode.actions_of(np.array([sparsity]), np.array([fallback]))
        return float(actions[0])

    def start_episodes(self, budgets: Sequence[SingleBudget]) -> BatchedEpisodes:
        """Begins episodes that step together, one for each budget.

        Raises:
            UserError: If a budget is of another metric or can't be reached.
        """
        targets = np.array([self.target_of(budget) for budget in budgets])
        batch = BatchedEpisodes(self.space, self.observer, self.reward.uses_up_budget)
        batch.start(targets)
        return batch

    def target_of(self, budget: SingleBudget) -> int:
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
        # Refused here, before an episode would run into its floor.
        self.space.check(target, budget)
        return target

    def counts(self, kept: np.ndarray) -> dict[str, int]:
        """Group to kept channels, from an array `(n_groups,)` in the groups' order."""
        return dict(zip(self.space.costs.names, map(int, kept), strict=True))

    def score(
        self, batch: BatchedEpisodes, budgets: Sequence[SingleBudget], block: int = 0
    ) -> tuple[np.ndarray, list[dict]]:
        """Scores the networks of finished episodes side by side.

        Args:
            batch: Episodes that are over.
            budgets: The budget of each.
            block: Which block of images scores them, see `ProxyAccuracy.block_of`.

        Returns:
            Rewards `(n_lanes,)`, and the last step's info of each episode.
        """
        counts = [self.counts(kept) for kept in batch.state.kept]
        # In one call, so that networks are scored on all cores.
        evaluations = self.proxy.score_all(counts, block)
        rewards = []
        infos = []
        for lane, evaluation in enumerate(evaluations):
            kept = batch.state.kept[lane]
            # Rewards weigh MACs even where parameters are budgeted.
            macs = self.space.costs.macs(kept)
            rewards.append(self.reward_of(evaluation, macs))
            allocation = Allocation(
                counts[lane], self.groups.fingerprint, str(budgets[lane])
            )
            info = {
                "allocation": allocation,
                "macs": macs,
                "cost": self.space.cost(kept),
                "target": int(batch.state.targets[lane]),
                "costs": self._costs_by_metric(budgets[lane], kept),
            }
            infos.append(info | asdict(evaluation))
        return np.array(rewards), infos

    def _costs_by_metric(
        self, budget: SingleBudget, kept: np.ndarray
    ) -> dict[str, int]:
        """Every metric that is budgeted to the cost of counts `(n_groups,)` in it."""
        metrics = self.space.costs.metrics
        return {part.metric: metrics[part.metric](kept) for part in budget.parts}

    def reward_of(self, evaluation: Evaluation, macs: int) -> float:
        """The reward of a network; higher is better.

        Args:
            evaluation: Its score.
            macs: Its multiply-accumulates.
        """
        outcome = Outcome(evaluation, macs, self._macs_dense, self.accuracy_floor)
        return self.reward.function(outcome)

    def _start(self, budget: SingleBudget) -> None:
        """Begins an episode; where the budget is refused nothing changes."""
        self.episode = self.start_episodes([budget])
        self.episode_budget = budget
