"""The experiments on tickets, on training from scratch and on what fine-tuning leaves
do what they say.
"""

import itertools
from dataclasses import replace

import pytest
import torch

from autoprune.config import DataConfig, FinetuneConfig
from autoprune.data.datasets import load
from autoprune.data.networks import CifarResNet
from autoprune.structure.slicing import prune
from autoprune.tracing.trace import trace
from autoprune.training.loop import finetune
from autoprune.training.masks import Masks
from experiments import lottery_tickets
from experiments.after_finetuning import CachedTeacher
from experiments.lottery_tickets import (
    KEPT,
    Training,
    copy_state,
    lenet,
    mask_smallest,
    tickets,
    train,
)
from experiments.rethinking import epochs_of, reinitialise

CONFIG = FinetuneConfig(4, 60, 0.1, weight_decay=1e-4, distillation=0.0, flip=False)


@pytest.fixture(scope="module")
def splits():
    return load(DataConfig("digits", max_train_images=240))


def n_values(model) -> int:
    return sum(int(p.count_nonzero()) for p in model.parameters())


def test_every_round_keeps_a_fifth_less_of_nested_connections_and_what_is_masked_stays_zero(
    splits,
):
    first = copy_state(lenet(0))
    model, before = train(first, Masks({}), splits, CONFIG, 0)[0], None
    n_all = sum(p.numel() for p in model.parameters())
    for number in (1, 2, 3):
        ranked = torch.cat(
            [
                p.detach().abs().flatten()
                for n, p in model.named_parameters()
                if n.endswith("weight")
            ]
        )
        masks = mask_smallest(model, splits.example, KEPT**number)
        n_gone = sum(int((~kept).sum()) for kept in masks.kept.values())
        assert n_all - n_gone == int(KEPT**number * n_all)
        values = {name: model.get_parameter(name).detach().abs() for name in masks.kept}
        threshold = ranked.sort().values[n_gone]
        assert (
            max(float(values[name][~kept].max()) for name, kept in masks.kept.items())
            <= threshold
        )
        assert before is None or all(
            (kept <= before.kept[name]).all() for name, kept in masks.kept.items()
        )
        model, before = train(first, masks, splits, CONFIG, 0)[0], masks
        assert all(
            (model.get_parameter(name)[~kept] == 0).all()
            for name, kept in masks.kept.items()
        )
        assert n_values(model) == n_all - n_gone


def test_rewinding_is_bit_exact(splits, monkeypatch):
    starts = []
    original = lottery_tickets.finetune

    def seen(model, images, config, seed, callback):
        callback.begin(model, 1, config)
        starts.append((copy_state(model), callback.masks))
        return original(model, images, config, seed, callback=callback)

    monkeypatch.setattr(lottery_tickets, "finetune", seen)
    rows = list(itertools.islice(tickets(splits, CONFIG, 3), 4))
    assert [row["arm"] for row in rows] == [
        "dense",
        "ticket",
        "reinitialised",
        "rewound",
    ]
    monkeypatch.undo()
    first = copy_state(lenet(3))
    early = train(first, Masks({}), splits, CONFIG, 3)[1].early
    (dense, _), (ticket, masks), (anew, same), (rewound, own) = starts
    assert all(torch.equal(dense[name], first[name]) for name in first)
    for start, source, kept in ((ticket, first, masks), (rewound, early, own)):
        for name, values in start.items():
            left = kept.kept.get(name, torch.ones_like(values, dtype=torch.bool))
            assert torch.equal(values[left], source[name][left])
            assert (values[~left] == 0).all()
    assert same.kept.keys() == masks.kept.keys()
    assert all(torch.equal(same.kept[n], masks.kept[n]) for n in masks.kept)
    assert not torch.equal(anew["1.weight"], ticket["1.weight"])


def test_the_early_values_are_those_after_the_first_epoch(splits):
    first = copy_state(lenet(0))
    _, watched = train(first, Masks({}), splits, CONFIG, 0)
    callback = Training(Masks({}), splits, CONFIG)
    seen = {}

    class StopError(Exception):
        pass

    def after(epoch: int, loss: float) -> None:
        seen.update(copy_state(model))
        raise StopError

    model = lenet(0)
    with pytest.raises(StopError):
        lottery_tickets.finetune(
            model, splits.train, CONFIG, 0, callback=callback, on_epoch=after
        )
    assert all(torch.equal(watched.early[name], seen[name]) for name in seen)
    assert not torch.equal(watched.early["1.weight"], first["1.weight"])


@pytest.mark.parametrize(
    ("share", "epochs"), [(0.5, 24), (0.25, 24), (0.8, 15), (1.0, 12)]
)
def test_scratch_b_trains_for_the_dense_networks_macs_at_most_twice_as_long(
    share, epochs
):
    assert epochs_of("scratch_b", 12, share) == epochs
    assert (
        epochs_of("scratch_e", 12, share)
        == epochs_of("fine_tuned_long", 12, share)
        == 12
    )
    assert epochs_of("fine_tuned", 12, share) == 3
    assert epochs_of("fine_tuned", 1, share) == 1


def test_a_network_from_scratch_has_the_shapes_of_the_pruned_one_and_values_for_its_own_widths():
    torch.manual_seed(0)
    dense = CifarResNet(8)
    groups = trace(dense, torch.randn(1, 3, 32, 32))
    pruned = prune(
        dense,
        groups,
        {group.name: torch.arange(group.channels // 4) for group in groups},
    )
    before = copy_state(pruned)
    anew = reinitialise(pruned, 0)
    assert [p.shape for p in anew.parameters()] == [
        p.shape for p in pruned.parameters()
    ]
    assert all(
        torch.equal(tensor, before[name])
        for name, tensor in pruned.state_dict().items()
    )
    assert not any(
        torch.equal(a, b)
        for a, b in zip(anew.parameters(), pruned.parameters(), strict=True)
        if a.ndim > 1
    )
    # Variance 2 over the fan-in of the small layer; the dense one's would be a quarter
    # of it.
    weight = anew.layer3[0].conv2.weight
    assert weight.var().item() == pytest.approx(2 / (weight.shape[1] * 9), rel=0.25)
    assert all(
        torch.equal(a, b)
        for a, b in zip(
            anew.parameters(), reinitialise(pruned, 0).parameters(), strict=True
        )
    )


def test_a_teacher_is_asked_once_by_all_that_one_seed_trains_and_teaches_the_same(
    splits,
):
    def train(start: int, seed: int, teacher: torch.nn.Module) -> dict:
        torch.manual_seed(start)
        return finetune(
            CifarResNet(8), splits.train, config, seed, teacher
        ).state_dict()

    config, dense, asked = (
        replace(CONFIG, distillation=0.5, flip=True, lr=0.01, epochs=2),
        CifarResNet(8),
        [],
    )
    teacher, n_batches = (
        CachedTeacher(dense),
        config.epochs * config.steps_per_epoch(len(splits.train)),
    )
    for start, seed, n_asked in (
        (0, 0, n_batches),
        (1, 0, n_batches),
        (0, 1, 2 * n_batches),
    ):
        handle = dense.register_forward_hook(lambda *_: asked.append(1))
        remembered = train(start, seed, teacher)
        handle.remove()
        assert len(asked) == n_asked
        plain = train(start, seed, dense)
        assert all(
            torch.equal(plain[name], tensor) for name, tensor in remembered.items()
        )
