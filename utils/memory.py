"""Memory that a training on a CPU frees and takes again, step after step."""

import ctypes

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h
LARGE, OLD_LIMIT = 1 << 30, 32 << 20  # bytes; an older glibc refuses a mapping threshold above the latter


def keep_freed() -> None:
    """Freed memory stays with the process, where its allocator is glibc's.

    It would give large blocks back to the system, which hands them out anew page by page: some 9,000 page faults, and a
    tenth of the time, in a training step of DeiT-Micro.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another allocator; Windows
        return
    # Setting either ends glibc's own raising of the mapping threshold, from 128 kB: without one it would stay there.
    mallopt(M_MMAP_THRESHOLD, LARGE) or mallopt(M_MMAP_THRESHOLD, OLD_LIMIT)
    mallopt(M_TRIM_THRESHOLD, LARGE)
