"""One plain training loop: fine-tuning, distillation, training from scratch.

It can be killed at any moment and resumed after its last whole epoch.

Methods that train differently (sparse training, masks, compactors) don't bring a loop
of their own: each is a `TrainingCallback`, whose hooks the loop calls.

What is learned is known to one function, `batch_loss`: here class labels, and with a
teacher its answers. Everything else of the loop is the same for any task.
"""

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from autoprune.config import FinetuneConfig
from autoprune.data.datasets import Images, batches, seeded
from autoprune.errors import DivergedError
from autoprune.evaluation.evaluate import in_eval_mode
from autoprune.evaluation.precision import training_autocast
from autoprune.structure.groups import tensors_in
from autoprune.training.checkpoint import Checkpoint, Progress, training_of

EpochCallback: TypeAlias = Callable[[int, float], None]
"""Is told the number of finished epochs and the mean training loss of the last one.

A training that goes on tells of its last finished epoch once more.
"""
N_CHECKED = 8
"""Images on which a network has to answer with finite numbers after each epoch."""


class TrainingCallback:
    """What a method adds to the training loop; this one adds nothing.

    The hooks are called in the order in which they stand here, the three of a step with
    the network that is trained and the number of the step from 0. What a callback draws
    at random comes from torch's global generator, which the loop seeds in each epoch.
    """

    def parameter_groups(self, model: nn.Module, config: FinetuneConfig) -> list[dict]:
        """Returns the optimizer's parameters and their options, before the first step.

        Args:
            model: The network that will be trained.
            config: Its training.

        Returns:
            Groups as `torch.optim.SGD` takes them.
        """
        return parameter_groups(model, config)

    def begin(self, model: nn.Module, n_steps: int, config: FinetuneConfig) -> None:
        """Called before the first step, or before the first one after a kill.

        Args:
            model: The network, with the weights of the checkpoint if there was one.
            n_steps: Length of the whole training, from its first step.
            config: The training.
        """

    def before_forward(self, model: nn.Module, step: int) -> None:
        """Called before a batch goes through the network.

        Args:
            model: The network.
            step: Number of the step, from 0.
        """

    def before_step(self, model: nn.Module, step: int) -> None:
        """Called between the backward pass and the optimizer; may change gradients.

        They are those of the loss alone: the optimizer adds weight decay and momentum.

        Args:
            model: The network.
            step: Number of the step, from 0.
        """

    def after_step(self, model: nn.Module, step: int) -> None:
        """Called after the optimizer has moved the weights; may change them.

        Args:
            model: The network.
            step: Number of the step, from 0.
        """

    def state_dict(self) -> dict:
        """Returns tensors and numbers from which `load_state_dict` goes on."""
        return {}

    def load_state_dict(self, state: dict) -> None:
        """Takes over what `state_dict` returned; called before `begin`."""


def _ignore_epoch(epoch: int, loss: float) -> None:
    """An `EpochCallback` that does nothing."""


def finetune(
    model: nn.Module,
    images: Images,
    config: FinetuneConfig,
    seed: int = 0,
    teacher: nn.Module | None = None,
    checkpoint: Path | None = None,
    on_epoch: EpochCallback = _ignore_epoch,
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
        callback: The method that takes part in the training; None for none.

    Returns:
        The same network.

    Raises:
        DivergedError: At the first loss that isn't finite, or where weights or answers
            aren't; the checkpoint is removed and `model` of no use any more.
        UserError: If the checkpoint is damaged, or is of a training of another length
            or with other settings.
    """
    callback = callback or TrainingCallback()
    # Convolutions on the CPU are fastest where a pixel's channels lie side by side.
    model.train().to(memory_format=torch.channels_last)
    if config.distillation <= 0:
        teacher = None  # it would cost a forward pass and count for nothing
    if teacher is not None:
        teacher.eval().to(memory_format=torch.channels_last)

    epochs = config.epochs_for(len(images))
    n_steps = epochs * config.steps_per_epoch(len(images))
    optimizer = torch.optim.SGD(
        callback.parameter_groups(model, config),
        config.lr_for(n_steps),
        config.momentum,
        # Nesterov looks ahead along the momentum; torch refuses it where there is none.
        nesterov=config.momentum > 0,
    )
    schedule = LambdaLR(optimizer, _annealing(n_steps, config.warmup))
    progress = Progress(model, optimizer, schedule, callback)
    keeper = Checkpoint(checkpoint, training_of(config, epochs, seed))
    n_finished, loss = keeper.restore(progress)
    if loss is not None:
        # A kill may have come after the checkpoint and before anybody was told.
        on_epoch(n_finished, loss)
    # After resuming, so that the callback sees the weights that will be trained.
    callback.begin(model, n_steps, config)

    for epoch in range(n_finished, epochs):
        try:
            # A seed for each epoch, so that a resumed training draws what an
            # uninterrupted one would. The factor keeps the epochs of one seed apart
            # from those of others.
            with seeded(seed * 100_003 + epoch):
                loss = _train_epoch(
                    model,
                    batches(images, config.batch_size, seed, epoch, config.flip),
                    optimizer,
                    schedule,
                    config,
                    teacher,
                    callback,
                )
        except FloatingPointError as error:
            # Where this rate leads is known by now; with another one a training starts
            # over, and nothing of this one may be in its way.
            keeper.remove()
            when = f"in epoch {epoch + 1} of {epochs}"
            raise DivergedError(f"{error} {when}", config.lr_for(n_steps)) from error
        # Before anybody is told, so that whoever stops the training then loses nothing.
        keeper.save(progress, epoch + 1, loss)
        on_epoch(epoch + 1, loss)
    return model.eval()


def _train_epoch(
    model: nn.Module,
    epoch_batches: Iterable[tuple[Tensor, Tensor]],
    optimizer: torch.optim.Optimizer,
    schedule: LambdaLR,
    config: FinetuneConfig,
    teacher: nn.Module | None,
    callback: TrainingCallback,
) -> float:
    """Trains on every batch once and returns the mean loss.

    Raises:
        FloatingPointError: At the first loss, weight or answer that isn't finite; its
            message says which of them.
    """
    losses = []
    inputs = None
    for inputs, labels in epoch_batches:
        # The schedule moves once a batch; torch calls whatever it counts epochs.
        step = schedule.last_epoch
        callback.before_forward(model, step)
        # Only the forward pass: gradients follow its precision by themselves.
        with training_autocast(config.bf16):
            loss = batch_loss(model, inputs, labels, config, teacher)
        # Detached, or every batch's graph would stay in memory for the whole epoch.
        losses.append(loss.detach())
        # Before it reaches the weights, which would all be lost with one step.
        if not losses[-1].isfinite():
            raise FloatingPointError(f"the loss is {losses[-1].item()}")
        optimizer.zero_grad()
        loss.backward()
        callback.before_step(model, step)
        optimizer.step()
        callback.after_step(model, step)
        schedule.step()
        _check_weights(model)
    assert inputs is not None, "an epoch has one batch at least"
    _check_network(model, inputs)
    return torch.stack(losses).mean().item()


def _check_weights(model: nn.Module) -> None:
    """Raises a `FloatingPointError` unless all weights are finite."""
    # A finite loss can have a gradient that isn't. One norm over all of them costs a
    # thousandth of a step; it also ends where the weights' squares do.
    parameters = [parameter.detach() for parameter in model.parameters()]
    if not torch.nn.utils.get_total_norm(parameters).isfinite():
        raise FloatingPointError("the weights are not finite")


@torch.no_grad()
def _check_network(model: nn.Module, inputs: Tensor) -> None:
    """Raises a `FloatingPointError` unless a network and its answers are finite.

    In eval mode it reads running statistics, which no training loss shows.
    """
    for name, buffer in model.named_buffers():
        if not buffer.isfinite().all():
            raise FloatingPointError(f"{name} is not finite")
    with in_eval_mode(model):
        answers = tensors_in(model(inputs[:N_CHECKED]))
    if not all(answer.isfinite().all() for answer in answers):
        raise FloatingPointError("the network's answers are not finite")


def batch_loss(
    model: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    config: FinetuneConfig,
    teacher: nn.Module | None = None,
) -> Tensor:
    """Computes the loss of one batch; all that the loop knows of the task is here.

    Without a teacher it is the cross-entropy with the labels. With one, a share of
    `config.distillation` of it is the divergence from the teacher's answers, both
    softened by the temperature T and scaled by T^2, which keeps the size of its
    gradient whatever T is (Hinton et al. 2015, section 2).

    Args:
        model: The network that is trained.
        inputs: Normalised images `(n, 3, height, width)`.
        labels: Their classes, int64 `(n,)`.
        config: Weight and temperature of the distillation.
        teacher: The network to imitate, in eval mode; None for the labels alone.

    Returns:
        A scalar with its graph.
    """
    if teacher is None:
        # Logits may be bfloat16, in which a softmax over many classes loses digits.
        return nn.functional.cross_entropy(model(inputs).float(), labels)
    weight = config.distillation
    temperature = config.temperature
    # The teacher's answers are targets: nothing flows back through them.
    with torch.no_grad():
        target = (teacher(inputs).float() / temperature).log_softmax(1)
    logits = model(inputs).float()
    soft_loss = nn.functional.kl_div(
        (logits / temperature).log_softmax(1),
        target,
        log_target=True,
        # torch's "mean" would divide by the number of classes too.
        reduction="batchmean",
    )
    hard_loss = nn.functional.cross_entropy(logits, labels)
    return (1 - weight) * hard_loss + weight * temperature**2 * soft_loss


def parameter_groups(model: nn.Module, config: FinetuneConfig) -> list[dict]:
    """Splits parameters into weights, which decay, and the rest, which doesn't.

    Args:
        model: The network that will be trained.
        config: Its weight decay.

    Returns:
        Groups as `torch.optim.SGD` takes them: weights, then batch norm and biases.
    """
    weights = []
    vectors = []
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        # Biases and batch norm have one axis, every layer's weight has more.
        if parameter.ndim > 1:
            weights.append(parameter)
        else:
            vectors.append(parameter)
    return [
        {"params": weights, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]


def _annealing(n_steps: int, warmup: float) -> Callable[[int], float]:
    """Linear warm-up, then a half cosine to zero: from step to factor of the rate.

    With 100 steps and a warm-up of 0.1, step 0 has a factor of 0.1, step 9 has 1, step
    55 has 0.5, and step 99 nearly 0.
    """
    n_warmup = max(1, round(warmup * n_steps))
    n_cosine = max(1, n_steps - n_warmup)

    def factor(step: int) -> float:
        # Above zero from the first step on, which would be lost otherwise.
        if step < n_warmup:
            return (step + 1) / n_warmup
        return 0.5 * (1 + math.cos(math.pi * (step - n_warmup) / n_cosine))

    return factor


def constant_pull(
    total: float,
    momentum: float,
    config: FinetuneConfig,
    n_steps: int,
    first_step: int = 0,
) -> float:
    """Finds the gradient that, constant over a training, moves a weight by `total`.

    A gradient moves a weight by the learning rate times itself, and by
    1 / (1 - momentum) as much once momentum has built up. With three steps of rates
    0.1, 0.05 and 0.01 and a momentum of 0.9, a pull of 1 moves it by 1.6.

    Args:
        total: How far the weight is to move.
        momentum: The optimizer's.
        config: The training, from which learning rates follow.
        n_steps: Its length.
        first_step: The step from which on the pull acts.

    Returns:
        The pull.
    """
    factor = _annealing(n_steps, config.warmup)
    sum_of_factors = sum(factor(step) for step in range(first_step, n_steps))
    sum_of_rates = config.lr_for(n_steps) * sum_of_factors
    # The floor is for a learning rate of 0, with which nothing moves anyway.
    return total * (1 - momentum) / max(sum_of_rates, 1e-12)
