"""The inputs that engines are timed on, and what PyTorch answers to them."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from autoprune.deploy.export import plain_copy
from autoprune.deploy.signature import Signature, signature_of
from autoprune.errors import UserError
from autoprune.latency.engine_protocol import Setting
from autoprune.structure.groups import tensors_in
from autoprune.structure.inputs import Example, Inputs


@dataclass(frozen=True)
class Samples:
    """One batch of random inputs for a network.

    Attributes:
        network: A copy of the network in evaluation mode, on the CPU, in float32.
        signature: How it is called.
        inputs: The batch, floats in float32.
        expected: PyTorch's outputs for it in float32.
    """

    network: nn.Module
    signature: Signature
    inputs: Inputs
    expected: list[Tensor]

    @classmethod
    def of(cls, model: nn.Module, example: Example, setting: Setting) -> "Samples":
        """A batch as long as a setting says, the same at every call.

        Args:
            model: The network; it is left as found.
            example: Its inputs, as `trace` takes them.
            setting: Its batch counts.

        Raises:
            UserError: If the network takes no batches and more than 1 is asked for, or
                the example doesn't fit.
        """
        network = plain_copy(model)
        signature = signature_of(network, example)
        _check_batch(signature, setting.batch)
        # Random, because zeros might be faster; seeded, so that all get the same.
        generator = torch.Generator().manual_seed(0)
        inputs = signature.samples(setting.batch, generator)
        with torch.no_grad():
            expected = tensors_in(inputs.run(network))
        return cls(network, signature, inputs, expected)


def takes_batches(model: nn.Module, example: Example) -> bool:
    """Whether a network takes batches of any length.

    Args:
        model: The network; it is left as found.
        example: Its inputs, as `trace` takes them.
    """
    return signature_of(plain_copy(model), example).has_batch


def check_batch(model: nn.Module, example: Example, batch: int) -> None:
    """Refuses a batch that a network doesn't take.

    Args:
        model: The network; it is left as found.
        example: Its inputs, as `trace` takes them.
        batch: The batch.

    Raises:
        UserError: If the network takes no batches and more than 1 is asked for.
    """
    # Every network takes that, and finding out takes passes.
    if batch > 1:
        _check_batch(signature_of(plain_copy(model), example), batch)


def _check_batch(signature: Signature, batch: int) -> None:
    """As `check_batch`, where it is known how the network is called."""
    if batch > 1 and not signature.has_batch:
        raise UserError(
            "latency.batch",
            f"this network takes no batches of any length, so it must be 1, got "
            f"{batch}",
        )
