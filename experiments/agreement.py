"""How proxies' scores agree with what networks reach after training.

For `proxy_fidelity.py`.
"""

import numpy as np

from experiments.proxies import MEASURES, PROXIES


def agreement(runs: list[dict], scores: list[dict]) -> list[dict]:
    """A row a network, budget, training, proxy and measure.

    Args:
        runs: A row a trained network.
        scores: A row a network, proxy and set of images.
    """
    by_training = group_rows(runs, "model", "budget", "training")
    by_proxy = group_rows(scores, "model", "budget", "proxy")
    table = []
    for (model, budget, training), trained in by_training.items():
        reached = accuracies(trained)
        for (scored_model, scored_budget, name), rows in by_proxy.items():
            if (scored_model, scored_budget) != (model, budget):
                continue
            proxy = PROXIES[name]
            for measure in proxy.measures:
                row = {
                    "model": model,
                    "budget": budget,
                    "training": training,
                    "proxy": name,
                    "measure": measure,
                    "images": proxy.images,
                    "passes": proxy.passes,
                }
                table.append(row | agreement_of(rows, measure, reached))
    return table


def group_rows(rows: list[dict], *columns: str) -> dict[tuple[str, ...], list[dict]]:
    """Rows by their values in some columns.

    Args:
        rows: The table.
        *columns: Those that are looked at.
    """
    groups: dict[tuple[str, ...], list[dict]] = {}
    for row in rows:
        groups.setdefault(tuple(row[column] for column in columns), []).append(row)
    return groups


def accuracies(runs: list[dict]) -> dict[str, float]:
    """What each network reached, the mean over seeds."""
    reached = {}
    for (number,), seeds in group_rows(runs, "number").items():
        reached[number] = float(np.mean([float(run["accuracy"]) for run in seeds]))
    return reached


def agreement_of(rows: list[dict], measure: str, reached: dict[str, float]) -> dict:
    """How one proxy's scores agree with what the networks reach when fine-tuned.

    Args:
        rows: The proxy's scores, a row a network and set.
        measure: The column, a key of `MEASURES`.
        reached: Network to its accuracy.

    Returns:
        The number of sets, and the columns of agreement.
    """
    cells = {}
    for row in rows:
        # The sign makes higher better.
        score = MEASURES[measure] * float(row[measure])
        cells[row["set"], row["number"]] = score
    sets = list(dict.fromkeys(row["set"] for row in rows))
    numbers = list(dict.fromkeys(row["number"] for row in rows))
    values = np.array([[cells[name, number] for number in numbers] for name in sets])
    truth = np.array([reached[number] for number in numbers])
    better = truth.argsort()[len(truth) // 2 :]
    taus = [kendall_tau(row, truth) for row in values]
    better_taus = [kendall_tau(row[better], truth[better]) for row in values]
    figures = {
        "tau": np.mean(taus),
        "tau_better_half": np.mean(better_taus),
        "pearson": np.mean([np.corrcoef(row, truth)[0, 1] for row in values]),
        "seconds": np.median([float(row["seconds"]) for row in rows]),
    }
    if len(sets) > 1:
        figures["tau_deviation"] = np.std(taus, ddof=1)
        figures |= noise(values)
    rounded = {key: round(float(value), 3) for key, value in figures.items()}
    return {"sets": len(sets)} | rounded


def kendall_tau(x: np.ndarray, y: np.ndarray) -> float:
    """Kendall's tau-b of two sequences `(n,)`, within [-1, 1].

    Pairs ordered alike less pairs ordered differently, by the pairs that aren't tied.
    For 1, 2, 3 and 1, 3, 2 two pairs are ordered alike and one differently, so it is
    1 / 3.

    Args:
        x: One sequence.
        y: The other.
    """
    x_order = np.sign(np.subtract.outer(x, x))
    y_order = np.sign(np.subtract.outer(y, y))
    untied = np.sqrt((x_order**2).sum() * (y_order**2).sum())
    return float((x_order * y_order).sum() / untied)


def noise(values: np.ndarray) -> dict[str, float]:
    """Deviation over sets by that over networks, of scores `(n_sets, n_networks)`.

    `noise_apart` is the same without the sets' means.
    """
    between = values.std(axis=1, ddof=1).mean()
    centred = values - values.mean(axis=1, keepdims=True)
    return {
        "noise": values.std(axis=0, ddof=1).mean() / between,
        "noise_apart": centred.std(axis=0, ddof=1).mean() / between,
    }
