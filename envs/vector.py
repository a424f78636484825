"""Episodes that step together behind Gymnasium's vector interface.

They end together, and their networks are scored together.
"""

from typing import Any, ClassVar

import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from autoprune.costs.budget import (
    SingleBudget,
    even_budgets,
    parse_budget,
    parse_single,
)
from autoprune.envs.layer_pruning import LayerPruningEnv
from autoprune.errors import UserError


class LayerPruningVectorEnv(VectorEnv):
    """What `gymnasium.make_vec("autoprune/LayerPruning-v0", num_envs=10)` makes.

    All lanes decide the same group in the same step, so one pass of array arithmetic
    serves them all, and the finished networks share the cores. An episode's last step
    returns the first observation of the next one; the one at its end is in
    `infos["final_obs"]` (same-step autoreset).

    Args:
        num_envs: Number of lanes.
        render_mode: Not available; None.
        **options: As for `LayerPruningEnv`. From a range of budgets the lanes take
            evenly spread ones.

    Raises:
        UserError: As `LayerPruningEnv`; or if a picture is asked for.
    """

    # Gymnasium declares it on instances, though every environment sets it on the class.
    metadata: ClassVar[dict[str, Any]] = {  # pyright: ignore[reportIncompatibleVariableOverride]
        "autoreset_mode": AutoresetMode.SAME_STEP,
        "render_modes": [],
    }

    def __init__(
        self, num_envs: int, render_mode: str | None = None, **options: Any
    ) -> None:
        if render_mode is not None:
            raise UserError(
                "render_mode",
                f"lanes aren't drawn, got {render_mode!r}; leave it out, "
                f"or make a single one",
            )
        self.env = LayerPruningEnv(**options)
        self.num_envs = num_envs
        self.render_mode = render_mode
        # Gymnasium wants the spaces of one lane and those of all.
        self.single_observation_space = self.env.observation_space
        self.single_action_space = self.env.action_space
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._start(None)

    def reset(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, *, seed: int | None = None, options: dict | None = None
    ) -> tuple[np.ndarray, dict]:
        """Starts an episode in every lane.

        Args:
            seed: Seeds what budgets of a range are drawn with.
            options: `{"budget": ...}`, one budget or a range, or `{"budgets": [...]}`,
                one for each lane, set the targets.

        Returns:
            Observations `(n_lanes, n_features)`, and the budgets as infos.

        Raises:
            UserError: If a budget is of another metric or can't be reached.
        """
        super().reset(seed=seed)
        observations = self._start(_budgets_in(options or {}, self.num_envs))
        names = np.array(list(map(str, self.budgets)), object)
        return observations, {"budget": names}

    def step(
        self, actions: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict]:
        """Prunes the current group in every lane.

        Args:
            actions: One for each lane, `(n_lanes, 1)`.

        Returns:
            Observations `(n_lanes, n_features)`; rewards, terminations and truncations,
            `(n_lanes,)` each; and infos, with an entry for each lane.
        """
        n_lanes = self.num_envs
        group = self.env.groups[self.batch.state.index]
        executed, sparsities = self.batch.step(np.asarray(actions)[:, 0])
        infos = {
            "group": np.full(n_lanes, group.name, object),
            "executed_action": executed,
            "sparsity": sparsities,
        }
        observations = self.batch.observe()
        rewards = np.zeros(n_lanes)
        is_over = self.batch.is_over
        if is_over:
            rewards, outcomes = self.env.score(self.batch, self.budgets)
            infos |= _final_infos(observations, outcomes)
            # Same-step autoreset: the next episodes' first observations take the place
            # of the last ones.
            observations = self._start(None)
        truncated = np.zeros(n_lanes, bool)
        return observations, rewards, np.full(n_lanes, is_over), truncated, infos

    def _start(self, budgets: list[SingleBudget] | None) -> np.ndarray:
        """Begins episodes; None draws budgets from the environment's range."""
        if budgets is None:
            offset = self.np_random.random()
            budgets = even_budgets(self.env.budget, self.num_envs, offset)
        # First, so that after a refused budget the episodes go on untouched.
        self.batch = self.env.start_episodes(budgets)
        self.budgets = budgets
        return self.batch.observe()


def _final_infos(observations: np.ndarray, outcomes: list[dict]) -> dict:
    """What Gymnasium tells of episodes that ended, under the names that it uses.

    Args:
        observations: The last ones, `(n_lanes, n_features)`.
        outcomes: The last step's info of each lane.
    """
    final = {}
    for name in outcomes[0]:
        final[name] = np.array([outcome[name] for outcome in outcomes], object)
    # Masks of the lanes that the entries are about; here all end at once.
    all_lanes = np.ones(len(outcomes), bool)
    return {
        "final_obs": np.array(list(observations), object),
        "final_info": final,
        "_final_obs": all_lanes,
        "_final_info": all_lanes.copy(),
    }


def _budgets_in(options: dict, n_lanes: int) -> list[SingleBudget] | None:
    """The budgets that a reset's options name; None if they name none."""
    if "budget" in options:
        return even_budgets(parse_budget(options["budget"]), n_lanes)
    if "budgets" not in options:
        return None
    budgets = options["budgets"]
    if len(budgets) != n_lanes:
        raise UserError(
            "budgets", f"one for each of the {n_lanes} lanes, got {len(budgets)}"
        )
    return [parse_single(budget) for budget in budgets]
