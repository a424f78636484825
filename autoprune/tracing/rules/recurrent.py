"""Rules of recurrent layers: GRU, LSTM and plain RNN, whole stacks and single cells.

PyTorch computes a layer as many small operations, a handful for each time step, or as
one of MKL-DNN's. Here it counts as one operation, whichever of these runs: the hidden
units are its channels. A unit has a row for each gate in the weights and biases of a
layer, and is read by the weight of the next step, by the next layer and by what reads
the output. All layers and directions of a module have the same width, so a unit goes
from all of them.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import _VF, Tensor
from torch._ops import OpOverload

from autoprune.structure.groups import Layer
from autoprune.structure.labels import take_at_origin, varying_axes
from autoprune.tracing.calls import Call
from autoprune.tracing.rules.contractions import NO_CHANNEL
from autoprune.tracing.tracer import Tracer

aten = torch.ops.aten


@dataclass(frozen=True)
class _Direction:
    """The weights of one direction of one layer.

    Attributes:
        reading: Reads the input, `(n_gates * hidden, n_in)`.
        recurrent: Reads what the step before returned, `(n_gates * hidden, n_out)`.
        biases: Of the gates, two or none.
        projection: From hidden units to what is returned, `(n_out, hidden)`; None where
            they are returned as they are.
    """

    reading: Tensor
    recurrent: Tensor
    biases: list[Tensor | None]
    projection: Tensor | None

    @property
    def weights(self) -> list[Tensor]:
        """Those that multiply."""
        together = [self.reading, self.recurrent, self.projection]
        return [weight for weight in together if weight is not None]

    @property
    def n_hidden(self) -> int:
        """How many hidden units there are."""
        # What reads them: the projection, or the next step.
        return self.weights[-1].shape[1]


@dataclass(frozen=True)
class _Units:
    """What all layers and directions of a module have in common.

    Attributes:
        hidden: Labels of the hidden units, `(hidden,)`.
        returned: Labels of what a direction returns: the hidden units, or their
            projection.
    """

    hidden: Tensor
    returned: Tensor


def whole_operation(function: object, args: Sequence[Any]) -> OpOverload | None:
    """The recurrent operation behind a function of `torch`, or None for others.

    Args:
        function: What the code calls, `torch.gru` for instance.
        args: Its arguments, by which packed sequences are told from others.
    """
    packet = WHOLE.get(function) if isinstance(function, Hashable) else None
    if packet is None:
        return None
    if "data" not in packet.overloads():
        return packet.default
    # Packed: steps, batch sizes, state, weights; else steps, state, weights.
    is_packed = isinstance(args[3], list | tuple)
    return packet.data if is_packed else packet.input


def recurrent(call: Call) -> str | None:
    """A stack of recurrent layers on sequences, packed or not."""
    tracer = call.tracer
    is_packed = call.func._overloadname == "data"
    x = call["data"] if is_packed else call["input"]
    weights = _directions(call)
    failure = _failure(tracer, x, weights)
    if failure is not None:
        return failure
    n_directions = 2 if call["bidirectional"] else 1
    inputs = tracer.unify_axis(x, x.ndim - 1)
    units = None
    for first in range(0, len(weights), n_directions):
        outputs = []
        for direction in weights[first : first + n_directions]:
            units = _apply(tracer, direction, inputs, x, units)
            outputs.append(units.returned)
        inputs = torch.cat(outputs)
    assert units is not None, "there is a layer"
    # The state of an LSTM is what it returned last, and its cells.
    of_states = (units.returned, units.hidden)
    for state, labels in zip(_listed(call["hx"]), of_states, strict=False):
        _join_state(tracer, state, labels)
    out, *states = call.out
    tracer.label(out, inputs.expand(out.shape))
    for state, labels in zip(states, of_states, strict=False):
        tracer.label(state, labels.expand(state.shape))
    return None


def cell(call: Call) -> str | None:
    """One step of one layer."""
    tracer = call.tracer
    x = call["input"]
    biases = [call["b_ih"], call["b_hh"]]
    weights = _Direction(call["w_ih"], call["w_hh"], biases, None)
    failure = _failure(tracer, x, [weights])
    if failure is not None:
        return failure
    inputs = tracer.unify_axis(x, x.ndim - 1)
    units = _apply(tracer, weights, inputs, x, None)
    for state in _listed(call["hx"]):
        _join_state(tracer, state, units.hidden)
    for state in _listed(call.out):
        tracer.label(state, units.hidden.expand(state.shape))
    return None


def packing(call: Call) -> str | None:
    """Sequences into a table of all their steps, or back: channels stay last."""
    tracer = call.tracer
    x = call.args[0]
    out = call.out[0]
    labels = tracer.labels(x)
    if set(varying_axes(labels)) - {x.ndim - 1}:
        return "has channels along time"
    tracer.label(out, take_at_origin(labels, [x.ndim - 1]).expand(out.shape))
    return None


def _listed(value: Any) -> list[Tensor]:
    """One tensor or several, as a list."""
    return [value] if isinstance(value, Tensor) else list(value)


def _directions(call: Call) -> list[_Direction]:
    """The weights of every direction of every layer, as PyTorch lists them."""
    weights = list(call["params"])
    n_directions = 2 if call["bidirectional"] else 1
    n_each = len(weights) // (call["num_layers"] * n_directions)
    n_biases = 2 if call["has_biases"] else 0
    directions = []
    for first in range(0, len(weights), n_each):
        own = weights[first : first + n_each]
        rest = own[2 + n_biases :]
        projection = rest[0] if rest else None
        directions.append(_Direction(own[0], own[1], own[2 : 2 + n_biases], projection))
    return directions


def _failure(tracer: Tracer, x: Tensor, weights: list[_Direction]) -> str | None:
    """Why a layer's channels can't be told, or None."""
    positions = x.numel() // x.shape[-1]
    reason = None
    if set(varying_axes(tracer.labels(x))) - {x.ndim - 1}:
        reason = "runs over channels as over time"
    for direction in weights:
        for weight in direction.weights:
            view = tracer.parameter(weight)
            if view is None or view.original_axis(0) != 0 or view.shape != weight.shape:
                reason = "has weights that are computed from others"
    if reason is not None:
        # What it computes counts, whatever is pruned.
        for direction in weights:
            for weight in direction.weights:
                tracer.products.append((NO_CHANNEL, positions * weight.numel()))
    return reason


def _apply(
    tracer: Tracer,
    direction: _Direction,
    inputs: Tensor,
    x: Tensor,
    units: _Units | None,
) -> _Units:
    """Records what one direction of one layer makes and reads.

    Args:
        tracer: The notebook of the run.
        direction: Its weights.
        inputs: Labels of what it reads, `(n_in,)`.
        x: The module's input, for the number of its steps.
        units: What the module's directions so far have in common, or None.

    Returns:
        What this one has in common with the next.
    """
    positions = x.numel() // x.shape[-1]
    names = []
    for weight in direction.weights:
        view = tracer.parameter(weight)
        assert view is not None, "`_failure` has looked"
        names.append(view.name)
        tracer.layers.append(Layer(view.name, "linear", positions))
        # The masked network leaves out what is read of removed units.
        tracer.label_axis(view.name, 1)
    reading, remembering, *projecting = names
    hidden = tracer.new_output_labels(reading, direction.n_hidden)
    returned = hidden
    if direction.projection is not None:
        n_returned = direction.projection.shape[0]
        returned = tracer.new_output_labels(projecting[0], n_returned)
        tracer.use(projecting[0], 0, returned, "produce")
        tracer.use(projecting[0], 1, hidden, "consume")
        # PyTorch sees by the two widths that there is a projection.
        tracer.book.pin(hidden, "has to stay wider than its projection")
    # Gate by gate, each with a row for every unit.
    rows = hidden.repeat(len(direction.reading) // len(hidden))
    tracer.use(reading, 0, rows, "produce")
    tracer.use(reading, 1, inputs, "consume")
    tracer.use(remembering, 0, rows, "produce")
    tracer.use(remembering, 1, returned, "consume")
    for bias in direction.biases:
        tracer.use_vector(bias, rows, "produce")
    if units is None:
        return _Units(hidden, returned)
    tracer.book.join(units.hidden, hidden)
    tracer.book.join(units.returned, returned)
    return units


def _join_state(tracer: Tracer, state: Tensor, labels: Tensor) -> None:
    """The first state has the units that the layer has; zeros are as many as needed.

    Args:
        tracer: The notebook of the run.
        state: What the code begins with, units on its last axis.
        labels: Of the units.
    """
    # Whether zeros are made as wide as the layer is, the proof shows.
    is_known = tracer.is_activation(state) or bool(tracer.views(state))
    if is_known and tracer.labels(state).any():
        tracer.book.join(tracer.unify_axis(state, state.ndim - 1), labels)


WHOLE: dict[Hashable, Any] = {
    _VF.gru: aten.gru,
    _VF.lstm: aten.lstm,
    _VF.rnn_tanh: aten.rnn_tanh,
    _VF.rnn_relu: aten.rnn_relu,
    _VF.gru_cell: aten.gru_cell,
    _VF.lstm_cell: aten.lstm_cell,
    _VF.rnn_tanh_cell: aten.rnn_tanh_cell,
    _VF.rnn_relu_cell: aten.rnn_relu_cell,
    _VF._pack_padded_sequence: aten._pack_padded_sequence,
    _VF._pad_packed_sequence: aten._pad_packed_sequence,
}
"""Function of `torch` to the operation that stands for all that it consists of."""
