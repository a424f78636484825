"""How the scores of proxies agree with what networks reach once they are trained, for
`proxy_fidelity.py`.
"""

import numpy as np

from experiments.proxies import MEASURES, PROXIES


def agreement(runs: list[dict], scores: list[dict]) -> list[dict]:
    """A row a network, budget, training, proxy and measure.

    Args:
        runs: A row a trained network.
        scores: A row a network, proxy and set of images.
    """
    reached = grouped(runs, "model", "budget", "training")
    scored = grouped(scores, "model", "budget", "proxy")
    return [
        {
            "model": model,
            "budget": budget,
            "training": training,
            "proxy": name,
            "measure": measure,
        }
        | {"images": PROXIES[name].images, "passes": PROXIES[name].passes}
        | agreement_of(rows, measure, accuracies(trained))
        for (model, budget, training), trained in reached.items()
        for (*network, name), rows in scored.items()
        if network == [model, budget]
        for measure in PROXIES[name].measures
    ]


def grouped(rows: list[dict], *columns: str) -> dict[tuple[str, ...], list[dict]]:
    """Rows by their values in some columns."""
    groups: dict[tuple[str, ...], list[dict]] = {}
    for row in rows:
        groups.setdefault(tuple(row[column] for column in columns), []).append(row)
    return groups


def accuracies(runs: list[dict]) -> dict[str, float]:
    """What each network reached, the mean over seeds."""
    by_number = grouped(runs, "number").items()
    return {
        number: float(np.mean([float(run["accuracy"]) for run in some]))
        for (number,), some in by_number
    }


def agreement_of(rows: list[dict], measure: str, reached: dict[str, float]) -> dict:
    """How the scores of one proxy agree with what the networks reach when fine-tuned."""
    cells = {
        (row["set"], row["number"]): MEASURES[measure] * float(row[measure])
        for row in rows
    }
    sets, numbers = (
        list(dict.fromkeys(row[key] for row in rows)) for key in ("set", "number")
    )
    values = np.array([[cells[at, number] for number in numbers] for at in sets])
    truth = np.array([reached[number] for number in numbers])
    better = truth.argsort()[len(truth) // 2 :]
    taus = [kendall_tau(row, truth) for row in values]
    figures = {
        "tau": np.mean(taus),
        "tau_better_half": np.mean(
            [kendall_tau(row[better], truth[better]) for row in values]
        ),
        "pearson": np.mean([np.corrcoef(row, truth)[0, 1] for row in values]),
        "seconds": np.median([float(row["seconds"]) for row in rows]),
    }
    if len(sets) > 1:
        figures |= {"tau_deviation": np.std(taus, ddof=1)} | noise(values)
    return {"sets": len(sets)} | {
        key: round(float(value), 3) for key, value in figures.items()
    }


def kendall_tau(x: np.ndarray, y: np.ndarray) -> float:
    """Kendall's tau-b: pairs ordered alike less pairs ordered differently, by the pairs
    that aren't tied.
    """
    x_order, y_order = (np.sign(np.subtract.outer(values, values)) for values in (x, y))
    return float(
        (x_order * y_order).sum() / np.sqrt((x_order**2).sum() * (y_order**2).sum())
    )


def noise(values: np.ndarray) -> dict[str, float]:
    """Deviation over sets by that over networks, of scores `(n_sets, n_networks)`; then
    without the sets' means.
    """
    between = values.std(axis=1, ddof=1).mean()
    apart = values - values.mean(axis=1, keepdims=True)
    return {
        "noise": values.std(axis=0, ddof=1).mean() / between,
        "noise_apart": apart.std(axis=0, ddof=1).mean() / between,
    }
