"""What `autoprune trace` prints: prunable groups, reasons once each, unknown
operations, the shares of MACs.
"""

from autoprune.reporting.console import print_trace

SHARES = (
    "share of MACs: 87.5% in layers that can shrink, 80.0% in layers that can on both "
    "axes, 75.5% gone with one "
    "channel left of each group"
)


def group(name: str, channels: int = 8, pinned: str | None = None) -> dict:
    members = [{"tensor": f"{name}.weight", "axis": 0, "role": "produce"}]
    prunable = pinned is None
    return {
        "name": name,
        "channels": channels,
        "prunable": prunable,
        "pinned": pinned,
        "macs_share": 0.25,
        "members": members,
    }


def printed(capsys, *groups: dict, unsupported: tuple[str, ...] = ()) -> list[str]:
    description = {"model": "net", "macs": 12_340_000, "params": 56_789}
    shares = {
        "prunable_macs_share": 0.875,
        "both_axes_macs_share": 0.8,
        "removable_macs_share": 0.755,
    }
    print_trace(
        description
        | {"groups": list(groups), "unsupported": list(unsupported)}
        | shares
    )
    return capsys.readouterr().out.splitlines()


def test_prunable_groups_are_a_table_of_channels_and_shares(capsys):
    lines = printed(
        capsys, group("conv1", 1024), group("fc", 10, "feeds the network's output")
    )
    assert lines[0].strip() == "net: 12.34 M MACs, 56,789 parameters"
    assert [cell.strip() for cell in lines[4].split("│")] == [
        "",
        "conv1",
        "1,024",
        "25.0%",
        "",
    ]
    assert lines[-3:] == [
        "pinned:",
        "  feeds the network's output: fc (10)",
        SHARES,
    ]


def test_pinned_groups_with_one_reason_share_a_line_and_long_lists_are_cut(capsys):
    lines = printed(
        capsys,
        *[group(f"b{i}", 4, "no layer reads it") for i in range(7)],
        group("fc", 10, "other"),
    )
    assert lines[1:4] == [
        "pinned:",
        "  no layer reads it: b0 (4), b1 (4), b2 (4), b3 (4) and 3 more",
        "  other: fc (10)",
    ]


def test_reasons_that_differ_in_the_module_alone_are_one(capsys):
    reason = "operation {} in features.{}.attn has no rule"
    groups = [
        group(f"qkv{i}", 4, reason.format(name, i))
        for i, name in enumerate(("bmm", "bmm", "index"))
    ]
    lines = printed(capsys, *groups)
    expected = [
        "  operation bmm has no rule: qkv0 (4), qkv1 (4)",
        f"  {reason.format('index', 2)}: qkv2 (4)",
    ]
    assert lines[2:4] == expected


def test_names_that_look_like_markup_are_printed_as_they_are(capsys):
    assert "  user asked (--exclude [ab]*): a (8)" in printed(
        capsys, group("a", pinned="user asked (--exclude [ab]*)")
    )


def test_a_network_without_prunable_groups_says_so(capsys):
    lines = printed(capsys, group("fc", 10, "feeds the network's output"))
    assert lines[0] == "net: 12.34 M MACs, 56,789 parameters; nothing can be pruned"


def test_unknown_operations_get_one_line_each(capsys):
    lines = printed(
        capsys,
        group("a"),
        unsupported=(
            "operation bmm in x has no rule",
            "operation fft in y has no rule",
        ),
    )
    at = lines.index("operations without a rule:")
    assert lines[at + 1 : -1] == [
        "  operation bmm in x has no rule",
        "  operation fft in y has no rule",
    ]


def test_the_last_line_sums_up_the_shares_of_macs(capsys):
    assert printed(capsys, group("a"))[-1] == SHARES
