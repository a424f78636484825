"""Policies by name, and what their files say; imports no torch."""

import json
from pathlib import Path
from typing import TypeGuard

from autoprune.agents.searchers import check_installed
from autoprune.errors import UserError, nearest_names
from autoprune.names import LEARNERS
from autoprune.runs import RunFolder

SHIPPED = Path(__file__).parent / "policies"
"""A folder a policy, as `Policy.save` writes it."""
POLICY_CLASS_OF = {"dyna": "ppo"}
"""Agents whose policies are those of another one, which can go on from them."""
STARTS_FROM_ANY = ("dyna",)
"""Agents that let any policy act and learn from what that earns."""


def shipped_policies() -> dict[str, Path]:
    """The policies that come with autoprune: name to folder."""
    descriptions = sorted(SHIPPED.glob("*/policy.json"))
    return {path.parent.name: path.parent for path in descriptions}


def find_policy(text: str, argument: str = "policy") -> Path:
    """The folder of a policy.

    Args:
        text: The name of a shipped policy, a run, or a policy's own folder. A name
            counts before a folder that is called the same.
        argument: The argument that it came by, for messages.

    Raises:
        UserError: If there is no such policy; the nearest names are offered.
    """
    known = shipped_policies()
    # First, so that a folder in the working directory can't stand in for a name.
    if text in known:
        return known[text]
    path = Path(text)
    if (path / "policy.json").is_file():
        return path
    if (path / "config.yaml").is_file():
        return RunFolder.open(path).policy
    if path.is_dir():
        missing = "no config.yaml, no policy.json"
        raise UserError(
            argument,
            f"{text!r} is neither a run nor a policy's folder ({missing}); "
            f"give one that `autoprune run` wrote",
        )
    raise UserError(
        argument,
        f"no shipped policy and no folder is called {text!r}; "
        f"{_hint(text, list(known))} give a name that `autoprune policies` "
        f"lists, or a folder that `autoprune run` wrote",
    )


def _hint(text: str, known: list[str]) -> str:
    """The shipped policies and runs with names like `text`, else all shipped ones."""
    # Runs lie in runs/ unless --out says otherwise.
    runs = [str(folder.parent) for folder in sorted(Path("runs").glob("*/policy"))]
    similar = nearest_names(text, [*known, *runs], 3)
    if similar:
        return f"did you mean {' or '.join(map(repr, similar))}?"
    return f"shipped are: {', '.join(known) or 'none'};"


def agent_of(text: str, copy: Path | None = None) -> str:
    """The agent that trained a policy.

    Args:
        text: As for `find_policy`.
        copy: Folder of a copy, which counts once it is there.

    Raises:
        UserError: If the policy is missing or damaged.
    """
    folder = copy if holds_policy(copy) else find_policy(text)
    return describe_policy(folder, "policy")["algorithm"]


def describe_policy(folder: Path, argument: str = "run") -> dict:
    """Reads the JSON of a saved policy and checks that it can be used here.

    Args:
        folder: Where `Policy.save` wrote it.
        argument: The argument that it came by, for messages.

    Returns:
        `algorithm`, `policy_kwargs`, `features`, maybe `kinds`, and what `save` was
        told besides.

    Raises:
        UserError: If there is none, it is damaged, was trained on other observations,
            or its algorithm isn't installed.
    """
    path = folder / "policy.json"
    if not path.is_file():
        learners = " or ".join(LEARNERS.known)
        raise UserError(
            argument,
            f"no policy in {str(folder)!r}; baselines learn none, search with "
            f"agent {learners}",
        )
    try:
        description = json.loads(path.read_text())
        features = description["features"]
        algorithm = description["algorithm"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            argument, f"{str(path)!r} is damaged ({error!r}); search anew"
        ) from error
    # Here, since Gymnasium takes a while that most commands needn't wait for.
    from autoprune.envs.observation import FEATURE_NAMES

    # A policy may know fewer features than there are by now, but no others.
    if not _is_part_in_order(features, FEATURE_NAMES):
        raise UserError(
            argument,
            f"the policy in {str(folder)!r} was trained on other observations; "
            f"train it with this version",
        )
    # First: one whose package is missing isn't among the learners either.
    check_installed(algorithm, argument)
    if algorithm not in LEARNERS.known:
        reason = f"no agent is called {algorithm!r}"
        raise UserError(
            argument,
            f"the policy in {str(folder)!r} is damaged ({reason}); search anew",
        )
    return description


def _is_part_in_order(features: object, known: list[str]) -> bool:
    """Whether something is a list of some of the known names, in their order."""
    if not isinstance(features, list) or not features:
        return False
    rest = iter(known)
    # Each search goes on where the one before has ended.
    return all(name in rest for name in features)


def holds_policy(copy: Path | None) -> TypeGuard[Path]:
    """Whether there is a folder, and a policy in it.

    Args:
        copy: The folder; None for none.
    """
    return copy is not None and (copy / "policy.json").is_file()


def check_start(agent: str, text: str) -> None:
    """Checks that an agent can start from a policy, as far as its description tells.

    Args:
        agent: Who learns on.
        text: As for `find_policy`; nothing passes.

    Raises:
        UserError: If the policy is missing, damaged, or of an algorithm that the agent
            can't go on from.
    """
    if not text:
        return
    check_learns(agent)
    algorithm = describe_policy(find_policy(text), "policy")["algorithm"]
    agents = _agents_that_start_from(algorithm)
    if agent not in agents:
        raise UserError(
            "policy",
            f"{text!r} was trained by {algorithm} and can't start "
            f"{agent}; use agent {' or '.join(agents)}",
        )


def check_learns(agent: str) -> None:
    """Checks that an agent is one that learns a policy.

    Args:
        agent: Its name.

    Raises:
        UserError: If it isn't.
    """
    if agent not in LEARNERS.known:
        raise UserError(
            "policy",
            f"{agent} learns no policy to start from one; use agent "
            f"{', '.join(LEARNERS.known)}",
        )


def _agents_that_start_from(algorithm: str) -> list[str]:
    """The agents that can go on from an algorithm's policy, in their usual order."""
    agents = []
    for name in LEARNERS.known:
        is_alike = _policy_class(name) == _policy_class(algorithm)
        if name in STARTS_FROM_ANY or is_alike:
            agents.append(name)
    return agents


def _policy_class(algorithm: str) -> str:
    return POLICY_CLASS_OF.get(algorithm, algorithm)
