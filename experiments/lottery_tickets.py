"""Is it the connections or their first values?

    python -m experiments.lottery_tickets --seeds 0 1 2 3 4 --lrs 0.02
    python -m experiments.lottery_tickets --summary

The Lottery Ticket experiment (Frankle and Carbin 2019, ICLR): LeNet-300-100 on
scikit-learn's digits. Train, mask the fifth of the remaining weights that is smallest
anywhere in the network, put what is left back to a former value, train again; fifteen
rounds leave 3.5 %. What is left begins with

- `ticket`: its values before the first step, bit by bit;
- `rewound`: those after the first epoch (Frankle et al. 2020), with rounds, and so
  masks, of its own;
- `reinitialised`: new random values under the masks of `ticket`; the control.

Every training is as long as the first one. A row a network in
`experiments/results/lottery_tickets.csv`: its accuracy on the test images after the
last epoch, and on the selection split after a quarter of them, since winning tickets
are said to learn faster. A seed's rows are written together; a killed script goes on
with the seed that it was at.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from autoprune.config import DataConfig, FinetuneConfig
from autoprune.costs.cost import CostTable
from autoprune.data.datasets import Splits, load
from autoprune.evaluation.evaluate import accuracy
from autoprune.tracing.trace import trace
from autoprune.training.loop import finetune
from autoprune.training.masks import KeepMasks, Masks, ranked_masks
from experiments.script import run
from experiments.tables import (
    add_rows,
    device,
    has_row,
    mean_and_spread,
    rows_for_summary,
)

TABLE = Path(__file__).parent / "results" / "lottery_tickets.csv"
KEY = ("lr", "seed", "arm", "round")
FIELDS = (*KEY, "remaining", "test", "early_selection", "device")
ROUNDS = 15
KEPT = 0.8
"""Share of the remaining weights that a round keeps."""
State = dict[str, Tensor]


def main() -> None:
    """Measures what the table lacks, or sums it up."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--lrs", nargs="+", type=float, default=[0.02, 0.05])
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--summary", action="store_true")
    args = parser.parse_args()
    if args.summary:
        return summarise(rows_for_summary(TABLE, parser))
    splits = load(DataConfig("digits"))
    for lr in args.lrs:
        for seed in args.seeds:
            if has_row(TABLE, {"lr": lr, "seed": seed}):
                continue
            config = FinetuneConfig(
                args.epochs, 60, lr, weight_decay=1e-4, distillation=0.0, flip=False
            )
            rows = []
            for row in tickets(splits, config, seed):
                rows.append({"lr": lr, "seed": seed, "device": device()} | row)
            add_rows(TABLE, rows, FIELDS)
            print(f"lr {lr}, seed {seed}: {len(rows)} networks", flush=True)


class Training(KeepMasks):
    """Keeps masks, and what is to be known of a training on the way.

    Args:
        masks: What stays zero.
        splits: The images.
        config: How long it takes.

    Attributes:
        early: The network's values at the end of the first epoch.
        early_selection: Its accuracy on the selection split after a quarter.
    """

    early: State
    early_selection: float

    def __init__(self, masks: Masks, splits: Splits, config: FinetuneConfig):
        super().__init__(masks)
        self.splits = splits
        assert config.epochs is not None, "the script sets it"
        per_epoch = config.steps_per_epoch(len(splits.train))
        self._last_of_first_epoch = per_epoch - 1
        self._quarter = config.epochs * per_epoch // 4

    def after_step(self, model: nn.Module, step: int) -> None:
        """Zeroes what is masked, and notes values and accuracy at their steps.

        Args:
            model: The network.
            step: Number of the step that was just made, from 0.
        """
        super().after_step(model, step)
        if step == self._last_of_first_epoch:
            self.early = copy_state(model)
        if step == self._quarter:
            self.early_selection = accuracy(model, self.splits.selection)


def lenet(seed: int) -> nn.Module:
    """LeNet-300-100 on 16x16 images, its values drawn with a seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = (
            nn.Linear(3 * 16 * 16, 300),
            nn.ReLU(),
            nn.Linear(300, 100),
            nn.ReLU(),
            nn.Linear(100, 10),
        )
        return nn.Sequential(nn.Flatten(), *layers)


def copy_state(model: nn.Module) -> State:
    """A copy of a network's values."""
    state = model.state_dict()
    return {name: tensor.detach().clone() for name, tensor in state.items()}


def tickets(splits: Splits, config: FinetuneConfig, seed: int) -> Iterator[dict]:
    """A row for each network of one seed: the dense one, then round by round.

    Args:
        splits: The images.
        config: How each network is trained.
        seed: Of values and trainings.
    """
    first = copy_state(lenet(seed))
    dense, callback = train(first, Masks({}), splits, config, seed)
    yield make_row("dense", 0, 1.0, dense, callback, splits)
    # Arm to the network of the last round, and the values that every round begins with.
    chains = {"ticket": (dense, first), "rewound": (dense, callback.early)}
    for number in range(1, ROUNDS + 1):
        remaining = KEPT**number
        for arm, (model, start) in chains.items():
            masks = mask_smallest(model, splits.example, remaining)
            again, callback = train(start, masks, splits, config, seed)
            chains[arm] = again, start
            yield make_row(arm, number, remaining, again, callback, splits)
            if arm == "ticket":
                anew = copy_state(lenet(1000 * (seed + 1) + number))
                control, callback = train(anew, masks, splits, config, seed)
                yield make_row(
                    "reinitialised", number, remaining, control, callback, splits
                )


def mask_smallest(model: nn.Module, example: Tensor, remaining: float) -> Masks:
    """Masks over the smallest weights of the whole network.

    The count that remains is rounded down. Weights that are zero already are the
    smallest, so masks only grow.

    Args:
        model: The network.
        example: One input.
        remaining: Share of its weights and biases that is left.
    """
    groups = trace(model, example)
    target = int(remaining * CostTable(groups).params({}))
    return ranked_masks(model, groups, "weight", target, "params")


def train(
    start: State, masks: Masks, splits: Splits, config: FinetuneConfig, seed: int
) -> tuple[nn.Module, Training]:
    """Trains a network from given values under masks.

    Args:
        start: The values.
        masks: What stays zero.
        splits: The images.
        config: How it is trained.
        seed: Of the order of images.

    Returns:
        The network, and what was noted on the way.
    """
    model = lenet(0)
    callback = Training(masks, splits, config)
    model.load_state_dict(start)
    return finetune(model, splits.train, config, seed, callback=callback), callback


def make_row(
    arm: str,
    number: int,
    remaining: float,
    model: nn.Module,
    callback: Training,
    splits: Splits,
) -> dict:
    """What the table says of a network.

    Args:
        arm: What it began with.
        number: The round.
        remaining: Share of its weights that is left.
        model: The network after the training.
        callback: What was noted on the way.
        splits: The images.
    """
    return {
        "arm": arm,
        "round": number,
        "remaining": round(remaining, 4),
        "test": round(accuracy(model, splits.test), 4),
        "early_selection": round(callback.early_selection, 4),
    }


def summarise(rows: list[dict]) -> None:
    """Accuracy by share of weights that remain, and what it says."""
    for lr in dict.fromkeys(row["lr"] for row in rows):
        table: dict[tuple[str, int], list[tuple[float, float]]] = {}
        for row in rows:
            if row["lr"] == lr:
                scores = float(row["test"]), float(row["early_selection"])
                table.setdefault((row["arm"], int(row["round"])), []).append(scores)
        print(
            f"learning rate {lr}: test accuracy after the last epoch, mean ± standard "
            f"deviation"
        )
        for number in range(ROUNDS + 1):
            cells = []
            for arm, its_number in table:
                if its_number == number:
                    tests = [100 * test for test, _ in table[arm, number]]
                    cells.append(f"{arm} {mean_and_spread(tests)}")
            print(f"  {KEPT**number:6.1%} left  " + "  ".join(cells))
        _conclude(table)


def _conclude(table: dict[tuple[str, int], list[tuple[float, float]]]) -> None:
    """With 10 % left or less: tickets against the control, paired over seeds."""
    numbers = [number for number in range(1, ROUNDS + 1) if KEPT**number <= 0.1]
    for arm in ("ticket", "rewound"):
        for place, moment in enumerate(("after the last epoch", "after a quarter")):
            differences = []
            for number in numbers:
                control = table["reinitialised", number]
                pairs = zip(table[arm, number], control, strict=True)
                differences.append([ours[place] - new[place] for ours, new in pairs])
            # One difference a seed: its rounds share their masks and aren't
            # independent.
            gains = 100 * np.array(differences).mean(0)
            error = np.inf
            if len(gains) > 1:
                error = gains.std(ddof=1) / len(gains) ** 0.5
            verdict = "no different from"
            if abs(gains.mean()) > 2 * error:
                verdict = "better than" if gains.mean() > 0 else "worse than"
            print(
                f"  at most 10 % left, {moment}: {arm} is {verdict} new values under "
                f"the ticket's masks, {gains.mean():+.2f} ± {error:.2f} points (mean "
                f"and its standard error, {len(gains)} seeds)"
            )


if __name__ == "__main__":
    run(main)
