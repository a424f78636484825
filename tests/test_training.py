"""The learners: they store what was executed, start at uniform, learn, and survive
being interrupted.
"""

import random
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from stable_baselines3.common.callbacks import BaseCallback
from toys import fake_env, run_episode, target_env

from autoprune.agents.dyna import train_dyna
from autoprune.agents.recorder import Recorder
from autoprune.agents.replay import Policy, replay
from autoprune.agents.sb3_env import RecordedVecEnv
from autoprune.agents.search import search
from autoprune.agents.settings import hyperparameters
from autoprune.agents.training import (
    ALGORITHMS,
    ExecutedAction,
    make_learner,
    train,
)
from autoprune.config import SearchConfig
from autoprune.envs.layer_pruning import LayerPruningEnv
from autoprune.errors import UserError
from autoprune.runs import RunFolder

OFF_POLICY = ("sac", "td3", "ddpg", "tqc")


class InterruptedSearchError(Exception):
    pass


class Noted(RecordedVecEnv):
    """Keeps what was wished and what was executed at every step."""

    def __init__(self, recorder: Recorder, n_lanes: int):
        super().__init__(recorder, n_lanes)
        self.wished, self.executed = [], []

    def step_async(self, actions):
        self.wished.append(actions[:, 0].copy())
        super().step_async(actions)

    def step_wait(self):
        result = super().step_wait()
        self.executed.append([info["executed_action"] for info in result[3]])
        return result


def lanes_of(
    env: LayerPruningEnv, n_lanes: int = 10, seed: int = 0, episodes: int = 100
) -> Noted:
    return Noted(Recorder(env, SearchConfig(episodes=episodes, seed=seed)), n_lanes)


def learner_on(name: str, lanes: RecordedVecEnv, seed: int = 0):
    return make_learner(name, lanes, len(lanes.env.groups), seed)


def trained(
    name: str,
    env,
    config: SearchConfig,
    folder: Path | None = None,
    interrupt_at: int = 0,
):
    """The policy and all episodes, resumed from `folder`; raises `InterruptedSearchError` after
    episode `interrupt_at`.
    """

    def on_episode(episode) -> None:
        if episode.number == interrupt_at:
            raise InterruptedSearchError

    recorder = Recorder(
        env, config, None if folder is None else RunFolder(folder), on_episode
    )
    if name == "dyna":
        policy = train_dyna(recorder)
    else:
        policy = train(
            name, recorder, None if folder is None else folder / "learner.pt"
        )
    return policy, recorder.episodes


def assert_same_policy(first: Policy, second: Policy) -> None:
    for (key, one), other in zip(
        first.network.state_dict().items(),
        second.network.state_dict().values(),
        strict=True,
    ):
        assert torch.equal(one, other), key


@pytest.mark.parametrize("name", OFF_POLICY)
def test_replay_buffer_holds_the_executed_actions_of_every_step(name):
    lanes = lanes_of(target_env(), n_lanes=3)
    buffer = learner_on(name, lanes).learn(2 * 3 * 4, ExecutedAction()).replay_buffer
    executed = np.array(lanes.executed, dtype=np.float32)
    assert executed.shape == (8, 3)
    assert buffer.pos == 8
    assert np.array_equal(buffer.actions[:8, :, 0], executed)
    assert not np.array_equal(np.array(lanes.wished), executed)  # rounding
    assert buffer.dones[:8].tolist() == [[is_last] * 3 for is_last in (0, 0, 0, 1) * 2]
    assert ((buffer.rewards[:8] != 0) == buffer.dones[:8].astype(bool)).all()
    returns = [episode.reward for episode in lanes.recorder.episodes]
    assert buffer.rewards[[3, 7]].flatten() == pytest.approx(returns, rel=1e-6)


@pytest.mark.parametrize("name", OFF_POLICY)
def test_every_step_is_credited_with_its_own_episodes_reward(name):
    lanes = lanes_of(target_env(), n_lanes=3)
    buffer = learner_on(name, lanes).learn(2 * 3 * 4, ExecutedAction()).replay_buffer
    # Rounding lets different episodes begin with the same step.
    expected = defaultdict(list)
    for step, reward in walked_anew(lanes):
        expected[step].append(reward)
    batch = buffer.sample(200)
    keys = [
        tuple(row) for row in torch.cat([batch.observations, batch.actions], 1).numpy()
    ]
    for key, reward in zip(keys, batch.rewards[:, 0].tolist(), strict=True):
        assert min(abs(reward - other) for other in expected[key]) < 1e-5
    assert (batch.dones == 1).all()  # nothing is bootstrapped


def walked_anew(lanes: Noted) -> Iterator[tuple[tuple[float, ...], float]]:
    """Observation and executed action of every step, and the reward at its episode's
    end.
    """
    rewards, n_steps = [episode.reward for episode in lanes.recorder.episodes], 4
    for number in range(len(lanes.executed) // n_steps):
        batch = lanes.env.start_episodes([lanes.env.budget] * lanes.num_envs)
        ends = rewards[number * lanes.num_envs :][: lanes.num_envs]
        for executed in np.array(lanes.executed[n_steps * number :][:n_steps]):
            seen = lanes.env.observer.seen(batch.observe())
            steps = np.column_stack([seen, executed.astype(np.float32)])
            yield from zip(map(tuple, steps), ends, strict=True)
            batch.step(executed)


def test_rollout_buffer_holds_the_executed_actions_and_the_first_ratio_is_one():
    lanes = lanes_of(target_env())
    learner = learner_on("ppo", lanes)
    learner.train = lambda: None  # the buffer as it is when the first update starts
    learner.learn(40, ExecutedAction())
    buffer = learner.rollout_buffer
    assert buffer.full
    assert np.array_equal(
        buffer.actions[:, :, 0], np.array(lanes.executed, dtype=np.float32)
    )
    batch = next(buffer.get())
    with torch.no_grad():
        _, log_prob, _ = learner.policy.evaluate_actions(
            batch.observations, batch.actions
        )
    assert torch.allclose(
        (log_prob - batch.old_log_prob).exp(), torch.ones(40), atol=1e-5
    )


@pytest.mark.parametrize("seed", [0, 2])
def test_wishes_far_beyond_the_bounds_break_no_policy(seed):
    learner = learner_on("ppo", lanes_of(target_env("wide")), seed)
    learner.policy.log_std.data.fill_(-2.5)
    learner.policy.action_net.bias.data.fill_(
        4.0
    )  # fifty standard deviations from what is executed
    learner.learn(100 * learner.n_steps, ExecutedAction())
    assert all(parameter.isfinite().all() for parameter in learner.policy.parameters())


@pytest.mark.parametrize("name", list(ALGORITHMS))
def test_first_deterministic_policy_is_nearly_uniform(name):
    for seed in range(3):
        env = target_env("wide")
        policy = Policy.from_learner(
            name, learner_on(name, lanes_of(env, n_lanes=20), seed), {}
        )
        observation, _ = env.reset()
        for _ in range(5):
            action = policy.act(observation)
            assert abs(action[0]) < 0.05
            observation, *_ = env.step(action)


@pytest.mark.parametrize("name", list(ALGORITHMS))
def test_first_explored_actions_spread_by_about_four_tenths(name):
    lanes = lanes_of(target_env("wide"), n_lanes=200)
    learner = learner_on(name, lanes)
    torch.manual_seed(0)
    np.random.seed(0)
    learner.learn(1, StopAtOnce())
    assert 0.3 < np.std(lanes.wished[0]) < 0.5


class StopAtOnce(BaseCallback):
    def _on_step(self) -> bool:
        return False


@pytest.mark.parametrize("name", list(ALGORITHMS))
def test_agent_learns_an_allocation_clearly_better_than_uniform(name):
    for seed in range(
        3 if name in ("ppo", "dyna") else 1
    ):  # three pass for the others too, but take long
        env = target_env(round_to=1)
        uniform = run_episode(env, lambda _: 0.0)["loss"]
        policy, episodes = trained(name, env, SearchConfig(episodes=60, seed=seed))
        assert len(episodes) == 60
        assert replay(policy, env)[1]["loss"] < 0.7 * uniform
        assert min(episode.evaluation.loss for episode in episodes) < 0.3 * uniform


@pytest.mark.parametrize("name", OFF_POLICY)
def test_off_policy_agent_never_stops_trying_new_allocations(name):
    env = target_env(round_to=1)
    _, episodes = trained(name, env, SearchConfig(episodes=30))
    assert (
        len({tuple(episode.allocation.kept.values()) for episode in episodes[-12:]})
        >= 8
    )


def test_last_batch_is_learned_from():
    for name in ("ppo", "ddpg"):
        first = learner_on(name, lanes_of(target_env()))
        policy, _ = trained(name, target_env(), SearchConfig(episodes=10))
        before, after = first.policy.state_dict(), policy.network.state_dict()
        assert any(not torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("name", list(ALGORITHMS))
@pytest.mark.parametrize(
    ("network", "n_episodes"), [("one", 1), ("chain", 1), ("chain", 7), ("chain", 12)]
)
def test_exactly_the_asked_number_of_episodes_is_walked(name, network, n_episodes):
    _, episodes = trained(name, target_env(network), SearchConfig(episodes=n_episodes))
    assert [episode.number for episode in episodes] == list(range(1, n_episodes + 1))


@pytest.mark.parametrize("name", list(ALGORITHMS))
def test_same_seed_gives_the_same_episodes_and_policy_and_another_seed_others(name):
    runs = [
        trained(name, target_env(), SearchConfig(episodes=12, seed=seed))
        for seed in (1, 1, 2)
    ]
    (first, episodes), (again, same), (_, others) = runs
    assert episodes == same
    assert_same_policy(first, again)
    assert [e.allocation for e in episodes] != [e.allocation for e in others]


@pytest.mark.parametrize("name", list(ALGORITHMS))
def test_interrupted_training_goes_on_to_the_same_episodes_and_weights(name, tmp_path):
    config = SearchConfig(episodes=34, seed=3, checkpoint_every=4)
    expected, expected_episodes = trained(name, target_env(), config)
    for interrupt_at in sorted(random.Random(name).sample(range(1, 35), 3)):
        with pytest.raises(InterruptedSearchError):
            trained(name, target_env(), config, tmp_path, interrupt_at)
        torch.manual_seed(99)  # whatever another process would have in its generators
        np.random.seed(99)
    policy, episodes = trained(name, target_env(), config, tmp_path)
    assert episodes == expected_episodes
    assert_same_policy(policy, expected)


def test_finished_training_is_not_repeated_and_gives_the_same_policy(tmp_path):
    config, env = SearchConfig(episodes=20, checkpoint_every=4), target_env()
    first, episodes = trained("ddpg", target_env(), config, tmp_path)
    again, same = trained("ddpg", env, config, tmp_path)
    assert same == episodes
    assert env.proxy.evaluations == 0
    assert_same_policy(first, again)


def test_checkpoint_loads_without_executing_code(tmp_path):
    trained(
        "sac", target_env(), SearchConfig(episodes=26, checkpoint_every=2), tmp_path
    )
    assert torch.load(tmp_path / "learner.pt", weights_only=True)["episodes"] == 20
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "learner.pt",
        "log.jsonl",
    ]


@pytest.mark.parametrize(
    "damage", ["cut", "noise", "empty", "other algorithm", "other file"]
)
def test_damaged_checkpoint_is_refused_in_one_line(tmp_path, damage):
    checkpoint, config = (
        tmp_path / "learner.pt",
        SearchConfig(episodes=12, checkpoint_every=2),
    )
    trained(
        "sac" if damage == "other algorithm" else "td3", target_env(), config, tmp_path
    )
    content = checkpoint.read_bytes()
    if damage == "other file":
        torch.save({"weights": torch.zeros(2)}, checkpoint)
    elif damage != "other algorithm":
        checkpoint.write_bytes(
            {"cut": content[: len(content) // 2], "noise": b"noise" * 99, "empty": b""}[
                damage
            ]
        )
    with pytest.raises(
        UserError, match=r"run: checkpoint '.*learner\.pt' can't be used .*delete it"
    ) as caught:
        trained("td3", target_env(), config, tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "near"),
    [("pp0", "ppo"), ("tdd3", "td3"), ("unifrom", "uniform"), ("dina", "dyna")],
)
def test_unknown_agent_is_refused_with_the_nearest_known(name, near):
    with pytest.raises(
        UserError,
        match=f"agent: unknown agent '{name}'; did you mean '{near}'.*Known: dyna, ppo, sac",
    ):
        search(fake_env(), SearchConfig(agent=name))


@pytest.mark.parametrize("name", list(ALGORITHMS))
def test_hyperparameters_are_plain_data_with_undiscounted_returns(name):
    settings = hyperparameters(name)
    assert settings["gamma"] == 1.0
    assert settings["policy_kwargs"]["net_arch"]


def test_training_without_a_log_leaves_no_folder_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    trained("ppo", target_env(), SearchConfig(episodes=4))
    assert list(tmp_path.iterdir()) == []
