"""The names of learning agents, and the packages that some searchers need.

`autoprune.agents.search` says how an agent or a baseline is added.
"""

from contextlib import suppress
from importlib.util import find_spec

from stable_baselines3 import DDPG, PPO, SAC, TD3
from stable_baselines3.common.base_class import BaseAlgorithm

from autoprune.errors import missing_package

ALGORITHMS: dict[str, type[BaseAlgorithm]] = {
    "dyna": PPO,
    "ppo": PPO,
    "sac": SAC,
    "td3": TD3,
    "ddpg": DDPG,
}
"""Agent to its learner from Stable-Baselines3; "tqc" too where sb3-contrib is there."""
OPTIONAL_PACKAGES = {
    "tqc": ("sb3_contrib", "sb3-contrib"),
    "evolution": ("cma", "cma"),
    "tpe": ("optuna", "optuna"),
}
"""Agent or baseline to the module that it imports and the package to install."""
with suppress(ImportError):
    from sb3_contrib import TQC

    ALGORITHMS["tqc"] = TQC


def check_installed(name: str, argument: str) -> None:
    """Checks that the package of an agent or a baseline can be imported.

    Args:
        name: The agent or baseline; one without a package of its own passes.
        argument: The argument that asked for it, for the message.

    Raises:
        UserError: If the package is missing; the message says how to install it.
    """
    if name not in OPTIONAL_PACKAGES:
        return
    module, package = OPTIONAL_PACKAGES[name]
    if find_spec(module) is None:
        raise missing_package(argument, name, package)
