"""What modules keep of evaluation, such as a table of biases that is looked up once."""

from torch import nn


def drop_caches(model: nn.Module) -> None:
    """Empties what modules keep of earlier runs, which another width makes wrong.

    Such a module overrides `train` to empty its cache when training begins, as timm's
    LeViT does. The modes of all modules stay as they are.

    Args:
        model: The network, changed in place.
    """
    modules = list(model.modules())
    if all(type(module).train is nn.Module.train for module in modules):
        return
    modes = [module.training for module in modules]
    model.train()
    # Back by the same way, since a module may note its mode elsewhere too.
    model.train(modes[0])
    for module, is_training in zip(modules, modes, strict=True):
        module.training = is_training
