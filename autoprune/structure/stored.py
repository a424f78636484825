"""What a file of a network's weights holds, tensor by tensor.

Pruning shortens tensors and leaves names and types as they are, so the file of a pruned
network follows from this without the network.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

from torch import nn

from autoprune.structure.groups import named_tensors

ALIGNMENT = 8
"""The header of a safetensors file is filled up to a multiple of so many bytes."""
LENGTH_BYTES = 8
"""In front of the header stands its length, in so many bytes."""
LONGEST_TYPE = "BOOL"
"""The longest name of a type; float32 is called F32."""


@dataclass(frozen=True)
class StoredTensor:
    """One entry of the file.

    Attributes:
        key: Its name there.
        tensor: The name of the tensor in `Groups.shapes`; tied weights are one tensor
            with several entries.
        item_bytes: Bytes of an element: 4 for floats, whatever the network's type.
        is_in_state: Whether the state dict holds it; other buffers are stored only
            where pruning has changed them.
    """

    key: str
    tensor: str
    item_bytes: int
    is_in_state: bool = True


def stored_tensors(model: nn.Module) -> tuple[StoredTensor, ...]:
    """What the file of a network's weights can hold.

    Args:
        model: The network, in float32.
    """
    names = {}
    for name, tensor in named_tensors(model).items():
        names[id(tensor)] = name
    state = model.state_dict(keep_vars=True)
    # A dict, since buffers of the state dict come by twice.
    entries = {}
    for key, tensor in [*state.items(), *model.named_buffers()]:
        entries[key] = StoredTensor(
            key, names[id(tensor)], tensor.element_size(), key in state
        )
    return tuple(entries.values())


def header_bytes(
    stored: Sequence[StoredTensor], shapes: Mapping[str, tuple[int, ...]]
) -> int:
    """The most that comes before the tensors in a safetensors file of a network.

    Args:
        stored: What the file holds.
        shapes: Tensor to its shape in the dense network; shapes and offsets of a pruned
            one have no more digits.
    """
    total = sum(item.item_bytes * prod(shapes[item.tensor]) for item in stored)
    # `save_pruned` names the tensors that are channels last, maybe all that can be.
    images = [item.key for item in stored if len(shapes[item.tensor]) == 4]
    header: dict[str, object] = {"__metadata__": {"channels_last": " ".join(images)}}
    for item in stored:
        header[item.key] = {
            "dtype": LONGEST_TYPE,
            "shape": shapes[item.tensor],
            "data_offsets": [total, total],
        }
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":"))
    length = len(text.encode())
    return LENGTH_BYTES + -(-length // ALIGNMENT) * ALIGNMENT
