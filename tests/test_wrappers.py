"""Networks as people hold them: wrapped ones are pruned like the network inside, and
those that can't be pruned are refused with the remedy.
"""

import warnings
from typing import Any

import pytest
import torch
from nets import Chain, images, random_kept, randomise
from torch import nn
from torch.nn.utils import prune as torch_prune

from autoprune.data.datasets import Images
from autoprune.deploy.export import export_onnx
from autoprune.deploy.pruned import save_pruned
from autoprune.errors import UserError
from autoprune.evaluation.importance import importance
from autoprune.structure.slicing import prune
from autoprune.structure.wrappers import unwrap
from autoprune.tracing.masking import mask
from autoprune.tracing.trace import trace

X = images(1, 8)


class Parallel(nn.parallel.DistributedDataParallel):
    """As it is between processes, without starting any."""

    def __init__(self, module):
        nn.Module.__init__(self)
        self.module = module


class Holding(nn.Module):
    """A network that keeps what its last pass computed, and its parts by themselves."""

    def __init__(self, net):
        super().__init__()
        self.net = net
        self.seen = {}

    def forward(self, x):
        self.last = self.net(x)
        self.seen["all"] = [self.last, (self.last.sum(),)]
        return self.last


def chain() -> Chain:
    net = Chain()
    randomise(net)
    return net.eval()


def compiled_on_gpus(net: Any) -> nn.Module:
    compiled: Any = torch.compile(net)
    return nn.DataParallel(compiled)


WRAPPED = {
    "on several GPUs": nn.DataParallel,
    "in several processes": Parallel,
    "compiled": torch.compile,
    "averaged": torch.optim.swa_utils.AveragedModel,
    "compiled on several GPUs": compiled_on_gpus,
}


@pytest.mark.parametrize("name", WRAPPED)
def test_wrapped_networks_are_pruned_like_the_network_inside(name, tmp_path):
    net = chain()
    wrapped = WRAPPED[name](net)
    groups = trace(wrapped, X)
    assert groups.channels == trace(net, X).channels == {"conv1": 6, "conv2": 8}
    kept = random_kept(groups, seed=0)
    expected = prune(net, groups, kept)(X)
    assert torch.equal(prune(wrapped, groups, kept)(X), expected)
    torch.testing.assert_close(mask(wrapped, groups, kept)(X), expected)
    data = Images(torch.zeros(4, 3, 8, 8, dtype=torch.uint8), torch.arange(4) % 2)
    scores = importance("taylor", wrapped, groups, data)
    torch.testing.assert_close(scores, importance("taylor", net, groups, data))
    plan = {"model": "x", "n_classes": 2}
    save_pruned(wrapped, tmp_path, plan, dense=chain())
    assert (tmp_path / "weights.safetensors").is_file()


def test_wrapped_networks_are_exported(tmp_path):
    assert export_onnx(nn.DataParallel(chain()), X, tmp_path / "net.onnx") < 1e-4


def test_compiled_parts_are_traced_as_they_were_written():
    net = chain()
    compiled: Any = torch.compile(nn.Sequential(net.conv2))
    net.conv2 = compiled
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        groups = trace(net, X)
        masked = mask(net, groups, random_kept(groups, seed=0))(X)
    assert list(groups.channels) == ["conv1", "conv2._orig_mod.0"]
    assert torch.isfinite(masked).all()


def test_activations_that_a_network_keeps_are_no_obstacle(tmp_path):
    net = Holding(chain())
    net(X).sum().backward()
    last = net.last
    groups = trace(net, X)
    kept = random_kept(groups, seed=0)
    pruned = prune(net, groups, kept)(X)
    torch.testing.assert_close(pruned, mask(net, groups, kept)(X))
    assert net.last is last
    assert export_onnx(net, X, tmp_path / "net.onnx") < 1e-4


def masked_by_torch() -> nn.Module:
    net = chain()
    torch_prune.ln_structured(net.conv1, "weight", 0.3, n=1, dim=0)
    torch_prune.random_unstructured(net.conv1, "weight", 0.3)
    return net


def normed(norm) -> nn.Module:
    net = chain()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        norm(net.conv1)
    return net


def lazy() -> nn.Module:
    return nn.Sequential(nn.LazyConv2d(8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1))


def scripted() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.trace(chain(), X)


def exported() -> nn.Module:
    return torch.export.export(chain(), (X,)).module()


REFUSED = {
    "masked": (masked_by_torch, r'conv1 .*torch\.nn\.utils\.prune\.remove\(module, "w'),
    "weight norm": (lambda: normed(nn.utils.weight_norm), "remove_weight_norm"),
    "spectral norm": (lambda: normed(nn.utils.spectral_norm), "remove_spectral_norm"),
    "lazy": (lazy, r"0 \(LazyConv2d\) has no weights yet; run the network once"),
    "scripted": (scripted, "is TorchScript"),
    "a part scripted": (lambda: nn.Sequential(scripted()), "0 is TorchScript"),
    "exported": (exported, "comes from torch.export"),
    "without weights": (lambda: chain().to("meta"), "meta device"),
    "weights alone": (lambda: chain().state_dict(), "must be a network"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_networks_that_cannot_be_pruned_are_refused_with_the_remedy(name):
    make, remedy = REFUSED[name]
    model = make()
    with pytest.raises(UserError, match=remedy) as caught:
        trace(model, X)
    assert caught.value.argument == "model"
    assert "\n" not in str(caught.value)


def test_the_remedies_work():
    net = masked_by_torch()
    torch_prune.remove(net.conv1, "weight")
    assert len(trace(net, X)) == 2
    net = normed(nn.utils.weight_norm)
    nn.utils.remove_weight_norm(net.conv1, "weight")
    assert len(trace(net, X)) == 2
    net = lazy()
    net(X)
    assert len(trace(net, X)) == 1


def test_a_bare_network_is_not_unwrapped():
    net = chain()
    assert unwrap(net) is net
