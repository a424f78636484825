"""The classes of learning agents.

`autoprune.agents.search` says how an agent or a baseline is added.
"""

from contextlib import suppress

from stable_baselines3 import DDPG, PPO, SAC, TD3
from stable_baselines3.common.base_class import BaseAlgorithm

ALGORITHMS: dict[str, type[BaseAlgorithm]] = {
    "dyna": PPO,
    "ppo": PPO,
    "sac": SAC,
    "td3": TD3,
    "ddpg": DDPG,
}
"""Agent to its learner from Stable-Baselines3; "tqc" too where sb3-contrib is there."""
with suppress(ImportError):
    from sb3_contrib import TQC

    ALGORITHMS["tqc"] = TQC
