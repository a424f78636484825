"""What `load.py` beside a pruned network does; it needs PyTorch, and no autoprune.

`autoprune.deploy.loader` writes such files from the definitions here, with `build` and
`CLASSES` as the network at hand needs them.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

HERE = Path(__file__).parent
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Types as safetensors calls them."""
WRAPPED_AS = {
    "DataParallel": "module",
    "DistributedDataParallel": "module",
    "AveragedModel": "module",
    "OptimizedModule": "_orig_mod",
}
"""Class that wraps a network, to what it calls it."""
CLASSES: dict[str, Any] = {}
"""Full name to a class that pruning puts in place of another, or adds."""
RESIZE = "autoprune.scaling.resolution.Resize"
"""The one that makes images smaller."""


def build() -> nn.Module:
    """The dense network, freshly initialised."""
    raise NotImplementedError("give the dense network: load(network)")


def load(network: nn.Module | None = None) -> nn.Module:
    """The pruned network with its weights, in evaluation mode.

    Args:
        network: The dense network, which becomes the pruned one; None builds it.

    Returns:
        The same object, without `DataParallel` or `torch.compile` around it.
    """
    network = _unwrapped(build() if network is None else network)
    plan = json.loads((HERE / "plan.json").read_text())
    for name in sorted(plan.get("removed_blocks") or [], reverse=True):
        _put_identity(network, name)
    for name, change in plan["modules"].items():
        if "class" in change:
            # The module keeps its parameters; only which code runs is exchanged.
            network.get_submodule(name).__class__ = CLASSES[change["class"]]
    path = HERE / "weights.safetensors"
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if plan["weights_sha256"] != digest:
        raise ValueError(f"plan.json in {HERE} is of other weights: copy both again")
    weights = read_weights(path)
    for name, tensor in weights.items():
        _lay(network, name, tensor)
    lacking = sorted(network.state_dict().keys() - weights.keys())
    if lacking:
        raise ValueError(f"{HERE} holds no weights for {lacking[0]}: another network?")
    for name, change in plan["modules"].items():
        for attribute, value in change.get("attributes", {}).items():
            setattr(network.get_submodule(name), attribute, _value(value))
    if plan.get("image_size"):
        network.register_forward_pre_hook(CLASSES[RESIZE](plan["image_size"]))
    return network.eval()


def _unwrapped(network: nn.Module) -> nn.Module:
    """The network that the wrappers of `WRAPPED_AS` hold."""
    attribute = WRAPPED_AS.get(type(network).__name__)
    if attribute is None:
        return network
    return _unwrapped(network.get_submodule(attribute))


def read_weights(path: Path) -> dict[str, Tensor]:
    """Name to tensor of a safetensors file: a header in JSON, and values behind it.

    Args:
        path: The file.
    """
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    metadata = header.pop("__metadata__", {})
    is_turned = set(metadata.get("channels_last", "").split())
    weights = {}
    for name, entry in header.items():
        first, end = entry["data_offsets"]
        values = bytearray(content[start + first : start + end])
        tensor = torch.empty(entry["shape"], dtype=DTYPES[entry["dtype"]])
        if values:
            flat = torch.frombuffer(values, dtype=tensor.dtype)
            tensor.copy_(flat.view(entry["shape"]))
        # The order in memory decides how PyTorch sums.
        if name in is_turned:
            tensor = tensor.clone(memory_format=torch.channels_last)
        weights[name] = tensor
    return weights


def _put_identity(network: nn.Module, name: str) -> None:
    """Puts the identity where a block was removed."""
    path, _, last = name.rpartition(".")
    network.get_submodule(path)._modules[last] = nn.Identity()


def _lay(network: nn.Module, name: str, tensor: Tensor) -> None:
    """Gives a parameter or buffer its value, of whatever shape."""
    path, _, attribute = name.rpartition(".")
    module = network.get_submodule(path)
    parameter = module._parameters.get(attribute)
    if parameter is not None:
        # The same object, since two modules may share it.
        parameter.data = tensor
    elif attribute in module._buffers:
        module._buffers[attribute] = tensor
    else:
        # Pruning made a buffer of a number, such as attention's scale.
        vars(module).pop(attribute, None)
        module.register_buffer(attribute, tensor)


def _value(value: Any) -> Any:
    """An attribute as it was, from JSON, which has no tuples."""
    if isinstance(value, list):
        return [_value(item) for item in value]
    if isinstance(value, dict):
        return tuple(_value(item) for item in value["tuple"])
    return value
