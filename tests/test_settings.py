"""Hyperparameters by flag or file: they reach the learner, are kept by the run, and are
refused by name before a search begins.
"""

import numpy as np
import pytest
import yaml
from test_cli import FAST, failure
from toys import fake_env, learner_of

from autoprune.agents.algorithms import ALGORITHMS
from autoprune.agents.recorder import Recorder
from autoprune.agents.sb3_env import RecordedVecEnv
from autoprune.agents.search import search
from autoprune.agents.settings import (
    FOLDER,
    check_hyperparameters,
    hyperparameters,
)
from autoprune.agents.training import make_learner
from autoprune.cli.main import main
from autoprune.config import SearchConfig
from autoprune.errors import UserError
from autoprune.runs import RunFolder


def learner(agent: str, changes: dict, start=None):
    lanes = RecordedVecEnv(Recorder(fake_env(), SearchConfig()))
    return make_learner(agent, lanes, 4, 0, start=start, changes=changes)


@pytest.mark.parametrize("agent", ["ppo", "sac", "td3", "ddpg", "tqc"])
def test_a_changed_setting_reaches_the_learner_and_the_others_stay(agent):
    usual = learner_of(agent)
    changed = learner(
        agent,
        {"learning_rate": 1e-4, "gamma": 0.5, "policy_kwargs": {"net_arch": [16]}},
    )
    assert changed.learning_rate == 1e-4
    assert changed.gamma == 0.5
    assert changed.policy_kwargs["net_arch"] == [16]
    assert changed.batch_size == usual.batch_size
    kept = {**usual.policy_kwargs, "net_arch": None}
    assert {**changed.policy_kwargs, "net_arch": None} == kept


def test_without_changes_the_settings_are_those_of_the_file():
    for agent in ALGORITHMS:
        stored = yaml.safe_load((FOLDER / f"{agent}.yaml").read_text())
        assert hyperparameters(agent) == hyperparameters(agent, {}) == stored


def test_a_rate_that_is_asked_for_counts_at_every_start():
    rates = hyperparameters("ppo", {"learning_rate": 1e-4})
    assert rates["from_a_policy"]["learning_rate"] == 1e-4
    assert rates["from_a_policy"]["spread"] == 0.2
    own = {"learning_rate": 1e-4, "from_a_policy": {"learning_rate": 1e-5}}
    assert hyperparameters("ppo", own)["from_a_policy"]["learning_rate"] == 1e-5


@pytest.mark.parametrize(
    ("agent", "changes", "message"),
    [
        ("ppo", {"learning_rat": 1}, "'learning_rat'; did you mean 'learning_rate'?"),
        (
            "ppo",
            {"policy_kwargs": {"net_arc": [8]}},
            "did you mean 'policy_kwargs.net_arch'?",
        ),
        ("sac", {"n_epochs": 3}, "unknown hyperparameter 'n_epochs'"),
        ("random", {"learning_rate": 1}, "random has none; those that have some: ddpg"),
        ("ppo", {"learning_rate": "fast"}, "learning_rate must be a number from 0"),
        ("ppo", {"learning_rate": -1e-3}, "must be a number from 0, got -0.001"),
        ("ppo", {"learning_rate": float("nan")}, "must be a number from 0, got nan"),
        ("ppo", {"gamma": 1.5}, "gamma must be a number from 0 to 1, got 1.5"),
        ("ppo", {"n_epochs": 0}, "n_epochs must be a count of at least 1, got 0"),
        ("ppo", {"n_epochs": 2.5}, "n_epochs must be a count of at least 1, got 2.5"),
        ("ppo", {"n_epochs": True}, "must be a count of at least 1, got True"),
        ("ppo", {"policy_kwargs": {"net_arch": 64}}, "a list of counts of at least 1"),
        ("ppo", {"policy_kwargs": {"net_arch": []}}, "a list of counts of at least 1"),
        ("ppo", {"policy_kwargs": 3}, "unknown hyperparameter 'policy_kwargs'"),
        ("ppo", {"from_a_policy": {"keeps_critic": 1}}, "must be true or false, got 1"),
        ("sac", {"ent_coef": "automatic"}, "must be a number, auto or auto_0.1"),
    ],
)
def test_a_wrong_name_or_value_is_refused(agent, changes, message):
    with pytest.raises(UserError) as caught:
        check_hyperparameters(agent, changes)
    assert caught.value.argument == "hyperparameters"
    assert message in caught.value.reason
    with pytest.raises(UserError):
        search(fake_env(), SearchConfig(agent=agent, hyperparameters=changes))


@pytest.mark.parametrize(
    ("agent", "changes"),
    [
        ("sac", {"ent_coef": 0.1}),
        ("sac", {"ent_coef": "auto", "target_entropy": -2, "learning_starts": 0}),
        ("ppo", {"policy_kwargs": {"log_std_init": -2}, "target_kl": 3}),
        ("dyna", {"n_minibatches": 1000}),
    ],
)
def test_what_a_learner_can_take_is_taken(agent, changes):
    check_hyperparameters(agent, changes)
    learner(agent, changes)


def test_the_network_of_a_policy_to_start_from_cannot_be_changed():
    changes = {"policy_kwargs": {"net_arch": [8]}}
    with pytest.raises(UserError, match="are those of the policy that the agent"):
        check_hyperparameters("ppo", changes, starts_from_policy=True)
    check_hyperparameters("dyna", changes, starts_from_policy=True)


def test_a_search_learns_otherwise_with_other_hyperparameters():
    def rewards(**changes):
        config = SearchConfig(agent="ppo", episodes=30, hyperparameters=changes)
        return [episode.reward for episode in search(fake_env("wide"), config).episodes]

    assert rewards() == rewards()
    assert rewards()[:10] == rewards(learning_rate=1e-2)[:10]
    assert rewards() != rewards(learning_rate=1e-2)


def test_flags_and_files_are_kept_by_the_run_which_needs_neither_any_more(
    tmp_path, capsys
):
    file = tmp_path / "mine.yaml"
    file.write_text("learning_rate: 1e-4\npolicy_kwargs:\n  net_arch: [16]\n")
    run = tmp_path / "run"
    begun = ["search", *FAST, "--agent", "ppo", "--hyperparameters", str(file)]
    begun += ["--hyperparameters.n_epochs", "3", "--out", str(run)]
    assert main(begun) == 0
    stored = yaml.safe_load((run / "config.yaml").read_text())["search"]
    assert stored["hyperparameters"] == {
        "learning_rate": 1e-4,
        "policy_kwargs": {"net_arch": [16]},
        "n_epochs": 3,
    }
    file.unlink()
    resume = ["search", "--resume", "--out", str(run)]
    assert main(resume) == 0
    line = failure(capsys, *resume, "--hyperparameters.n_epochs", "4")
    assert "--hyperparameters: " in line
    assert "was started with" in line
    # Baselines beside the agent have none.
    assert RunFolder(run).read_results().baselines.keys() == {"uniform"}
    replayed = ["replay", str(run), "--budget", "macs=70%"]
    assert main([*replayed, "--out", str(tmp_path / "a.json")]) == 0
    line = failure(capsys, *begun[:-1], str(tmp_path / "no"))
    assert f"--hyperparameters: no file '{file}'" in line


def test_an_own_agent_searches_like_any_other(tmp_path):
    seen = []

    def lopsided(recorder: Recorder) -> None:
        while recorder.remaining:
            n_lanes = min(4, recorder.remaining)
            seen.append(n_lanes)
            recorder.run_episodes(
                lambda batch: np.full(len(batch.state.targets), 0.5), n_lanes
            )

    result = search(
        fake_env("wide"), SearchConfig(episodes=6), RunFolder(tmp_path), agent=lopsided
    )
    assert seen == [4, 2]
    assert len(result.episodes) == 6
    assert result.policy is None
    best = max(episode.reward for episode in result.episodes)
    assert result.best.allocation.kept in [
        episode.allocation.kept for episode in result.episodes if episode.reward == best
    ]
    with pytest.raises(UserError, match="agent: it played no episode"):
        search(fake_env(), SearchConfig(), agent=lambda recorder: None)


def events(folder: RunFolder) -> dict[str, list[tuple[int, float]]]:
    """Scalar to its steps and values, as TensorBoard reads them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (folder_of_events,) = [folder.tensorboard / "episodes"]
    read = EventAccumulator(str(folder_of_events))
    read.Reload()
    scalars = {}
    for name in read.Tags()["scalars"]:
        scalars[name] = [(event.step, event.value) for event in read.Scalars(name)]
    return scalars


@pytest.mark.parametrize("agent", ["random", "dyna", "evolution", "ppo"])
def test_every_agent_tells_tensorboard_of_every_episode_once(agent, tmp_path):
    folder = RunFolder(tmp_path)
    config = SearchConfig(agent=agent, episodes=20)
    # The second search takes all of them from its log.
    for _ in range(2):
        env = fake_env("wide")
        episodes = search(env, config, folder).episodes
        scalars = events(folder)
        steps = list(range(1, len(episodes) + 1))
        assert all([step for step, _ in rows] == steps for rows in scalars.values())
        values = {name: [value for _, value in rows] for name, rows in scalars.items()}
        rewards = [episode.reward for episode in episodes]
        np.testing.assert_allclose(values["search/reward"], rewards, rtol=1e-6)
        np.testing.assert_allclose(
            values["search/best"], np.maximum.accumulate(rewards), rtol=1e-6
        )
        for episode, cost, loss, accuracy in zip(
            episodes,
            values["search/cost"],
            values["search/loss"],
            values["search/accuracy"],
            strict=True,
        ):
            assert cost == pytest.approx(episode.macs)
            assert loss == pytest.approx(episode.evaluation.loss)
            assert accuracy == pytest.approx(episode.evaluation.accuracy)


def test_under_a_range_no_reward_is_the_best(tmp_path):
    folder = RunFolder(tmp_path)
    config = SearchConfig("macs=30%..80%", agent="random", episodes=10)
    search(fake_env("wide", budget="macs=30%..80%"), config, folder)
    assert events(folder).keys() == {
        f"search/{name}" for name in ("accuracy", "loss", "cost", "reward")
    }
