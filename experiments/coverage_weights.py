"""Networks whose weights are computed from parameters, beside their plain siblings."""

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torchvision import models


class Standardised(nn.Module):
    """Weights with mean 0 and deviation 1 for every output channel."""

    def forward(self, weight: Tensor) -> Tensor:
        """The weights that the layer computes with."""
        axes = list(range(1, weight.ndim))
        mean = weight.mean(axes, keepdim=True)
        return (weight - mean) / (weight.std(axes, keepdim=True) + 1e-5)


def _standardise(module: nn.Module) -> None:
    parametrize.register_parametrization(module, "weight", Standardised())


# By name: the network, and what is done to every convolution of it.
BUILDERS: dict[str, tuple[str, Callable[[nn.Module], object] | None]] = {
    "resnet18": ("resnet18", None),
    "resnet18 weight_norm": ("resnet18", parametrizations.weight_norm),
    "resnet18 spectral_norm": ("resnet18", parametrizations.spectral_norm),
    "resnet18 standardised": ("resnet18", _standardise),
    "mobilenet_v2": ("mobilenet_v2", None),
    "mobilenet_v2 weight_norm": ("mobilenet_v2", parametrizations.weight_norm),
}


def names() -> list[str]:
    """The networks' names, each after its plain sibling."""
    return list(BUILDERS)


def build(name: str) -> nn.Module:
    """A network, freshly initialised.

    Args:
        name: One of `names`.
    """
    builder, change = BUILDERS[name]
    model = models.get_model(builder, weights=None)
    if change is not None:
        for module in list(model.modules()):
            if isinstance(module, nn.Conv2d):
                change(module)
    return model
