"""Threads that work side by side, each on a core of its own."""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch


def available_cores() -> int:
    """Cores that this process may use."""
    # In a container, or under taskset, fewer than the machine has; macOS and Windows
    # can't say.
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@contextmanager
def one_thread_each(n_workers: int) -> Iterator[ThreadPoolExecutor]:
    """Workers in which PyTorch's operations run on a single thread each.

    Args:
        n_workers: How many.

    Yields:
        The pool; outside of it nothing changes.
    """
    n_threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(
            n_workers, initializer=torch.set_num_threads, initargs=(1,)
        ) as pool:
            yield pool
    finally:
        # A thread's own setting is the default of those to come.
        torch.set_num_threads(n_threads)
