"""What `autoprune trace` prints: prunable groups, reasons once each, unknown
operations, the shares of MACs.
"""

import pytest

from autoprune.latency.engine_protocol import Setting
from autoprune.latency.measuring import Latency
from autoprune.pipeline.remarks import finetune_remarks, speed_remarks
from autoprune.reporting.console import print_results, print_trace, progress, say
from autoprune.reporting.verbosity import ProgressLines, Verbosity, verbosity

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


class Clock:
    """Seconds that go on only when they are told to."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_progress_is_a_line_now_and_then_with_what_is_done_and_the_time_left():
    clock, lines = Clock(), []
    steps = ProgressLines("dyna", 300, lines.append, pause=30, clock=clock)
    for step in range(300):
        clock.now += 1
        steps.advance(f"best {step}")
    steps.finish()
    assert lines[0] == "dyna: 30/300, 4 min 30 s left, best 29"
    assert lines[-2] == "dyna: 270/300, 30 s left, best 269"
    assert lines[-1] == "dyna: best 299 (300/300 in 5 min 0 s)"
    # One every half minute, the last one in the place of the tenth.
    assert len(lines) == 10


def test_a_pause_within_a_step_is_no_step():
    clock, lines = Clock(), []
    steps = ProgressLines("ppo", 2, lines.append, pause=5, clock=clock)
    clock.now += 60
    steps.advance("comparing", 0)
    assert lines == ["ppo: 0/2, comparing"]
    steps.advance("one")
    assert len(lines) == 1, "too soon for another one"


@pytest.mark.parametrize(
    ("level", "said"),
    [
        (Verbosity.QUIET, []),
        (Verbosity.NORMAL, ["usual", "job: two (2/2 in 0 s)"]),
        (
            Verbosity.VERBOSE,
            ["usual", "detail", "job: 1/2, 0 s left, one", "job: two (2/2 in 0 s)"],
        ),
    ],
)
def test_a_command_says_as_much_as_it_was_asked_to(level, said, capsys):
    token = verbosity.set(level)
    try:
        say("usual")
        say("detail", Verbosity.VERBOSE)
        with progress("job", 2) as advance:
            advance("one")
            advance("two")
    finally:
        verbosity.reset(token)
    printed = capsys.readouterr()
    assert printed.err.splitlines() == said
    assert printed.out == ""


@pytest.mark.parametrize(("epochs", "is_shown"), [(0, False), (3, True)])
def test_a_network_that_was_not_fine_tuned_has_no_such_row(epochs, is_shown, capsys):
    accuracies = {"accuracy_dense": 0.9, "accuracy_pruned": 0.7, "accuracy": 0.8}
    print_results({"model": "net", "finetune_epochs": epochs, **accuracies})
    printed = capsys.readouterr().out
    assert ("test accuracy, fine-tuned" in printed) == is_shown
    assert "test accuracy, not fine-tuned" in printed


@pytest.mark.parametrize(
    ("before", "after", "n_images", "is_remarked"),
    [
        (1.0, 0.33, 60, True),
        (0.9, 0.8, 1000, True),
        # What so few images can't tell apart.
        (0.9, 0.8, 50, False),
        # Significant, but little.
        (0.9, 0.86, 10_000, False),
        (0.5, 0.9, 1000, False),
    ],
)
def test_fine_tuning_that_lost_accuracy_is_remarked_on(
    before, after, n_images, is_remarked
):
    remarks = finetune_remarks(before, after, n_images)
    assert len(remarks) == is_remarked
    for remark in remarks:
        text = remark.replace("\N{NO-BREAK SPACE}", "")
        assert f"{before:.2%} before it, {after:.2%} after" in text
        assert "--finetune.lr" in remark


def test_whatever_is_not_faster_is_remarked_on_with_both_times(capsys):
    rows = [
        Latency(Setting("torch", 1, 1, "float32"), 2.0, 1.0),
        Latency(Setting("torch", 64, 1, "float32"), 2.0, 1.99),
        Latency(Setting("openvino", 1, 2, "bfloat16"), 2.0, 2.5),
    ]
    remarks = speed_remarks(rows)
    assert remarks == [
        "the pruned network is not faster in torch, batch 64, 1 thread, float32: 1.99 "
        "ms, dense 2.00 ms",
        "the pruned network is not faster in openvino, batch 1, 2 threads, bfloat16: "
        "2.50 ms, dense 2.00 ms",
    ]
    print_results({"remarks": remarks})
    assert capsys.readouterr().out.splitlines() == [
        "remarks:",
        *(f"  {remark}" for remark in remarks),
    ]
