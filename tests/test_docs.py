"""What the README shows runs as it stands."""

import re
from pathlib import Path

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


def test_the_readmes_example_runs_and_ends_within_its_budget():
    (example,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    names: dict = {}
    exec(compile(example, "README.md", "exec"), names)  # our own text
    costs = names["CostTable"](names["groups"])
    assert costs.macs(names["found"].allocation.kept) <= 0.5 * costs.macs(costs.dense)
    assert sum(p.numel() for p in names["smaller"].parameters()) == costs.params(names["found"].allocation.kept)


def test_the_readmes_links_and_commands_exist():
    from autoprune.cli import COMMANDS

    root = Path(__file__).parent.parent
    targets = re.findall(r"\]\(([^)#]+)\)", README)
    assert targets and [target for target in targets if not (root / target).exists()] == []
    assert set(re.findall(r"^    autoprune (\w+)", README, flags=re.MULTILINE)) <= set(COMMANDS)
