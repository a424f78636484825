"""The training loop: it learns, it survives being killed, and it ends with a learning
rate of zero.
"""

from dataclasses import replace

import pytest
import torch
from kills import KilledError, kill_after
from torch import nn

from autoprune.config import DataConfig, FinetuneConfig
from autoprune.data.datasets import Images, load
from autoprune.data.networks import conv_bn
from autoprune.errors import UserError
from autoprune.training.loop import TrainingCallback, finetune

CONFIG = FinetuneConfig(epochs=4, batch_size=64, lr=0.1, distillation=0.0, bf16="off")


@pytest.fixture(scope="module")
def images() -> Images:
    return load(DataConfig(data="digits")).train[:512]


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    body = (
        conv_bn(3, 8, stride=2),
        conv_bn(8, 16, stride=2),
        nn.Dropout(0.1),
        nn.Flatten(),
    )
    return nn.Sequential(*body, nn.Linear(16 * 16, 10))


def assert_same_weights(first: nn.Module, second: nn.Module) -> None:
    for (key, one), other in zip(
        first.state_dict().items(), second.state_dict().values(), strict=True
    ):
        assert torch.equal(one, other), key


def test_loss_falls_and_most_training_images_are_recognised(images):
    losses = []
    config = replace(CONFIG, epochs=10)
    model = finetune(
        network(), images, config, on_epoch=lambda epoch, loss: losses.append(loss)
    )
    assert losses[-1] < losses[0] / 2
    assert len(losses) == 10
    assert not model.training
    with torch.no_grad():
        assert (model(images.inputs).argmax(1) == images.labels).float().mean() > 0.8


def test_same_seed_gives_the_same_weights_and_another_seed_others(images):
    first, again, other = (
        finetune(network(), images, CONFIG, seed) for seed in (3, 3, 4)
    )
    assert_same_weights(first, again)
    assert not torch.equal(first[-1].weight, other[-1].weight)


def test_global_random_state_is_left_as_found(images):
    model = network()
    before = torch.get_rng_state()
    finetune(model, images[:64], replace(CONFIG, epochs=1))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("killed_after", [1, 2, 3])
def test_killed_run_goes_on_to_bit_identical_weights(images, tmp_path, killed_after):
    checkpoint = tmp_path / "training.ckpt"
    with pytest.raises(KilledError):
        finetune(
            network(),
            images,
            CONFIG,
            checkpoint=checkpoint,
            on_epoch=kill_after(killed_after),
        )
    epochs = []
    resumed = finetune(
        network(seed=9),
        images,
        CONFIG,
        checkpoint=checkpoint,
        on_epoch=lambda epoch, loss: epochs.append(epoch),
    )
    # The last finished one once more: nobody knows whether it was told before the kill.
    assert epochs == list(range(killed_after, 5))
    assert_same_weights(resumed, finetune(network(), images, CONFIG))


class StepCounter(TrainingCallback):
    """Counts steps, through kills."""

    n = 0

    def after_step(self, model: nn.Module, step: int) -> None:
        self.n += 1

    def state_dict(self) -> dict:
        return {"n": self.n}

    def load_state_dict(self, state: dict) -> None:
        self.n = state["n"]


@pytest.mark.parametrize("key", ["callback", "plug"])
def test_a_callback_goes_on_whatever_the_checkpoints_version_calls_its_state(
    images, tmp_path, key
):
    checkpoint = tmp_path / "training.ckpt"
    with pytest.raises(KilledError):
        finetune(
            network(),
            images,
            CONFIG,
            checkpoint=checkpoint,
            on_epoch=kill_after(1),
            callback=StepCounter(),
        )
    state = torch.load(checkpoint, weights_only=True)
    state[key] = state.pop("callback")
    torch.save(state, checkpoint)
    counter = StepCounter()
    finetune(network(), images, CONFIG, checkpoint=checkpoint, callback=counter)
    assert counter.n == 4 * CONFIG.steps_per_epoch(len(images))


def test_finished_run_is_not_trained_again(images, tmp_path):
    told, checkpoint = [], tmp_path / "training.ckpt"
    first = finetune(
        network(),
        images,
        CONFIG,
        checkpoint=checkpoint,
        on_epoch=lambda *args: told.append(args),
    )
    again = finetune(
        network(seed=9),
        images,
        CONFIG,
        checkpoint=checkpoint,
        on_epoch=lambda *args: told.append(args),
    )
    assert [epoch for epoch, _ in told] == [1, 2, 3, 4, 4]
    assert told[-1] == told[-2]
    assert_same_weights(first, again)


def test_checkpoint_of_a_training_of_other_length_is_refused(images, tmp_path):
    checkpoint = tmp_path / "training.ckpt"
    finetune(network(), images, replace(CONFIG, epochs=2), checkpoint=checkpoint)
    with pytest.raises(
        UserError,
        match=r"another length \(epochs 2, asked for 4\); ask for 2 again, or delete it",
    ):
        finetune(network(), images, CONFIG, checkpoint=checkpoint)


def test_checkpoint_loads_without_executing_code_and_its_learning_rate_ends_at_zero(
    images, tmp_path
):
    rates, checkpoint = [], tmp_path / "training.ckpt"

    def note(epoch: int, loss: float) -> None:
        rates.append(
            torch.load(checkpoint, weights_only=True)["optimizer"]["param_groups"][0][
                "lr"
            ]
        )

    finetune(network(), images, CONFIG, checkpoint=checkpoint, on_epoch=note)
    assert rates == sorted(rates, reverse=True)
    assert rates[0] > 0.5 * CONFIG.lr
    assert rates[-1] < 1e-6 * CONFIG.lr


def test_distillation_moves_the_network_towards_its_teacher(images):
    teacher = finetune(network(seed=5), images, CONFIG, seed=5)
    before = {key: value.clone() for key, value in teacher.state_dict().items()}
    alone = finetune(network(), images, CONFIG, teacher=teacher)
    taught = finetune(
        network(), images, replace(CONFIG, distillation=0.9), teacher=teacher
    )

    def distance(model: nn.Module) -> float:
        with torch.no_grad():
            return (
                (model(images.inputs).softmax(1) - teacher(images.inputs).softmax(1))
                .abs()
                .mean()
                .item()
            )

    assert distance(taught) < distance(alone)
    assert all(
        torch.equal(before[key], value) for key, value in teacher.state_dict().items()
    )


def test_weights_decay_but_batch_norm_and_biases_do_not(images):
    black = Images(torch.zeros_like(images.pixels[:64]), images.labels[:64])
    model = network()
    for parameter in model[-1].parameters():
        parameter.requires_grad_(False)
    model[-1].weight.zero_()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    finetune(model, black, replace(CONFIG, epochs=1, weight_decay=0.5))
    after = model.state_dict()
    assert after["0.0.weight"].norm() < before["0.0.weight"].norm()
    assert torch.equal(after["0.1.weight"], before["0.1.weight"])
    assert torch.equal(after["4.weight"], before["4.weight"])


def test_fewer_images_than_a_batch_still_train(images):
    first, model = network(), network()
    finetune(model, images[:10], replace(CONFIG, epochs=1))
    assert not torch.equal(model[-1].weight, first[-1].weight)


@pytest.mark.parametrize(
    ("n_images", "epochs"), [(45_000, 10), (2_600, 30), (5_120, 15), (100, 30)]
)
def test_by_default_small_datasets_are_passed_over_more_often(n_images, epochs):
    config = FinetuneConfig()
    assert config.epochs_for(n_images) == epochs
    assert replace(config, epochs=3).epochs_for(n_images) == 3


@pytest.mark.parametrize(
    ("lr", "n_steps", "expected"),
    [(None, 1500, 0.05), (None, 10**6, 0.05), (0.3, 15, 0.3)],
)
def test_a_long_training_has_the_usual_rate_and_any_training_the_one_that_is_given(
    lr, n_steps, expected
):
    assert FinetuneConfig(lr=lr).lr_for(n_steps) == expected


def test_a_short_training_has_a_lower_rate_and_uses_it(images, tmp_path):
    config = replace(CONFIG, epochs=2, lr=None)
    n_steps = 2 * config.steps_per_epoch(len(images))
    assert config.lr_for(4 * n_steps) == pytest.approx(2 * config.lr_for(n_steps))
    finetune(network(), images, config, checkpoint=tmp_path / "state.pt")
    (group, *_) = torch.load(tmp_path / "state.pt", weights_only=True)["optimizer"][
        "param_groups"
    ]
    assert group["initial_lr"] == config.lr_for(n_steps) < 0.01
