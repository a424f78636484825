"""A long search moves on to images that it hasn't seen; whoever was measured on images
is never judged by them.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_proxy import FLOAT32, SPLITS, assert_close
from toys import digits, fake_env

from autoprune.agents.finalists import choose_finalists
from autoprune.agents.recorder import LANES, Recorder
from autoprune.config import ProxyConfig, SearchConfig
from autoprune.evaluation.evaluate import EvalBatches, evaluate, on_batch_statistics
from autoprune.evaluation.image_blocks import BATCHES_PER_TURN, ImageBlocks
from autoprune.evaluation.importance import importance
from autoprune.evaluation.proxy import ProxyAccuracy
from autoprune.structure.slicing import prune, top_channels

CONFIG = replace(FLOAT32, images=20, blocks=2)
"""Two blocks of each split of SPLITS, whose calibration images are 40."""
EIGHT = replace(CONFIG, images=10, blocks=4)
"""Four blocks of each."""


def blocks_of(
    config: ProxyConfig = CONFIG, is_free: bool = True, difficulty=lambda x: x.labels
) -> ImageBlocks:
    return ImageBlocks(SPLITS, config, is_free, EvalBatches, difficulty)


def rows(images) -> torch.Tensor:
    return images.pixels.flatten(1)


def is_among(images, split) -> bool:
    return all((rows(split) == row).all(1).any() for row in rows(images))


@given(batch=st.integers(0, 500))
def test_every_other_forty_batches_are_judged_by_calibration_images_in_turns(batch):
    blocks = blocks_of()
    block = blocks.block_of(batch)
    assert block % 2 == batch % 2
    assert (block >= 2) == (batch // BATCHES_PER_TURN % 2 == 1)
    assert is_among(
        blocks[block].images, SPLITS.proxy if block < 2 else SPLITS.calibration
    )


@given(images=st.integers(1, 70), n=st.integers(1, 6), is_free=st.booleans())
def test_blocks_are_disjoint_equally_large_and_as_many_as_fit(images, n, is_free):
    blocks = blocks_of(replace(CONFIG, images=images, blocks=n), is_free)
    assert blocks.n_blocks == max(1, min(n, 60 // images))
    assert blocks.n_calibration_blocks == is_free * min(n, 40 // images)
    all_of_them = [
        blocks[block].images
        for block in sorted(
            {blocks.block_of(batch) for batch in range(2 * BATCHES_PER_TURN)}
        )
    ]
    assert len(all_of_them) == blocks.n_blocks + blocks.n_calibration_blocks
    assert {len(block) for block in all_of_them} == {min(images, 60)}
    assert len(torch.cat([rows(block) for block in all_of_them]).unique(dim=0)) == sum(
        map(len, all_of_them)
    )


def test_of_images_that_are_next_to_each_other_in_difficulty_every_block_has_one():
    def brightness(images):
        return rows(images).float().mean(1)

    blocks = blocks_of(EIGHT, difficulty=brightness)
    for split, first in ((SPLITS.proxy, 0), (SPLITS.calibration, 4)):
        quartets = brightness(split[:40]).sort().values.view(10, 4)
        for values in (
            brightness(blocks[first + number].images).sort().values
            for number in range(4)
        ):
            assert bool(((quartets == values[:, None]).sum(1) == 1).all())


def test_a_survey_asks_all_images_that_judged_the_search():
    blocks = blocks_of()
    short, long = (
        blocks.all_images(BATCHES_PER_TURN).images,
        blocks.all_images(BATCHES_PER_TURN + 1).images,
    )
    assert torch.equal(short.pixels, SPLITS.proxy.pixels)
    assert torch.equal(
        long.pixels, torch.cat([SPLITS.proxy.pixels, SPLITS.calibration.pixels])
    )
    assert torch.equal(
        long.labels, torch.cat([SPLITS.proxy.labels, SPLITS.calibration.labels])
    )
    assert (
        blocks_of(is_free=False).all_images(10 * BATCHES_PER_TURN).images
        is SPLITS.proxy
    )


def test_a_late_batch_scores_on_calibration_images_alone():
    model, groups, splits = digits()
    l1 = importance("l1", model, groups, splits.train)
    proxy = ProxyAccuracy(model, groups, l1, splits, CONFIG)
    half = {group.name: group.channels // 2 for group in groups}
    pruned = prune(model, groups, top_channels(l1, half))
    block = proxy.block_of(BATCHES_PER_TURN)
    images = proxy.blocks[block].images
    assert is_among(images, splits.calibration)
    with on_batch_statistics(pruned):
        assert_close(
            proxy.score_all([half], block)[0],
            evaluate(pruned, EvalBatches(images), "off"),
        )


@pytest.mark.parametrize(
    "change", [{"statistics": "calibration"}, {"reconstruct": "on"}]
)
def test_images_that_candidates_are_measured_or_solved_on_judge_nobody(change):
    model, groups, splits = digits()
    l1 = importance("l1", model, groups, splits.train)
    proxy = ProxyAccuracy(model, groups, l1, splits, replace(CONFIG, **change))
    assert {proxy.block_of(batch) for batch in range(3 * BATCHES_PER_TURN)} == {0, 1}
    free = ProxyAccuracy(model, groups, l1, splits, CONFIG)
    assert {free.block_of(batch) for batch in range(3 * BATCHES_PER_TURN)} == {
        0,
        1,
        2,
        3,
    }


class Judged:
    """Wraps a toy's proxy: which block was asked in each batch, and how many were
    surveyed after how many batches.
    """

    def __init__(self, proxy):
        self.proxy, self.asked, self.surveyed = proxy, [], []

    def __getattr__(self, name):
        return getattr(self.proxy, name)

    def block_of(self, batch):
        return blocks_of(EIGHT).block_of(batch)

    def score_all(self, allocations, block=0):
        self.asked.append(block)
        return self.proxy.score_all(allocations, block)

    def survey_all(self, allocations, batches=0):
        self.surveyed.append((len(allocations), batches))
        return self.proxy.survey_all(allocations, batches)


@pytest.mark.parametrize(
    ("episodes", "n_surveyed"), [(20, 8), (400, 8), (401, 10), (480, 16)]
)
def test_every_batch_asks_its_block_and_each_block_sends_as_many_however_many_there_are(
    episodes, n_surveyed
):
    env = fake_env("wide")
    env.proxy = Judged(env.proxy)
    recorder = Recorder(env, SearchConfig(episodes=episodes, finalists=2))
    generator = np.random.default_rng(0)
    while recorder.remaining:
        n_lanes = min(LANES, recorder.remaining)
        recorder.run_episodes(
            lambda batch: generator.uniform(-1, 1, len(batch.state.kept)), n_lanes
        )
    n_batches = -(-episodes // LANES)
    assert env.proxy.asked == [
        blocks_of(EIGHT).block_of(batch) for batch in range(n_batches)
    ]
    assert (
        recorder.blocks.tolist()
        == [block for block in env.proxy.asked for _ in range(LANES)][:episodes]
    )
    choose_finalists(recorder, None)
    assert env.proxy.surveyed == [(n_surveyed, n_batches)]
