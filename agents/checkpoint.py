"""A learner's whole state in one file that loads without executing code: weights,
optimisers, replay, random states.
"""

import random
from pathlib import Path

import numpy as np
import torch
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.buffers import ReplayBuffer

from autoprune.errors import UserError
from autoprune.runs import write_state

COUNTERS = (
    "num_timesteps",
    "_episode_num",
    "_n_updates",
    "_current_progress_remaining",
)
REPLAY = (
    "observations",
    "next_observations",
    "actions",
    "rewards",
    "dones",
    "timeouts",
)


def save_learner(learner: BaseAlgorithm, episodes: int, path: Path) -> None:
    """Writes the state after `episodes` episodes, atomically; call it between an update
    and the next roll-out.
    """
    _, variables = learner._get_torch_save_params()
    state = {
        "episodes": episodes,
        "counters": {name: getattr(learner, name) for name in COUNTERS},
        "parameters": learner.get_parameters(),
        "variables": {name: getattr(learner, name).detach() for name in variables},
        "random": _random_state(),
        "replay": _replay_state(getattr(learner, "replay_buffer", None)),
    }
    write_state(path, state)


def restore_learner(learner: BaseAlgorithm, path: Path) -> int:
    """Puts a saved state into a learner made with the same settings; returns its number
    of episodes.

    Raises:
        UserError: If the file is damaged or belongs to other settings.
    """
    try:
        state = torch.load(path, weights_only=True)
        learner.set_parameters(state["parameters"])
        for name, value in state["counters"].items():
            setattr(learner, name, value)
        for name, value in state["variables"].items():
            getattr(learner, name).data.copy_(value)
        _restore_replay(getattr(learner, "replay_buffer", None), state["replay"])
        _restore_random(state["random"])
        return state["episodes"]
    except Exception as error:  # torch raises a dozen types for a damaged file
        reason = (str(error).splitlines() or [""])[0]
        raise UserError(
            "run",
            f"checkpoint {str(path)!r} can't be used ({reason}); delete it to "
            f"search anew",
        ) from error


def _random_state() -> dict:
    # Stable-Baselines3 draws from the global generators: torch for actions, NumPy for
    # noise and replay.
    name, keys, position, has_gauss, gauss = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "numpy": [
            name,
            torch.from_numpy(keys.astype(np.int64)),
            position,
            has_gauss,
            gauss,
        ],
        "python": [
            list(part) if isinstance(part, tuple) else part
            for part in random.getstate()
        ],
    }


def _restore_random(state: dict) -> None:
    name, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state(
        (name, keys.numpy().astype(np.uint32), position, has_gauss, gauss)
    )
    torch.set_rng_state(state["torch"])
    random.setstate(
        tuple(
            tuple(part) if isinstance(part, list) else part for part in state["python"]
        )
    )


def _replay_state(buffer: ReplayBuffer | None) -> dict | None:
    if buffer is None:
        return None
    used = buffer.buffer_size if buffer.full else buffer.pos
    arrays = {
        name: torch.from_numpy(getattr(buffer, name)[:used].copy()) for name in REPLAY
    }
    return {"pos": buffer.pos, "full": buffer.full, "arrays": arrays}


def _restore_replay(buffer: ReplayBuffer | None, state: dict | None) -> None:
    if buffer is None or state is None:
        return
    buffer.pos, buffer.full = state["pos"], state["full"]
    for name, values in state["arrays"].items():
        getattr(buffer, name)[: len(values)] = values.numpy()
