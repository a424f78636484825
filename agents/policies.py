"""Policies by name: those that autoprune ships, those of runs, and those in folders."""

from pathlib import Path
from typing import TypeGuard

from autoprune.agents.algorithms import ALGORITHMS
from autoprune.agents.replay import Policy, describe_policy
from autoprune.errors import UserError, nearest_names
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
    folder = copy if _holds_policy(copy) else find_policy(text)
    return describe_policy(folder, "policy")["algorithm"]


def starting_policy(agent: str, text: str, copy: Path | None = None) -> Policy | None:
    """The policy from which an agent starts; None for no text.

    Args:
        agent: Who learns on.
        text: As for `find_policy`.
        copy: Folder for a copy, which counts once it is there: a resumed search starts
            where it started, whatever has become of the original.

    Raises:
        UserError: If the policy is missing, damaged, or of an algorithm that the agent
            can't go on from.
    """
    if not text:
        return None
    if agent not in ALGORITHMS:
        raise UserError(
            "policy",
            f"{agent} learns no policy to start from one; use agent "
            f"{', '.join(ALGORITHMS)}",
        )
    if _holds_policy(copy):
        # It was checked when the search began.
        return Policy.load(copy, "policy")
    policy = Policy.load(find_policy(text), "policy")
    agents = _agents_that_start_from(policy)
    if agent not in agents:
        raise UserError(
            "policy",
            f"{text!r} was trained by {policy.algorithm} and can't start "
            f"{agent}; use agent {' or '.join(agents)}",
        )
    if copy is not None:
        policy.save(copy)
    return policy


def _holds_policy(copy: Path | None) -> TypeGuard[Path]:
    """Whether there is a folder, and a policy in it."""
    return copy is not None and (copy / "policy.json").is_file()


def _agents_that_start_from(policy: Policy) -> list[str]:
    """The agents that can go on from a policy, in the order of `ALGORITHMS`."""
    agents = []
    for name in ALGORITHMS:
        is_alike = _policy_class(name) == _policy_class(policy.algorithm)
        if name in STARTS_FROM_ANY or is_alike:
            agents.append(name)
    return agents


def _policy_class(algorithm: str) -> str:
    return POLICY_CLASS_OF.get(algorithm, algorithm)


def shipped_table() -> list[dict]:
    """What each shipped policy is, and whether it is usable here.

    Returns:
        A row a policy: `name`, `algorithm`, `trained_on`, `budget`, `features_ok`, and
        `problem`, which is empty where nothing is wrong.
    """
    rows = []
    for name, folder in shipped_policies().items():
        description = {}
        problem = ""
        # A damaged one doesn't hide the others.
        try:
            description = describe_policy(folder, name)
        except UserError as error:
            problem = str(error)
        row: dict[str, object] = {"name": name}
        for key in ("algorithm", "trained_on", "budget"):
            row[key] = description.get(key, "")
        row["features_ok"] = not problem
        row["problem"] = problem
        rows.append(row)
    return rows
