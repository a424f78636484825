"""How well does each proxy rank networks before fine-tuning?

    python experiments/proxy_fidelity.py --model resnet20 --weights FILE
    python experiments/proxy_fidelity.py --model resnet20 --weights FILE --stages score    new proxies only

Stage `finetune`: 24 allocations that meet macs=50% are pruned (L1), recalibrated and fine-tuned alike, one annealed
epoch on the same 10,000 training images without distillation. They are uniform, 18 random walks around uniform with
offsets of standard deviation 0.03 to 0.5, and the 5 best of 30 such walks with 0.05 to 0.2, by the loss on selection
images that no proxy sees: the better half is dense, as it is when a search nears its end. What they reach on the 10,000
test images judges the proxies; no network and no setting is chosen by it.

Stage `score`: every entry of `PROXIES` scores every network as it is before fine-tuning. Then the table of agreement is
written for all networks measured so far. A proxy on few images scores four disjoint sets of them: agreement is the mean
over sets, `noise` the deviation over sets of a network's score by that over networks of one set's, and `noise_apart`
the same once what moves all networks of a set alike is taken off. `seconds` are processor time on one thread, from an
allocation to its score.

Tables in `experiments/results`: `proxy_fidelity_runs.csv` (a row a fine-tuned network), `proxy_fidelity_scores.csv`
(network x proxy x set) and `proxy_fidelity.csv` (agreement). A killed script goes on where it was. On one core,
ResNet-20: about a quarter of an hour to fine-tune and as much to score; ResNet-56: three times that.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from autoprune.allocation import Budget, SearchSpace
from autoprune.config import DataConfig, FinetuneConfig, NetworkConfig, SearchConfig, Settings
from autoprune.data import Images, batches
from autoprune.finetune import finetune
from autoprune.precision import autocast
from autoprune.pruning import Slicer, prune, top_channels
from autoprune.scoring import in_eval_mode, on_batch_statistics, recalibrate
from autoprune.workspace import Workspace
from experiments.tables import add_rows, holds, read_table, write_table

RESULTS = Path(__file__).parent / "results"
RUNS, SCORES, AGREEMENT = (RESULTS / f"proxy_fidelity{part}.csv" for part in ("_runs", "_scores", ""))
RUN_FIELDS = ("model", "number", "kind", "spread", "seed", "kept", "macs_ratio", "accuracy", "seconds")
SCORE_FIELDS = ("model", "number", "proxy", "set", "accuracy", "cross_entropy", "kl", "seconds")
AGREEMENT_FIELDS = (
    *("model", "proxy", "measure", "images", "passes", "sets", "tau", "tau_deviation", "tau_better_half"),
    *("pearson", "seconds", "noise", "noise_apart"),
)
BUDGET = "macs=50%"
MEASURES = {"accuracy": 1, "cross_entropy": -1, "kl": -1}
"""What is read off a network's answers, and the sign that makes higher better."""
N_SETS, SET_SIZE = 4, 256
BATCH = 512
FINETUNE_IMAGES = 10_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet20")
    parser.add_argument("--weights", required=True)
    parser.add_argument("--stages", nargs="+", choices=("finetune", "score"), default=["finetune", "score"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="of fine-tuning; several are averaged")
    args = parser.parse_args()

    data = DataConfig("cifar10", proxy_images=N_SETS * SET_SIZE)
    network = Network(Workspace(Settings(NetworkConfig(args.model, args.weights), data, SearchConfig(budget=BUDGET))))
    if "finetune" in args.stages:
        for seed in args.seeds:
            finetune_all(network, seed)
    if "score" in args.stages:
        score_all(network)
        write_table(AGREEMENT, agreement(), AGREEMENT_FIELDS)


@dataclass(frozen=True)
class Exam:
    """Images to be scored, beside what the dense network says of them.

    Attributes:
        inputs: Normalised images.
        labels: Theirs.
        dense: The dense network's log-probabilities, in float32.
    """

    inputs: Tensor
    labels: Tensor
    dense: Tensor

    def __getitem__(self, part: slice) -> "Exam":
        return Exam(self.inputs[part], self.labels[part], self.dense[part])

    def measure(self, answers: Tensor) -> dict[str, float]:
        """`MEASURES` of logits; `kl` is KL(dense || answers), as both losses the mean over images, in nats."""
        return {
            "accuracy": (answers.argmax(1) == self.labels).float().mean().item(),
            "cross_entropy": F.cross_entropy(answers, self.labels).item(),
            "kl": F.kl_div(answers.log_softmax(1), self.dense, log_target=True, reduction="batchmean").item(),
        }


def answer(model: nn.Module, inputs: Tensor, bf16: str = "off") -> Tensor:
    """Logits of `model`, in the mode that it is in."""
    with torch.no_grad(), autocast(bf16):
        return torch.cat([model(batch).float() for batch in inputs.split(BATCH)])


@dataclass(frozen=True)
class Network:
    """A dense network with what its sub-models are made of and scored on; made lazily.

    Attributes:
        workspace: Network, images and trace.
    """

    workspace: Workspace

    @property
    def name(self) -> str:
        """What the tables call it."""
        return self.workspace.settings.network.model

    @cached_property
    def space(self) -> SearchSpace:
        """The allocations."""
        return SearchSpace(self.workspace.costs)

    @cached_property
    def slicer(self) -> Slicer:
        """The copy in which sub-models are scored."""
        return Slicer(self.workspace.model, self.workspace.groups)

    @cached_property
    def proxy(self) -> Exam:
        """The proxy split; its four sets don't overlap."""
        return self.exam(self.workspace.splits.proxy)

    @cached_property
    def train(self) -> Exam:
        """Training images, for proxies that were published with as many."""
        return self.exam(self.workspace.splits.train[:10_000])

    @cached_property
    def train_batches(self) -> list[Tensor]:
        """EagleEye's calibration: 100 augmented batches of training images."""
        return [inputs for inputs, _ in islice(batches(self.workspace.splits.train, 128, seed=0, epoch=0), 100)]

    @cached_property
    def calibration(self) -> Tensor:
        """The calibration split, normalised."""
        return self.workspace.splits.calibration.inputs

    def exam(self, images: Images) -> Exam:
        """Images to be scored."""
        return Exam(images.inputs, images.labels, answer(self.workspace.model, images.inputs).log_softmax(1))

    def lay(self, kept: dict[str, int]) -> nn.Module:
        """The sub-model of an allocation with the dense network's statistics, valid until the next; in eval mode."""
        return self.slicer.apply(top_channels(self.workspace.importance, kept)).eval()


@dataclass(frozen=True)
class Candidate:
    """An allocation whose network is fine-tuned.

    Attributes:
        kind: How it was found.
        spread: Standard deviation of the offsets from uniform.
        counts: Kept channels in the order of the prunable groups.
    """

    kind: str
    spread: float
    counts: tuple[int, ...]


def finetune_all(network: Network, seed: int) -> None:
    """Adds the networks that the table lacks, one by one."""
    cells = ({"model": network.name, "number": number, "seed": seed} for number in range(24))
    missing = [cell for cell in cells if not holds(RUNS, cell)]
    chosen = candidates(network) if missing else []
    for cell in missing:
        row = cell | finetuned(network, chosen[cell["number"]], seed)
        add_rows(RUNS, [row], RUN_FIELDS)
        print(row, flush=True)


def candidates(network: Network) -> list[Candidate]:
    """The 24 allocations, all different, the same for the same network."""
    space, generator = network.space, np.random.default_rng(0)
    target = Budget.parse(BUDGET).target(space.costs)
    uniform = tuple(map(int, space.uniform(target)))
    seen = {uniform}

    def walks(kind: str, spreads: np.ndarray) -> Iterator[Candidate]:
        for spread in map(float, spreads):
            while (counts := around_uniform(space, target, spread, generator)) in seen:
                pass
            seen.add(counts)
            yield Candidate(kind, round(spread, 3), counts)

    drawn = list(walks("random", np.geomspace(0.03, 0.5, 18)))
    tried = list(walks("best of 30", np.linspace(0.05, 0.2, 30)))
    exam = network.exam(network.workspace.splits.selection[:500])
    calibration = network.workspace.splits.selection[500:1000].inputs

    def loss(candidate: Candidate) -> float:
        model = network.lay(kept_of(network, candidate))
        recalibrate(model, calibration, bf16="auto")
        return exam.measure(answer(model, exam.inputs, "auto"))["cross_entropy"]

    return [Candidate("uniform", 0.0, uniform), *drawn, *sorted(tried, key=loss)[:5]]


def around_uniform(space: SearchSpace, target: int, spread: float, generator: np.random.Generator) -> tuple[int, ...]:
    """Counts of a walk whose wishes are uniform-to-go and a random offset."""
    counts = space.walk(target, lambda index, uniform: uniform + generator.normal(0, spread))
    return tuple(map(int, counts))


def kept_of(network: Network, candidate: Candidate) -> dict[str, int]:
    return dict(zip(network.space.costs.names, candidate.counts, strict=True))


def finetuned(network: Network, candidate: Candidate, seed: int) -> dict:
    """Prunes, recalibrates, fine-tunes and reads the test split; all but the first three columns of the row."""
    workspace, kept, started = network.workspace, kept_of(network, candidate), time.process_time()
    model = prune(workspace.model, workspace.groups, top_channels(workspace.importance, kept))
    recalibrate(model, network.calibration)
    config = FinetuneConfig(epochs=1, lr=0.05, distillation=0.0)
    finetune(model, workspace.splits.train[:FINETUNE_IMAGES], config, seed)
    seconds, test = time.process_time() - started, workspace.splits.test
    correct = answer(model, test.inputs).argmax(1) == test.labels
    return {
        "kind": candidate.kind,
        "spread": candidate.spread,
        "kept": json.dumps(kept),
        "macs_ratio": round(workspace.costs.macs(kept) / workspace.costs.macs(workspace.costs.dense), 5),
        "accuracy": round(correct.float().mean().item(), 4),
        "seconds": round(seconds, 1),
    }


@dataclass(frozen=True)
class Proxy:
    """A way to score a network before fine-tuning.

    Attributes:
        prepare: `(network, model, part)` settles where batch norm takes its statistics from, and gives the context in
            which `model` is to be scored; `part` is the set at hand.
        images: Images that are scored.
        passes: Over images, that of `prepare` included.
        split: The exam they come from, "proxy" or "train".
        bf16: As in `ProxyConfig`.
        measures: Those of `MEASURES` that are reported.
    """

    prepare: Callable[[Network, nn.Module, slice], AbstractContextManager]
    images: int
    passes: int
    split: str = "proxy"
    bf16: str = "auto"
    measures: tuple[str, ...] = tuple(MEASURES)

    @property
    def sets(self) -> list[slice]:
        """The disjoint sets of images that are scored apart."""
        n_sets = N_SETS if self.images <= SET_SIZE else 1
        return [slice(at, at + self.images) for at in range(0, n_sets * self.images, self.images)]


def as_pruned(network: Network, model: nn.Module, part: slice) -> AbstractContextManager:
    """The dense network's statistics."""
    return in_eval_mode(model)


def moving_average(network: Network, model: nn.Module, part: slice) -> AbstractContextManager:
    """The dense network's statistics, moved by PyTorch's usual momentum over training batches."""
    model.train()
    for inputs in network.train_batches:
        answer(model, inputs)
    return in_eval_mode(model)


def recalibrated(network: Network, model: nn.Module, part: slice) -> AbstractContextManager:
    """Statistics measured anew, on as many other images as are scored."""
    recalibrate(model, network.calibration[part], bf16="auto")
    return in_eval_mode(model)


def batch_statistics(network: Network, model: nn.Module, part: slice) -> AbstractContextManager:
    """The statistics of the very images that are scored."""
    return on_batch_statistics(model)


PUBLISHED = {"split": "train", "bf16": "off", "measures": ("accuracy",)}
PROXIES = {
    "amc": Proxy(as_pruned, 5_000, 1, **PUBLISHED),
    "eagleeye": Proxy(moving_average, 10_000, 2, **PUBLISHED),
    "recalibrated, 250": Proxy(recalibrated, 250, 2),
    "recalibrated, 1000": Proxy(recalibrated, 1_000, 2),
    "one pass, 128": Proxy(batch_statistics, 128, 1),
    "one pass, 224": Proxy(batch_statistics, 224, 1),
    "one pass, 256": Proxy(batch_statistics, 256, 1),
    "one pass, 512": Proxy(batch_statistics, 512, 1),
    "one pass, 256, float32": Proxy(batch_statistics, 256, 1, bf16="off"),
}


def score_all(network: Network) -> None:
    """Adds the scores that the table lacks, network by network."""
    kept = {row["number"]: json.loads(row["kept"]) for row in read_table(RUNS) if row["model"] == network.name}
    for number in kept:
        cell = {"model": network.name, "number": number}
        missing = [name for name in PROXIES if not holds(SCORES, cell | {"proxy": name})]
        rows = [cell | row for row in scores(network, kept[number], missing)]
        add_rows(SCORES, rows, SCORE_FIELDS)
        print(network.name, number, len(rows), flush=True)


def scores(network: Network, kept: dict[str, int], names: list[str]) -> Iterator[dict]:
    """A row a proxy and set; all but the first two columns."""
    for name in names:
        proxy = PROXIES[name]
        for number, part in enumerate(proxy.sets):
            exam = getattr(network, proxy.split)[part]
            measured, seconds = score(network, kept, proxy, part, exam)
            rounded = {measure: round(value, 5) for measure, value in measured.items()}
            yield {"proxy": name, "set": number, "seconds": round(seconds, 4)} | rounded


def score(network: Network, kept: dict[str, int], proxy: Proxy, part: slice, exam: Exam) -> tuple[dict, float]:
    """`MEASURES` of a sub-model, and the processor seconds from allocation to score."""
    started = time.process_time()
    model = network.lay(kept)
    with proxy.prepare(network, model, part):
        measured = exam.measure(answer(model, exam.inputs, proxy.bf16))
    return measured, time.process_time() - started


def agreement() -> list[dict]:
    """A row a network, proxy and measure."""
    reached: dict[str, dict[str, list[float]]] = {}
    for row in read_table(RUNS):
        reached.setdefault(row["model"], {}).setdefault(row["number"], []).append(float(row["accuracy"]))
    scored: dict[tuple[str, str], list[dict]] = {}
    for row in read_table(SCORES):
        scored.setdefault((row["model"], row["proxy"]), []).append(row)
    return [
        {"model": model, "proxy": name, "measure": measure, "images": PROXIES[name].images}
        | {"passes": PROXIES[name].passes}
        | agreement_of(rows, measure, {number: float(np.mean(seeds)) for number, seeds in reached[model].items()})
        for (model, name), rows in scored.items()
        for measure in PROXIES[name].measures
    ]


def agreement_of(rows: list[dict], measure: str, reached: dict[str, float]) -> dict:
    """How the scores of one proxy agree with what the networks reach when fine-tuned."""
    cells = {(row["set"], row["number"]): MEASURES[measure] * float(row[measure]) for row in rows}
    sets, numbers = (list(dict.fromkeys(row[key] for row in rows)) for key in ("set", "number"))
    values = np.array([[cells[at, number] for number in numbers] for at in sets])
    truth = np.array([reached[number] for number in numbers])
    better = truth.argsort()[len(truth) // 2 :]
    taus = [kendall_tau(row, truth) for row in values]
    figures = {
        "tau": np.mean(taus),
        "tau_better_half": np.mean([kendall_tau(row[better], truth[better]) for row in values]),
        "pearson": np.mean([np.corrcoef(row, truth)[0, 1] for row in values]),
        "seconds": np.median([float(row["seconds"]) for row in rows]),
    }
    if len(sets) > 1:
        figures |= {"tau_deviation": np.std(taus, ddof=1)} | noise(values)
    return {"sets": len(sets)} | {key: round(float(value), 3) for key, value in figures.items()}


def kendall_tau(x: np.ndarray, y: np.ndarray) -> float:
    """Kendall's tau-b: pairs ordered alike less pairs ordered differently, by the pairs that aren't tied."""
    x_order, y_order = (np.sign(np.subtract.outer(values, values)) for values in (x, y))
    return float((x_order * y_order).sum() / np.sqrt((x_order**2).sum() * (y_order**2).sum()))


def noise(values: np.ndarray) -> dict[str, float]:
    """Deviation over sets by that over networks, of scores `(n_sets, n_networks)`; then without the sets' means."""
    between = values.std(axis=1, ddof=1).mean()
    apart = values - values.mean(axis=1, keepdims=True)
    return {
        "noise": values.std(axis=0, ddof=1).mean() / between,
        "noise_apart": apart.std(axis=0, ddof=1).mean() / between,
    }


if __name__ == "__main__":
    main()
