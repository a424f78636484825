"""The report holds every number of the run, escapes what it is given, loads nothing and
is the same every time.
"""

import re
from html.parser import HTMLParser

import matplotlib
import numpy as np
import pytest
import yaml

from autoprune.config import Settings
from autoprune.errors import UserError
from autoprune.files import write_json, write_text
from autoprune.reporting.figures import (
    allocation_bars,
    loss_curve,
    render_rgb,
    render_svg,
    reward_curve,
)
from autoprune.reporting.report import write_report
from autoprune.runs import RunFolder

SEARCHED = {
    "run": "runs/one",
    "model": "resnet20",
    "data": "sample",
    "budget": "macs=50%",
    "agent": "ppo",
    "seed": 3,
    "episodes": 300,
    "evaluations": 1312,
    "seconds_search": 83.2,
    "seconds_total": 7412.7,
}
SELECTED = {"selection_accuracy": 0.7531, "selection_loss": 0.9123}
IMAGES = {"test_images": 8765, "selection_images": 3210}
PROXY = {"proxy_accuracy": 0.7623, "proxy_loss": 0.8811}
FINISHED = {
    **SEARCHED,
    **SELECTED,
    **IMAGES,
    "macs": 20_382_912,
    "macs_dense": 40_813_184,
    "macs_ratio": 20_382_912 / 40_813_184,
    "params": 151_234,
    "params_dense": 269_722,
    "memory_bytes": 803_328,
    "memory_bytes_dense": 1_210_368,
    "accuracy_dense": 0.9161,
    "accuracy_pruned": 0.7412,
    "accuracy": 0.9024,
    "finalists": [
        {"source": "policy", **PROXY, **SELECTED, "macs": 20_382_912},
        {
            "source": "episode 17",
            **PROXY,
            "selection_accuracy": 0.7442,
            "selection_loss": 0.9307,
            "macs": 20_382_001,
        },
    ],
    "baselines": {
        "uniform": {
            "reward": -2.0312,
            **PROXY,
            "selection_accuracy": 0.6021,
            "selection_loss": 2.1131,
            "evaluations": 1,
        },
        "sensitivity": {"reward": -1.4245, "evaluations": 82},
    },
    "groups": [
        {"name": "layer1.0.conv1", "channels": 16, "kept": 10},
        {"name": "layer2.0.conv1", "channels": 32, "kept": 9},
    ],
    "pinned": [{"name": "linear", "channels": 1000, "reason": "feeds the output"}],
    "latency": [
        {
            "engine": "torch",
            "batch": 64,
            "threads": 2,
            "precision": "bfloat16",
            "dense_ms": 61.23,
            "pruned_ms": 40.41,
        }
    ],
    "latency_ms": 40.41,
    "latency_ms_dense": 61.23,
    "onnx_max_relative_error": 3.9e-7,
}


class Text(HTMLParser):
    """The page's visible text and the tags left open; void elements aside."""

    def __init__(self, html: str):
        super().__init__()
        self.text, self.open, self.ids = "", [], []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.ids += [value for name, value in attributes if name == "id"]
        if tag not in ("meta", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.text += data.replace("\N{NO-BREAK SPACE}", " ")


def run_folder(
    root, results: dict, n_episodes: int = 0, n_epochs: int = 0
) -> RunFolder:
    folder = RunFolder(root)
    folder.config.write_text("data:\n  data: sample\nlr: 0.0375\n")
    write_json(folder.results, results)
    for episode in range(1, n_episodes + 1):
        folder.append(
            "episode",
            episode=episode,
            reward=-2.5 + 0.125 * episode,
            accuracy=0.5,
            loss=1.0,
            macs=1,
            seconds=0.1,
        )
    for epoch in range(1, n_epochs + 1):
        folder.append("epoch", epoch=epoch, loss=1 / epoch)
    return folder


@pytest.fixture
def finished(tmp_path) -> RunFolder:
    return run_folder(tmp_path, FINISHED, n_episodes=5, n_epochs=4)


def text_of(folder: RunFolder) -> str:
    parsed = Text(write_report(folder).read_text())
    assert not parsed.open
    return parsed.text


def test_the_headline_says_the_result_in_words(finished):
    headline = "resnet20 on sample: 49.9 % of the MACs, accuracy 91.6 % → 90.2 %"
    assert text_of(finished).count(headline) == 2  # as title and as heading


@pytest.mark.parametrize(
    "shown",
    [
        *("macs=50%", "ppo", "300", "1,312", "1 min 23 s", "2 h 3 min"),
        *(
            "20,382,912",
            "40,813,184",
            "49.9 %",
            "2.00 ×",
            "151,234",
            "269,722",
            "803,328",
            "1,210,368",
        ),
        *("91.61 %", "74.12 %", "90.24 %", "8,765", "75.31 %", "3,210", "0.9123"),
        *(
            "policy, chosen",
            "episode 17",
            "76.23 %",
            "0.8811",
            "74.42 %",
            "0.9307",
            "20,382,001",
        ),
        *("uniform", "−2.0312", "60.21 %", "2.1131", "sensitivity", "−1.4245", "82"),
        *(
            "layer1.0.conv1",
            "10 / 16",
            "layer2.0.conv1",
            "9 / 32",
            "linear",
            "1,000",
            "feeds the output",
        ),
        *(
            "Latency, torch, batch 64, 2 threads, bfloat16",
            "61.23 ms",
            "40.41 ms",
            "66.0 %",
            "1.52 ×",
            "3.9e-07",
        ),
        *("best, −1.8750, in episode 5", "0.2500 after the last", "lr: 0.0375"),
    ],
)
def test_the_page_contains(shown, page_text):
    assert shown in page_text


@pytest.fixture(scope="module")
def page_text(tmp_path_factory) -> str:
    return text_of(
        run_folder(tmp_path_factory.mktemp("run"), FINISHED, n_episodes=5, n_epochs=4)
    )


STAGE = r'<th scope="row">([^<]*)</th><td class="text">(test|selection)</td>'


@pytest.mark.parametrize(
    "counted", [IMAGES, {}], ids=["counted", "by an older version"]
)
def test_every_stage_names_its_split_and_how_many_images_that_has(counted, tmp_path):
    results = {
        key: value for key, value in FINISHED.items() if key not in IMAGES
    } | counted
    html = write_report(run_folder(tmp_path, results, n_episodes=5)).read_text()
    test, selection = ("8,765", "3,210") if counted else ("–", "–")
    pruned = [
        ("As the search saw it", "selection", selection),
        ("Pruned", "test", test),
    ]
    expected = [("Dense", "test", test), *pruned, ("Fine-tuned", "test", test)]
    assert re.findall(STAGE + r"<td>([^<]*)</td>", html) == expected


@pytest.mark.parametrize("is_reconstructed", [True, False])
def test_it_says_whether_the_search_compared_solved_weights(is_reconstructed, tmp_path):
    text = text_of(
        run_folder(
            tmp_path, {**FINISHED, "reconstructed": is_reconstructed}, n_episodes=2
        )
    )
    assert (
        "All sliced, with weights solved anew and batch norm" in text
    ) == is_reconstructed
    assert ("All sliced, with batch norm" in text) != is_reconstructed


def test_a_searched_run_says_in_words_what_is_missing(tmp_path):
    text = text_of(run_folder(tmp_path, {**SEARCHED, "seconds_total": None}))
    assert "resnet20 on sample: macs=50% asked for, nothing decided yet" in text
    assert "Go on with autoprune run --resume --out runs/one." in text
    for sentence in (
        "No costs were recorded",
        "No allocation has been chosen",
        "No episodes",
        "Nothing has been trained yet",
    ):
        assert sentence in text
    assert "whole run" not in text


def test_a_run_that_was_killed_before_its_search_says_what_was_asked_for(tmp_path):
    folder = run_folder(
        tmp_path,
        {"method": "amc", "baselines": {"uniform": {"reward": -2.0}}},
        n_episodes=3,
    )
    write_text(folder.config, yaml.safe_dump(Settings().to_dict()))
    text = text_of(folder)
    assert "resnet20 on sample: macs=50% asked for, nothing decided yet" in text
    assert "dyna (this run)" in text
    assert f"Go on with autoprune run --resume --out {tmp_path}." in text


def test_a_run_without_fine_tuning_reports_the_recalibrated_accuracy(tmp_path):
    text = text_of(run_folder(tmp_path, {**FINISHED, "accuracy": None}, n_episodes=1))
    assert "49.9 % of the MACs, accuracy 91.6 % → 74.1 % before fine-tuning" in text


def test_latency_without_rows_is_still_shown(tmp_path):
    text = text_of(run_folder(tmp_path, {**FINISHED, "latency": None}))
    assert "61.23 ms" in text
    assert "40.41 ms" in text


def test_episodes_logged_again_count_once(finished):
    finished.append("episode", episode=5, reward=-0.5)
    assert "Reward of 5 episodes; the best, −0.5000, in episode 5" in text_of(finished)


def test_a_run_that_prunes_by_training_shows_that_training_and_no_accuracy_of_what_was_never_built(
    tmp_path,
):
    results = {**FINISHED, "removal_method": "resrep", "finetune_epochs": 0}
    folder = run_folder(tmp_path, results, n_episodes=1)
    for epoch in (1, 2, 3):
        folder.append("removal epoch", epoch=epoch, loss=0.5 / epoch)
    html, text = write_report(folder).read_text(), text_of(folder)
    assert re.findall(STAGE, html) == [
        ("Dense", "test"),
        ("Pruned by training", "test"),
    ]
    assert "Training loss over 3 epochs; 0.1667 after the last" in text
    assert "One episode, so there is no curve" in text


def test_trainings_follow_each_other_under_their_names(tmp_path):
    folder = run_folder(tmp_path, FINISHED, n_epochs=2)
    folder.append("sparse epoch", epoch=1, loss=2.0)
    axes = loss_curve({"sparse training": [2.0], "fine-tuning": [1.0, 0.5]}).axes[0]
    points = [
        line.get_xydata().tolist() for line in axes.lines if line.get_marker() == "o"
    ]
    assert points == [[[1, 2.0]], [[2, 1.0], [3, 0.5]]]
    assert [text.get_text() for text in axes.texts] == [
        "sparse training",
        "fine-tuning",
    ]
    assert "Training loss over 3 epochs; 0.5000 after the last" in text_of(folder)


@pytest.mark.parametrize(
    "baselines",
    [{}, {"uniform": {"reward": None, "evaluations": 1}}, FINISHED["baselines"]],
)
def test_dashed_lines_are_explained_where_there_are_some(baselines, tmp_path):
    text = text_of(
        run_folder(tmp_path, FINISHED | {"baselines": baselines}, n_episodes=3)
    )
    assert "Reward of every episode" in text
    assert ("Dashed lines" in text) == ("sensitivity" in baselines)


@pytest.mark.parametrize("n_epochs", [1, 2, 3, 30])
def test_epochs_are_counted_in_whole_numbers(n_epochs):
    axes = loss_curve({"fine-tuning": [1.0] * n_epochs}).axes[0]
    low, high = axes.get_xlim()
    shown = [tick for tick in axes.get_xticks() if low <= tick <= high]
    assert shown
    assert all(tick == round(tick) for tick in shown)


def test_a_shorter_fine_tuning_replaces_a_longer_one(tmp_path):
    folder = run_folder(tmp_path, {**FINISHED, "finetune_epochs": 2}, n_epochs=4)
    assert "Training loss over 2 epochs; 0.5000 after the last" in text_of(folder)


def test_names_are_escaped(tmp_path):
    name = "<script>alert('a&b')</script>"
    group = {"name": name, "channels": 8, "kept": 4}
    results = {
        **FINISHED,
        "model": name,
        "agent": name,
        "groups": [group],
        "pinned": [{**group, "reason": name}],
    }
    folder = run_folder(tmp_path, results, n_episodes=2)
    assert "<script" not in write_report(folder).read_text()
    # Title, heading, agent, its row, axis label, table of groups, pinned name and
    # reason.
    assert text_of(folder).count(name) == 8


def test_the_page_loads_nothing_and_its_references_resolve(finished):
    html = write_report(finished).read_text()
    assert not re.search(r"https?://|<link|<script|<img|@import|src=", html)
    ids = Text(html).ids
    assert len(ids) == len(set(ids))
    references = re.findall(
        r'(?:href="|url\()#([^")]+)|aria-labelledby="([^"]+)"', html
    )
    assert {href or label for href, label in references} <= set(ids)


def test_figures_follow_the_theme_of_the_page(finished):
    figures = re.findall(
        r"<svg.*?</svg>", write_report(finished).read_text(), re.DOTALL
    )
    assert len(figures) == 3
    for svg in figures:
        assert "var(--accent, #0b6bcb)" in svg
        assert not re.search(r"(?:fill|stroke): #", svg)


def test_the_same_run_gives_the_same_bytes(finished):
    first = write_report(finished).read_bytes()
    assert write_report(finished).read_bytes() == first


def test_a_run_without_results_is_refused(tmp_path):
    folder = run_folder(tmp_path, {})
    folder.results.unlink()
    with pytest.raises(UserError, match=r"has no results\.json yet"):
        write_report(folder)
    assert not folder.report.exists()


def test_allocation_bars_render_to_pixels():
    few, more = (
        render_rgb(allocation_bars(names, [16] * len(names), [4] * len(names)))
        for names in ("ab", "abcdef")
    )
    assert few.dtype == np.uint8
    assert few.ndim == 3
    assert few.shape[2] == 3
    assert more.shape[0] > few.shape[0]
    assert more.shape[1] == few.shape[1]


def test_kept_channels_fill_their_share_of_the_bar():
    accent = np.array([0x0B, 0x6B, 0xCB])
    half, full = (render_rgb(allocation_bars(["a"], [40], [kept])) for kept in (20, 40))
    n_half, n_full = ((pixels == accent).all(2).sum() for pixels in (half, full))
    assert n_half / n_full == pytest.approx(0.5, abs=0.02)


def test_drawing_leaves_matplotlib_as_found():
    before = dict(matplotlib.rcParams)
    figures = [
        reward_curve({1: -2.0, 2: -1.0}, {"uniform": -1.5}),
        loss_curve({"fine-tuning": [0.5]}),
        allocation_bars([], [], []),
    ]
    assert all(
        render_svg(figure, "name", "title").startswith("<svg") for figure in figures
    )
    assert dict(matplotlib.rcParams) == before


def test_labels_of_close_baselines_do_not_overlap():
    figure = reward_curve(
        {1: -2.0, 2: -1.0}, {"uniform": -1.5, "random": -1.5, "sensitivity": -1.49}
    )
    heights = sorted(text.get_position()[1] for text in figure.axes[0].texts)
    assert len(heights) == 4
    assert np.diff(heights).min() >= 0.06
