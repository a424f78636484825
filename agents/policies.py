"""Policies by name: those that autoprune ships, those of runs, and those in folders."""

from pathlib import Path

from autoprune.agents.replay import ALGORITHMS, Policy, describe_policy
from autoprune.errors import UserError, nearest_names
from autoprune.runs import RunFolder

SHIPPED = Path(__file__).parent / "policies"
"""A folder a policy, as `Policy.save` writes it."""
SHARED = {"dyna": "ppo"}
"""Agents whose policies are those of another one."""
STARTS_FROM_ANY = ("dyna",)
"""Agents that let the policy act and learn from what it earns."""


def shipped() -> dict[str, Path]:
    """The policies that come with autoprune: name to folder."""
    return {
        path.parent.name: path.parent for path in sorted(SHIPPED.glob("*/policy.json"))
    }


def find_policy(text: str, argument: str = "policy") -> Path:
    """The folder of a policy.

    Args:
        text: The name of a shipped policy, a run, or a policy's own folder. A name
            counts before a folder that is called the same.
        argument: The argument that it came by, for messages.

    Raises:
        UserError: If there is no such policy; the nearest names are offered.
    """
    known, path = shipped(), Path(text)
    if text in known:
        return known[text]
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
    runs = [str(folder.parent) for folder in sorted(Path("runs").glob("*/policy"))]
    near = " or ".join(map(repr, nearest_names(text, [*known, *runs], 3)))
    hint = (
        f"did you mean {near}?"
        if near
        else f"shipped are: {', '.join(known) or 'none'};"
    )
    raise UserError(
        argument,
        f"no shipped policy and no folder is called {text!r}; {hint} give a "
        f"name that `autoprune policies` "
        f"lists, or a folder that `autoprune run` wrote",
    )


def agent_of(text: str, copy: Path | None = None) -> str:
    """The agent that trained a policy; arguments and errors as for `starting_policy`."""
    return describe_policy(copy if _is_there(copy) else find_policy(text), "policy")[
        "algorithm"
    ]


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
    if _is_there(copy):
        return Policy.load(copy, "policy")
    policy = Policy.load(find_policy(text), "policy")
    fitting = [
        name
        for name in ALGORITHMS
        if name in STARTS_FROM_ANY or _shared(name) == _shared(policy.algorithm)
    ]
    if agent not in fitting:
        raise UserError(
            "policy",
            f"{text!r} was trained by {policy.algorithm} and can't start "
            f"{agent}; "
            f"use agent {' or '.join(fitting)}",
        )
    if copy is not None:
        policy.save(copy)
    return policy


def _is_there(copy: Path | None) -> bool:
    return copy is not None and (copy / "policy.json").is_file()


def _shared(algorithm: str) -> str:
    return SHARED.get(algorithm, algorithm)


def shipped_table() -> list[dict]:
    """What each shipped policy is: name, algorithm, what it was trained on, budgets,
    and whether it is usable here.
    """
    rows = []
    for name, folder in shipped().items():
        try:
            about, problem = describe_policy(folder, name), ""
        except UserError as error:
            about, problem = {}, str(error)
        told = {
            key: about.get(key, "") for key in ("algorithm", "trained_on", "budget")
        }
        rows.append(
            {"name": name, **told, "features_ok": not problem, "problem": problem}
        )
    return rows
