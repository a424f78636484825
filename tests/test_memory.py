"""Freed memory stays with a program that asks for it."""

import os
import platform

import pytest
from processes import run_python

PROBE = """
import ctypes
import resource
import sys

{ask}

libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
size, blocks = 16 << 20, [None] * 16

def pages_cleared():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for place in range(16):
        blocks[place] = ctypes.c_void_p(libc.malloc(size))
        libc.memset(blocks[place], 1, size)
    for block in blocks:
        libc.free(block)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print([pages_cleared() for _ in range(8)][-1], file=sys.stderr)
"""
LARGE_PAGES = 128
"""In all blocks; of small ones there are 512 times as many."""

pytestmark = pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="these are settings of glibc's malloc"
)


def _pages_cleared(ask: str, **variables: str) -> int:
    """Pages that the system clears for 256 MiB of blocks after as many were freed."""
    usual = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("MALLOC_", "GLIBC_"))
    }
    done = run_python("-c", PROBE.format(ask=ask), environment=usual | variables)
    assert done.returncode == 0, done.stderr
    return int(done.stderr.splitlines()[-1])


@pytest.mark.parametrize(
    "ask",
    [
        "from autoprune.cli.memory import keep_freed_memory; keep_freed_memory()",
        "from autoprune.cli.main import main; main(['trace', '--model', 'resnet20'])",
    ],
    ids=["keep_freed_memory", "the command line"],
)
def test_blocks_take_the_memory_of_freed_ones(ask):
    assert _pages_cleared(ask) < LARGE_PAGES / 2


def test_the_library_alone_leaves_the_process_as_it_is():
    assert (
        _pages_cleared(
            "import autoprune.cli.main, autoprune.training.loop, "
            "autoprune.evaluation.proxy"
        )
        >= LARGE_PAGES
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("MALLOC_TRIM_THRESHOLD_", "131072"),
        ("GLIBC_TUNABLES", "glibc.malloc.trim_threshold=131072"),
    ],
)
def test_what_the_user_set_stays(name, value):
    ask = "from autoprune.cli.memory import keep_freed_memory; keep_freed_memory()"
    assert _pages_cleared(ask, **{name: value}) >= LARGE_PAGES
