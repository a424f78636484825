"""Policies to start a search from, and those that autoprune ships."""

from pathlib import Path

from autoprune.agents.policy_files import (
    check_learns,
    check_start,
    describe_policy,
    find_policy,
    holds_policy,
    shipped_policies,
)
from autoprune.agents.replay import Policy
from autoprune.errors import UserError


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
    check_learns(agent)
    if holds_policy(copy):
        # It was checked when the search began.
        return Policy.load(copy, "policy")
    check_start(agent, text)
    policy = Policy.load(find_policy(text), "policy")
    if copy is not None:
        policy.save(copy)
    return policy


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
