"""One frozen dataclass per stage; the command line is generated from them.

So flags and defaults can't drift apart.

This module imports neither torch nor anything that does: `autoprune --help` has to
answer at once.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field
from typing import Any

from autoprune.errors import UserError, check_share, did_you_mean

INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos", "box", "hamming")
"""Pillow's ways of scaling images, all but the first antialiased."""
CROP_MODES = ("center", "squash", "border")
"""How an image of another shape is made to fit, as timm calls it: cropped at the
centre, scaled without regard to its shape, or with borders.
"""
AUTO = "auto"
"""The value of `round_to` that asks for widths which suit the engine."""
LARGEST_SEED = 2**32 - 2
"""Of what generators take one less than the most: CMA-ES adds one."""


def _check_range(
    config: object, low: float, high: float, *names: str, stage: str = ""
) -> None:
    """Checks that fields lie in [low, high]; None is no value and passes.

    Args:
        config: The dataclass.
        low: The least value allowed.
        high: The largest value allowed; infinity for none.
        *names: The fields.
        stage: What their names begin with in a message.

    Raises:
        UserError: For the first field outside of it.
    """
    allowed = f"from {low:g} to {high:.10g}"
    if high == float("inf"):
        allowed = f"at least {low:g}"
    for name in names:
        value = getattr(config, name)
        if value is None or low <= value <= high:
            continue
        shown = value if isinstance(value, int) else f"{value:g}"
        raise UserError(_argument(stage, name), f"must be {allowed}, got {shown}")


def _check_choice(config: object, name: str, *choices: str, stage: str) -> None:
    """Checks that a field is one of the choices.

    Args:
        config: The dataclass.
        name: The field.
        *choices: Its possible values.
        stage: What its name begins with in a message.

    Raises:
        UserError: If it isn't.
    """
    value = getattr(config, name)
    if value not in choices:
        listed = f"{', '.join(choices[:-1])} or {choices[-1]}"
        nearest = did_you_mean(value, choices)
        reason = f"must be {listed}, got {value!r}{nearest and ';'}{nearest}"
        raise UserError(_argument(stage, name), reason)


def _argument(stage: str, name: str) -> str:
    """What a caller calls a field: "proxy.images"; without a stage its own name."""
    return f"{stage}.{name}" if stage else name


def _items(text: str) -> list[str]:
    """The parts of a comma-separated list, empty ones left out."""
    parts = [part.strip() for part in text.split(",")]
    return [part for part in parts if part]


def _numbers(argument: str, text: str) -> dict[str, int]:
    """Pattern to number, from "PATTERN=N,PATTERN=N".

    Args:
        argument: The argument that holds the text.
        text: The text.

    Raises:
        UserError: Unless every N is a count of at least 1.
    """
    numbers = {}
    for item in _items(text):
        pattern, _, number = item.rpartition("=")
        if not pattern or not number.isdecimal() or int(number) < 1:
            raise UserError(
                argument,
                f"expected PATTERN=N,PATTERN=N with N at least 1, e.g. layer1.*=8; "
                f"got {item!r}",
            )
        numbers[pattern] = int(number)
    return numbers


def check_multiple(value: int | str) -> None:
    """Checks that it is a multiple for widths: "auto", or a number of at least 1.

    Args:
        value: As given.

    Raises:
        UserError: If it isn't.
    """
    # Booleans are numbers to Python, but none that anybody would round to.
    if isinstance(value, int) and not isinstance(value, bool) and value >= 1:
        return
    if value == AUTO:
        return
    raise UserError(
        "round_to",
        f"must be {AUTO} or a number of at least 1, such as 8; got {value!r}",
    )


def _size(argument: str, value: int | str | None) -> tuple[int, int] | None:
    """Height and width, from a side or "HEIGHTxWIDTH"; None for None.

    Args:
        argument: The argument that holds the value.
        value: As given.

    Raises:
        UserError: If it is neither, or a side is below 1.
    """
    if value is None:
        return None
    parts = str(value).lower().split("x")
    if len(parts) > 2 or not all(
        part.strip().lstrip("-").isdecimal() for part in parts
    ):
        raise UserError(
            argument,
            f"expected a side in pixels, or height x width as in 192x256; got "
            f"{value!r}",
        )
    height = int(parts[0])
    width = int(parts[-1])
    if min(height, width) < 1:
        raise UserError(argument, f"must be at least 1, got {value}")
    return height, width


def _channel_values(
    argument: str, text: str | float | list[float] | None
) -> tuple[float, ...] | None:
    """Numbers from "0.5,0.5,0.5", "0.5" or a list; None for None.

    Args:
        argument: The argument that holds them.
        text: As given.

    Raises:
        UserError: If one isn't a finite number.
    """
    if text is None:
        return None
    values = []
    # Brackets as Python writes them do no harm.
    for item in _items(str(text).strip("()[] ")):
        try:
            values.append(float(item))
        except ValueError:
            values.append(math.nan)
    if not values or not all(math.isfinite(value) for value in values):
        raise UserError(
            argument,
            f"expected numbers in the order of the channels, as in 0.5,0.5,0.5; got "
            f"{text!r}",
        )
    return tuple(values)


def _crop(argument: str, value: float | str | None) -> dict[str, Any]:
    """What a crop says: its mode, and a share or the shorter side before it.

    Args:
        argument: The argument that holds the value.
        value: As given: a share, pixels, or one of `CROP_MODES`.

    Raises:
        UserError: If it is none of these.
    """
    if value is None:
        return {}
    if value in CROP_MODES:
        return {"crop_mode": value, "crop": 1.0}
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    # Not `number <= 0`: NaN has to fail as well.
    if not 0 < number < math.inf:
        raise UserError(
            argument,
            f"expected a share in (0, 1], pixels above 1, or "
            f"{' or '.join(CROP_MODES)}; got {value!r}",
        )
    kind = "crop" if number <= 1 else "shorter_side"
    return {"crop_mode": "center", kind: number}


def stated_preprocessing(config: "DataConfig | TraceConfig") -> dict[str, Any]:
    """What options say of the preprocessing; what they leave open isn't in it.

    Args:
        config: The options.

    Returns:
        Fields of `autoprune.data.Preprocessing`, "channels", and "shorter_side" for a
        crop in pixels.

    Raises:
        UserError: If one of them can't be read.
    """
    values: dict[str, Any] = {
        "size": _size("image_size", config.image_size),
        "channels": config.channels,
    }
    if isinstance(config, DataConfig):
        values["mean"] = _channel_values("mean", config.mean)
        values["std"] = _channel_values("std", config.std)
        values["interpolation"] = config.interpolation
        values |= _crop("crop", config.crop)
        if values["std"] is not None and min(values["std"]) <= 0:
            raise UserError("std", f"must be above 0, got {config.std}")
    return {name: value for name, value in values.items() if value is not None}


@dataclass(frozen=True)
class NetworkConfig:
    """The network to prune."""

    model: str = "resnet20"
    """A CIFAR network (resnet20, vgg16_bn_cifar, ...), any torchvision classifier,
    timm/NAME, or a function of your own that makes it: package.module:factory or
    ./file.py:factory.
    """
    weights: str = "auto"
    """Trained weights: a safetensors or torch.save file, or FILE:KEY where it holds
    several sets, as in ckpt.pt:ema. "auto" takes the embedded ones for resnet20 on
    CIFAR-10; "none" takes the network as it is made, for a factory that brings its own.
    """


class _Excluding:
    """Of a configuration with a field `exclude`."""

    exclude: str

    @property
    def excluded(self) -> list[str]:
        """The patterns of `exclude`."""
        return _items(self.exclude)


@dataclass(frozen=True)
class TraceConfig(_Excluding):
    """A network to look into, trained or not."""

    model: str = NetworkConfig.model
    """A network by name, package.module:factory or ./file.py:factory."""
    weights: str | None = None
    """Weights file; groups don't depend on it."""
    n_classes: int = 10
    """Width of the head."""
    image_size: int | str | None = None
    """Side of the input in pixels, or height x width as in 192x256 (None: what the
    network says, else 32 for the CIFAR networks and 224 for others).
    """
    channels: int | None = None
    """Channels of the input, 1 for grey (None: what the network reads)."""
    exclude: str = ""
    """Groups or layers that stay whole, as for `autoprune run`."""

    def __post_init__(self) -> None:
        _check_range(self, 1, float("inf"), "n_classes", "channels")
        _size("image_size", self.image_size)

    @property
    def preprocessing(self) -> dict[str, Any]:
        """What the options say of the preprocessing, as in `DataConfig`."""
        return stated_preprocessing(self)


@dataclass(frozen=True)
class OutputConfig:
    """Where results go."""

    out: str | None = None
    """Run folder (None: runs/MODEL-BUDGET-AGENT-seedSEED, numbered where taken)."""
    resume: bool = False
    """Go on with the run in --out where it was interrupted."""
    baselines: str | None = None
    """Searched beside the agent at the same number of evaluations and drawn in the
    report, as in uniform,evolution; "none" for none (None: uniform, random and
    sensitivity, but none beside an allocator that decides at once). With a range of
    budgets none is searched: uniform pruning is the line that the front is drawn
    against.
    """
    json: bool = False
    """Print one JSON object as the last line of stdout."""

    def __post_init__(self) -> None:
        if self.resume and self.out is None:
            raise UserError("resume", "which run? Give its folder with --out")


@dataclass(frozen=True)
class DataConfig:
    """Where the images come from and how they are split."""

    data: str = "sample"
    """"sample" (embedded CIFAR-10 images), "cifar10", "digits", or a folder with train/
    and test/ or val/, in each a folder a class. Without test/ and val/ a fifth of the
    training images is kept apart for the test.
    """
    image_size: int | str | None = None
    """Side in pixels to which images are scaled and cropped, or height x width as in
    192x256 (None: the network's, else the images' own).
    """
    mean: str | float | list[float] | None = None
    """Mean of the channels' values in [0, 1], comma-separated, one for all or one each
    (None: the network's, else ImageNet's).
    """
    std: str | float | list[float] | None = None
    """Deviation of the channels' values in [0, 1], as for mean."""
    channels: int | None = None
    """Channels of the images: 1 for grey, 3 for colours, or more (None: what the
    network reads).
    """
    interpolation: str | None = None
    """How images are scaled: nearest, bilinear, bicubic, lanczos, box or hamming (None:
    the network's, else bilinear).
    """
    crop: float | str | None = None
    """Share of the scaled image that the crop at the centre keeps, as in 0.875; above
    1 the shorter side in pixels before the crop, as in 256; squash to scale images to
    the size whatever their shape; border to keep the whole image within borders (None:
    the network's, else 1).
    """
    calibration_images: int | None = None
    """Training images held out for batch-norm statistics of sub-models (None: all
    stored ones of the sample, else 1,000 or a fifteenth of a small dataset).
    """
    proxy_images: int | None = None
    """Training images held out for the reward (None: as for calibration_images)."""
    selection_images: int | None = None
    """Training images held out for choosing among the finalists (None: all stored ones
    of the sample, else 3,000 or a fifth of a small dataset).
    """
    split_seed: int = 0
    """Seed of the splits; apart from --seed, so that runs with several seeds see the
    same held-out images. The parts of "sample" are stored and don't depend on it.
    """
    max_train_images: int | None = None
    """Train on only this many of the images that are left for training (None: all)."""
    max_test_images: int | None = None
    """Read only this many test images (None: all)."""

    def __post_init__(self) -> None:
        held_out = "calibration_images", "proxy_images", "selection_images"
        _check_range(
            self,
            1,
            float("inf"),
            *held_out,
            "channels",
            "max_train_images",
            "max_test_images",
        )
        _check_range(self, 0, LARGEST_SEED, "split_seed")
        if self.interpolation is not None:
            _check_choice(self, "interpolation", *INTERPOLATIONS, stage="")
        # Read for its refusals, before anything slow happens.
        stated_preprocessing(self)

    @property
    def preprocessing(self) -> dict[str, Any]:
        """What the options say of the preprocessing; see `stated_preprocessing`."""
        return stated_preprocessing(self)


@dataclass(frozen=True)
class FinetuneConfig:
    """Training after pruning: SGD with Nesterov momentum.

    The rate rises linearly, then anneals to zero within the epochs.
    """

    epochs: int | None = None
    """Passes over the training split (None: 10, or on a small dataset as many as make
    600 steps, at most 30).
    """
    batch_size: int = 128
    """Images a step."""
    lr: float | None = None
    """Highest learning rate, reached at the end of the warm-up (None: 0.05; in fewer
    than 1,500 steps less, with the root of their number, since a short training can't
    repair what a high rate breaks).
    """
    warmup: float = 0.1
    """Share of the steps over which the learning rate rises."""
    weight_decay: float = 5e-4
    """L2 penalty on weights; batch norm and biases are exempt."""
    momentum: float = 0.9
    """Nesterov momentum."""
    distillation: float = 0.5
    """Weight in [0, 1] of matching the dense network's outputs (Hinton et al. 2015); 0
    trains on the labels alone.
    """
    temperature: float = 4.0
    """Softening of both outputs in the distillation term."""
    flip: bool = True
    """Mirror images from epoch to epoch; turn it off where left and right matter
    (digits, text, road signs).
    """
    bf16: str = "auto"
    """"auto" uses bfloat16 autocast where the CPU has the instructions, "on" and "off"
    force it.
    """

    def __post_init__(self) -> None:
        _check_range(self, 0, float("inf"), "epochs")
        _check_range(self, 0, float("inf"), "lr", "weight_decay", stage="finetune")
        _check_range(
            self, 1, float("inf"), "batch_size", "temperature", stage="finetune"
        )
        _check_range(self, 0, 1, "warmup", "distillation", "momentum", stage="finetune")
        _check_choice(self, "bf16", "auto", "on", "off", stage="finetune")

    def epochs_for(self, n_images: int) -> int:
        """The number of passes over the training split.

        Args:
            n_images: Images of that split.
        """
        if self.epochs is not None:
            return self.epochs
        # As many as make 600 steps, rounded up.
        epochs = -(-600 // self.steps_per_epoch(n_images))
        return min(30, max(10, epochs))

    def lr_for(self, n_steps: int) -> float:
        """The highest learning rate of a training.

        Args:
            n_steps: Its length in steps of the optimizer.
        """
        if self.lr is not None:
            return self.lr
        return 0.05 * min(1.0, n_steps / 1500) ** 0.5

    def steps_per_epoch(self, n_images: int) -> int:
        """Whole batches in one pass.

        Args:
            n_images: Images of the training split.
        """
        return max(1, n_images // self.batch_size)


@dataclass(frozen=True)
class SparseConfig:
    """Sparse training before the search; it makes weights or channels dispensable."""

    method: str = "none"
    """none, l1, l2, group_lasso, slimming, group_decay, gsm, drop_out or drop_connect.
    """
    strength: float | None = None
    """Factor of the penalty; of gsm the weight decay, of dropping its probability
    (None: the method's usual one).
    """
    share: float | None = None
    """Of gsm the share of the weights that is trained in a step (None: the budget's);
    of dropping the share of a layer, the least of it, that may be dropped (None: half;
    1 is plain, untargeted dropping).
    """
    epochs: int | None = None
    """Passes over the training split (None: as many as by default in fine-tuning)."""
    lr: float = 0.05
    """Highest learning rate; the rest is as in fine-tuning."""

    def __post_init__(self) -> None:
        _check_range(self, 0, float("inf"), "strength", "epochs", "lr", stage="sparse")
        if self.share is not None:
            check_share("sparse.share", self.share)


@dataclass(frozen=True)
class RemovalConfig:
    """How channels leave the network once it is decided how many."""

    method: str = "slice"
    """slice; or, by training first: gradual (a little at a time, ranked anew each time;
    masks as well), centripetal (channels grow together and merge), compactors (ResRep,
    as many as the allocation says) or resrep (ResRep, which also chooses where, under
    the budget).
    """
    strength: float | None = None
    """Pull of that training (None: what lets channels merge, or vanish, in time)."""
    clusters: str = "kmeans"
    """How centripetal groups channels: kmeans or even."""
    prunings: int = 10
    """In how many steps gradual prunes, over the first two thirds of its training."""
    schedule: str = "cubic"
    """How much goes in each step of gradual: cubic (AGP: the first steps take the most)
    or linear.
    """
    epochs: int | None = None
    """Passes over the training split (None: as many as by default in fine-tuning)."""
    lr: float = 0.05
    """Highest learning rate; the rest is as in fine-tuning."""

    def __post_init__(self) -> None:
        _check_range(self, 0, float("inf"), "strength", "lr", stage="removal")
        _check_range(self, 1, float("inf"), "epochs", "prunings", stage="removal")
        _check_choice(self, "clusters", "kmeans", "even", stage="removal")
        _check_choice(self, "schedule", "cubic", "linear", stage="removal")


@dataclass(frozen=True)
class DimensionsConfig:
    """How the agent polynomial measures what depth, width and image size are worth."""

    epochs: int = 1
    """Passes over the training split for each network that is measured."""
    lr: float = 0.01
    """Highest learning rate meanwhile; the rest is as in fine-tuning."""
    degree: int = 2
    """Of the accuracy model's polynomials, one for each dimension."""

    def __post_init__(self) -> None:
        _check_range(self, 0, float("inf"), "epochs", "lr", stage="dimensions")
        _check_range(self, 1, 3, "degree", stage="dimensions")


@dataclass(frozen=True)
class LatencyConfig:
    """What latency is measured with, and what a budget of latency means.

    Beside it, the report has ONNX Runtime and PyTorch at batch 1 and 32.
    """

    engine: str = "onnxruntime"
    """onnxruntime, torch (eager, channels last), compiled (torch.compile) or openvino.
    """
    batch: int = 1
    """Images in a forward pass."""
    threads: int = 0
    """Threads that the engine may use (0: as many as PyTorch uses)."""
    precision: str = "float32"
    """float32, or bfloat16 where the engine computes so."""

    def __post_init__(self) -> None:
        _check_range(self, 1, float("inf"), "batch", stage="latency")
        _check_range(self, 0, float("inf"), "threads", stage="latency")
        _check_choice(self, "precision", "float32", "bfloat16", stage="latency")


@dataclass(frozen=True)
class ProxyConfig:
    """How a sub-model is scored during the search."""

    images: int = 224
    """Images of the proxy split that are scored; more rank a little better and cost in
    proportion.
    """
    blocks: int = 4
    """Disjoint blocks of as many images, of equal difficulty, that the batches of a
    search take turns with; 1 scores all candidates on the same images, to which a long
    search adapts. As many as the proxy split holds, at most. After every 400
    evaluations a search changes between these and blocks of calibration images, where
    no candidate is measured or solved on those.
    """
    loss: str = "cross_entropy"
    """What answers are held against: cross_entropy (with the labels) or kl (with the
    dense network's outputs).
    """
    statistics: str = "batch"
    """Where batch norm takes its statistics from: batch (the images being scored, one
    pass) or calibration (other images, in a pass of their own).
    """
    recalibration_images: int = 250
    """Images of the calibration split for --proxy.statistics calibration."""
    reconstruct: str = "auto"
    """Whether weights of pruned layers are solved anew, so that they reproduce the
    dense network's outputs as well as the kept channels can: "off"; "on": for every
    candidate, and the pruned network starts fine-tuning from them if that makes it
    better; "auto": the latter, and for candidates where uniform pruning to the budget
    leaves a network worse than a guess, since there the losses of networks that are
    only sliced rank nothing.
    """
    temperature: float = 0.0
    """0 keeps the most important channels; above 0 they are sampled, the more evenly
    the higher.
    """
    sub_models: int = 1
    """Sub-models drawn and averaged per allocation, where a temperature makes them
    differ.
    """
    seed: int = 0
    """Seed of the sampled channels."""
    bf16: str = "auto"
    """"auto" uses bfloat16 autocast where the CPU has the instructions, "on" and "off"
    force it.
    """
    workers: int | None = None
    """Candidates scored at once, each on a core of its own (None: one for each core).
    """

    def __post_init__(self) -> None:
        _check_range(
            self,
            1,
            float("inf"),
            "images",
            "blocks",
            "recalibration_images",
            "sub_models",
            "workers",
            stage="proxy",
        )
        _check_choice(self, "loss", "cross_entropy", "kl", stage="proxy")
        _check_choice(self, "statistics", "batch", "calibration", stage="proxy")
        _check_choice(self, "reconstruct", "auto", "on", "off", stage="proxy")
        _check_range(self, 0, float("inf"), "temperature", stage="proxy")
        _check_choice(self, "bf16", "auto", "on", "off", stage="proxy")


@dataclass(frozen=True)
class SearchConfig(_Excluding):
    """What is searched, by whom and for how long."""

    budget: str = "macs=50%"
    """Cost not to exceed: macs, params, memory, size (of the file) or latency; a share
    (50%) or an amount (macs=20M, memory=20MB, size=5MB, latency=8ms). Several are all
    met: macs=50%,size=5MB. A range of shares, as in macs=30%..80%, is searched as a
    whole: one policy, and the Pareto front.
    """
    _: KW_ONLY
    granularity: str = "channel"
    """What is removed: channel; dimensions: channels, residual blocks and pixels of the
    image's side together; layer, with the agent global: residual blocks; or, as masks
    that leave the shapes as they are, ranked by l1, l2, lamp or random with the agent
    global or uniform: weight, row, column, kernel, filter, or N:M as in 2:4 (by l1
    alone).
    """
    agent: str = "dyna"
    """dyna, ppo, sac, td3, ddpg, tqc, or a baseline: uniform, random, sensitivity,
    evolution, tpe, global (one threshold for the importance of all channels),
    cost_aware (for importance per cost saved), eagleeye; or, for dimensions, polynomial
    (an accuracy model fitted to short trainings).
    """
    policy: str = ""
    """Policy to start from, instead of from uniform pruning: a name that `autoprune
    policies` lists, a run, or a policy's folder. On the command line it brings its
    agent along. One that knows less than half of the network only leads the first ten
    episodes.
    """
    hyperparameters: dict[str, Any] = field(default_factory=dict, hash=False)
    """Settings of a learning agent that count instead of those in its file, one by one,
    as in --hyperparameters.learning_rate 1e-4, or a YAML file of them. Each agent's are
    in agents/hyperparameters/.
    """
    episodes: int = 300
    """Allocations to try; each is one evaluation."""
    seed: int = 0
    """Seed of the search and of fine-tuning."""
    criterion: str = "l1"
    """Which channels survive: l1, l2, bn_scale, fpgm, activation, apoz, taylor,
    hessian, lamp or random.
    """
    reward: str = "weighted_sum"
    """weighted_sum, amc or accuracy_guaranteed."""
    accuracy_floor: float = 0.8
    """Least proxy accuracy, in [0, 1], that the accuracy_guaranteed reward accepts."""
    round_to: int | str = AUTO
    """Kept channels are multiples of it. "auto" takes the number of channels that the
    engine computes at a time on this processor, such as 16 or 8, and its largest
    divisor that leaves a choice where a group is narrow or the budget tight.
    """
    max_sparsity: float = 0.9
    """Largest share of a group's channels that may go, from 0 to 0.99."""
    exclude: str = ""
    """Groups or layers that stay whole, as comma-separated patterns: layer1.*,conv1. A
    layer's name means all channels that it reads or produces; `autoprune trace` lists
    the names.
    """
    min_width: str = ""
    """Least channels by pattern, PATTERN=N,PATTERN=N: the groups meant keep at least N
    (all, if they have fewer). Of several patterns that mean a group the last counts.
    """
    round_to_for: str = ""
    """--round_to by pattern, PATTERN=N,PATTERN=N; the others keep to --round_to."""
    finalists: int = 5
    """Best allocations that are compared once more on the selection split, chosen among
    four times as many on the whole proxy split; a range of budgets compares six points
    of its front instead.
    """
    checkpoint_every: int = 10
    """Episodes between two checkpoints of sac, td3, ddpg, tqc or ppo, at the next end
    of a batch of ten; dyna practises again from the log, and baselines learn nothing.
    """

    def __post_init__(self) -> None:
        _check_range(
            self,
            1,
            float("inf"),
            "episodes",
            "finalists",
            "checkpoint_every",
        )
        check_multiple(self.round_to)
        _check_range(self, 0, LARGEST_SEED, "seed")
        _check_range(self, 0, 1, "accuracy_floor")
        _check_range(self, 0, 0.99, "max_sparsity")
        _numbers("min_width", self.min_width)
        _numbers("round_to_for", self.round_to_for)

    @property
    def least_widths(self) -> dict[str, int]:
        """Pattern to least width, from `min_width`."""
        return _numbers("min_width", self.min_width)

    @property
    def multiples(self) -> dict[str, int]:
        """Pattern to multiple, from `round_to_for`."""
        return _numbers("round_to_for", self.round_to_for)


@dataclass(frozen=True)
class Settings:
    """Everything that decides a run's result; stored in its folder as config.yaml."""

    network: NetworkConfig = field(default_factory=NetworkConfig)
    data: DataConfig = field(default_factory=DataConfig)
    search: SearchConfig = field(default_factory=SearchConfig)
    proxy: ProxyConfig = field(default_factory=ProxyConfig)
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
    sparse: SparseConfig = field(default_factory=SparseConfig)
    removal: RemovalConfig = field(default_factory=RemovalConfig)
    dimensions: DimensionsConfig = field(default_factory=DimensionsConfig)
    latency: LatencyConfig = field(default_factory=LatencyConfig)

    @property
    def sparse_training(self) -> FinetuneConfig:
        """How sparse training goes, as far as it is training."""
        return dataclasses.replace(
            self.finetune, epochs=self.sparse.epochs, lr=self.sparse.lr
        )

    @property
    def removal_training(self) -> FinetuneConfig:
        """How the training of a removal goes, as far as it is training."""
        return dataclasses.replace(
            self.finetune, epochs=self.removal.epochs, lr=self.removal.lr
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain nested data."""
        return dataclasses.asdict(self)

    @property
    def arguments(self) -> dict[str, Any]:
        """Argument to its value, each by the name that messages have for it.

        Nothing stands for the seed of the proxy, which follows that of the search.
        """
        arguments = {}
        for stage, fields in self.to_dict().items():
            for name, value in fields.items():
                # What nearly every run sets has no prefix.
                has_prefix = stage not in ("network", "data", "search")
                arguments[_argument(stage if has_prefix else "", name)] = value
        arguments["epochs"] = arguments.pop("finetune.epochs")
        del arguments["proxy.seed"]
        return arguments

    @classmethod
    def from_dict(cls, stages: Mapping[str, Any]) -> "Settings":
        """The settings stored in a run's config.

        Args:
            stages: Stage to its fields; keys that are no stage (provenance) are
                ignored.

        Raises:
            UserError: If a stage or one of its fields isn't known to this version.
        """
        try:
            return cls(
                network=NetworkConfig(**stages["network"]),
                data=DataConfig(**stages["data"]),
                search=SearchConfig(**stages["search"]),
                proxy=ProxyConfig(**stages["proxy"]),
                finetune=FinetuneConfig(**stages["finetune"]),
                sparse=SparseConfig(**stages["sparse"]),
                removal=RemovalConfig(**stages["removal"]),
                dimensions=DimensionsConfig(**stages["dimensions"]),
                # Runs of earlier versions say nothing of it.
                latency=LatencyConfig(**stages.get("latency", {})),
            )
        except (KeyError, TypeError) as error:
            raise UserError(
                "run",
                f"its config.yaml is damaged or of another version ({error}); "
                f"start the run anew",
            ) from error
