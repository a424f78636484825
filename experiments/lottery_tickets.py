"""Is it the connections or their first values? The Lottery Ticket experiment (Frankle
and Carbin 2019, ICLR).

    python experiments/lottery_tickets.py --seeds 0 1 2 3 4 --lrs 0.02
    python experiments/lottery_tickets.py --summary

LeNet-300-100 on scikit-learn's digits. Train, mask the fifth of the remaining weights
that is smallest anywhere in the network, put what is left back to a former value, train
again; fifteen rounds leave 3.5 %. What is left begins with

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
from experiments.tables import add_rows, device, holds, mean_and_spread, measured

TABLE = Path(__file__).parent / "results" / "lottery_tickets.csv"
KEY = ("lr", "seed", "arm", "round")
FIELDS = (*KEY, "remaining", "test", "early_selection", "device")
ROUNDS, KEPT = 15, 0.8
State = dict[str, Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--lrs", nargs="+", type=float, default=[0.02, 0.05])
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--summary", action="store_true")
    args = parser.parse_args()
    if args.summary:
        return summarise(measured(TABLE, parser))
    splits = load(DataConfig("digits"))
    for lr in args.lrs:
        for seed in args.seeds:
            if holds(TABLE, {"lr": lr, "seed": seed}):
                continue
            config = FinetuneConfig(
                args.epochs, 60, lr, weight_decay=1e-4, distillation=0.0, flip=False
            )
            rows = [
                {"lr": lr, "seed": seed, "device": device()} | row
                for row in tickets(splits, config, seed)
            ]
            add_rows(TABLE, rows, FIELDS)
            print(f"lr {lr}, seed {seed}: {len(rows)} networks", flush=True)


class Training(KeepMasks):
    """Keeps masks, the weights at the end of the first epoch, and how good the network
    is after a quarter.

    Args:
        masks: What stays zero.
        splits: The images.
        config: How long it takes.
    """

    def __init__(self, masks: Masks, splits: Splits, config: FinetuneConfig):
        super().__init__(masks)
        self.splits, per_epoch = splits, config.steps_per_epoch(len(splits.train))
        self._first, self._quarter = per_epoch - 1, config.epochs * per_epoch // 4

    def after_step(self, model: nn.Module, step: int) -> None:
        """Zeroes, and looks."""
        super().after_step(model, step)
        if step == self._first:
            self.early = copied(model)
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


def copied(model: nn.Module) -> State:
    """A network's values."""
    return {
        name: tensor.detach().clone() for name, tensor in model.state_dict().items()
    }


def tickets(splits: Splits, config: FinetuneConfig, seed: int) -> Iterator[dict]:
    """A row for each network of one seed: the dense one, then round by round."""
    first = copied(lenet(seed))
    dense, watched = trained(first, Masks({}), splits, config, seed)
    yield row("dense", 0, 1.0, dense, watched, splits)
    chains = {"ticket": (dense, first), "rewound": (dense, watched.early)}
    for number in range(1, ROUNDS + 1):
        for arm, (model, start) in chains.items():
            masks = smallest_masked(model, splits.example, KEPT**number)
            again, watched = trained(start, masks, splits, config, seed)
            chains[arm] = again, start
            yield row(arm, number, KEPT**number, again, watched, splits)
            if arm == "ticket":
                anew = copied(lenet(1000 * (seed + 1) + number))
                yield row(
                    "reinitialised",
                    number,
                    KEPT**number,
                    *trained(anew, masks, splits, config, seed),
                    splits,
                )


def smallest_masked(model: nn.Module, example: Tensor, remaining: float) -> Masks:
    """Masks over the smallest weights of the whole network, until that share of its
    weights and biases is left.

    The count that remains is rounded down. Weights that are zero already are the
    smallest, so masks only grow.
    """
    groups = trace(model, example)
    target = int(remaining * CostTable(groups).params({}))
    return ranked_masks(model, groups, "weight", target, "params")


def trained(
    start: State, masks: Masks, splits: Splits, config: FinetuneConfig, seed: int
) -> tuple[nn.Module, Training]:
    """The network after a training from given values under masks, and what was seen on
    the way.
    """
    model, callback = lenet(0), Training(masks, splits, config)
    model.load_state_dict(start)
    return finetune(model, splits.train, config, seed, callback=callback), callback


def row(
    arm: str,
    number: int,
    remaining: float,
    model: nn.Module,
    seen: Training,
    splits: Splits,
) -> dict:
    """What the table says of a network."""
    scores = {
        "test": round(accuracy(model, splits.test), 4),
        "early_selection": round(seen.early_selection, 4),
    }
    return {"arm": arm, "round": number, "remaining": round(remaining, 4)} | scores


def summarise(rows: list[dict]) -> None:
    """Accuracy by share of weights that remain, and what it says."""
    for lr in dict.fromkeys(row["lr"] for row in rows):
        table: dict[tuple[str, int], list[tuple[float, float]]] = {}
        for entry in (row for row in rows if row["lr"] == lr):
            scores = float(entry["test"]), float(entry["early_selection"])
            table.setdefault((entry["arm"], int(entry["round"])), []).append(scores)
        print(
            f"learning rate {lr}: test accuracy after the last epoch, mean ± standard "
            f"deviation"
        )
        for number in range(ROUNDS + 1):
            arms = [arm for arm, n in table if n == number]
            shown = [
                f"{arm} "
                f"{mean_and_spread([100 * test for test, _ in table[arm, number]])}"
                for arm in arms
            ]
            print(f"  {KEPT**number:6.1%} left  " + "  ".join(shown))
        _conclude(table)


def _conclude(table: dict) -> None:
    """With 10 % left or less: tickets against the control, paired over seeds."""
    few = [number for number in range(1, ROUNDS + 1) if KEPT**number <= 0.1]
    for arm in ("ticket", "rewound"):
        for place, what in enumerate(("after the last epoch", "after a quarter")):
            pairs = [
                zip(table[arm, number], table["reinitialised", number], strict=True)
                for number in few
            ]
            # One difference a seed: its rounds share their masks and aren't
            # independent.
            gains = 100 * np.array(
                [
                    [ours[place] - theirs[place] for ours, theirs in pair]
                    for pair in pairs
                ]
            ).mean(0)
            error = gains.std(ddof=1) / len(gains) ** 0.5 if len(gains) > 1 else np.inf
            is_clear = abs(gains.mean()) > 2 * error
            verdict = (
                "no different from"
                if not is_clear
                else "better than"
                if gains.mean() > 0
                else "worse than"
            )
            print(
                f"  at most 10 % left, {what}: {arm} is {verdict} new values under the "
                f"ticket's masks, "
                f"{gains.mean():+.2f} ± {error:.2f} points (mean and its standard "
                f"error, {len(gains)} seeds)"
            )


if __name__ == "__main__":
    run(main)
