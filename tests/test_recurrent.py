"""Recurrent layers behind a convolution: what feeds them and their hidden units."""

from collections.abc import Callable

import pytest
import torch
from nets import difference, outputs, random_kept, randomise
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.flop_counter import FlopCounterMode

from autoprune.costs.cost import CostTable
from autoprune.structure.slicing import prune
from autoprune.tracing.masking import mask
from autoprune.tracing.trace import trace

WIDTH, HEIGHT, LENGTH, HIDDEN = 5, 4, 7, 6


class Reader(nn.Module):
    """Columns of a map as steps of a sequence, as text recognition reads them."""

    def __init__(self, layer: nn.RNNBase, n_out: int):
        super().__init__()
        self.conv = nn.Conv2d(1, WIDTH, 3, padding=1)
        self.layer = layer
        self.head = nn.Linear(n_out, 3)

    def steps(self, x: Tensor) -> Tensor:
        """`(batch, length, features)`, or the first two swapped."""
        steps = self.conv(x).tanh().permute(0, 3, 1, 2).flatten(2)
        return steps if self.layer.batch_first else steps.transpose(0, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(self.steps(x))[0])


class LastState(Reader):
    """Reads the last state alone, of all layers and directions."""

    def forward(self, x: Tensor) -> Tensor:
        state = self.layer(self.steps(x))[1]
        hidden = state[0] if isinstance(state, tuple) else state
        return self.head(hidden.transpose(0, 1).flatten(1))


class Packed(Reader):
    """Packs the sequences first."""

    def forward(self, x: Tensor) -> Tensor:
        steps = self.steps(x)
        lengths = torch.tensor([LENGTH - 2] * len(steps))
        packed = pack_padded_sequence(steps, lengths, batch_first=True)
        out, _ = pad_packed_sequence(self.layer(packed)[0], batch_first=True)
        return self.head(out)


class FromImage(Reader):
    """Begins with a state that a layer makes, and one that is learned."""

    def __init__(self, layer: nn.RNNBase, n_out: int):
        super().__init__(layer, n_out)
        self.start = nn.Linear(WIDTH, HIDDEN)
        self.learned = nn.Parameter(torch.ones(1, 1, HIDDEN))

    def forward(self, x: Tensor) -> Tensor:
        start = self.start(self.conv(x).mean((2, 3)))[None] + self.learned
        return self.head(self.layer(self.steps(x), start)[0])


class Cells(Reader):
    """Steps written as a loop over a cell."""

    def forward(self, x: Tensor) -> Tensor:
        state = None
        for step in self.steps(x).unbind(1):
            state = self.layer(step, state)
        return self.head(state[0] if isinstance(state, tuple) else state)


pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections")


def stack(kind: type[nn.RNNBase], **options) -> nn.RNNBase:
    """A recurrent layer on the maps' columns."""
    return kind(WIDTH * HEIGHT, HIDDEN, batch_first=True, **options)


def cell(kind: type[nn.RNNCellBase], **options) -> nn.RNNCellBase:
    """A cell on the same."""
    made = kind(WIDTH * HEIGHT, HIDDEN, **options)
    made.batch_first = True
    return made


NETWORKS: dict[str, Callable[[], Reader]] = {
    "gru": lambda: Reader(stack(nn.GRU), HIDDEN),
    "lstm": lambda: Reader(stack(nn.LSTM), HIDDEN),
    "rnn": lambda: Reader(stack(nn.RNN, nonlinearity="relu"), HIDDEN),
    "no_bias": lambda: Reader(stack(nn.RNN, bias=False), HIDDEN),
    "two_layers": lambda: Reader(stack(nn.GRU, num_layers=2), HIDDEN),
    "both_ways": lambda: Reader(stack(nn.LSTM, bidirectional=True), 2 * HIDDEN),
    "both_ways_twice": lambda: Reader(
        stack(nn.GRU, bidirectional=True, num_layers=2), 2 * HIDDEN
    ),
    "projected": lambda: Reader(
        stack(nn.LSTM, proj_size=4, num_layers=2, bidirectional=True), 8
    ),
    "steps_first": lambda: Reader(nn.GRU(WIDTH * HEIGHT, HIDDEN), HIDDEN),
    "last_state": lambda: LastState(stack(nn.GRU, bidirectional=True), 2 * HIDDEN),
    "last_state_of_lstm": lambda: LastState(stack(nn.LSTM, num_layers=2), 2 * HIDDEN),
    "packed": lambda: Packed(stack(nn.GRU), HIDDEN),
    "packed_lstm": lambda: Packed(stack(nn.LSTM), HIDDEN),
    "from_image": lambda: FromImage(stack(nn.GRU), HIDDEN),
    "gru_cell": lambda: Cells(cell(nn.GRUCell), HIDDEN),
    "lstm_cell": lambda: Cells(cell(nn.LSTMCell), HIDDEN),
    "rnn_cell": lambda: Cells(cell(nn.RNNCell), HIDDEN),
}


def lines(n: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Images of lines of text."""
    generator = torch.Generator().manual_seed(n)
    return torch.randn(n, 1, HEIGHT, LENGTH, generator=generator).to(dtype)


def network(name: str) -> Reader:
    """One of the networks, in float64 with random weights."""
    return randomise(NETWORKS[name]().double()).eval()


@pytest.mark.parametrize("name", NETWORKS)
def test_pruned_recurrent_networks_equal_masked_ones_and_cost_what_is_counted(name):
    model = network(name)
    groups = trace(model, lines(1))
    # A stream goes by the first layer that adds to it.
    units = {"from_image": "start", "projected": "layer.weight_hr_l0"}
    n_units = 4 if name == "projected" else HIDDEN
    assert groups["conv"].channels == WIDTH
    assert groups[units.get(name, "layer")].channels == n_units
    for seed in range(2):
        kept = random_kept(groups, seed)
        pruned = prune(model, groups, kept)
        x = lines(3)
        masked = outputs(mask(model, groups, kept), x)
        assert difference(outputs(pruned, x), masked) < 1e-12
        counts = {name: len(channels) for name, channels in kept.items()}
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            pruned(lines(1))
        assert CostTable(groups).macs(counts) == counter.get_total_flops() // 2


@pytest.mark.parametrize(
    "name", ["gru", "lstm", "rnn", "two_layers", "both_ways_twice"]
)
@torch.no_grad()
def test_pruned_layers_are_those_with_the_kept_rows_of_every_gate(name):
    model = network(name)
    groups = trace(model, lines(1))
    features, units = torch.tensor([0, 3]), torch.tensor([1, 2, 5])
    pruned = prune(model, groups, {"conv": features, "layer": units})
    layer = model.layer
    smaller = type(layer)(
        2 * HEIGHT,
        3,
        layer.num_layers,
        batch_first=True,
        bidirectional=layer.bidirectional,
        **({"nonlinearity": "relu"} if name == "rnn" else {}),
    ).double()
    read = torch.arange(WIDTH * HEIGHT).view(WIDTH, HEIGHT)[features].flatten()
    n_ways = 2 if layer.bidirectional else 1
    of_ways = torch.cat([units + way * HIDDEN for way in range(n_ways)])
    for key, value in smaller.state_dict().items():
        dense = layer.state_dict()[key]
        rows = dense.view(-1, HIDDEN, *dense.shape[1:])[:, units].flatten(0, 1)
        if "weight_hh" in key:
            rows = rows[:, units]
        elif "weight_ih_l0" in key:
            rows = rows[:, read]
        elif "weight_ih" in key:
            rows = rows[:, of_ways]
        value.copy_(rows)
    x = lines(2)
    made, _ = smaller(model.steps(x)[..., read])
    expected = made @ model.head.weight[:, of_ways].T + model.head.bias
    assert difference(pruned(x), expected) < 1e-12
    assert (pruned.layer.input_size, pruned.layer.hidden_size) == (2 * HEIGHT, 3)


def test_pruned_recurrent_networks_train_and_are_pruned_again_in_float32():
    model = NETWORKS["both_ways_twice"]()
    groups = trace(model, lines(1, torch.float32))
    kept = {"conv": torch.tensor([0, 2]), "layer": torch.tensor([1, 4, 5])}
    pruned = prune(model, groups, kept)
    optimizer = torch.optim.SGD(pruned.parameters(), 0.1)
    before = outputs(pruned, lines(2, torch.float32))
    pruned.train()(lines(2, torch.float32)).square().sum().backward()
    assert all(parameter.grad is not None for parameter in pruned.parameters())
    optimizer.step()
    after = outputs(pruned, lines(2, torch.float32))
    # The layer computes with the parameters that the optimizer has moved.
    assert difference(after, before) > 1e-3
    assert len(trace(pruned.eval(), lines(1, torch.float32))) == len(groups)


class OverChannels(nn.Module):
    """Takes the channels for the steps."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, WIDTH, 3, padding=1)
        self.layer = nn.GRU(HEIGHT * LENGTH, HIDDEN, batch_first=True)
        self.head = nn.Linear(HIDDEN, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(self.conv(x).flatten(2))[0][:, -1])


class FixedState(Reader):
    """Begins with zeros of a written width."""

    def forward(self, x: Tensor) -> Tensor:
        state = torch.zeros(1, len(x), HIDDEN, dtype=x.dtype)
        return self.head(self.layer(self.steps(x), state)[0])


def test_channels_that_are_steps_are_pinned_and_hidden_units_are_not():
    groups = trace(randomise(OverChannels()).eval(), lines(1))
    assert "over channels as over time" in groups.reasons["conv"]


def test_a_first_state_of_written_width_pins_the_hidden_units_alone():
    groups = trace(randomise(FixedState(stack(nn.GRU), HIDDEN)).eval(), lines(1))
    assert "doesn't run" in groups.reasons["layer"]
    assert "conv" in groups.channels
