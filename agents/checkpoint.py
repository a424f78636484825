"""A learner's whole state in one file: weights, optimisers, replay, random states.

The file loads without executing code.
"""

import random
from pathlib import Path

import numpy as np
import torch
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.buffers import ReplayBuffer

from autoprune.errors import UserError, first_line
from autoprune.files import write_state

COUNTERS = (
    "num_timesteps",
    "_episode_num",
    "_n_updates",
    "_current_progress_remaining",
)
"""Attributes of a learner that say how far it is."""
REPLAY = (
    "observations",
    "next_observations",
    "actions",
    "rewards",
    "dones",
    "timeouts",
)
"""Arrays of a replay buffer."""


def save_learner(learner: BaseAlgorithm, episodes: int, path: Path) -> None:
    """Writes a learner's state, atomically.

    Call it between an update and the next roll-out: then no episode is open.

    Args:
        learner: The learner.
        episodes: How many episodes it has seen.
        path: The file.
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
    """Puts a saved state into a learner that was made with the same settings.

    Args:
        learner: The learner.
        path: The file.

    Returns:
        How many episodes the state has seen.

    Raises:
        UserError: If the file is damaged or belongs to other settings.
    """
    try:
        state = torch.load(path, weights_only=True)
        learner.set_parameters(state["parameters"])
        for name, value in state["counters"].items():
            setattr(learner, name, value)
        for name, value in state["variables"].items():
            # In place, since optimisers hold these tensors.
            getattr(learner, name).data.copy_(value)
        _restore_replay(getattr(learner, "replay_buffer", None), state["replay"])
        # Last, since the steps above may draw.
        _restore_random(state["random"])
        return state["episodes"]
    except Exception as error:  # torch raises a dozen types for a damaged file
        reason = first_line(error)
        raise UserError(
            "run",
            f"checkpoint {str(path)!r} can't be used ({reason}); delete it to "
            f"search anew",
        ) from error


def _random_state() -> dict:
    """The states of the global generators, as plain data and tensors."""
    # Stable-Baselines3 draws from the global generators: torch for actions, NumPy for
    # noise and replay.
    name, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    keys = torch.from_numpy(np.asarray(keys).astype(np.int64))
    # Tuples are stored as lists; `_restore_random` makes tuples of them again.
    python = []
    for part in random.getstate():
        python.append(list(part) if isinstance(part, tuple) else part)
    return {
        "torch": torch.get_rng_state(),
        "numpy": [name, keys, position, has_gauss, gauss],
        "python": python,
    }


def _restore_random(state: dict) -> None:
    """Sets the global generators to what `_random_state` returned."""
    name, keys, position, has_gauss, gauss = state["numpy"]
    keys = keys.numpy().astype(np.uint32)
    np.random.set_state((name, keys, position, has_gauss, gauss))
    torch.set_rng_state(state["torch"])
    python = []
    for part in state["python"]:
        python.append(tuple(part) if isinstance(part, list) else part)
    random.setstate(tuple(python))


def _replay_state(buffer: ReplayBuffer | None) -> dict | None:
    """What a replay buffer holds; on-policy learners have none."""
    if buffer is None:
        return None
    # A buffer is a ring: until it is full, what lies behind its position is empty.
    n_used = buffer.buffer_size if buffer.full else buffer.pos
    arrays = {}
    for name in REPLAY:
        arrays[name] = torch.from_numpy(getattr(buffer, name)[:n_used].copy())
    return {"pos": buffer.pos, "full": buffer.full, "arrays": arrays}


def _restore_replay(buffer: ReplayBuffer | None, state: dict | None) -> None:
    """Fills a replay buffer in place with what `_replay_state` returned."""
    if buffer is None or state is None:
        return
    buffer.pos = state["pos"]
    buffer.full = state["full"]
    for name, values in state["arrays"].items():
        getattr(buffer, name)[: len(values)] = values.numpy()
