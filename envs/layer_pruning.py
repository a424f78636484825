"""LayerPruningEnv: one step a group, an allocation that meets its budget at the end."""

from collections.abc import Mapping
from typing import Any, ClassVar

import gymnasium
import numpy as np
from gymnasium import spaces
from torch import nn

from autoprune.allocation import Allocation, Budget, SearchSpace
from autoprune.cost import CostTable
from autoprune.errors import UserError
from autoprune.groups import Groups, own_tensors
from autoprune.proxy import ProxyAccuracy
from autoprune.tracing import trace
from envs.observation import OBSERVATION_SPACE, Observer, State
from envs.rewards import Outcome, reward_named

FLAT = 1e-6
"""Width below which one side of the feasible interval counts as a point."""


class LayerPruningEnv(gymnasium.Env):
    """Walks a network group by group; each action is a sparsity, the last one ends the episode with a scored network.

    ## Description
    A trained network has groups of channels that can only be pruned together. An episode decides the share of channels
    to remove from each, in the order of the forward pass. When all are decided, a sub-model is sliced, recalibrated and
    scored on the proxy split.

    ## Action Space
    `Box(-1, 1, (1,))`, mapped to the feasible sparsity interval: -1 is its lowest sparsity, 1 its highest, 0 the
    *uniform-to-go* sparsity, the one that would meet the budget if this and all later groups got the same; linear in
    between. The wish is rounded to an allowed count; so every action is valid, and 0 all the way is uniform pruning.
    What was executed stands in `info["executed_action"]`, as an action, for the learner to store.

    ## Observation Space
    `Box(0, 1, (20,))`, the features of `envs.observation.FEATURES`; they describe the group that the *next* action is
    for. `envs.observation.feature_table()` prints index, name, bounds and meaning; `docs/environment.md` holds it.

    ## Rewards
    0 until the last step, then the chosen function of `envs.rewards.REWARDS` of proxy score and MACs saved.

    ## Starting State
    The first group, nothing pruned. `reset(options={"budget": "macs=40%"})` sets another target for the episode; it has
    to be of the metric that the environment was made for.

    ## Episode End
    Terminates after the last group, within the budget; what rounding left of it is spent by growing groups by single
    rounding steps, so the cost is below the target by less than the cheapest possible step. Never truncates. Under a
    reward that searches the cost itself (`accuracy_guaranteed`) the budget is a ceiling only and nothing is grown.

    ## Info
    Each step: `group`, `sparsity` and `executed_action` of the step just taken. Last step also: `allocation`, `macs`,
    `cost` (of the budgeted metric), `target`, `accuracy`, `loss`.

    ## Arguments
    See below.

    ## Version History
    * v0: first version.

    Args:
        model: The dense network; never changed.
        groups: Its trace; made here if None.
        proxy: Scores allocations of that network.
        budget: Cost not to exceed, e.g. "macs=50%"; absolute numbers work too.
        reward: A name of `REWARDS`.
        round_to: Kept counts are multiples of it; one number, or group to number.
        max_sparsity: Largest share of a group that may go.
        accuracy_floor: For the reward `accuracy_guaranteed`.
        min_width: Least channels that a group keeps; one number, or group to number.
        render_mode: None, or "rgb_array" for a picture of the allocation so far.

    Raises:
        UserError: If the groups are another network's, nothing can be pruned, or the budget can't be reached.
    """

    metadata: ClassVar[dict[str, Any]] = {"render_modes": ["rgb_array"], "render_fps": 4}

    def __init__(  # noqa: PLR0913, the arguments are Gymnasium keyword arguments
        self,
        model: nn.Module,
        groups: Groups | None = None,
        proxy: ProxyAccuracy | None = None,
        budget: str | Budget = "macs=50%",
        reward: str = "weighted_sum",
        round_to: int | Mapping[str, int] = 2,
        max_sparsity: float = 0.9,
        accuracy_floor: float = 0.8,
        min_width: int | Mapping[str, int] = 1,
        render_mode: str | None = None,
    ):
        if proxy is None:
            raise UserError("proxy: the environment needs a ProxyAccuracy of the network to score allocations")
        self.groups = trace(model, proxy.example) if groups is None else groups
        _check_network(model, self.groups, proxy)
        self.proxy = proxy
        self.budget = Budget.parse(budget)
        self.reward = reward_named(reward)
        self.accuracy_floor = accuracy_floor
        self.render_mode = render_mode
        self.space = SearchSpace(CostTable(self.groups), self.budget.metric, round_to, max_sparsity, min_width)
        self.observer = Observer(self.groups, self.space, proxy.importance)
        self.action_space = spaces.Box(-1.0, 1.0, (1,), np.float32)
        self.observation_space = OBSERVATION_SPACE
        self._macs_dense = self.space.costs.macs(self.space.costs.dense)
        self._start(self.budget)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        """Starts an episode; `options={"budget": ...}` sets its target."""
        super().reset(seed=seed)
        self._start(Budget.parse((options or {}).get("budget", self.budget)))
        return self.observer.observe(self._state), {"budget": str(self.episode_budget)}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        """Prunes the current group by the feasible sparsity that `action` stands for."""
        state, dense = self._state, self.space.costs.dense
        if state.index >= len(dense):
            raise RuntimeError("step() after the episode's end; call reset() first")
        wish = float(np.clip(np.asarray(action, dtype=np.float64).reshape(-1)[0], -1, 1))
        count = self.space.nearest(state.index, self._sparsity_of(wish), self._bounds)
        sparsity = 1 - count / dense[state.index]
        executed = self.action_of(sparsity, otherwise=wish)
        info = {"group": self.groups[state.index].name, "sparsity": float(sparsity), "executed_action": executed}
        kept = state.kept.copy()
        kept[state.index] = count
        if state.index + 1 < len(dense):
            self._state = self._look(state.index + 1, kept, sparsity)
            return self.observer.observe(self._state), 0.0, False, False, info
        return self._finish(kept, info)

    def render(self) -> np.ndarray | None:
        """The allocation so far, uint8 `(height, width, 3)`; undecided groups are drawn dense."""
        if self.render_mode is None:
            return None
        from autoprune.figures import allocation_bars, render_rgb

        dense = self.space.costs.dense
        return render_rgb(
            allocation_bars([group.name for group in self.groups], dense.tolist(), self._state.kept.tolist())
        )

    @property
    def target(self) -> int:
        """The episode's budget as an absolute cost."""
        return self._target

    @property
    def bounds(self) -> tuple[float, float]:
        """Lowest and highest feasible sparsity of the current group."""
        return self._state.bounds

    def action_of(self, sparsity: float, otherwise: float = 0.0) -> float:
        """The action that stands for a sparsity of the current group, as far as that is feasible.

        Args:
            sparsity: Share of channels to remove.
            otherwise: What to return where a whole side of the interval is one point, so that any action would do.
        """
        lowest, centre, highest = self._interval()
        upwards = sparsity > centre or (sparsity == centre and otherwise > 0)
        width = highest - centre if upwards else centre - lowest
        if width < FLAT:
            return otherwise
        return float(np.clip((sparsity - centre) / width, -1, 1))

    def _sparsity_of(self, action: float) -> float:
        lowest, centre, highest = self._interval()
        return centre + action * (highest - centre if action > 0 else centre - lowest)

    def _interval(self) -> tuple[float, float, float]:
        """Lowest, uniform-to-go and highest sparsity; rounding can put the middle one just outside."""
        lowest, highest = self._state.bounds
        return lowest, min(max(self._state.uniform_to_go, lowest), highest), highest

    def _start(self, budget: Budget) -> None:
        if budget.metric != self.space.metric:
            raise UserError(
                f"budget: this environment budgets {self.space.metric}, got {budget}; make another one for it"
            )
        target = budget.target(self.space.costs)
        self.space.check(target, budget)
        self.episode_budget, self._target = budget, target
        self._state = self._look(0, self.space.costs.dense.copy(), 0.0)

    def _look(self, index: int, kept: np.ndarray, previous: float) -> State:
        """The state before deciding group `index`."""
        dense = self.space.costs.dense[index]
        lowest, highest = self.space.feasible(kept, index, self._target)
        if not self.reward.uses_up_budget:
            lowest = int(self.space.low[index])
        self._bounds = lowest, highest
        sparsities = 1 - highest / dense, 1 - lowest / dense
        return State(
            index, kept, self._target, sparsities, self.space.uniform_to_go(kept, index, self._target), previous
        )

    def _finish(self, kept: np.ndarray, info: dict) -> tuple[np.ndarray, float, bool, bool, dict]:
        if self.reward.uses_up_budget:
            kept = self.space.fill(kept, self._target)
        counts = {name: int(count) for name, count in zip(self.space.costs.names, kept, strict=True)}
        evaluation, macs = self.proxy(counts), self.space.costs.macs(kept)
        reward = self.reward.function(Outcome(evaluation, macs, self._macs_dense, self.accuracy_floor))
        allocation = Allocation(counts, self.groups.fingerprint, str(self.episode_budget))
        info |= {"allocation": allocation, "macs": macs, "cost": self.space.cost(kept), "target": self._target}
        info |= {"accuracy": evaluation.accuracy, "loss": evaluation.loss}
        last = self._state
        observation = self.observer.observe(last)
        self._state = State(len(kept), kept, self._target, last.bounds, last.uniform_to_go, info["sparsity"])
        return observation, float(reward), True, False, info


def _check_network(model: nn.Module, groups: Groups, proxy: ProxyAccuracy) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in own_tensors(model).items()}
    # A trace may hold buffers that the model lacks, never parameters.
    differ = any(groups.shapes.get(name) != shape for name, shape in shapes.items())
    if differ or not groups.parameters <= shapes.keys() or proxy.groups.fingerprint != groups.fingerprint:
        raise UserError("groups: model, groups and proxy are of different networks; trace the model that you pass")
    if not len(groups):
        reasons = "; ".join(sorted({f"{group.name}: {group.pinned}" for group in groups.pinned})[:3])
        raise UserError(f"model: nothing can be pruned ({reasons}); see `autoprune trace`")
