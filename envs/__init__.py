"""Gymnasium environments of autoprune; importing this package registers them.

Gymnasium 1.0 removed its plugin system, so an installed package can't register
environments by itself. An id that names this package makes Gymnasium import it:

    import gymnasium

    env = gymnasium.make("autoprune.envs:autoprune/LayerPruning-v0")

After `import autoprune.envs` the plain id "autoprune/LayerPruning-v0" will do.
`gymnasium.make_vec` takes the same ids and makes episodes that step together and are
scored together. Neither form imports PyTorch before an environment is made.
"""

from gymnasium.envs.registration import register, registry

ENV_ID = "autoprune/LayerPruning-v0"


def register_envs() -> None:
    """Registers the environments with Gymnasium; a second call changes nothing."""
    # Gymnasium warns when an id is registered again, which would happen where a test or
    # a notebook imports this package by another name.
    if ENV_ID in registry:
        return
    register(
        id=ENV_ID,
        entry_point="autoprune.envs.layer_pruning:LayerPruningEnv",
        vector_entry_point="autoprune.envs.vector:LayerPruningVectorEnv",
    )


register_envs()
