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
    assert sum(p.numel() for p in names["smaller"].parameters()) == costs.params(
        names["found"].allocation.kept
    )


def test_the_readmes_links_and_commands_exist():
    from autoprune.cli.main import COMMANDS

    root = Path(__file__).parent.parent
    targets = re.findall(r"\]\(([^)#]+)\)", README)
    assert (
        targets and [target for target in targets if not (root / target).exists()] == []
    )
    assert set(re.findall(r"^    autoprune (\w+)", README, flags=re.MULTILINE)) <= set(
        COMMANDS
    )


def test_the_tracing_guides_rules_free_what_it_says(monkeypatch):
    import torch
    from torch import nn

    from autoprune import trace
    from autoprune.structure.slicing import ATTRIBUTE_SETTERS
    from autoprune.tracing.rules import table

    monkeypatch.setattr(table, "RULES", dict(table.RULES))
    names: dict = {"__name__": "guide"}

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.attention = nn.Conv2d(3, 32, 4, 4), names["Attention"]()
            self.head = nn.Linear(32, 5)

        def forward(self, x):
            x = torch.cummax(self.stem(x), 3).values.flatten(2).transpose(1, 2)
            return self.head((x + self.attention(x)).mean(1))

    guide = (Path(__file__).parent.parent / "docs" / "tracing.md").read_text(
        encoding="utf-8"
    )
    example = "\n".join(re.findall(r"```python\n(.*?)```", guide, flags=re.DOTALL))
    try:
        exec(compile(example, "tracing.md", "exec"), names)  # our own text
        groups = trace(Network(), torch.zeros(1, 3, 16, 16))
    finally:
        ATTRIBUTE_SETTERS.pop(names.get("Attention"), None)
    assert groups.channels == {"stem": 32, "attention.qkv:heads": 4}
    assert not groups.unsupported
    assert "attention.qkv:width" in {group.name for group in groups.pinned}


def test_the_page_of_methods_is_written_from_what_is_listed_and_measured():
    from experiments.methods_report import PAGE, TABLE, page
    from experiments.tables import read_table

    assert PAGE.read_text(encoding="utf-8") == page(read_table(TABLE))


def test_the_page_of_results_is_written_from_every_table_of_searches():
    from experiments.search_report import NETWORKS, PAGE, RESULTS, page

    assert {
        path.stem.removeprefix("search_") for path in RESULTS.glob("search_*.csv")
    } <= set(NETWORKS)
    assert PAGE.read_text(encoding="utf-8") == page()
