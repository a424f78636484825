"""Networks of several inputs: tuples, lists and dicts, of floats and of integers."""

from collections import namedtuple
from dataclasses import dataclass

import pytest
import torch
from nets import CLASSES, RGB, conv, images, pooled, random_kept, randomise
from torch import Tensor, nn
from torch.nn import functional as F

from autoprune.costs.cost import CostTable
from autoprune.errors import UserError
from autoprune.structure.inputs import Inputs
from autoprune.structure.slicing import prune
from autoprune.tracing.masking import mask
from autoprune.tracing.trace import trace

WORDS, LENGTH = 11, 6
Pair = namedtuple("Pair", "left right")


class Two(nn.Module):
    """An image and token ids, added; optionally scaled by a vector of each sample."""

    def __init__(self):
        super().__init__()
        self.image = conv(RGB, 8)
        self.words = nn.Embedding(WORDS, 8)
        self.mix = nn.Linear(8, 10)
        self.head = nn.Linear(10, CLASSES)

    def forward(self, image: Tensor, ids: Tensor, scale: Tensor | None = None):
        h = pooled(F.relu(self.image(image))) + self.words(ids).mean(1)
        if scale is not None:
            h = h * scale[:, None]
        return self.head(F.relu(self.mix(h)))


class Nested(nn.Module):
    """The same inputs in a dict within a list."""

    def __init__(self):
        super().__init__()
        self.two = Two()

    def forward(self, batch):
        return self.two(batch[0]["image"], batch[0]["ids"])


class Apart(nn.Module):
    """Two images of different channels, each in a branch of its own."""

    def __init__(self):
        super().__init__()
        self.left, self.right = conv(RGB, 8), conv(2, 6)
        self.head = nn.Linear(14, CLASSES)

    def forward(self, pair):
        left, right = pair
        both = torch.cat([pooled(self.left(left)), pooled(self.right(right))], 1)
        return self.head(both)


def ids(n: int) -> Tensor:
    return torch.arange(n * LENGTH).view(n, LENGTH) % WORDS


def two(n: int) -> tuple[Tensor, Tensor]:
    return images(n, 8), ids(n)


def check_pruned_equals_masked(model, groups, inputs):
    kept = random_kept(groups, seed=0)
    pruned = Inputs.from_example(inputs).run(prune(model, groups, kept))
    masked = Inputs.from_example(inputs).run(mask(model, groups, kept))
    torch.testing.assert_close(pruned, masked, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "example",
    [
        two(2),
        list(two(2)),
        {"ids": ids(2), "image": images(2, 8)},
        (*two(2), torch.tensor([0.5, 2.0])),
    ],
    ids=["tuple", "list", "keywords", "with a vector"],
)
def test_inputs_by_position_and_by_keyword_are_traced_alike(example):
    model = randomise(Two()).eval()
    groups = trace(model, example)
    assert groups.channels == {"image": 8, "mix": 10}
    assert groups.reasons["image:input"] == "is the network's input"
    check_pruned_equals_masked(model, groups, example)


def test_tensors_inside_lists_and_dicts_are_found():
    model = randomise(Nested()).eval()
    image, tokens = two(1)
    example = ([{"image": image, "ids": tokens}],)
    groups = trace(model, example)
    assert groups.channels == {"two.image": 8, "two.mix": 10}
    check_pruned_equals_masked(model, groups, example)


@dataclass(frozen=True)
class Both:
    """Two tensors, as networks of some libraries take and return them."""

    first: Tensor
    second: Tensor


class Grouped(nn.Module):
    """Inputs and outputs are a dataclass."""

    def __init__(self):
        super().__init__()
        self.two = Two()

    def forward(self, inputs: Both) -> Both:
        features = F.relu(self.two.image(inputs.first))
        return Both(self.two(inputs.first, inputs.second), features)


def test_tensors_inside_dataclasses_are_found():
    model = randomise(Grouped()).eval()
    example = (Both(*two(2)),)
    groups = trace(model, example)
    # The features of the image are an output as well.
    assert groups.channels == {"two.mix": 10}
    kept = random_kept(groups, 0)
    pruned = prune(model, groups, kept)(*example)
    masked = mask(model, groups, kept)(*example)
    torch.testing.assert_close(pruned.first, masked.first, rtol=1e-4, atol=1e-5)
    assert pruned.second.shape == model(*example).second.shape


@pytest.mark.parametrize("output", [None, 3, "text", object()])
def test_a_network_that_returns_no_tensor_is_refused(output):
    class Mute(Two):
        def forward(self, image, ids):
            super().forward(image, ids)
            return output

    with pytest.raises(UserError, match="returns no tensor, but"):
        trace(Mute().eval(), two(1))


def test_every_float_inputs_channels_are_pinned():
    model = randomise(Apart()).eval()
    example = (Pair(images(1, 8), images(1, 8)[:, :2]),)
    groups = trace(model, example)
    assert groups.channels == {"left": 8, "right": 6}
    for name in ("left:input", "right:input"):
        assert groups.reasons[name] == "is the network's input"
    check_pruned_equals_masked(model, groups, example)


def test_costs_are_those_of_the_first_sample():
    model = Two().eval()
    one = CostTable(trace(model, two(1)))
    three = CostTable(trace(model, two(3)))
    # 8 x 8 places, kernels of 3 x 3; two linear layers; the table costs nothing.
    assert one.macs(one.dense) == 64 * 9 * RGB * 8 + 8 * 10 + 10 * CLASSES
    assert three.macs(three.dense) == one.macs(one.dense)


def test_a_batch_is_cut_only_where_all_tensors_have_it():
    lengths = []
    for example in (two(3), (images(3, 8), ids(2)), ([images(3, 8)], ids(3))):
        tensors = Inputs.from_example(example).first_sample().tensors()
        lengths.append([len(tensor) for tensor in tensors])
    assert lengths == [[1, 1], [3, 2], [3, 3]]


def test_inputs_are_left_as_found():
    model = Two().eval()
    image, tokens = two(2)
    before = (dict(vars(image)), image.clone(), tokens.clone())
    groups = trace(model, (image.double(), tokens))
    mask(model, groups, {})(image, tokens)
    assert vars(image) == before[0]
    assert torch.equal(image, before[1])
    assert torch.equal(tokens, before[2])


def test_a_tensor_that_is_given_twice_stays_one():
    x = images(1, 8)
    changed = Inputs((x, [x])).change(torch.neg)
    assert changed.positional[0] is changed.positional[1][0]


@pytest.mark.parametrize(
    ("example", "reason"),
    [
        (images(1, 8), r"doesn't fit Two.forward\(image, ids, scale\): missing"),
        ({"picture": images(1, 8), "ids": ids(1)}, "doesn't fit"),
        ((*two(1), None, None), "too many positional arguments"),
        ("an image", "must be a tensor, a tuple or list of inputs, or a dict"),
        ((), "holds no tensor"),
        ({"ids": 3}, "holds no tensor"),
    ],
)
def test_what_does_not_fit_is_refused_in_a_line(example, reason):
    with pytest.raises(UserError, match=reason) as caught:
        trace(Two().eval(), example)
    assert caught.value.argument == "example"
    assert "\n" not in str(caught.value)
