"""What becomes of the memory of freed tensors: the next batch gets it."""

import ctypes
import os
import platform

# glibc's names for these settings, in its malloc.h.
TRIM_THRESHOLD = -1
MMAP_THRESHOLD = -3
MOST_KEPT = 1 << 30
"""Free bytes that the process may keep."""
LARGEST_KEPT = 32 << 20
"""The largest block that it keeps, in bytes, which is glibc's own limit."""


def keep_freed_memory() -> None:
    """Has glibc keep up to 1 GiB of freed memory for the next batch.

    Given back to the system and handed out anew, each page would be cleared at its
    first touch. Blocks of more than 32 MB are still given back: an aligned tensor
    doesn't fit into the hole that one of its size left, so keeping them lets a process
    grow that makes and frees a single large one.

    It is a setting of the whole process, so a program decides about it and the library
    never does. Other allocators aren't touched, nor is what the user set by glibc's own
    variables.
    """
    if platform.libc_ver()[0] != "glibc" or _is_set_by_user():
        return
    # The C library that this process has loaded already.
    libc = ctypes.CDLL(None)
    # Both, since setting either one ends glibc's own adaptation of the two.
    libc.mallopt(MMAP_THRESHOLD, LARGEST_KEPT)
    libc.mallopt(TRIM_THRESHOLD, MOST_KEPT)


def _is_set_by_user() -> bool:
    # glibc has read both before Python started, so a call here would overrule them.
    if "malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return True
    return any(name.startswith("MALLOC_") for name in os.environ)
