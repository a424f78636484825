"""What a network does only while it is trained: found in a pass of its own.

An auxiliary head runs in training alone, yet it reads channels that evaluation prunes.
So a network whose code asks for its mode runs once more in training mode, with the same
labels, and what meets there is joined to what evaluation has shown.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from autoprune.structure.labels import LabelBook
from autoprune.structure.slicing import copy_buffers, shared_copy
from autoprune.tracing.tracer import Tracer

AttributeReads = set[tuple[str, str]]
"""Names of modules and of their attributes that code has read."""
MODELESS = ("torch.nn.", "autoprune.structure.")
"""Packages whose modules compute the same in both modes but for dropout and batch
statistics."""
_WATCHING = threading.RLock()


@contextmanager
def watch_reads(model: nn.Module) -> Iterator[AttributeReads]:
    """Notes which attributes of a network's modules are read inside the `with` block.

    Args:
        model: The network.
    """
    names = {id(module): name for name, module in model.named_modules()}
    reads: AttributeReads = set()

    def note_read(module: nn.Module, attribute: str) -> Any:
        name = names.get(id(module))
        # Other networks may run in other threads.
        if name is not None:
            reads.add((name, attribute))
        return object.__getattribute__(module, attribute)

    # On the one base class of all modules: subclasses made for this alone would answer
    # `type(module) is Block` otherwise than the user's code expects.
    with _WATCHING:
        setattr(nn.Module, "__getattribute__", note_read)  # noqa: B010, types forbid it
        try:
            yield reads
        finally:
            delattr(nn.Module, "__getattribute__")


def depends_on_mode(model: nn.Module, reads: AttributeReads) -> bool:
    """Whether a network may do something else in training mode.

    Args:
        model: The network.
        reads: What its code has read in evaluation mode.
    """
    for name, module in model.named_modules():
        kind = type(module)
        if kind.train is not nn.Module.train or kind.eval is not nn.Module.eval:
            # It keeps a mode of its own.
            return True
        if (name, "training") in reads and not kind.__module__.startswith(MODELESS):
            return True
    return False


def set_mode(model: nn.Module, is_training: bool) -> None:
    """Puts a network into training or evaluation mode, in place.

    Norms that keep statistics stay in evaluation mode, where one sample is enough and
    the statistics stay as they are.

    Args:
        model: The network.
        is_training: Which mode.
    """
    model.train(is_training)
    for module in model.modules():
        if isinstance(module, _NormBase):
            module.eval()


def training_tracer(tracer: Tracer) -> Tracer:
    """A tracer for a pass in training mode, with the labels of the evaluation pass.

    Args:
        tracer: That of the evaluation pass.
    """
    twin = shared_copy(tracer.model)
    copy_buffers(twin)
    set_mode(twin, True)
    return Tracer(twin, tracer.book.copy_for_second_pass())


def merge_training(tracer: Tracer, training: Tracer) -> bool:
    """Adds what a training pass has shown; layers and costs stay evaluation's.

    Args:
        tracer: That of the evaluation pass, to be added to.
        training: That of the training pass, on a copy of the book.

    Returns:
        Whether there was anything new to prove.
    """
    book = training.book
    tracer.unsupported += training.unsupported
    for key, use in training.uses.items():
        if key in tracer.uses:
            book.join(tracer.uses[key][0], use[0])
    book.drop_repeated_constraints(tracer.book)
    if not _uses_more(training, tracer) and not _demands_more(book, tracer.book):
        # The same joins once more would only take time.
        tracer.book.take_pins(book)
        return False
    tracer.book = book
    tracer.training_tensors |= training.used_tensors - tracer.used_tensors
    # What evaluation has comes first, as groups are named by it.
    tracer.uses = tracer.uses | (training.uses | tracer.uses)
    tracer.part_uses = tracer.part_uses | (training.part_uses | tracer.part_uses)
    tracer.axis_labels = training.axis_labels | tracer.axis_labels
    tracer.bare_parameters = training.bare_parameters | tracer.bare_parameters
    tracer.summed_labels += training.summed_labels
    tracer.ties += training.ties
    return True


def _uses_more(training: Tracer, tracer: Tracer) -> bool:
    """Whether training uses parameters, or parts of them, that evaluation doesn't."""
    return (
        not training.uses.keys() <= tracer.uses.keys()
        or not training.part_uses.keys() <= tracer.part_uses.keys()
        or not training.bare_parameters.keys() <= tracer.bare_parameters.keys()
        or not training.used_tensors <= tracer.used_tensors
    )


def _demands_more(book: LabelBook, known: LabelBook) -> bool:
    """Whether a second pass ties channels together that the first left apart.

    Args:
        book: After the second pass.
        known: Before it.
    """
    if len(book.lattices) > len(known.lattices):
        return True
    if len(book.constraints) > len(known.constraints):
        return True
    before = known.representatives()
    return not np.array_equal(before, book.representatives()[: len(before)])
