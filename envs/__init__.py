"""Gymnasium environments of autoprune; importing this package registers them.

import gymnasium, envs
env = gymnasium.make("autoprune/LayerPruning-v0", model=model, groups=groups, proxy=proxy, budget="macs=50%")
"""

from gymnasium.envs.registration import register

register(id="autoprune/LayerPruning-v0", entry_point="envs.layer_pruning:LayerPruningEnv")
