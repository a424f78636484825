"""Every layer and function of PyTorch that acts on feature maps, in 1, 2 and 3 dimensions.

Each comes behind a convolution, and a reader follows: the convolution's channels can go,
or the operation is listed with the reason why they can't.
"""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from nets import difference, outputs, random_kept, randomise
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import DeformConv2d

from autoprune.costs.cost import CostTable
from autoprune.structure.slicing import prune
from autoprune.tracing.masking import mask
from autoprune.tracing.trace import trace

N, SIDE = 8, 8
CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}

# Modules by the number of spatial axes of what they take.
MODULES = {
    1: {
        "Conv1d": lambda: nn.Conv1d(N, 6, 3),
        "ConvTranspose1d": lambda: nn.ConvTranspose1d(N, 6, 3),
        "MaxPool1d": lambda: nn.MaxPool1d(2),
        "AvgPool1d": lambda: nn.AvgPool1d(2),
        "LPPool1d": lambda: nn.LPPool1d(2, 2),
        "AdaptiveAvgPool1d": lambda: nn.AdaptiveAvgPool1d(3),
        "AdaptiveMaxPool1d": lambda: nn.AdaptiveMaxPool1d(3),
        "BatchNorm1d": lambda: nn.BatchNorm1d(N),
        "InstanceNorm1d": lambda: nn.InstanceNorm1d(N, affine=True),
        "ReflectionPad1d": lambda: nn.ReflectionPad1d(1),
        "ReplicationPad1d": lambda: nn.ReplicationPad1d(1),
        "CircularPad1d": lambda: nn.CircularPad1d(1),
        "ConstantPad1d": lambda: nn.ConstantPad1d(1, 0.5),
        "ZeroPad1d": lambda: nn.ZeroPad1d(1),
        "Dropout1d": lambda: nn.Dropout1d(),
    },
    2: {
        "Conv2d": lambda: nn.Conv2d(N, 6, 3),
        "ConvTranspose2d": lambda: nn.ConvTranspose2d(N, 6, 3),
        "MaxPool2d": lambda: nn.MaxPool2d(2),
        "AvgPool2d": lambda: nn.AvgPool2d(2),
        "LPPool2d": lambda: nn.LPPool2d(2, 2),
        "FractionalMaxPool2d": lambda: nn.FractionalMaxPool2d(2, output_size=3),
        "AdaptiveAvgPool2d": lambda: nn.AdaptiveAvgPool2d(3),
        "AdaptiveMaxPool2d": lambda: nn.AdaptiveMaxPool2d(3),
        "BatchNorm2d": lambda: nn.BatchNorm2d(N),
        "InstanceNorm2d": lambda: nn.InstanceNorm2d(N, affine=True),
        "GroupNorm": lambda: nn.GroupNorm(2, N),
        "LocalResponseNorm": lambda: nn.LocalResponseNorm(3),
        "CrossMapLRN2d": lambda: nn.CrossMapLRN2d(3),
        "ReflectionPad2d": lambda: nn.ReflectionPad2d(1),
        "ReplicationPad2d": lambda: nn.ReplicationPad2d(1),
        "CircularPad2d": lambda: nn.CircularPad2d(1),
        "ConstantPad2d": lambda: nn.ConstantPad2d(1, 0.5),
        "ZeroPad2d": lambda: nn.ZeroPad2d(1),
        "Dropout2d": lambda: nn.Dropout2d(),
        "UpsamplingNearest2d": lambda: nn.UpsamplingNearest2d(scale_factor=2),
        "UpsamplingBilinear2d": lambda: nn.UpsamplingBilinear2d(scale_factor=2),
        "PixelShuffle": lambda: nn.PixelShuffle(2),
        "PixelUnshuffle": lambda: nn.PixelUnshuffle(2),
        "ChannelShuffle": lambda: nn.ChannelShuffle(2),
        "Softmax2d": lambda: nn.Softmax2d(),
    },
    3: {
        "Conv3d": lambda: nn.Conv3d(N, 6, 3),
        "ConvTranspose3d": lambda: nn.ConvTranspose3d(N, 6, 3),
        "MaxPool3d": lambda: nn.MaxPool3d(2),
        "AvgPool3d": lambda: nn.AvgPool3d(2),
        "LPPool3d": lambda: nn.LPPool3d(2, 2),
        "FractionalMaxPool3d": lambda: nn.FractionalMaxPool3d(2, output_size=3),
        "AdaptiveAvgPool3d": lambda: nn.AdaptiveAvgPool3d(3),
        "AdaptiveMaxPool3d": lambda: nn.AdaptiveMaxPool3d(3),
        "BatchNorm3d": lambda: nn.BatchNorm3d(N),
        "InstanceNorm3d": lambda: nn.InstanceNorm3d(N, affine=True),
        "ReflectionPad3d": lambda: nn.ReflectionPad3d(1),
        "ReplicationPad3d": lambda: nn.ReplicationPad3d(1),
        "CircularPad3d": lambda: nn.CircularPad3d(1),
        "ConstantPad3d": lambda: nn.ConstantPad3d(1, 0.5),
        "ZeroPad3d": lambda: nn.ZeroPad3d(1),
        "Dropout3d": lambda: nn.Dropout3d(),
    },
}  # fmt: skip

# Those that take a map of any number of axes; most are elementwise.
ANY = {
    "Dropout": nn.Dropout, "AlphaDropout": nn.AlphaDropout, "FeatureAlphaDropout": nn.FeatureAlphaDropout,
    "CELU": nn.CELU, "ELU": nn.ELU, "GELU": nn.GELU, "Hardshrink": nn.Hardshrink, "Hardsigmoid": nn.Hardsigmoid,
    "Hardswish": nn.Hardswish, "Hardtanh": nn.Hardtanh, "LeakyReLU": nn.LeakyReLU, "LogSigmoid": nn.LogSigmoid,
    "Mish": nn.Mish, "ReLU": nn.ReLU, "ReLU6": nn.ReLU6, "RReLU": nn.RReLU, "SELU": nn.SELU, "SiLU": nn.SiLU,
    "Sigmoid": nn.Sigmoid, "Softplus": nn.Softplus, "Softshrink": nn.Softshrink, "Softsign": nn.Softsign,
    "Tanh": nn.Tanh, "Tanhshrink": nn.Tanhshrink, "Identity": nn.Identity,
    "PReLU": lambda: nn.PReLU(N), "Threshold": lambda: nn.Threshold(0.1, 0.0), "GLU": lambda: nn.GLU(1),
    "Softmax": lambda: nn.Softmax(1), "Softmin": lambda: nn.Softmin(1), "LogSoftmax": lambda: nn.LogSoftmax(1),
    "Upsample": lambda: nn.Upsample(scale_factor=2), "Flatten": lambda: nn.Flatten(2),
    "LayerNorm": lambda: nn.LayerNorm(SIDE), "RMSNorm": lambda: nn.RMSNorm(SIDE),
    "SyncBatchNorm": lambda: nn.SyncBatchNorm(N),
}  # fmt: skip

ELSEWHERE = {
    "AdaptiveLogSoftmaxWithLoss": "a loss", "Container": "a container", "Sequential": "a container", "ModuleList": "a container",
    "ModuleDict": "a container", "ParameterList": "a container", "ParameterDict": "a container", "Module": "a container",
    "DataParallel": "a wrapper",
    "NLLLoss2d": "a loss", "LazyBatchNorm1d": "lazy",
    "Bilinear": "see tests of functions", "Linear": "tests/nets.py", "Unflatten": "tests/nets.py", "Unfold": "in FUNCTIONS", "Fold": "in FUNCTIONS",
    "MaxUnpool1d": "in FUNCTIONS", "MaxUnpool2d": "in FUNCTIONS", "MaxUnpool3d": "in FUNCTIONS",
    "CosineSimilarity": "in FUNCTIONS", "PairwiseDistance": "in FUNCTIONS",
    "Embedding": "takes words", "EmbeddingBag": "takes words",
    "GRU": "tests/test_recurrent.py", "LSTM": "tests/test_recurrent.py", "RNN": "tests/test_recurrent.py", "RNNBase": "tests/test_recurrent.py",
    "GRUCell": "tests/test_recurrent.py", "LSTMCell": "tests/test_recurrent.py", "RNNCell": "tests/test_recurrent.py", "RNNCellBase": "tests/test_recurrent.py",
    "MultiheadAttention": "tests/test_attention.py", "Transformer": "tests/test_attention.py", "TransformerEncoder": "tests/test_attention.py",
    "TransformerDecoder": "tests/test_attention.py", "TransformerEncoderLayer": "tests/test_attention.py", "TransformerDecoderLayer": "tests/test_attention.py",
}  # fmt: skip


def resized(mode: str, **options):
    return lambda x: F.interpolate(x, scale_factor=2, mode=mode, **options)


def grid_sampled(x: Tensor) -> Tensor:
    """Sampled at places of a grid that doesn't depend on the map."""
    n_axes = x.ndim - 2
    theta = torch.eye(n_axes, n_axes + 1, dtype=x.dtype)[None] * 0.8
    grid = F.affine_grid(theta.expand(len(x), -1, -1), (len(x), 1, *x.shape[2:]), False)
    return F.grid_sample(x, grid, align_corners=False)


def warped(x: Tensor) -> Tensor:
    """Sampled where the map itself says."""
    shift = x.mean(1).tanh()
    grid = torch.stack([shift, shift], -1)
    return F.grid_sample(x, grid, align_corners=False)


def unpooled(x: Tensor) -> Tensor:
    pool = {3: F.max_pool1d, 4: F.max_pool2d, 5: F.max_pool3d}[x.ndim]
    unpool = {3: F.max_unpool1d, 4: F.max_unpool2d, 5: F.max_unpool3d}[x.ndim]
    small, index = pool(x, 2, return_indices=True)
    return unpool(small, index, 2)


FUNCTIONS = {
    "nearest": (1, 2, 3, resized("nearest")),
    "nearest_exact": (1, 2, 3, resized("nearest-exact")),
    "linear": (1, resized("linear")),
    "bilinear": (2, resized("bilinear")),
    "bilinear_smooth": (2, resized("bilinear", antialias=True)),
    "bicubic": (2, resized("bicubic")),
    "bicubic_smooth": (2, resized("bicubic", antialias=True)),
    "trilinear": (3, resized("trilinear", align_corners=True)),
    "area": (1, 2, 3, resized("area")),
    "unpool": (1, 2, 3, unpooled),
    "grid_sample": (2, 3, grid_sampled),
    "grid_sample_by_values": (2, warped),
    "unfold": (2, lambda x: F.unfold(x, 3, padding=1)),
    "unfold_fold": (2, lambda x: F.fold(F.unfold(x, 3, padding=1), x.shape[2:], 3, padding=1)),
    "tensor_unfold": (1, 2, 3, lambda x: x.unfold(2, 2, 2).mean(-1)),
    "cosine_similarity": (1, 2, 3, lambda x: x * F.cosine_similarity(x, x.flip(2), 1)[:, None]),
    "pairwise_distance": (1, lambda x: x + F.pairwise_distance(x.transpose(1, 2), x.transpose(1, 2).flip(1))[:, None]),
    "normalize": (1, 2, 3, lambda x: F.normalize(x, dim=1)),
    "rms_norm": (2, lambda x: F.rms_norm(x.movedim(1, -1), (x.shape[1],)).movedim(-1, 1)),
    "cumsum": (2, lambda x: x.cumsum(2)),
    "cumsum_of_channels": (2, lambda x: x.cumsum(1)),
    "cumprod": (2, lambda x: x.cumprod(2)),
    "cummax": (2, lambda x: x.cummax(2)[0]),
    "cummin": (2, lambda x: x.cummin(2)[0]),
    "logcumsumexp": (2, lambda x: x.logcumsumexp(3)),
    "sort": (2, lambda x: x.sort(2)[0]),
    "topk": (2, lambda x: x.topk(3, 2)[0]),
    "kthvalue": (1, lambda x: x.kthvalue(2, 2)[0]),
    "median": (1, lambda x: x.median(2)[0]),
    "argmax_of_space": (2, lambda x: x * (x.flatten(2).argmax(2) * 0.1)[:, :, None, None]),
    "argmax_of_channels": (2, lambda x: x * x.argmax(1, keepdim=True)),
    "prod": (1, lambda x: x.prod(2)),
    "aminmax": (1, lambda x: x.aminmax(dim=2)[1]),
    "all_any": (2, lambda x: x * (x > 0).any(2, keepdim=True) * (x > -9).all(3, keepdim=True)),
    "roll": (2, lambda x: x.roll(1, 2)),
    "rot90": (2, lambda x: x.rot90(1, (2, 3))),
    "flip": (2, lambda x: x.flip((2, 3))),
    "tril": (2, lambda x: x.tril()),
    "triu": (2, lambda x: x.triu()),
    "diagonal": (2, lambda x: x.diagonal(dim1=2, dim2=3)),
    "cdist": (1, lambda x: x.mean(2)[:, :, None] * torch.cdist(x.transpose(1, 2), x.transpose(1, 2)).mean((1, 2), keepdim=True)),
    "cdist of many rows": (1, lambda x: x.mean(2)[:, :, None] * torch.cdist(x.repeat(1, 1, 30).transpose(1, 2), 3 + x.transpose(1, 2)).mean((1, 2), keepdim=True)),
    "einsum_gram": (1, lambda x: x * torch.einsum("bct,bcs->bts", x, x).mean(2)[:, None]),
    "einsum_pool": (2, lambda x: torch.einsum("bchw,bchw->bch", x, x)),
    "einsum_outer": (1, lambda x: torch.einsum("bct,bcs->bcts", x, x).flatten(2)),
    "tensordot": (2, lambda x: torch.tensordot(x, torch.ones(SIDE, 3, dtype=x.dtype), dims=([3], [0]))),
    "matmul_of_space": (2, lambda x: x @ x.transpose(2, 3)),
    "where": (2, lambda x: torch.where(x > 0, x, x.exp())),
    "masked_fill": (2, lambda x: x.masked_fill(x > 0.5, 0.5)),
    "scatter": (1, lambda x: x.scatter(2, torch.zeros(x.shape, dtype=torch.long), 1.0)),
    "scatter_add": (1, lambda x: torch.zeros_like(x).scatter_add(2, torch.zeros(x.shape, dtype=torch.long), x)),
    "gather": (1, lambda x: x.gather(2, torch.zeros(x.shape, dtype=torch.long))),
    "take_along_dim": (1, lambda x: x.take_along_dim(x.argsort(2), 2)),
    "index_put": (1, lambda x: placed(x)),
    "index_add": (1, lambda x: x.index_add(2, torch.tensor([0, 1]), x[..., :2])),
    "index_select": (1, lambda x: x.index_select(2, torch.tensor([1, 3, 5]))),
    "assignment": (1, lambda x: assigned(x)),
    "repeat_interleave": (1, lambda x: x.repeat_interleave(2, 2)),
    "repeat_channels": (1, lambda x: x.repeat_interleave(2, 1)),
    "tile": (1, lambda x: x.tile(1, 1, 2)),
    "meshgrid": (2, lambda x: x * torch.stack(torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")).sum(0)),
    "chunk_swap": (1, lambda x: torch.cat(x.chunk(2, 1)[::-1], 1)),
    "hsplit": (2, lambda x: torch.cat(x.tensor_split(2, 3), 3)),
    "movedim": (2, lambda x: x.movedim(1, 3).swapaxes(1, 3).flatten(2)),
    "channel_mean": (2, lambda x: x - x.mean(1, keepdim=True)),
    "std_mean": (2, lambda x: (x - torch.std_mean(x, 1, keepdim=True)[1]) / torch.std_mean(x, 1, keepdim=True)[0]),
    "fft": (1, lambda x: torch.fft.rfft(x).abs()),
    "fft2": (2, lambda x: torch.fft.irfft2(torch.fft.rfft2(x) * 2)),
    "lerp": (2, lambda x: torch.lerp(x, x.flip(2), 0.3)),
    "addcmul": (2, lambda x: torch.addcmul(x, x, x, value=0.5)),
    "clamp": (2, lambda x: x.clamp(-1, 1).nan_to_num().abs().sqrt()),
    "nll_of_space": (2, lambda x: F.log_softmax(x.flatten(2), -1)),
    "gumbel": (1, lambda x: F.gumbel_softmax(x, dim=2)),
    "scaled_dot_product": (1, lambda x: F.scaled_dot_product_attention(x[:, None].transpose(2, 3), x[:, None].transpose(2, 3), x[:, None].transpose(2, 3))[:, 0].transpose(1, 2)),
    "conv_of_constant_kernel": (2, lambda x: F.conv2d(x, torch.ones(1, 1, 3, 3, dtype=x.dtype).expand(x.shape[1], 1, 3, 3), groups=x.shape[1])),
    "conv_on_batch_axis": (2, lambda x: F.conv2d(x.flatten(0, 1)[:, None], torch.ones(1, 1, 3, 3, dtype=x.dtype)).unflatten(0, x.shape[:2])[:, :, 0]),
}  # fmt: skip


def assigned(x: Tensor) -> Tensor:
    """Written into, at a place of space."""
    x = x.clone()
    x[..., 0] = 0
    return x


def placed(x: Tensor) -> Tensor:
    """The same, at places of a list."""
    x = x.clone()
    x[:, :, [1, 3]] = 0.5
    return x


PINNED = {
    "LocalResponseNorm": "works across channels as across space",
    "CrossMapLRN2d": "has no rule",
    "argmax_of_channels": "tells the number of a channel",
}
"""What can't go, and why."""


RANDOM = {"FractionalMaxPool2d", "FractionalMaxPool3d", "gumbel"}
"""What draws numbers, which the proof alone makes the same twice."""


class Between(nn.Module):
    """Convolution, the operation, and a layer that reads every channel."""

    def __init__(self, operation: Callable[[Tensor], Tensor], n_axes: int):
        super().__init__()
        self.conv = CONV[n_axes](3, N, 3, padding=1)
        self.operation = operation
        if isinstance(operation, nn.Module):
            operation.eval()
        y = (
            operation.eval()(self.conv(torch.zeros(1, 3, *[SIDE] * n_axes)))
            if isinstance(operation, nn.Module)
            else operation(self.conv(torch.rand(1, 3, *[SIDE] * n_axes)))
        )
        self.head = nn.Linear(y.shape[1], 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.operation(self.conv(x))
        return self.head(y.flatten(2).mean(2) if y.ndim > 2 else y)


def cases() -> list:
    """Every operation, with the number of its spatial axes and its name."""
    found = []
    for n_axes, modules in MODULES.items():
        for name, build in modules.items():
            found.append(pytest.param(build, n_axes, name, id=name))
    for n_axes in CONV:
        for name, build in ANY.items():
            found.append(pytest.param(build, n_axes, name, id=f"{name}-{n_axes}d"))
    for name, (*axes, function) in FUNCTIONS.items():
        for n_axes in axes:
            build = partial(identity, function)
            found.append(pytest.param(build, n_axes, name, id=f"{name}-{n_axes}d"))
    return found


def identity(function: Callable) -> Callable:
    """The function itself, as a module's class makes the module."""
    return function


@pytest.mark.parametrize(("build", "n_axes", "name"), cases())
def test_channels_before_an_operation_can_go_or_the_reason_is_listed(
    build, n_axes, name
):
    torch.manual_seed(0)
    model = randomise(Between(build(), n_axes).double()).eval()
    x = torch.randn(2, 3, *[SIDE] * n_axes, dtype=torch.float64)
    groups = trace(model, x[:1])
    if name in PINNED:
        assert PINNED[name] in groups.reasons["conv"]
        return
    assert "conv" in groups.channels, (groups.reasons, groups.unsupported)
    if name in RANDOM:
        return
    kept = random_kept(groups, 0)
    pruned = outputs(prune(model, groups, kept), x)
    assert difference(pruned, outputs(mask(model, groups, kept), x)) < 1e-10


def test_every_module_of_pytorch_is_traced_here_or_elsewhere():
    listed = {*ANY, *ELSEWHERE}
    for modules in MODULES.values():
        listed.update(modules)
    for name, kind in vars(nn).items():
        is_module = isinstance(kind, type) and issubclass(kind, nn.Module)
        # Losses come after the network; lazy layers become one of these.
        if is_module and not name.endswith("Loss") and not name.startswith("Lazy"):
            assert name in listed, f"{name} isn't in a list of this test"


class Deformable(nn.Module):
    """A deformable convolution between two plain ones, with weights of its places."""

    def __init__(self, groups: int = 1, offset_groups: int = 1):
        super().__init__()
        self.stem = nn.Conv2d(3, N, 3, padding=1)
        self.places = nn.Conv2d(N, 27 * offset_groups, 3, padding=1)
        self.body = DeformConv2d(N, 6, 3, padding=1, groups=groups)
        self.head = nn.Conv2d(6, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).tanh()
        first, second, weights = self.places(x).chunk(3, 1)
        offsets = torch.cat([first, second], 1)
        return self.head(self.body(x, offsets, weights.sigmoid()).tanh())


@pytest.mark.parametrize("options", [{}, {"groups": 2}, {"offset_groups": 2}])
def test_deformable_convolutions_lose_inputs_and_outputs_and_are_counted(options):
    model = randomise(Deformable(**options).double()).eval()
    x = torch.randn(2, 3, SIDE, SIDE, dtype=torch.float64)
    groups = trace(model, x[:1])
    assert {"stem", "body"} <= set(groups.channels)
    assert "its places" in groups.reasons["places"]
    kept = random_kept(groups, 0)
    pruned = prune(model, groups, kept)
    masked = mask(model, groups, kept)
    assert difference(outputs(pruned, x), outputs(masked, x)) < 1e-12
    counts = {name: len(channels) for name, channels in kept.items()}
    n_weights = 0
    for layer in (pruned.stem, pruned.places, pruned.body, pruned.head):
        n_weights += layer.weight.numel()
    assert CostTable(groups).macs(counts) == n_weights * SIDE**2
