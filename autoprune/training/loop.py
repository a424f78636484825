"""One plain training loop: fine-tuning, distillation, training from scratch; resumable
at every epoch.

Methods that train differently (sparse training, masks, compactors) don't bring a loop
of their own: each is a `TrainingCallback`.
"""

import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from autoprune.config import FinetuneConfig
from autoprune.data.datasets import Images, batches, seeded
from autoprune.errors import UserError
from autoprune.evaluation.precision import training_autocast
from autoprune.runs import write_state

EpochCallback = Callable[[int, float], None]


class TrainingCallback:
    """What a method adds to the training loop; this one adds nothing.

    The hooks are called in the order in which they stand here, the three of a step with
    the network that is trained and the number of the step from 0. What a plug draws at
    random comes from the global generator, which the loop seeds.
    """

    def parameter_groups(self, model: nn.Module, config: FinetuneConfig) -> list[dict]:
        """Parameters and their options for `torch.optim.SGD`; before the first step."""
        return parameter_groups(model, config)

    def begin(self, model: nn.Module, n_steps: int, config: FinetuneConfig) -> None:
        """Training is about to start, or to go on; `n_steps` is its whole length."""

    def before_forward(self, model: nn.Module, step: int) -> None:
        """A batch is about to be answered."""

    def before_step(self, model: nn.Module, step: int) -> None:
        """Gradients of the loss are there; the optimizer is about to use them, weight
        decay and momentum included.
        """

    def after_step(self, model: nn.Module, step: int) -> None:
        """The optimizer has moved the weights."""

    def state_dict(self) -> dict:
        """Tensors and numbers from which `load_state_dict` goes on after a kill."""
        return {}

    def load_state_dict(self, state: dict) -> None:
        """Takes over what `state_dict` gave."""


def finetune(
    model: nn.Module,
    images: Images,
    config: FinetuneConfig,
    seed: int = 0,
    teacher: nn.Module | None = None,
    checkpoint: Path | None = None,
    on_epoch: EpochCallback = lambda epoch, loss: None,
    callback: TrainingCallback | None = None,
) -> nn.Module:
    """Trains `model` in place and returns it in eval mode.

    With a `checkpoint` file the state after each epoch is kept there, and a call that
    finds one goes on after its epoch. Order, crops and dropout depend on seed and epoch
    only, so a resumed run ends with the same weights.

    Args:
        model: The network to train.
        images: Its training split.
        config: Epochs, learning rate and the rest.
        seed: Seed of order, augmentation and dropout.
        teacher: Dense network to distil from; used where `config.distillation` > 0.
        checkpoint: File to resume from and to write to.
        on_epoch: Called with the number of finished epochs and the mean training loss.
        plug: The method that takes part in the training; None for none.
    """
    callback = callback or TrainingCallback()
    model.train().to(memory_format=torch.channels_last)
    epochs = config.epochs_for(len(images))
    n_steps = epochs * config.steps_per_epoch(len(images))
    groups, accelerated = callback.parameter_groups(model, config), config.momentum > 0
    optimizer = torch.optim.SGD(
        groups, config.lr_for(n_steps), config.momentum, nesterov=accelerated
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, _annealing(n_steps, config.warmup)
    )
    loss_of = (
        _distilled(config, teacher)
        if teacher is not None and config.distillation > 0
        else _plain
    )
    trained = _resume(checkpoint, epochs, model, optimizer, schedule, callback)
    callback.begin(model, n_steps, config)
    for epoch in range(trained, epochs):
        with seeded(seed * 100_003 + epoch):
            loss = _one_epoch(
                model,
                batches(images, config.batch_size, seed, epoch, config.flip),
                optimizer,
                schedule,
                loss_of,
                config,
                callback,
            )
        _save(checkpoint, (epoch + 1, epochs), model, optimizer, schedule, callback)
        on_epoch(epoch + 1, loss)
    return model.eval()


def _one_epoch(
    model,
    epoch_batches,
    optimizer,
    schedule,
    loss_of,
    config: FinetuneConfig,
    callback: TrainingCallback,
) -> float:
    losses = []
    for inputs, labels in epoch_batches:
        step = schedule.last_epoch
        callback.before_forward(model, step)
        with training_autocast(config.bf16):
            loss = loss_of(model, inputs, labels)
        optimizer.zero_grad()
        loss.backward()
        callback.before_step(model, step)
        optimizer.step()
        callback.after_step(model, step)
        schedule.step()
        losses.append(loss.detach())
    return torch.stack(losses).mean().item()


def _plain(model: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(model(inputs).float(), labels)


def _distilled(
    config: FinetuneConfig, teacher: nn.Module
) -> Callable[[nn.Module, Tensor, Tensor], Tensor]:
    """Hinton et al. 2015, section 2: the soft term is scaled by the squared temperature
    to keep its gradient.
    """
    weight, temperature = config.distillation, config.temperature
    teacher.eval().to(memory_format=torch.channels_last)

    def loss(model: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
        with torch.no_grad():
            target = (teacher(inputs).float() / temperature).log_softmax(1)
        logits = model(inputs).float()
        soft = F.kl_div(
            (logits / temperature).log_softmax(1),
            target,
            log_target=True,
            reduction="batchmean",
        )
        return (1 - weight) * F.cross_entropy(
            logits, labels
        ) + weight * temperature**2 * soft

    return loss


def parameter_groups(model: nn.Module, config: FinetuneConfig) -> list[dict]:
    """Options of `torch.optim.SGD`: weights decay, batch norm and biases don't."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    decayed = [p for p in parameters if p.ndim > 1]
    exempt = [p for p in parameters if p.ndim <= 1]
    return [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": exempt, "weight_decay": 0.0},
    ]


def _annealing(total: int, warmup: float) -> Callable[[int], float]:
    rising = max(1, round(warmup * total))

    def factor(step: int) -> float:
        if step < rising:
            return (step + 1) / rising
        return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, total - rising)))

    return factor


def pull_for(
    total: float, momentum: float, config: FinetuneConfig, n_steps: int, since: int = 0
) -> float:
    """The constant pull that, times the learning rate and accelerated by momentum, adds
    up to `total`.

    Over all steps of a training, or over those from one on.
    """
    factor = _annealing(n_steps, config.warmup)
    rate = config.lr_for(n_steps) * sum(factor(step) for step in range(since, n_steps))
    return total * (1 - momentum) / max(rate, 1e-12)


def _save(
    checkpoint: Path | None,
    epoch_of: tuple[int, int],
    model: nn.Module,
    optimizer,
    schedule,
    callback,
) -> None:
    if checkpoint is None:
        return
    state = {
        "epoch_of": epoch_of,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "step": schedule.last_epoch,
        "plug": callback.state_dict(),
    }
    write_state(checkpoint, state)


def _resume(
    checkpoint: Path | None,
    epochs: int,
    model: nn.Module,
    optimizer,
    schedule,
    callback: TrainingCallback,
) -> int:
    """The finished epochs; of a training of other length, whose rates are others,
    nothing can be used.
    """
    if checkpoint is None or not checkpoint.exists():
        return 0
    try:
        state = torch.load(checkpoint, weights_only=True)
        epoch, planned = state["epoch_of"]
        if planned == epochs:
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            schedule.last_epoch = state["step"]
            callback.load_state_dict(state["plug"])
    except Exception as error:  # torch raises a dozen types for a damaged file
        reason = (str(error).splitlines() or [""])[0]
        raise UserError(
            "run",
            f"can't use checkpoint {str(checkpoint)!r} ({reason}); delete it to "
            f"start over",
        ) from error
    if planned != epochs:
        raise UserError(
            "run",
            f"checkpoint {str(checkpoint)!r} is of a training of another length "
            f"(epochs {planned}, asked for "
            f"{epochs}); ask for {planned} again, or delete it to start over",
        )
    return epoch
