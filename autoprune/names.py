"""Names of what can be chosen, known without importing it.

Importing PyTorch takes seconds, and a name with a typo should be refused at once. So
the names of the registries stand here once more; `tests/test_mistakes.py` holds both
equal.
"""

import sys
from dataclasses import dataclass

from autoprune.errors import check_known


@dataclass(frozen=True)
class Registry:
    """The keys of a dict in a module that takes long to import.

    Attributes:
        kind: What its keys name, for messages.
        home: The module.
        attribute: The dict's name there.
        names: Its keys as autoprune enters them, the default first.
    """

    kind: str
    home: str
    attribute: str
    names: tuple[str, ...]

    @property
    def known(self) -> tuple[str, ...]:
        """The keys, with those that a script has entered."""
        home = sys.modules.get(self.home)
        # Whoever enters something has imported the module.
        return self.names if home is None else tuple(getattr(home, self.attribute))

    def check(self, name: str, argument: str | None = None, others: str = "") -> None:
        """Checks that a name is known.

        Args:
            name: As given.
            argument: As for `check_known`.
            others: As for `check_known`.

        Raises:
            UserError: If it isn't; the message offers the nearest name.
        """
        check_known(self.kind, name, self.known, argument, others)


CRITERIA = Registry(
    "criterion",
    "autoprune.evaluation.importance",
    "CRITERIA",
    (
        "l1",
        "l2",
        "bn_scale",
        "fpgm",
        "activation",
        "apoz",
        "taylor",
        "hessian",
        "lamp",
        "random",
    ),
)
SPARSE_METHODS = Registry(
    "method",
    "autoprune.training.sparse",
    "SPARSE",
    (
        "l1",
        "l2",
        "group_lasso",
        "slimming",
        "group_decay",
        "gsm",
        "drop_out",
        "drop_connect",
    ),
)
REWARDS = Registry(
    "reward",
    "autoprune.envs.rewards",
    "REWARDS",
    ("weighted_sum", "amc", "accuracy_guaranteed"),
)
DATASETS = Registry(
    "dataset",
    "autoprune.data.datasets",
    "DATASETS",
    ("sample", "cifar10", "digits"),
)
ENGINES = Registry(
    "engine",
    "autoprune.latency.engines",
    "ENGINES",
    ("onnxruntime", "torch", "compiled", "openvino"),
)
LEARNERS = Registry(
    "agent",
    "autoprune.agents.algorithms",
    "ALGORITHMS",
    ("dyna", "ppo", "sac", "td3", "ddpg", "tqc"),
)
BASELINES = Registry(
    "baseline",
    "autoprune.agents.baselines",
    "BASELINES",
    (
        "uniform",
        "random",
        "sensitivity",
        "evolution",
        "tpe",
        "global",
        "cost_aware",
        "eagleeye",
    ),
)
MODELS = Registry(
    "model",
    "autoprune.data.models",
    "MODELS",
    (
        "resnet20",
        "resnet32",
        "resnet44",
        "resnet56",
        "resnet110",
        "resnet20_b",
        "resnet32_b",
        "resnet44_b",
        "resnet56_b",
        "resnet110_b",
        "vgg16_bn_cifar",
        "mobilenet_v1_cifar",
        "mobilenet_v2_cifar",
    ),
)
