"""What modules keep of evaluation, such as a table of biases that is looked up once."""

from torch import nn


def may_keep_caches(model: nn.Module) -> bool:
    """Whether a module may keep something of earlier runs.

    Such a module overrides `train` to empty its cache when training begins, as timm's
    LeViT does.

    Args:
        model: The network.
    """
    return any(type(module).train is not nn.Module.train for module in model.modules())


def drop_caches(model: nn.Module) -> None:
    """Empties what modules keep of earlier runs, which another width makes wrong.

    The modes of all modules stay as they are.

    Args:
        model: The network, changed in place.
    """
    if not may_keep_caches(model):
        return
    modules = list(model.modules())
    modes = [module.training for module in modules]
    model.train()
    # Back by the same way, since a module may note its mode elsewhere too.
    model.train(modes[0])
    for module, is_training in zip(modules, modes, strict=True):
        module.training = is_training
