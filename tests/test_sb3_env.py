"""Lanes: exactly the asked episodes, each within its own budget, nothing paid for
twice.
"""

from collections import Counter

import numpy as np
import pytest
from toys import fake_env, run_episode, target_env

from autoprune.agents.recorder import Recorder, is_near_budget
from autoprune.agents.sb3_env import RecordedVecEnv
from autoprune.agents.search import search
from autoprune.config import SearchConfig
from autoprune.costs.budget import Budget
from autoprune.runs import RunFolder

RANGE = "macs=30%..80%"


def recorder_of(env, episodes: int = 100, seed: int = 0) -> Recorder:
    return Recorder(env, SearchConfig(episodes=episodes, seed=seed))


def walked(lanes: RecordedVecEnv, n_batches: int, seed: int = 0) -> list[tuple]:
    """What the last step of each batch returned, under random actions."""
    generator, last = np.random.default_rng(seed), []
    lanes.reset()
    for _ in range(n_batches):
        for _ in lanes.env.groups:
            result = lanes.step(generator.uniform(-1, 1, (lanes.num_envs, 1)))
        last.append(result)
    return last


def kept(episode) -> np.ndarray:
    return np.array(list(episode.allocation.kept.values()))


@pytest.mark.parametrize("budget", ["macs=50%", RANGE])
@pytest.mark.parametrize("episodes", [1, 3, 10, 13, 27])
def test_exactly_the_asked_episodes_are_recorded_and_surplus_lanes_shadow_the_first(
    budget, episodes
):
    scored = Counter()

    def loss_of(kept: np.ndarray) -> float:
        scored[tuple(kept)] += 1
        return float(1 / kept.sum())

    env = fake_env("wide", loss_of, budget=budget)
    lanes = RecordedVecEnv(recorder_of(env, episodes), n_lanes=10)
    last = walked(lanes, -(-episodes // 10))
    assert [episode.number for episode in lanes.recorder.episodes] == list(
        range(1, episodes + 1)
    )
    assert lanes.recorder.remaining == 0
    live = episodes - 10 * (len(last) - 1)
    _, rewards, dones, infos = last[-1]
    assert dones.all()
    assert rewards.tolist() == [rewards[lane % live] for lane in range(10)]
    assert [info["executed_action"] for info in infos[live:]] == [
        infos[lane % live]["executed_action"] for lane in range(live, 10)
    ]
    assert set(scored.values()) == {1}
    par = {
        tuple(env.space.uniform(env.target_of(env.budget.at_position(p))))
        for p in np.linspace(0, 1, 6)
    }
    assert (
        set(scored)
        <= {tuple(kept(episode)) for episode in lanes.recorder.episodes} | par
    )


@pytest.mark.parametrize("n", [1, 4, 10])
def test_budgets_of_a_range_are_one_from_each_equal_part_of_a_half_circle_over_it(n):
    recorder = recorder_of(fake_env("wide", budget=RANGE))
    shares = np.array([budget.share for budget in recorder.budgets(n)])
    edges = 0.55 - 0.25 * np.cos(np.linspace(0, np.pi, n + 1))
    assert (edges[:-1] - 1e-4 <= shares).all()
    assert (shares <= edges[1:] + 1e-4).all()


def test_a_searchs_budgets_cover_their_range_and_lie_closest_at_its_ends():
    def shares(seed: int) -> np.ndarray:
        return np.array(
            [
                budget.share
                for budget in recorder_of(
                    fake_env("wide", budget=RANGE), seed=seed
                ).budgets(10)
            ]
        )

    drawn = np.array([shares(seed) for seed in range(60)])
    assert drawn.min() >= 0.3
    assert drawn.max() <= 0.8
    assert (np.diff(drawn, axis=1) > 0).all()
    assert drawn[:, 0].max() < 0.33
    assert drawn[:, -1].min() > 0.77
    gaps = np.diff(drawn, axis=1).mean(0)
    assert (np.diff(gaps[:5]) > 0).all()
    assert np.allclose(gaps, gaps[::-1], atol=0.01)
    tenths = np.histogram(drawn, np.linspace(0.3, 0.8, 11))[0] / drawn.size
    assert tenths.min() > 0.05
    assert tenths[0] > 0.17
    assert tenths[-1] > 0.17


def test_budgets_of_a_range_follow_from_seed_and_episode_alone():
    def drawn(seed: int, n_walked: int = 0) -> list[Budget]:
        recorder = recorder_of(fake_env("wide", budget=RANGE), seed=seed)
        if n_walked:
            recorder.run_episodes(lambda batch: np.zeros(n_walked), n_walked)
        np.random.seed(n_walked)  # other generators don't matter
        return recorder.budgets(10)

    assert drawn(1) == drawn(1) != drawn(2)
    assert drawn(1) != drawn(1, 10) == drawn(1, 10)


def test_a_single_budget_is_that_of_every_lane():
    assert {
        str(budget)
        for budget in recorder_of(fake_env("wide", budget="params=40%")).budgets(10)
    } == {"params=40%"}


@pytest.mark.parametrize("network", ["one", "chain", "wide", "resnet20"])
@pytest.mark.parametrize("budget", [RANGE, "params=50%..95%"])
def test_every_allocation_meets_the_budget_of_its_own_lane_and_leaves_no_room_for_a_step(
    network, budget
):
    env = fake_env(network, budget=budget)
    lanes = RecordedVecEnv(recorder_of(env, 20), 10)
    walked(lanes, 2)
    shares = []
    for episode in lanes.recorder.episodes:
        budget = Budget.parse(episode.allocation.budget)
        shares.append(budget.share)
        assert env.space.cost(kept(episode)) <= env.target_of(budget)
        assert (
            env.space.fill(kept(episode), env.target_of(budget)).tolist()
            == kept(episode).tolist()
        )
    assert np.ptp(shares) > 0.8 * (env.budget.high.share - env.budget.low.share)


def test_under_one_budget_a_learner_sees_the_reward_as_it_is():
    lanes = RecordedVecEnv(recorder_of(target_env("wide")), 10)
    ((_, rewards, *_),) = walked(lanes, 1)
    assert rewards == pytest.approx(
        [episode.reward for episode in lanes.recorder.episodes], rel=1e-6
    )


def test_under_a_range_a_learner_sees_how_much_better_than_uniform_it_did():
    def loss(kept: np.ndarray) -> float:
        return float(100 / kept.sum())

    env = fake_env("wide", loss, budget="macs=30%..31%", round_to=1)
    lanes = RecordedVecEnv(recorder_of(env), 10)
    ((_, rewards, _, infos),) = walked(lanes, 1)
    single = fake_env("wide", loss, round_to=1)
    for reward, episode in zip(rewards, lanes.recorder.episodes, strict=True):
        single.reset(options={"budget": episode.allocation.budget})
        for _ in single.groups:
            _, uniform, *_ = single.step(np.zeros(1))
        assert reward == pytest.approx(episode.reward - uniform, abs=0.02)
    assert [info["episode"]["r"] for info in infos] == pytest.approx(rewards)


def test_an_episodes_last_observation_is_told_beside_the_next_ones_first():
    lanes = RecordedVecEnv(recorder_of(fake_env("wide")), 3)
    first = lanes.reset()
    for step in range(5):
        before = lanes.batch.observe()
        observations, _, dones, infos = lanes.step(np.full((3, 1), 0.3))
        assert dones.tolist() == [step == 4] * 3
    assert np.array_equal(observations, first)
    terminal = np.array([info["terminal_observation"] for info in infos])
    assert np.array_equal(terminal[:, :15], before[:, :15])
    assert not np.array_equal(terminal, first)


def test_lanes_do_what_the_environment_does_one_by_one():
    env = target_env("wide")
    lanes, actions = (
        RecordedVecEnv(recorder_of(env), 4),
        np.random.default_rng(0).uniform(-1, 1, (5, 4)),
    )
    lanes.reset()
    for row in actions:
        lanes.step(row[:, None])
    for lane, episode in enumerate(lanes.recorder.episodes):
        info = run_episode(
            target_env("wide"), lambda position, lane=lane: actions[position, lane]
        )
        assert (info["allocation"], info["loss"]) == (
            episode.allocation,
            episode.evaluation.loss,
        )


def test_recorded_episodes_are_read_back_and_not_paid_for_again(tmp_path):
    config = SearchConfig(episodes=20)
    first = Recorder(fake_env("wide"), config, RunFolder(tmp_path))
    walked(RecordedVecEnv(first, 10), 2)
    env, seen = fake_env("wide"), []
    again = Recorder(env, config, RunFolder(tmp_path), seen.append)
    assert again.n_restored == len({tuple(kept(episode)) for episode in first.episodes})
    again.resume_at(10)
    assert again.episodes == seen == first.episodes[:10]
    lanes = RecordedVecEnv(again, 10)
    generator = np.random.default_rng(0)
    generator.uniform(-1, 1, (5, 10, 1))  # the actions of the first batch
    lanes.reset()
    for _ in range(5):
        lanes.step(generator.uniform(-1, 1, (10, 1)))
    assert again.episodes == seen == first.episodes
    assert env.proxy.evaluations == 0
    assert len(list(RunFolder(tmp_path).events("episode"))) == 20


def test_lanes_are_no_place_for_attributes_of_their_own():
    lanes = RecordedVecEnv(recorder_of(fake_env("wide")), 3)
    assert lanes.get_attr("target") == [lanes.env.target] * 3
    assert lanes.env_is_wrapped(object) == [False] * 3
    with pytest.raises(
        NotImplementedError, match="target: lanes share one environment"
    ):
        lanes.set_attr("target", 3)


@pytest.mark.parametrize(
    ("reward", "expected"),
    [("weighted_sum", [0.91, 1.0, 1.09]), ("accuracy_guaranteed", [0.5, 0.91, 1.0])],
)
def test_near_a_budget_is_close_on_both_sides_or_anywhere_below_a_ceiling(
    reward, expected
):
    env = fake_env("wide", reward=reward)
    shares = np.array([0.5, 0.91, 1.0, 1.09, 1.15])
    assert (
        shares[is_near_budget(env, shares * env.target, env.budget)].tolist()
        == expected
    )


@pytest.mark.parametrize(
    ("options", "is_there"),
    [
        ({"budget": "macs=30%..80%"}, True),
        ({"budget": "macs=50%"}, False),
        (
            {"budget": "macs=30%..80%", "reward": "accuracy_guaranteed"},
            False,
        ),  # there cheaper is better
    ],
)
def test_what_is_usual_at_a_cost_counts_under_a_range_of_budgets_that_are_used_up(
    options, is_there
):
    recorder = search(
        fake_env("wide", **options), SearchConfig(agent="random", episodes=30)
    ).recorder
    assert (recorder.cost_baseline is not None) == is_there


def test_where_nothing_is_near_a_budget_the_closest_counts():
    env = fake_env("wide")
    assert is_near_budget(
        env, np.array([0.4, 0.7, 1.5]) * env.target, env.budget
    ).tolist() == [
        False,
        True,
        False,
    ]
    assert is_near_budget(env, np.array([]), env.budget).tolist() == []
