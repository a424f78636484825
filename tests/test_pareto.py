"""A range of budgets gives a Pareto front: as data, on the command line, in the report;
killed and resumed the same.
"""

import json
import re
import shlex

import matplotlib
import numpy as np
import pytest
from test_cli import TINY, failure, failure_after_progress
from test_report import FINISHED, Text, run_folder
from toys import fake_env

from autoprune.agents import dyna, finalists
from autoprune.agents.finalists import FRONT_BUDGETS
from autoprune.agents.pareto import front_to_json
from autoprune.agents.recorder import counts_of, is_near_budget
from autoprune.agents.search import search
from autoprune.cli.main import main
from autoprune.config import SearchConfig
from autoprune.costs.allocation import Allocation
from autoprune.costs.budget import Budget
from autoprune.files import write_json
from autoprune.reporting.figures import pareto_front, render_svg
from autoprune.reporting.report import write_report

RANGE = "macs=30%..80%"
SEARCH = [
    "search",
    *TINY,
    "--budget",
    RANGE,
    "--episodes",
    "20",
    "--proxy.images",
    "40",
    "--proxy.workers",
    "1",
]


def lopsided(kept: np.ndarray) -> float:
    """Loss 0 for a dense network; the first group matters most, so that uniform pruning
    isn't best.
    """
    return float(10 * (1 - kept / np.array([8, 16, 12, 16])) ** 2 @ [8, 4, 2, 1])


@pytest.fixture(scope="module", autouse=True)
def short_practice():
    """Whether a policy is good isn't asked here."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(dyna, "PRACTICE", 10)
        yield


@pytest.fixture(scope="module")
def found() -> tuple[dict, object]:
    """The front of a search on a toy, and its environment."""
    env = fake_env("chain", lopsided, budget=RANGE)
    result = search(env, SearchConfig(agent="random", episodes=200))
    return front_to_json(result.front, result.uniform, env), env


@pytest.mark.parametrize(
    ("budget", "pauses"),
    [
        (RANGE, ["practising for all budgets", "comparing the best"]),
        ("macs=50%", ["comparing the best"]),
    ],
)
def test_a_search_says_what_it_does_where_no_episode_ends_for_a_while(budget, pauses):
    told: list[str | int] = []
    config = SearchConfig(agent="dyna", episodes=20)
    env = fake_env("chain", lopsided, budget=budget)
    search(
        env,
        config,
        on_episode=lambda episode: told.append(episode.number),
        on_pause=told.append,
    )
    assert told == [*range(1, 21), *pauses]


def test_every_point_is_an_allocation_with_its_own_costs(found, tmp_path):
    data, env = found
    assert data["metric"] == "macs"
    assert data["dense"] == env.space.cost(env.space.costs.dense)
    for point in json.loads(json.dumps(data))["front"] + data["uniform"]:
        write_json(tmp_path / "point.json", point)
        allocation = Allocation.read(tmp_path / "point.json", env.groups)
        cost = env.space.cost(np.array(list(allocation.kept.values())))
        assert cost == point["cost"] == point["macs"]
        assert (
            point["share"] == point["macs_ratio"] == pytest.approx(cost / data["dense"])
        )
        assert (
            point["selection_loss"]
            == env.proxy.evaluate(allocation.kept).loss
            == point["proxy_loss"]
        )


def test_the_front_falls_in_loss_as_it_grows_in_cost(found):
    costs, losses = (
        [point[key] for point in found[0]["front"]]
        for key in ("cost", "selection_loss")
    )
    assert 2 < len(costs) <= FRONT_BUDGETS
    assert (np.diff(costs) > 0).all()
    assert (np.diff(losses) < 0).all()


def test_uniform_stands_at_the_budgets_of_the_front_and_is_beaten(found):
    data, _ = found
    uniform = data["uniform"]
    targets = np.linspace(0.3, 0.8, FRONT_BUDGETS)
    assert [point["budget"] for point in uniform] == [
        f"macs={100 * target:.8g}%" for target in targets
    ]
    assert all(
        target - 0.08 < point["share"] <= target
        for point, target in zip(uniform, targets, strict=True)
    )
    assert {point["source"] for point in uniform} == {"uniform"}
    best = min(
        point["selection_loss"] for point in data["front"] if point["share"] <= 0.55
    )
    assert best < uniform[2]["selection_loss"]  # uniform at 50 %


@pytest.mark.parametrize("target", ["macs=35%", "macs=70%"])
def test_near_a_budget_an_episode_does_not_win_by_having_cost_more(target, monkeypatch):
    """An agent without a model of the reward; the reward is mostly a matter of cost,
    and else of one group.
    """
    space = fake_env("wide").space

    def loss(kept: np.ndarray) -> float:
        return float(
            50 * (1 - space.cost(kept) / space.cost(space.costs.dense))
            + kept[1] / space.costs.dense[1]
        )

    env, budget = fake_env("wide", loss, budget=RANGE), Budget.parse(target)
    recorder = search(env, SearchConfig(agent="random", episodes=200)).recorder
    kept = counts_of(recorder.episodes)
    is_near = is_near_budget(env, space.cost(kept), budget)
    monkeypatch.setattr(finalists, "N_SURVEYED_PER_BUDGET", 1)
    (best,) = finalists.candidates_for_budget(recorder, None, budget)
    assert best.counts[1] <= np.quantile(kept[is_near, 1], 0.1)
    assert best.allocation.source.endswith(", resized")
    assert 0.97 * env.target_of(budget) < best.macs <= env.target_of(budget)


def test_parameters_are_budgeted_apart_from_macs():
    env = fake_env("chain", lopsided, budget="params=40%..60%")
    result = search(env, SearchConfig(agent="random", episodes=20))
    data = front_to_json(result.front, result.uniform, env)
    assert data["metric"] == "params"
    assert data["dense"] == env.space.costs.params(env.space.costs.dense)
    assert all(
        point["cost"] != point["macs"] and point["share"] != point["macs_ratio"]
        for point in data["front"]
    )


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    """A search of a range on the command line; tests only read it."""
    folder = tmp_path_factory.mktemp("runs") / "range"
    assert main([*SEARCH, "--out", str(folder)]) == 0
    return folder


def test_a_search_of_a_range_writes_the_front_and_goes_on_with_its_knee(searched):
    results, data = (
        json.loads((searched / name).read_text())
        for name in ("results.json", "pareto.json")
    )
    assert results["pareto"] == str(searched / "pareto.json")
    assert results["budget"] == RANGE
    assert "baselines" not in results
    assert not (searched / "baselines").exists()
    chosen = json.loads((searched / "allocation.json").read_text())
    (knee,) = [point for point in data["front"] if point["kept"] == chosen["kept"]]
    assert results["macs"] == knee["macs"]
    assert results["selection_loss"] == knee["selection_loss"]


def test_the_report_tells_how_to_have_another_point(searched):
    assert (
        f"autoprune replay {searched} --budget macs=40%"
        in (searched / "report.html").read_text()
    )


def test_the_console_shows_the_front_and_how_to_go_on(tmp_path, capsys):
    folder = tmp_path / "range"
    arguments = [
        "search",
        *TINY,
        "--budget",
        "macs=60%..90%",
        "--episodes",
        "10",
        "--exclude",
        "0.*",
    ]
    assert main([*arguments, "--out", str(folder), "--json"]) == 0
    captured = capsys.readouterr()
    assert "Pareto front, not fine-tuned" in captured.out
    assert "uniform" in captured.out
    assert json.loads(captured.out.splitlines()[-1])["pareto"] == str(
        folder / "pareto.json"
    )
    assert "the run goes on with the front's knee" in captured.err
    # The two commands that it offers work as they stand.
    offered = [
        re.search(f"autoprune {pattern}", captured.err).group(1)
        for pattern in ("(replay .*)", "(prune .*);")
    ]
    assert main(shlex.split(offered[0])) == 0
    assert main(shlex.split(offered[1].replace("NEW_RUN", str(tmp_path / "new")))) == 0
    assert (
        0.6
        < json.loads((tmp_path / "new" / "results.json").read_text())["macs_ratio"]
        <= 0.66
    )
    assert (tmp_path / "new" / "pruned" / "plan.json").exists()


def test_replay_of_a_range_says_how_far_the_policy_decides(tmp_path, capsys):
    foreign = [
        "--model",
        "tests.tiny:residual",
        "--weights",
        "none",
        "--data",
        "digits",
        "--budget",
        RANGE,
        "--proxy.images",
        "40",
    ]
    out = str(tmp_path / "front.json")
    assert main(["replay", "resnet20-ppo", *foreign, "--json", "--out", out]) == 0
    captured = capsys.readouterr()
    familiar = json.loads(captured.out.splitlines()[-1])["familiar"]
    assert familiar < 1
    assert f"policy decides to {familiar:.0%}" in captured.err


def test_a_killed_search_of_a_range_ends_with_the_same_front(searched, tmp_path):
    """Killed after some episodes: what a search writes at its end isn't there yet."""
    folder = tmp_path / "killed"
    folder.mkdir()
    for name in ("config.yaml", "log.jsonl"):
        lines = (searched / name).read_text().splitlines(keepends=True)
        (folder / name).write_text(
            "".join(lines[:13] if name == "log.jsonl" else lines)
        )
    assert main([*SEARCH, "--out", str(folder), "--resume"]) == 0
    for name in ("pareto.json", "allocation.json", "policy/policy.safetensors"):
        assert (folder / name).read_bytes() == (searched / name).read_bytes(), name


def test_a_run_of_a_range_ends_with_a_network_of_the_knee(
    searched, tmp_path, monkeypatch
):
    from autoprune.pipeline import stages

    for slow in ("evaluate_stage", "export_stage", "latency_stage"):
        monkeypatch.setattr(stages, slow, lambda *arguments: None)
    monkeypatch.chdir(tmp_path)
    arguments = [
        *TINY,
        "--budget",
        RANGE,
        "--episodes",
        "10",
        "--epochs",
        "1",
        "--proxy.images",
        "40",
        "--agent",
        "random",
    ]
    assert main(["run", *arguments]) == 0
    folder = tmp_path / "runs" / "tests.tiny-network-macs-30..80-random-seed0"
    plan = json.loads((folder / "pruned" / "plan.json").read_text())
    points = json.loads((folder / "pareto.json").read_text())["front"]
    assert plan["stage"] == "finetuned"
    assert plan["allocation"]["kept"] in [point["kept"] for point in points]


def test_replaying_a_range_writes_the_front_of_the_policys_roll_outs_and_uniform_pruning(
    searched, tmp_path, capsys
):
    path = tmp_path / "front.json"
    assert (
        main(
            [
                "replay",
                str(searched),
                "--budget",
                "macs=40%..60%",
                "--out",
                str(path),
                "--json",
            ]
        )
        == 0
    )
    results = json.loads(capsys.readouterr().out.splitlines()[-1])
    points = json.loads(path.read_text())["front"]
    assert results["pareto"] == str(path)
    assert results["points"] == len(points) > 0
    assert {point["source"] for point in points} <= {"policy", "uniform"}
    assert all(0.3 < point["share"] <= 0.6 for point in points)
    assert main(["replay", str(searched)]) == 0  # the run's own range
    assert (searched / "replay-tests.tiny-network-macs-30..80.json").exists()


def test_prune_takes_one_allocation_and_no_range(searched, tmp_path, capsys):
    prune = ["prune", *TINY, "--out", str(tmp_path / "new"), "--allocation"]
    line = failure(capsys, *prune, str(searched / "allocation.json"), "--budget", RANGE)
    assert "--budget: prune applies one allocation, got the range macs=30%..80%" in line
    line = failure(capsys, *prune, str(searched / "pareto.json"))
    assert "holds a whole front; give one of its points" in line
    assert not (tmp_path / "new").exists()


def test_a_full_disk_leaves_no_half_written_front(tmp_path, monkeypatch, capsys):
    import errno
    import os

    replace = os.replace

    def full(source, target):
        if str(target).endswith("pareto.json"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))
        replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    folder = tmp_path / "run"
    line = failure_after_progress(
        capsys, *SEARCH, "--agent", "random", "--out", str(folder)
    )
    assert "pareto.json" in line
    assert not list(folder.rglob("*.partial*"))
    assert not (folder / "allocation.json").exists()


def point(share: float, accuracy: float, source: str = "policy") -> dict:
    scores = {
        "proxy_accuracy": 0.5,
        "proxy_loss": 1.5,
        "selection_accuracy": accuracy,
        "selection_loss": 1 - accuracy,
    }
    return {
        "budget": f"macs={share:.0%}",
        "source": source,
        "cost": int(40_813_184 * share),
        "share": share,
        **scores,
    }


PARETO = {
    "metric": "macs",
    "dense": 40_813_184,
    "front": [point(0.301, 0.4), point(0.5, 0.7531, "episode 17"), point(0.79, 0.88)],
    "uniform": [point(0.3, 0.2, "uniform"), point(0.8, 0.85, "uniform")],
}


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> str:
    root = tmp_path_factory.mktemp("run")
    write_json(root / "pareto.json", PARETO)
    results = {
        **FINISHED,
        "finalists": None,
        "baselines": None,
        "budget": RANGE,
        "selection_loss": 1 - 0.7531,
    }
    return write_report(run_folder(root, results, n_episodes=5)).read_text()


def test_the_report_draws_the_front_and_holds_every_number_of_it(page):
    assert page.count('id="pareto-title"') == 1
    (title,) = re.findall(r'<title id="pareto-title">([^<]*)</title>', page)
    shown = title.replace("\N{NO-BREAK SPACE}", " ")
    assert (
        "Pareto front of 3 points: accuracy 40.0 % to 88.0 % with 30.1 % to 79.0 % of "
        "the MACs" in shown
    )
    assert "uniform pruning 20.0 % to 85.0 %" in shown
    parsed = Text(page)
    assert not parsed.open
    for number in (
        "50.0 %, chosen",
        "episode 17",
        "75.31 %",
        "20,406,592",
        "share of MACs kept, %",
    ):
        assert number in parsed.text, number
    assert "Reward of 5 episodes, each under a budget of its own" in parsed.text
    assert "autoprune replay" not in parsed.text  # no policy was learned
    assert "Against the baselines" not in parsed.text
    assert "best so far" not in parsed.text


def test_the_fronts_figure_follows_the_theme_and_rings_the_chosen_point(page):
    (svg,) = [
        svg
        for svg in re.findall(r"<svg.*?</svg>", page, re.DOTALL)
        if 'id="pareto-title"' in svg
    ]
    assert "var(--accent, #0b6bcb)" in svg
    assert not re.search(r"(?:fill|stroke): #", svg)
    assert svg.count(">chosen<") == 1


def test_a_front_of_one_point_can_be_drawn():
    before = dict(matplotlib.rcParams)
    figure = pareto_front([(0.5, 0.7)], [(0.5, 0.6)], "parameters")
    assert render_svg(figure, "name", "title").startswith("<svg")
    assert dict(matplotlib.rcParams) == before
    assert figure.axes[0].get_xlabel() == "share of parameters kept, %"
