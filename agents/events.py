"""What a search found so far, for TensorBoard: the same scalars for every agent."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
from torch.utils.tensorboard import SummaryWriter

from autoprune.agents.recorder import Episode
from autoprune.costs.budget import BudgetRange
from autoprune.envs.layer_pruning import LayerPruningEnv
from autoprune.runs import RunFolder


@contextmanager
def episode_events(
    folder: RunFolder | None, env: LayerPruningEnv
) -> Iterator[Callable[[Episode], None]]:
    """Writes scalars of each episode into `tensorboard/episodes` of a run.

    Proxy accuracy, proxy loss, cost in the budgeted metric and reward of the episode,
    and the best reward so far. Rewards of different budgets don't compare, so under a
    range there is no best.

    Args:
        folder: The run; None writes nothing.
        env: Tells what an allocation costs.

    Yields:
        What gets each episode once, in order, those that a resumed search takes from
        its log too.
    """
    if folder is None:
        yield lambda episode: None
        return
    place = folder.tensorboard / "episodes"
    # A resumed search is told its earlier episodes once more.
    shutil.rmtree(place, ignore_errors=True)
    best = -np.inf
    is_range = isinstance(env.budget, BudgetRange)
    with SummaryWriter(str(place), flush_secs=30) as writer:

        def write(episode: Episode) -> None:
            nonlocal best
            # NaN, of a network that computes none, isn't taken for the best.
            best = np.fmax(best, episode.reward)
            scalars = {
                "accuracy": episode.evaluation.accuracy,
                "loss": episode.evaluation.loss,
                "cost": env.space.cost(np.array(episode.counts)),
                "reward": episode.reward,
            }
            if not is_range:
                scalars["best"] = best
            for name, value in scalars.items():
                writer.add_scalar(f"search/{name}", value, episode.number)

        yield write
