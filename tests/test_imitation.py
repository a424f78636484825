"""Searches that start from a policy on a network that it doesn't know: they begin as that acts with its guide."""

import numpy as np
import pytest
import torch
from toys import additive_env, some_policy, target_env

from agents.dyna import Imagination
from agents.imitation import begin_as, guided_measurements, imitate
from agents.lanes import Lanes, Recorder
from agents.replay import ALGORITHMS, Policy, acting
from agents.search import search
from agents.training import make_learner
from autoprune.config import SearchConfig
from autoprune.runs import RunFolder
from envs.layer_pruning import LayerPruningEnv


def knowing(env: LayerPruningEnv, shift: float, name: str = "ppo") -> Policy:
    """A policy that was trained on groups like the environment's, or `shift` away from them."""
    policy = some_policy(name)
    return Policy(name, policy.network, policy.policy_kwargs, env.observer.kinds + shift)


def learner_on(env: LayerPruningEnv, name: str, start: Policy | None = None):
    recorder = Recorder(env, SearchConfig())
    lanes = Imagination(env, 12) if name == "dyna" else Lanes(recorder)
    return make_learner(name, lanes, len(env.groups), 0, start=start)


def allocated(act, env: LayerPruningEnv, budget: str = "macs=50%") -> np.ndarray:
    """Sparsities `(n_groups,)` to which actions lead."""
    budgets = [type(env.budget.at(0)).parse(budget)]
    return 1 - env.walks(budgets).follow(act).state.kept[0] / env.space.costs.dense


def of(learner):
    return lambda walks: learner.policy.predict(walks.observe(), deterministic=True)[0][:, 0]


@pytest.mark.parametrize("name", list(ALGORITHMS))
def test_on_a_strange_network_an_agent_begins_as_the_policy_and_its_guide_act(name):
    env = additive_env()
    start = knowing(env, 5, name)
    learner = learner_on(env, name, start)
    wanted = allocated(acting(start, env), env)
    before = np.abs(allocated(of(learner), env) - wanted).max()
    begin_as(start, learner, env, seed=0)
    assert np.abs(allocated(of(learner), env) - wanted).max() < 0.1 < before
    assert env.proxy.evaluations == guided_measurements(start, env) == len(env.groups) + 1


def test_under_a_range_every_budget_is_imitated():
    env = additive_env(budget="macs=30%..80%")
    start = knowing(env, 5)
    learner = learner_on(env, "ppo", start)
    begin_as(start, learner, env, seed=0)
    for budget in ("macs=30%", "macs=55%", "macs=80%"):
        wanted = allocated(acting(start, env), env, budget)
        assert np.abs(allocated(of(learner), env, budget) - wanted).max() < 0.15  # a step of the narrowest is 0.125


@pytest.mark.parametrize("shift", [0, 0.05])
@pytest.mark.parametrize("name", list(ALGORITHMS))
def test_on_a_network_that_it_mostly_knows_an_agent_begins_as_the_policy_is(name, shift):
    env = target_env("wide")
    start = knowing(env, shift, name)
    assert (shift == 0) == (start.trust(env.observer).min() == 1)
    learner = learner_on(env, name, start)
    before = {key: value.clone() for key, value in learner.policy.state_dict().items()}
    begin_as(start, learner, env, seed=0)
    assert all(torch.equal(value, before[key]) for key, value in learner.policy.state_dict().items())
    assert env.proxy.evaluations == guided_measurements(start, env) == 0


@pytest.mark.parametrize("name", ["td3", "ddpg"])
def test_target_actors_follow_at_once(name):
    env = additive_env()
    learner = learner_on(env, name)
    imitate(learner, lambda walks: np.full(len(walks.state.kept), 0.5), env, seed=0)
    actor, target = learner.actor.state_dict(), learner.actor_target.state_dict()
    assert all(torch.equal(value, target[key]) for key, value in actor.items())


@pytest.mark.parametrize("name", ["sac", "ddpg"])
def test_critics_and_spread_stay_as_they_are(name):
    env = additive_env()
    learner = learner_on(env, name)
    before = {key: value.clone() for key, value in learner.policy.state_dict().items()}
    imitate(learner, lambda walks: np.full(len(walks.state.kept), 0.5), env, seed=0)
    changed = {key for key, value in learner.policy.state_dict().items() if not torch.equal(value, before[key])}
    assert changed and all(key.startswith("actor") and "log_std" not in key for key in changed)


@pytest.mark.parametrize("agent", ["dyna", "ppo", "sac"])
def test_a_search_from_a_strange_policy_is_repeatable_and_resumes_to_the_same_result(agent, tmp_path, monkeypatch):
    knowing(additive_env(), 5, agent).save(tmp_path / "policy")
    settings = {"agent": agent, "seed": 1, "finalists": 2, "checkpoint_every": 10, "policy": str(tmp_path / "policy")}

    def searched(episodes: int, folder: str):
        return search(additive_env(), SearchConfig(episodes=episodes, **settings), RunFolder(tmp_path / folder))

    expected = searched(30, "alone")
    searched(30, "again")
    assert (tmp_path / "alone/log.jsonl").read_text() == (tmp_path / "again/log.jsonl").read_text()
    walk = Recorder.score

    def killed(recorder, *rest):
        if len(recorder.episodes) == 20:
            raise KeyboardInterrupt
        return walk(recorder, *rest)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Recorder, "score", killed)
        searched(30, "killed")
    result = searched(30, "killed")
    assert result.episodes == expected.episodes and result.best.allocation == expected.best.allocation
    assert result.evaluations == expected.evaluations


def test_a_search_from_a_strange_policy_starts_near_what_its_guide_suggests(tmp_path):
    env = additive_env()
    start = knowing(env, 5, "sac")
    start.save(tmp_path)
    wanted = allocated(acting(start, additive_env()), additive_env())
    episodes = search(env, SearchConfig(agent="sac", episodes=10, policy=str(tmp_path))).episodes
    walked = np.mean([1 - np.array(e.counts) / env.space.costs.dense for e in episodes], axis=0)
    uniform = 1 - env.space.uniform(env.target_of(env.budget)) / env.space.costs.dense
    assert np.abs(walked - wanted).mean() < 0.5 * np.abs(uniform - wanted).mean()
