"""The metric `size` against the files that `save_pruned` really writes."""

import numpy as np
import pytest
import torch
from nets import NETS, build, images
from torch import nn

from autoprune.costs.cost import CostTable
from autoprune.deploy.pruned import save_pruned
from autoprune.files import WEIGHTS
from autoprune.structure.slicing import prune
from autoprune.tracing.trace import trace

PLAN = {"model": "own", "n_classes": 5}


def file_size(model: nn.Module, dense: nn.Module, folder) -> int:
    save_pruned(model, folder, PLAN, dense)
    return (folder / WEIGHTS).stat().st_size


def sizes_and_files(model, x, folder, n_draws: int = 3):
    """Costs and real files of the dense network and of random allocations."""
    groups = trace(model, x, verify=False)
    costs, generator = CostTable(groups), np.random.default_rng(0)
    draws = [costs.dense, costs.dense * 0 + 1]
    draws += [generator.integers(1, costs.dense + 1) for _ in range(n_draws)]
    for number, counts in enumerate(draws):
        kept = {
            name: torch.arange(int(n))
            for name, n in zip(costs.names, counts, strict=True)
        }
        pruned = prune(model, groups, kept)
        for form in (torch.contiguous_format, torch.channels_last):
            pruned = pruned.to(memory_format=form)
            yield (
                costs.size(counts),
                file_size(pruned, model, folder / f"{number}{form}"),
                len(groups.stored),
            )


@pytest.mark.parametrize("name", [name for name, net in NETS.items() if net.groups])
def test_size_is_at_least_the_file_and_hardly_more(name, tmp_path):
    model, x = build(name), images(1, NETS[name].size)
    for size, written, n_tensors in sizes_and_files(model, x, tmp_path, 1):
        assert written <= size
        # Per tensor: a longer name of its type, digits, its name among channels last.
        assert size <= written + 80 * n_tensors + 100


class Buffers(nn.Module):
    """Integer buffers, one outside the state dict, tied weights, odd names."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.register_buffer("steps", torch.arange(1000))
        self.register_buffer("shift", torch.randn(8, 1, 1), persistent=False)
        self.register_buffer("flags", torch.zeros(77, dtype=torch.bool))
        self.add_module("Köpfe", nn.Linear(8, 5))
        self.twin = self.get_submodule("Köpfe")

    def forward(self, x):
        x = self.norm(self.stem(x)) + self.shift
        return self.twin(x.mean((2, 3)))


def test_size_counts_true_types_tied_weights_and_buffers_outside_the_state(tmp_path):
    model = Buffers().eval()
    for size, written, n_tensors in sizes_and_files(model, images(1, 8), tmp_path):
        assert written <= size <= written + 80 * n_tensors + 100
    costs = CostTable(trace(model, images(1, 8), verify=False))
    state = sum(tensor.nbytes for tensor in model.state_dict().values())
    assert costs.size({}) > state + 8 * 4
    # A channel of the stem: its filter, bias, norm (4) and shift; the head's column
    # lies under two names.
    assert costs.size({}) - costs.size({"stem": 7}) == 4 * (27 + 1 + 4 + 1 + 2 * 5)
