"""What is freed goes back to the system. By default glibc keeps freed arrays below 32 MB, scattered over a heap a thread:
two fifths of the memory of a calibrated conversion were such (stories15M, 65,536 tokens: 2.3 GB instead of 1.5).

Elsewhere than on glibc nothing happens.
"""

import ctypes
import sys

_M_MMAP_THRESHOLD, _M_ARENA_MAX = -3, -8  # of glibc's malloc.h


def return_freed() -> None:
    """Has glibc give back what is free now, between arrays that stay as well; .04 s for some hundred MB."""
    if (libc := _glibc()) is not None:
        libc.malloc_trim(0)


def return_freed_from_now_on() -> None:
    """Arrays of 4 MB and more go back as soon as they are freed, threads share two heaps: less memory, slower."""
    if (libc := _glibc()) is not None:
        libc.mallopt(_M_MMAP_THRESHOLD, 4 << 20)
        libc.mallopt(_M_ARENA_MAX, 2)
    return_freed()


def _glibc() -> ctypes.CDLL | None:
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    return (
        libc
        if libc is not None and hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim")
        else None
    )
