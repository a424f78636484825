"""The search: honest about splits and evaluations, and the same whether or not it was
killed on the way.
"""

import random
import signal
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pytest
import torch
from processes import FORKS, forked
from toys import FakeProxy, digits_env, digits_proxy, fake_env, target_env, traced

from autoprune.agents import finalists, training
from autoprune.agents.baselines import BASELINES
from autoprune.agents.recorder import Episode
from autoprune.agents.search import AGENTS, search
from autoprune.agents.settings import hyperparameters
from autoprune.config import ProxyConfig, SearchConfig
from autoprune.data.datasets import Images, Splits
from autoprune.envs.layer_pruning import LayerPruningEnv
from autoprune.evaluation.evaluate import Evaluation
from autoprune.evaluation.importance import importance
from autoprune.evaluation.proxy import ProxyAccuracy
from autoprune.runs import RunFolder

N_KILLED = 40
N_EPISODES = {"uniform": 1, "sensitivity": 2, "global": 1, "cost_aware": 1}
"""Of those that walk fewer than they are asked for."""


class Poisoned(Images):
    """Fails as soon as anyone looks at it."""

    def __init__(self):
        pass

    def __getattribute__(self, name):
        raise AssertionError(f"the test split was touched ({name})")

    def __len__(self):
        raise AssertionError("the test split was touched (len)")


class Shifted(FakeProxy):
    """Orders candidates on the selection split the other way round."""

    def score_all(self, allocations, block=0):
        return [
            type(proxy)(1 - proxy.accuracy, 2 - proxy.loss)
            for proxy in super().score_all(allocations, block)
        ]

    def survey_all(self, allocations, batches=0):
        return [
            type(proxy)(1 - proxy.accuracy, 2 - proxy.loss)
            for proxy in super().survey_all(allocations, batches)
        ]


class Uneven(FakeProxy):
    """Two blocks of images, the second much harder than the first."""

    surveyed: tuple[tuple[int, ...], ...] = ()

    def block_of(self, batch):
        return batch % 2

    def score_all(self, allocations, block=0):
        return [
            Evaluation(proxy.accuracy, proxy.loss + block)
            for proxy in super().score_all(allocations, block)
        ]

    def survey_all(self, allocations, batches=0):
        self.surveyed = tuple(tuple(kept.values()) for kept in allocations)
        return super().survey_all(allocations, batches)


def killable_search(
    agent: str,
    folder: Path,
    on_episode: Callable[[Episode], None] = lambda episode: None,
):
    """One search on a real proxy of an untrained network: the same in every process."""
    learns_off_policy = (
        agent not in BASELINES and "updates_per_step" in hyperparameters(agent)
    )
    config = SearchConfig(
        agent=agent,
        episodes=N_KILLED,
        checkpoint_every=5,
        seed=1,
        hyperparameters={"updates_per_step": 1} if learns_off_policy else {},
    )
    folder.mkdir(exist_ok=True)
    return search(small_real_env(), config, RunFolder(folder), on_episode)


def search_until_killed(agent: str, folder: Path, number: int, told: Connection):
    """Searches on, telling of every episode from `number` on, then waits for its end."""

    def tell(episode: Episode) -> None:
        if episode.number >= number:
            told.send(episode.number)

    killable_search(agent, folder, tell)
    # A kill right before may have left all episodes in the log already.
    told.send(N_KILLED)
    signal.pause()


def small_real_env() -> LayerPruningEnv:
    model, groups, _ = traced("chain")
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(
        0, 256, (60, 3, 16, 16), generator=generator, dtype=torch.uint8
    )
    images = Images(pixels, torch.randint(0, 10, (60,), generator=generator))
    splits = Splits(
        images,
        images[:20],
        images[20:40],
        images[40:],
        Poisoned(),
        tuple("0123456789"),
        "random",
    )
    proxy = ProxyAccuracy(
        model,
        groups,
        importance("l1", model, groups, images),
        splits,
        ProxyConfig(bf16="off"),
    )
    return LayerPruningEnv.with_suited_proxy(model, groups, proxy, round_to=2)


def logged(folder: Path) -> list[dict]:
    return list(RunFolder(folder).events("episode"))


@pytest.fixture
def fewer_updates(monkeypatch):
    """Off-policy learners with half of their updates, where it isn't asked how well they
    learn.
    """
    usual = training.hyperparameters

    def fewer(name, changes=None):
        settings = usual(name, changes)
        if "updates_per_step" in settings:
            settings["updates_per_step"] = 1
        return settings

    monkeypatch.setattr(training, "hyperparameters", fewer)


@pytest.mark.parametrize("agent", AGENTS)
def test_every_episode_of_200_meets_the_budget_whoever_walks_it(agent, fewer_updates):
    env = target_env("chain")
    episodes = search(
        env, SearchConfig(agent=agent, episodes=200, finalists=1)
    ).episodes
    assert len(episodes) == N_EPISODES.get(agent, 200)
    costs = [
        env.space.cost(np.array(list(episode.allocation.kept.values())))
        for episode in episodes
    ]
    assert max(costs) <= env.target


@pytest.mark.parametrize("agent", AGENTS)
def test_every_agent_and_baseline_returns_an_allocation_within_the_budget(agent):
    env = target_env("wide")
    result = search(env, SearchConfig(agent=agent, episodes=13, finalists=4))
    result.best.allocation.check(env.groups)
    kept = np.array(list(result.best.allocation.kept.values()))
    assert env.space.cost(kept) <= env.target
    assert result.best.macs == env.space.costs.macs(kept)
    assert (result.policy is None) == (agent in BASELINES)
    assert 1 <= len(result.finalists) <= 5
    assert (
        result.best.allocation.source == "policy"
        or result.best.allocation.source.startswith("episode ")
    )


def test_finalists_are_the_best_different_episodes_sorted_by_their_selection_reward():
    model, groups, example = traced("wide")
    proxy = Shifted(groups, example, lambda kept: float(kept[0] / 20))
    result = search(
        LayerPruningEnv.with_suited_proxy(model, groups, proxy, round_to=2),
        SearchConfig(agent="random", episodes=30, finalists=6),
    )
    rewards = [finalist.reward for finalist in result.finalists]
    assert len(rewards) == 6
    assert rewards == sorted(rewards, reverse=True)
    assert result.best is result.finalists[0]
    chosen = {tuple(finalist.allocation.kept.values()) for finalist in result.finalists}
    assert len(chosen) == 6
    others = [
        e.reward
        for e in result.episodes
        if tuple(e.allocation.kept.values()) not in chosen
    ]
    by_kept = {tuple(e.allocation.kept.values()): e.reward for e in result.episodes}
    assert min(by_kept[kept] for kept in chosen) >= max(others)
    # The best on the proxy split is not the best on the selection split here, and the
    # latter decides.
    assert by_kept[tuple(result.best.allocation.kept.values())] < max(by_kept.values())


def test_every_block_of_images_sends_its_best_episodes_to_the_survey():
    model, groups, example = traced("wide")
    proxy = Uneven(groups, example, lambda kept: float(kept[0] / 40))
    result = search(
        LayerPruningEnv.with_suited_proxy(model, groups, proxy, round_to=2),
        SearchConfig(agent="random", episodes=40, finalists=2),
    )
    rewards = {episode.counts: episode.reward for episode in reversed(result.episodes)}
    easy, hard = (
        sorted(
            {e.counts for e in result.episodes if (e.number - 1) // 10 % 2 == block},
            key=lambda c: -rewards[c],
        )
        for block in (0, 1)
    )
    assert max(rewards[counts] for counts in hard) < min(
        rewards[counts] for counts in easy
    )
    for block in (easy, hard):
        sent = [rewards[counts] for counts in block if counts in proxy.surveyed]
        assert len(sent) == 4
        assert min(sent) >= max(rewards[c] for c in block if c not in proxy.surveyed)


def test_trained_policy_competes_as_a_finalist():
    result = search(
        target_env("wide"), SearchConfig(agent="ppo", episodes=12, finalists=3)
    )
    assert sorted(f.allocation.source.split()[0] for f in result.finalists) == [
        "episode"
    ] * 3 + ["policy"]


def test_a_network_that_policy_and_episode_share_stands_once_among_the_finalists(
    monkeypatch,
):
    result = search(
        target_env("wide"), SearchConfig(agent="random", episodes=12, finalists=3)
    )
    shared = max(result.episodes, key=lambda episode: episode.reward)
    its = replace(
        shared, number=0, allocation=replace(shared.allocation, source="policy")
    )
    monkeypatch.setattr(finalists, "roll_out_policy", lambda *_: its)
    found = {
        tuple(f.allocation.kept.values()): f
        for f in finalists.choose_finalists(result.recorder, policy=object())
    }
    assert len(found) == 3
    assert found[shared.counts].allocation.source == "policy"


def test_test_split_is_never_touched():
    env = digits_env()
    env.proxy = digits_proxy(test=Poisoned())
    with pytest.raises(AssertionError, match="the test split was touched"):
        len(env.proxy._splits.test)
    assert search(env, SearchConfig(agent="ppo", episodes=6)).best
    assert search(env, SearchConfig(agent="sensitivity", episodes=12)).best


@pytest.mark.parametrize("agent", ["ppo", "dyna", *BASELINES])
def test_evaluations_count_the_sub_models_that_were_scored(agent):
    calls = []

    def loss_of(kept: np.ndarray) -> float:
        calls.append(tuple(kept))
        return float(kept[0])

    env = fake_env("chain", loss_of)
    result = search(env, SearchConfig(agent=agent, episodes=20, finalists=5))
    assert result.evaluations == env.proxy.evaluations == len(set(calls))
    surveyed = min(
        4 * 5,
        len({tuple(episode.allocation.kept.values()) for episode in result.episodes}),
    )
    assert len(calls) == result.evaluations + surveyed + len(result.finalists)
    assert result.seconds > 0


def test_episodes_are_logged_and_reported_one_by_one(tmp_path):
    seen = []
    result = search(
        target_env(),
        SearchConfig(agent="random", episodes=7),
        RunFolder(tmp_path),
        seen.append,
    )
    assert [episode.number for episode in seen] == [1, 2, 3, 4, 5, 6, 7]
    assert result.episodes == seen
    assert [{"event": "episode", **episode.to_json()} for episode in seen] == logged(
        tmp_path
    )
    assert all(
        asdict(e.evaluation).items() <= entry.items()
        for e, entry in zip(seen, logged(tmp_path), strict=True)
    )


@pytest.mark.parametrize("agent", ["random", "sensitivity", "ddpg"])
def test_finished_search_is_not_searched_again(agent, tmp_path):
    config = SearchConfig(agent=agent, episodes=30, checkpoint_every=5)
    first = search(target_env("wide"), config, RunFolder(tmp_path))
    env, before = target_env("wide"), logged(tmp_path)
    again = search(env, config, RunFolder(tmp_path))
    assert (
        again.finalists == first.finalists or agent == "ddpg"
    )  # the policy's proxy reward is NaN there
    assert again.best.allocation == first.best.allocation
    assert again.episodes == first.episodes
    assert again.evaluations == first.evaluations
    assert logged(tmp_path) == before
    if agent != "sensitivity":  # whose table isn't made of episodes
        assert env.proxy.evaluations <= 1


@pytest.mark.parametrize(
    "agent", [agent for agent in AGENTS if agent not in N_EPISODES]
)
def test_search_killed_at_any_moment_ends_as_one_left_alone(agent, tmp_path):
    expected = killable_search(agent, tmp_path / "alone")
    folder = tmp_path / "killed"
    generator = random.Random(agent)
    for number in sorted(generator.sample(range(1, N_KILLED - 4), 4)):
        receiver, sender = FORKS.Pipe(duplex=False)
        with forked(search_until_killed, agent, folder, number, sender) as process:
            # So that a search which fails ends the pipe, and with it the waiting.
            sender.close()
            receiver.recv()
            # Anywhere in what follows an episode: a log line, an update, a checkpoint.
            time.sleep(generator.uniform(0, 0.02))
        receiver.close()
        assert process.exitcode == -signal.SIGKILL
    result = killable_search(agent, folder)
    assert result.best.allocation == expected.best.allocation
    assert result.best.selection == expected.best.selection
    assert result.episodes == expected.episodes
    assert result.evaluations == expected.evaluations
    assert logged(folder) == logged(tmp_path / "alone")
    for key, weights in (
        expected.policy.network.state_dict().items() if expected.policy else ()
    ):
        assert torch.equal(result.policy.network.state_dict()[key], weights), key


@pytest.mark.parametrize("cut", [1, 20, 10_000])
def test_log_line_cut_short_by_a_kill_is_written_again(cut, tmp_path):
    config = SearchConfig(agent="random", episodes=20)
    for name in ("alone", "killed"):
        (tmp_path / name).mkdir()
    search(target_env(), config, RunFolder(tmp_path / "alone"))
    lines = (tmp_path / "alone" / "log.jsonl").read_text().splitlines(keepends=True)
    for n_lines in (6, 12):
        whole = "".join(lines[:n_lines])
        (tmp_path / "killed" / "log.jsonl").write_text(
            whole + lines[n_lines][:cut].rstrip("\n")
        )
        search(target_env(), config, RunFolder(tmp_path / "killed"))
        assert logged(tmp_path / "killed") == logged(tmp_path / "alone")


def test_an_agent_can_not_be_taken_for_another_setting():
    with pytest.raises(TypeError, match="positional"):
        SearchConfig("macs=50%", "random")
