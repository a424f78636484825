"""Networks composed at random: a recipe is plain data that prints as the code that
makes it again.

`recipe(seed)` is the same at every call, `Recipe((Conv(width=6), Split()),
ending="list")` a literal as failures print it, and `build` makes either into a network
with tame random weights in float64.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from nets import RGB, SIZE, randomise
from steps import ANY_VALUE, STEPS, Modulate
from steps.base import Meeting, Step, pooled
from torch import Tensor, nn

MAX_STEPS = 12
MAX_CHANNELS, MAX_SIZE = 48, 20
N_OUT = 3
ENDINGS = ("together", "together", "list", "dict", "with_features")
Choose = Callable[[Sequence[Any]], Any]


@dataclass(frozen=True)
class Recipe:
    """What a network is made of.

    Attributes:
        steps: In the order of the forward pass, on values made before.
        ending: Every value that no step reads goes to one common head ("together"), to
            heads of their own whose outputs come as "list" or "dict", or to a common
            head beside the newest value itself ("with_features").
    """

    steps: tuple[Step, ...]
    ending: str = ENDINGS[0]


def choose_step(choose: Choose) -> Step:
    """One step, each of its fields chosen among what it lists."""
    kind = choose(STEPS)
    return kind(
        **{field.name: choose(field.metadata["choices"]) for field in fields(kind)}
    )


def recipe(seed: int) -> Recipe:
    """A random recipe, the same for the same seed."""
    rng = random.Random(seed)
    steps = tuple(choose_step(rng.choice) for _ in range(rng.randint(2, MAX_STEPS)))
    return Recipe(steps, rng.choice(ENDINGS))


class Composed(nn.Module):
    """The network of a recipe."""

    def __init__(self, recipe: Recipe):
        super().__init__()
        self.ending = recipe.ending
        self.stem = nn.Conv2d(RGB, 8, 3, padding=1)
        self.steps, self.wiring = nn.ModuleList(), []
        values = [self.stem(torch.zeros(1, RGB, SIZE, SIZE))]
        for step in recipe.steps:
            self._append(step, values)
        read = {index for wires in self.wiring for index in wires}
        self.ends = [index for index in range(len(values)) if index not in read]
        widths = [
            (values[index].ndim == 4, values[index].shape[1]) for index in self.ends
        ]
        if self.ending in ("list", "dict"):
            self.head = nn.ModuleList(
                nn.Conv2d(n, N_OUT, 1) if is_map else nn.Linear(n, N_OUT)
                for is_map, n in widths
            )
        else:
            self.head = nn.Linear(sum(n for _, n in widths), N_OUT)

    def _append(self, step: Step, values: list[Tensor]) -> None:
        wires = [_pick(values, step.source, isinstance(step, ANY_VALUE))]
        if isinstance(step, Meeting):
            wires.append(_pick(values, step.other, isinstance(step, Modulate)))
        self._run(step.build(*(values[index] for index in wires)), wires, values)
        newest = values[-1]
        if newest.shape[1] > MAX_CHANNELS:
            self._run(nn.Conv2d(newest.shape[1], 8, 1), [len(values) - 1], values)
        if newest.ndim == 4 and max(newest.shape[2:]) > MAX_SIZE:
            self._run(nn.AvgPool2d(2), [len(values) - 1], values)

    def _run(self, module: nn.Module, wires: list[int], values: list[Tensor]) -> None:
        values.extend(_listed(module.eval()(*(values[index] for index in wires))))
        self.steps.append(module)
        self.wiring.append(wires)

    def forward(self, x: Tensor):
        values = [self.stem(x)]
        for step, wires in zip(self.steps, self.wiring, strict=True):
            values.extend(_listed(step(*(values[index] for index in wires))))
        ends = [values[index] for index in self.ends]
        if self.ending in ("list", "dict"):
            outputs = [head(end) for head, end in zip(self.head, ends, strict=True)]
            return (
                outputs
                if self.ending == "list"
                else {str(i): output for i, output in enumerate(outputs)}
            )
        logits = self.head(torch.cat([pooled(end) for end in ends], 1))
        return logits if self.ending == "together" else (logits, values[-1])


def _pick(values: list[Tensor], back: int, may_be_vector: bool) -> int:
    """The index of a value that was made so many before the newest, maps alone unless a
    vector will do.
    """
    fitting = [
        index for index, value in enumerate(values) if may_be_vector or value.ndim == 4
    ]
    return fitting[-1 - back % len(fitting)]


def _listed(result: Tensor | Sequence[Tensor]) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


@torch.no_grad()
def build(recipe: Recipe, seed: int = 0) -> nn.Module:
    """The network of a recipe in eval mode and float64, with random weights that
    neither hide nor amplify anything.
    """
    with torch.random.fork_rng():
        return randomise(Composed(recipe).double(), seed).eval()


def shrunk(recipe: Recipe, fails: Callable[[Recipe], bool]) -> Recipe:
    """The smallest recipe on the way down from a failing one that still fails."""
    smaller = next(
        (candidate for candidate in _smaller(recipe) if fails(candidate)), None
    )
    return recipe if smaller is None else shrunk(smaller, fails)


def _smaller(recipe: Recipe) -> Iterator[Recipe]:
    """The recipe with one step less, or with one thing as simple as can be."""
    steps = recipe.steps
    for i in range(len(steps)):
        yield replace(recipe, steps=steps[:i] + steps[i + 1 :])
    if recipe.ending != ENDINGS[0]:
        yield replace(recipe, ending=ENDINGS[0])
    for i, step in enumerate(steps):
        for part in fields(step):
            if getattr(step, part.name) != part.default:
                yield replace(
                    recipe,
                    steps=(
                        *steps[:i],
                        replace(step, **{part.name: part.default}),
                        *steps[i + 1 :],
                    ),
                )
