"""One frozen dataclass per stage; the command line is generated from them, so flags and defaults can't drift apart.

This module imports neither torch nor anything that does: `autoprune --help` has to answer at once.
"""

from dataclasses import dataclass

from autoprune.errors import UserError


@dataclass(frozen=True)
class DataConfig:
    """Where the images come from and how they are split."""

    data: str = "sample"
    """"sample" (embedded CIFAR-10 images), "cifar10", "digits", or a folder with train/ and test/, a folder a class."""
    image_size: int = 224
    """Side in pixels to which the images of a folder are resized and cropped."""
    calibration_images: int | None = None
    """Training images held out for batch-norm statistics of sub-models (None: all stored ones of the sample, else 1,000
    or a fifteenth of a small dataset)."""
    proxy_images: int | None = None
    """Training images held out for the reward (None: as for calibration_images)."""
    selection_images: int | None = None
    """Training images held out for choosing among the finalists (None: all stored ones of the sample, else 3,000 or a
    fifth of a small dataset)."""
    split_seed: int = 0
    """Seed of the splits; apart from --seed, so that runs with several seeds see the same held-out images. The parts of
    "sample" are stored and don't depend on it."""
    max_test_images: int | None = None
    """Read only this many test images (None: all)."""

    def __post_init__(self) -> None:
        for name in ("image_size", "calibration_images", "proxy_images", "selection_images", "max_test_images"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"--{name}: must be at least 1, got {value}")


@dataclass(frozen=True)
class FinetuneConfig:
    """Training after pruning: SGD with Nesterov momentum, linear warm-up, then annealed to zero inside the epochs."""

    epochs: int = 10
    """Passes over the training split."""
    batch_size: int = 128
    """Images a step."""
    lr: float = 0.05
    """Highest learning rate, reached at the end of the warm-up."""
    warmup: float = 0.1
    """Share of the steps over which the learning rate rises."""
    weight_decay: float = 5e-4
    """L2 penalty on weights; batch norm and biases are exempt."""
    momentum: float = 0.9
    """Nesterov momentum."""
    distillation: float = 0.5
    """Weight in [0, 1] of matching the dense network's outputs (Hinton et al. 2015); 0 trains on the labels alone."""
    temperature: float = 4.0
    """Softening of both outputs in the distillation term."""
    bf16: str = "auto"
    """"auto" uses bfloat16 autocast where the CPU has the instructions, "on" and "off" force it."""
