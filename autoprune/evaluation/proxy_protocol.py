"""What searches and environments ask of a proxy, whoever scores.

`autoprune.evaluation.proxy.ProxyAccuracy` scores widths alone, and
`autoprune.scaling.scaled_proxy.ScaledProxy` depth and image size too.
"""

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
from torch import Tensor

from autoprune.config import ProxyConfig
from autoprune.evaluation.evaluate import Evaluation
from autoprune.evaluation.importance import Importance
from autoprune.structure.groups import Groups


class Proxy(Protocol):
    """What a search asks of a proxy: the score of an allocation before fine-tuning.

    An allocation is a mapping from group to kept channels.

    Attributes:
        evaluations: Networks scored so far; what came from the cache isn't counted.
    """

    evaluations: int

    @property
    def groups(self) -> Groups:
        """The trace of the network that is scored."""
        ...

    @property
    def importance(self) -> Importance:
        """Scores per channel that decide which survive; higher is kept."""
        ...

    @property
    def config(self) -> ProxyConfig:
        """How sub-models are scored."""
        ...

    @property
    def example(self) -> Tensor:
        """One normalised input of the network."""
        ...

    @property
    def n_workers(self) -> int:
        """Candidates that are scored at once."""
        ...

    @property
    def reconstructs(self) -> bool:
        """Whether candidates get weights solved anew."""
        ...

    @property
    def sensitivity(self) -> np.ndarray:
        """Damage when each prunable group alone loses half, `(n_groups,)`, in nats."""
        ...

    def __call__(self, kept: Mapping[str, int]) -> Evaluation:
        """The score of one allocation."""
        ...

    def score_all(
        self, allocations: Sequence[Mapping[str, int]], block: int = 0
    ) -> list[Evaluation]:
        """The scores of several allocations on one block of images.

        Args:
            allocations: Group to kept channels.
            block: Number of the block, see `block_of`.
        """
        ...

    def survey_all(
        self, allocations: Sequence[Mapping[str, int]], batches: int = 0
    ) -> list[Evaluation]:
        """Scores on all images that score a search of so many batches.

        Args:
            allocations: Group to kept channels.
            batches: How many batches the search had.
        """
        ...

    def select_all(self, allocations: Sequence[Mapping[str, int]]) -> list[Evaluation]:
        """Scores on the selection split, for the finalists."""
        ...

    def restore(self, kept: Mapping[str, int], evaluation: Evaluation) -> None:
        """Takes over a score of an earlier, interrupted search.

        Args:
            kept: Group to kept channels.
            evaluation: What it scored then.
        """
        ...

    def key(self, kept: Mapping[str, int]) -> tuple:
        """What tells networks apart: allocations of one key are one network."""
        ...

    def block_of(self, batch: int) -> int:
        """Which block of images scores a batch of a search."""
        ...

    def suited_to(self, kept: Mapping[str, int]) -> "Proxy":
        """The proxy for a search whose tightest uniform allocation is `kept`."""
        ...
