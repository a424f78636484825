"""Policies by name: found, listed, refused with the next step, acted with, and started
from.
"""

import json
import math
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_cli import TINY, failure
from toys import fake_env, learner_of, some_policy

from autoprune.agents import policy_files
from autoprune.agents.algorithms import ALGORITHMS
from autoprune.agents.policies import shipped_table, starting_policy
from autoprune.agents.policy_files import agent_of, find_policy, shipped_policies
from autoprune.agents.recorder import START_STD
from autoprune.agents.replay import Policy, replay
from autoprune.agents.search import search
from autoprune.agents.searchers import check_agent
from autoprune.cli.main import main
from autoprune.config import SearchConfig
from autoprune.costs.budget import Budget
from autoprune.envs.observation import FEATURES
from autoprune.errors import UserError

FAST = [
    *TINY,
    "--episodes",
    "10",
    "--baselines",
    "none",
    "--proxy.images",
    "40",
    "--proxy.workers",
    "1",
]

CRITIC_LAYERS = ("mlp_extractor.value_net.0", "mlp_extractor.value_net.2", "value_net")
PPO_CRITIC = {
    f"{layer}.{part}" for layer in CRITIC_LAYERS for part in ("weight", "bias")
}


@pytest.fixture
def home(tmp_path, monkeypatch):
    """Stands for `agents/policies/`, with two policies in it; the working directory is
    empty.
    """
    some_policy().save(
        tmp_path / "shipped" / "resnets",
        trained_on="resnet20 on sample",
        budget="macs=30%..80%",
    )
    some_policy("sac").save(
        tmp_path / "shipped" / "vggs", trained_on="vgg16 on digits", budget="macs=50%"
    )
    (tmp_path / "shipped" / "README.md").write_text("no policy")
    monkeypatch.setattr(policy_files, "SHIPPED", tmp_path / "shipped")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "shipped"


def acts(policy: Policy) -> np.ndarray:
    observations = np.random.default_rng(0).random(
        (20, len(FEATURES)), dtype=np.float32
    )
    return np.array([policy.act(observation)[0] for observation in observations])


def test_what_is_shipped_can_be_used():
    assert [row["name"] for row in shipped_table() if row["problem"]] == []


def test_a_policy_is_found_by_name_run_and_folder(home, tmp_path):
    assert shipped_policies() == {"resnets": home / "resnets", "vggs": home / "vggs"}
    assert find_policy("resnets") == home / "resnets"
    assert find_policy(str(home / "vggs")) == home / "vggs"
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("network: {}")
    assert find_policy(str(tmp_path / "run")) == tmp_path / "run" / "policy"


def test_a_name_counts_before_a_folder_that_is_called_the_same(home):
    some_policy().save(home.parent / "here" / "resnets")
    assert find_policy("resnets") == home / "resnets"
    assert find_policy("./resnets").resolve() == home.parent / "here" / "resnets"


def test_an_unknown_policy_offers_the_nearest_names(home):
    with pytest.raises(
        UserError,
        match=r"policy: no shipped policy and no folder is called 'resnts'; did you mean 'res",
    ):
        find_policy("resnts")
    with pytest.raises(
        UserError,
        match=r"POLICY: .*'xyz'; shipped are: resnets, vggs; give a name that `autoprune pol",
    ):
        find_policy("xyz", "POLICY")
    (home.parent / "here" / "runs" / "mobile-1" / "policy").mkdir(parents=True)
    with pytest.raises(UserError, match="did you mean 'runs/mobile-1'"):
        find_policy("runs/mobile")


def test_a_folder_that_holds_no_policy_is_refused(home, tmp_path):
    with pytest.raises(
        UserError,
        match=r"policy: .* is neither a run nor a policy's folder \(no config\.yaml, no policy",
    ):
        find_policy(str(tmp_path))


def test_a_run_of_a_baseline_has_no_policy(home, tmp_path):
    (tmp_path / "config.yaml").write_text("network: {}")
    advice = "baselines learn none, search with agent dyna or ppo or sac"
    with pytest.raises(UserError, match=rf"policy: no policy in .*; {advice}"):
        starting_policy("ppo", str(tmp_path))


@pytest.mark.parametrize(
    "damage", ["cut", "no weights", "json", "features", "algorithm", "kinds"]
)
def test_a_damaged_policy_is_refused_in_one_line(damage, home):
    weights, description = (
        home / "resnets" / f"policy.{end}" for end in ("safetensors", "json")
    )
    if damage == "cut":
        weights.write_bytes(weights.read_bytes()[:500])
    elif damage == "no weights":
        weights.unlink()
    elif damage == "json":
        description.write_text("{")
    else:
        wrong = {
            "features": ["colour"],
            "algorithm": "guesswork",
            "kinds": [[0.5, 0.5]],
        }[damage]
        description.write_text(
            json.dumps(json.loads(description.read_text()) | {damage: wrong})
        )
    message = (
        "was trained on other observations; train it"
        if damage == "features"
        else r"is damaged \(.*\); search anew"
    )
    with pytest.raises(UserError, match=f"policy: .*{message}") as caught:
        starting_policy("ppo", "resnets")
    assert "\n" not in str(caught.value)
    if damage in ("json", "features", "algorithm"):
        with pytest.raises(UserError, match=f"policy: .*{message}"):
            agent_of("resnets")


def test_a_policy_of_another_algorithm_is_refused_with_those_that_fit(home):
    with pytest.raises(
        UserError,
        match=r"'vggs' was trained by sac and can't start ppo; use agent dyna or sac$",
    ):
        starting_policy("ppo", "vggs")
    with pytest.raises(
        UserError,
        match=r"'resnets' was trained by ppo and can't start td3; use agent dyna or ppo$",
    ):
        starting_policy("td3", "resnets")
    with pytest.raises(
        UserError,
        match="policy: sensitivity learns no policy to start from one; use agent dyna",
    ):
        starting_policy("sensitivity", "resnets")
    assert starting_policy("ppo", "") is None
    assert starting_policy("dyna", "vggs").algorithm == "sac"


def test_an_agent_whose_package_is_missing_is_refused_with_the_way_to_install_it(
    home, monkeypatch
):
    some_policy("tqc").save(home / "quantiles")
    monkeypatch.delitem(ALGORITHMS, "tqc")
    monkeypatch.setitem(sys.modules, "sb3_contrib", None)
    needs = "tqc needs sb3-contrib; install it with: pip install sb3-contrib"
    with pytest.raises(UserError, match=f"^policy: {needs}$"):
        Policy.load(home / "quantiles", "policy")
    with pytest.raises(UserError, match=f"^agent: {needs}$"):
        check_agent("tqc", Budget.parse("macs=50%"))
    assert [row["problem"] for row in shipped_table() if row["problem"]] == [
        f"quantiles: {needs}"
    ]


LEARNS_ON = [name for name in ALGORITHMS if name != "dyna"]


@pytest.mark.parametrize("name", LEARNS_ON)
def test_a_learner_that_starts_from_a_policy_acts_as_it_does(name):
    start = some_policy(name)
    learner = learner_of(name, start)
    assert np.ptp(acts(start)) > 0.05
    assert np.array_equal(
        acts(Policy.from_learner(name, learner, start.policy_kwargs)), acts(start)
    )
    given, taken = start.network.state_dict(), learner.policy.state_dict()
    differ = {key for key in taken if not torch.equal(taken[key], given[key])}
    own = (
        {"log_std", *PPO_CRITIC} if name == "ppo" else set()
    )  # of others critics and targets too
    assert differ <= own
    assert not any(
        value is other
        for value in learner.policy.parameters()
        for other in start.network.parameters()
    )


def test_ppo_judges_a_policy_that_it_starts_from_by_a_critic_of_its_own_and_learns_more_slowly():
    start = some_policy("ppo")
    fresh, started = learner_of("ppo"), learner_of("ppo", start)
    own, taken = fresh.policy.state_dict(), started.policy.state_dict()
    assert all(torch.equal(own[key], taken[key]) for key in PPO_CRITIC)
    assert started.lr_schedule(1.0) < fresh.lr_schedule(1.0)


def test_ppo_starts_from_dynas_policy_with_a_spread_of_its_own():
    start = some_policy("dyna")
    learner = learner_of("ppo", start)
    assert np.array_equal(acts(Policy.from_learner("ppo", learner, {})), acts(start))
    assert learner.policy.log_std.item() == pytest.approx(math.log(START_STD / 2))


def test_a_policy_of_another_size_is_started_from_and_saved_with_its_size(tmp_path):
    kwargs = {"net_arch": [16], "log_std_init": -2.0}
    learner = learner_of("ppo")
    small = Policy(
        "ppo",
        type(learner.policy)(
            learner.observation_space, learner.action_space, lambda _: 0, **kwargs
        ),
        kwargs,
    )
    small.save(tmp_path / "small")
    config = SearchConfig(agent="ppo", episodes=10, policy=str(tmp_path / "small"))
    result = search(fake_env(), config)
    assert result.policy.policy_kwargs == kwargs
    result.policy.save(tmp_path / "again")
    assert np.array_equal(acts(Policy.load(tmp_path / "again")), acts(result.policy))


@pytest.mark.parametrize(
    ("name", "output"), [("ppo", "action_net"), ("td3", "actor.mu.4")]
)
def test_the_first_episodes_of_a_search_are_near_the_policy_that_it_starts_from(
    name, output, tmp_path
):
    start, env = some_policy(name), fake_env("wide")
    start.network.get_submodule(output).bias.data.fill_(
        1.5
    )  # prunes early groups as far as it may
    start.save(tmp_path)
    own = np.array(list(replay(start, env)[0].kept.values()))

    def distance(policy: str) -> float:
        found = search(
            fake_env("wide"), SearchConfig(agent=name, episodes=10, policy=policy)
        )
        kept = [list(episode.allocation.kept.values()) for episode in found.episodes]
        return np.abs(np.mean(kept, axis=0) - own).sum()

    assert distance(str(tmp_path)) < 0.5 * distance("")


@pytest.mark.parametrize(
    ("name", "output"),
    [("dyna", "action_net"), ("sac", "actor.mu"), ("td3", "actor.mu.4")],
)
def test_half_of_dynas_first_episodes_are_those_of_the_policy_that_it_starts_from(
    name, output, tmp_path
):
    start = some_policy(name)
    start.network.get_submodule(output).bias.data.fill_(1.5)
    start.save(tmp_path)
    own = np.array(list(replay(start, fake_env("wide"))[0].kept.values()))

    def walked(policy: str) -> np.ndarray:
        found = search(fake_env("wide"), SearchConfig(episodes=10, policy=policy))
        return np.array(
            [list(episode.allocation.kept.values()) for episode in found.episodes]
        )

    fresh, started = walked(""), walked(str(tmp_path))
    assert np.array_equal(started[0], own)
    assert np.array_equal(started[1::2], fresh[1::2])
    assert np.abs(started[::2] - own).mean() < 0.5 * np.abs(fresh[::2] - own).mean()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A search on the command line; tests only read it."""
    folder = tmp_path_factory.mktemp("runs") / "first"
    assert main(["search", *FAST, "--out", str(folder)]) == 0
    return folder


def test_a_search_starts_from_the_policy_of_a_run_and_says_so(run, tmp_path):
    second = [
        "search",
        *FAST,
        "--policy",
        str(run),
        "--budget",
        "macs=60%",
        "--out",
        str(tmp_path / "second"),
    ]
    assert main(second) == 0
    assert main([*second, "--resume"]) == 0
    about, first = (
        json.loads((folder / "policy" / "policy.json").read_text())
        for folder in (tmp_path / "second", run)
    )
    assert about["start"] == str(run)
    assert "start" not in first
    assert about["trained_on"] == first["trained_on"] == "tests.tiny:network on digits"


def test_a_killed_search_starts_where_it_started_though_that_policy_is_gone(
    run, tmp_path, capsys
):
    shutil.copytree(run, tmp_path / "origin")
    arguments = [
        "search",
        *FAST,
        "--policy",
        str(tmp_path / "origin"),
        "--out",
        str(tmp_path / "run"),
    ]
    assert main(arguments) == 0
    before = (tmp_path / "run" / "policy" / "policy.safetensors").read_bytes()
    for name in ("allocation.json", "checkpoints", "policy"):
        path = tmp_path / "run" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    shutil.rmtree(tmp_path / "origin")
    assert main([*arguments, "--resume"]) == 0
    assert (tmp_path / "run" / "policy" / "policy.safetensors").read_bytes() == before
    assert "no shipped policy and no folder" in failure(
        capsys, *arguments[:-1], str(tmp_path / "another")
    )


def test_baselines_beside_a_started_search_learn_nothing(run, tmp_path):
    arguments = [*FAST, "--baselines", "uniform", "--policy", str(run)]
    assert main(["search", *arguments, "--out", str(tmp_path / "run")]) == 0
    assert (
        "uniform"
        in json.loads((tmp_path / "run" / "results.json").read_text())["baselines"]
    )


def test_a_search_is_refused_for_another_algorithm_before_anything_is_written(
    run, tmp_path, capsys
):
    line = failure(
        capsys,
        "search",
        *FAST,
        "--agent",
        "sac",
        "--policy",
        str(run),
        "--out",
        str(tmp_path / "run"),
    )
    assert "was trained by dyna and can't start sac; use agent dyna or ppo" in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "method", [[], ["--config", "agent.yaml"], ["--agent", "dyna"]]
)
def test_the_agent_follows_from_the_policy_unless_one_is_given(home, method):
    Path("agent.yaml").write_text("agent: dyna\n")
    arguments = ["search", *FAST, "--policy", "vggs", *method, "--out", "run"]
    assert main(arguments) == 0
    shutil.rmtree(home / "vggs")
    assert main([*arguments, "--resume"]) == 0, "the run has a copy of it"
    assert json.loads(Path("run/policy/policy.json").read_text())["algorithm"] == (
        "dyna" if method else "sac"
    )


def test_a_policy_acts_the_same_by_name_run_and_folder(home, run, tmp_path):
    kept = {}
    (home / "mine").symlink_to(run / "policy")
    for text in ("mine", str(run), str(run / "policy")):
        path = tmp_path / "allocation.json"
        assert (
            main(
                [
                    "replay",
                    text,
                    *TINY,
                    "--proxy.images",
                    "40",
                    "--budget",
                    "macs=50%",
                    "--out",
                    str(path),
                ]
            )
            == 0
        )
        kept[text] = json.loads(path.read_text())["kept"]
    own = json.loads((run / "policy" / "policy.json").read_text())["allocation"]
    assert all(allocation == own for allocation in kept.values())


def test_a_named_policy_writes_into_runs_and_never_beside_itself(home, capsys):
    before = sorted(home.rglob("*"))
    assert main(["replay", "resnets", *TINY, "--json"]) == 0
    results = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert results["allocation"] == "runs/resnets-tests.tiny-network-macs-50.json"
    assert results["agent"] == "policy of resnets"
    assert results["macs_ratio"] <= 0.5
    assert (home.parent / "here" / results["allocation"]).exists()
    assert sorted(home.rglob("*")) == before


def test_replay_takes_the_options_of_a_network(home, capsys):
    assert "--max_sparsity: must be from 0 to 0.99, got 2" in failure(
        capsys, "replay", "resnets", "--max_sparsity", "2"
    )
    assert "give the trained weights of resnet56" in failure(
        capsys, "replay", "resnets", "--model", "resnet56"
    )
    assert "--agent" in failure(capsys, "replay", "resnets", "--agent", "ppo")
    assert (
        main(
            [
                "replay",
                "resnets",
                *TINY,
                "--budget",
                "params=60%",
                "--round_to",
                "4",
                "--max_sparsity",
                "0.5",
            ]
        )
        == 0
    )
    (path,) = (home.parent / "here" / "runs").iterdir()
    kept = json.loads(path.read_text())["kept"]
    assert all(count % 4 == 0 for count in kept.values())
    assert kept["2.0"] >= 8


def test_policies_lists_what_is_shipped_and_what_is_wrong_with_it(home, capsys):
    description = home / "vggs" / "policy.json"
    description.write_text(
        json.dumps(json.loads(description.read_text()) | {"features": ["colour"]})
    )
    assert main(["policies", "--json"]) == 0
    *table, last = capsys.readouterr().out.splitlines()
    good, bad = json.loads(last)["policies"]
    assert good == {
        "name": "resnets",
        "algorithm": "ppo",
        "trained_on": "resnet20 on sample",
        "budget": "macs=30%..80%",
        "features_ok": True,
        "problem": "",
    }
    assert bad["name"] == "vggs"
    assert not bad["features_ok"]
    assert "other observations" in bad["problem"]
    text = "\n".join(table)
    assert "resnet20 on sample" in text
    assert "can't be used:\n  vggs: " in text


def test_policies_says_that_none_is_shipped(home, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(policy_files, "SHIPPED", tmp_path / "nothing")
    assert main(["policies", "--json"]) == 0
    first, last = capsys.readouterr().out.splitlines()
    assert first.startswith("no policy is shipped")
    assert json.loads(last) == {"policies": []}


def test_weights_with_other_names_are_refused(home):
    weights = home / "resnets" / "policy.safetensors"
    save_file(
        {f"x.{name}": tensor for name, tensor in load_file(weights).items()}, weights
    )
    with pytest.raises(UserError, match=r"policy: the policy in .* is damaged"):
        starting_policy("ppo", "resnets")
