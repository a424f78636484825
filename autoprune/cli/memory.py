"""What becomes of the memory of freed tensors: it makes room for those of the next
batch.
"""

import ctypes
import os
import platform

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
"""glibc's names for these settings, in its malloc.h."""
MOST_KEPT, LARGEST_KEPT = 1 << 30, 32 << 20
"""Free bytes that the process may keep, and the largest block that it keeps, which is
glibc's own limit.
"""


def keep_freed_memory() -> None:
    """Has glibc keep up to 1 GiB of freed memory instead of giving it back to the
    system after every batch.

    Handed out anew, each page is cleared at its first touch: a tenth of a search, a
    fifth of a MobileNet's training. Blocks of more than 32 MB are still given back.
    Keeping them too saves as much again, but an aligned tensor doesn't fit into the
    hole that one of its size left, and a process that makes and frees a single large
    one grew severalfold.

    It is a setting of the whole process, so a program decides about it and the library
    never does. Other allocators aren't touched, nor is what the user set by glibc's own
    variables.
    """
    is_set = any(
        name.startswith("MALLOC_") for name in os.environ
    ) or "malloc" in os.environ.get("GLIBC_TUNABLES", "")
    if platform.libc_ver()[0] == "glibc" and not is_set:
        libc = ctypes.CDLL(None)
        libc.mallopt(MMAP_THRESHOLD, LARGEST_KEPT)
        libc.mallopt(TRIM_THRESHOLD, MOST_KEPT)
