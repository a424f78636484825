"""Gymnasium environments of autoprune; importing this package registers them.

import gymnasium, envs env = gymnasium.make("autoprune/LayerPruning-v0", model=model,
groups=groups, proxy=proxy, budget="macs=50%")

`gymnasium.make_vec` with vectorization_mode="vector_entry_point" makes lanes that are
scored together.
"""

from gymnasium.envs.registration import register

register(
    id="autoprune/LayerPruning-v0",
    entry_point="autoprune.envs.layer_pruning:LayerPruningEnv",
    vector_entry_point="autoprune.envs.vector:LayerPruningVectorEnv",
)
