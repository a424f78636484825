"""What an environment is made of: a trained network, its trace and a proxy.

`network_named` makes all three from two names, for environments that are made from text
alone as Gymnasium's registry wants it.
"""

from typing import NamedTuple

from torch import nn

from autoprune.config import DataConfig
from autoprune.costs.budget import AnyBudget
from autoprune.costs.search_space import SearchSpace
from autoprune.data.datasets import open_dataset, read_dataset
from autoprune.data.models import build, embedded_resnet20, prepare_network
from autoprune.data.places import has_embedded_weights
from autoprune.data.preprocessing_sources import preprocessing_of
from autoprune.errors import UserError
from autoprune.evaluation.importance import importance
from autoprune.evaluation.proxy import ProxyAccuracy
from autoprune.evaluation.proxy_protocol import Proxy
from autoprune.structure.groups import Groups, named_tensors
from autoprune.tracing.trace import trace


class NamedNetwork(NamedTuple):
    """What an environment needs of a network.

    Attributes:
        model: The trained network, in eval mode.
        groups: Its trace.
        proxy: Scores its allocations.
    """

    model: nn.Module
    groups: Groups
    proxy: Proxy


def network_named(model: str, data: str) -> NamedNetwork:
    """A trained network on a dataset, with importance "l1".

    Everything is as the command line makes it without options.

    Args:
        model: "resnet20", whose weights are embedded, or `package.module:factory` or
            `./file.py:factory` for a callable that returns a trained network.
        data: A dataset's name, or a folder with images.

    Raises:
        UserError: If the network or the data isn't known, has no trained weights here,
            or the network doesn't answer these images with these classes.
    """
    config = DataConfig(data=data)
    dataset = open_dataset(config)
    n_classes = len(dataset.classes)
    network = _trained(model, data, n_classes)
    preprocessing = preprocessing_of(network, config, model, n_classes=n_classes)
    splits = read_dataset(dataset, config, preprocessing)
    # As a run does it, so that importance is the same to the last bit.
    network = prepare_network(network, model, splits.example, n_classes)
    groups = trace(network, splits.example)
    scores = importance("l1", network, groups, splits.train)
    return NamedNetwork(network, groups, ProxyAccuracy(network, groups, scores, splits))


def _trained(model: str, data: str, n_classes: int) -> nn.Module:
    """The network with its weights."""
    if ":" in model:
        # A factory brings its own weights.
        return build(model, n_classes)
    if has_embedded_weights(model, data):
        return embedded_resnet20()
    raise UserError(
        "model",
        f"{model!r} has no trained weights for {data!r} here; pass the trained "
        f"torch.nn.Module with groups and proxy, or package.module:factory",
    )


def suited_proxy(proxy: Proxy, space: SearchSpace, budget: AnyBudget) -> Proxy:
    """The proxy itself, or one that reconstructs where a tight budget asks for it.

    Where uniform pruning to the budget leaves a network worse than a guess, losses of
    networks that are only sliced rank nothing. Of a range the tightest budget decides.

    Args:
        proxy: Scores allocations of the network; its config says whether there is a
            choice.
        space: The allocations to choose from.
        budget: Has to be reachable.
    """
    target = budget.at_position(0).target(space.costs)
    tightest = space.uniform(target)
    return proxy.suited_to(dict(zip(space.costs.names, tightest.tolist(), strict=True)))


def check_network(model: nn.Module, groups: Groups, proxy: Proxy) -> None:
    """Checks that all three are of one network that can be pruned.

    Args:
        model: The network.
        groups: A trace.
        proxy: Scores allocations of a network.

    Raises:
        UserError: If they aren't.
    """
    tensors = named_tensors(model)
    # A trace may hold buffers that the model lacks, never parameters.
    lacks_parameters = not groups.parameters <= tensors.keys()
    # Shapes are compared, not values: a network may be trained on after its trace.
    has_other_shapes = False
    for name, tensor in tensors.items():
        has_other_shapes |= groups.shapes.get(name) != tuple(tensor.shape)
    if (
        has_other_shapes
        or lacks_parameters
        or proxy.groups.fingerprint != groups.fingerprint
    ):
        raise UserError(
            "groups",
            "model, groups and proxy are of different networks; trace the "
            "model that you pass",
        )
    if not len(groups):
        reasons = {f"{group.name}: {group.pinned}" for group in groups.pinned}
        examples = "; ".join(sorted(reasons)[:3])
        raise UserError(
            "model", f"nothing can be pruned ({examples}); see `autoprune trace`"
        )
