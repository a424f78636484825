"""Episodes side by side behind Gymnasium's vector interface: they end together and are
scored together.
"""

from typing import Any, ClassVar

import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from autoprune.costs.budget import Budget, evenly_spaced, parse_budget
from autoprune.envs.layer_pruning import LayerPruningEnv
from autoprune.errors import UserError


class LayerPruningVectorEnv(VectorEnv):
    """`gymnasium.make_vec("autoprune/LayerPruning-v0", num_envs=10,
    vectorization_mode="vector_entry_point", ...)`.

    All lanes decide the same group in the same step, so one pass of array arithmetic
    serves them all, and the finished networks share the cores. An episode's last step
    returns the first observation of the next one; the one at its end is in
    `infos["final_obs"]` (same-step autoreset).

    Args:
        num_envs: How many lanes.
        render_mode: Not available; None.
        **options: As for `LayerPruningEnv`. From a range of budgets the lanes take
            evenly spread ones.

    Raises:
        UserError: As `LayerPruningEnv`; or if a picture is asked for.
    """

    metadata: ClassVar[dict[str, Any]] = {
        "autoreset_mode": AutoresetMode.SAME_STEP,
        "render_modes": [],
    }

    def __init__(self, num_envs: int, render_mode: str | None = None, **options: Any):
        if render_mode is not None:
            raise UserError(
                "render_mode",
                f"lanes aren't drawn, got {render_mode!r}; leave it out, "
                f"or make a single one",
            )
        self.env, self.num_envs, self.render_mode = (
            LayerPruningEnv(**options),
            num_envs,
            render_mode,
        )
        self.single_observation_space = self.env.observation_space
        self.single_action_space = self.env.action_space
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._start(None)

    def reset(
        self, *, seed: int | None = None, options: dict | None = None
    ) -> tuple[np.ndarray, dict]:
        """Starts an episode in every lane; `options={"budget": ...}` or `{"budgets":
        [...]}` set their targets.
        """
        super().reset(seed=seed)
        observations = self._start(_asked(options or {}, self.num_envs))
        return observations, {
            "budget": np.array([str(budget) for budget in self.budgets], object)
        }

    def step(
        self, actions: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict]:
        """Prunes the current group in every lane, by the feasible sparsity that its
        action stands for.
        """
        n, group = self.num_envs, self.env.groups[self.batch.state.index].name
        executed, sparsities = self.batch.step(np.asarray(actions)[:, 0])
        infos = {
            "group": np.full(n, group, object),
            "executed_action": executed,
            "sparsity": sparsities,
        }
        observations, rewards = self.batch.observe(), np.zeros(n)
        is_over = self.batch.is_over
        if is_over:
            rewards, outcomes = self.env.score(self.batch, self.budgets)
            final = {
                name: np.array([outcome[name] for outcome in outcomes], object)
                for name in outcomes[0]
            }
            marks = {name: np.ones(n, bool) for name in ("_final_obs", "_final_info")}
            infos |= {
                "final_obs": np.array(list(observations), object),
                "final_info": final,
            } | marks
            observations = self._start(None)
        return observations, rewards, np.full(n, is_over), np.zeros(n, bool), infos

    def _start(self, budgets: list[Budget] | None) -> np.ndarray:
        self.budgets = budgets or evenly_spaced(
            self.env.budget, self.num_envs, self.np_random.random()
        )
        self.batch = self.env.start_episodes(self.budgets)
        return self.batch.observe()


def _asked(options: dict, n: int) -> list[Budget] | None:
    if "budget" in options:
        return evenly_spaced(parse_budget(options["budget"]), n)
    if "budgets" not in options:
        return None
    if len(options["budgets"]) != n:
        raise UserError(
            "budgets", f"one for each of the {n} lanes, got {len(options['budgets'])}"
        )
    return [Budget.parse(budget) for budget in options["budgets"]]
