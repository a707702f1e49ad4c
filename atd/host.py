"""Settings of the host: the threads of BLAS, and memory that is given back to the system."""

import ctypes
import os
import sys

_M_MMAP_THRESHOLD, _M_ARENA_MAX = -3, -8  # of glibc's malloc.h


def one_blas_thread() -> bool:
    """Has numpy's OpenBLAS compute on one thread; returns whether it will.

    Conversions are several times faster so on few or busy cores: the threads of BLAS spin while
    they wait, and take the cores from those of XLA, which compute the large products. The
    factorisation of a 576 x 576 matrix took 240 ms of CPU time on two busy cores, and 8 ms on one
    thread.

    To be called before numpy is imported, for OpenBLAS reads the environment variable
    OPENBLAS_NUM_THREADS once. A variable that is set already stays as it is, and this process and
    those that it starts have it from then on. The command `atd` calls this; `import atd` does not,
    for other code of the same process may want the threads.
    """
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    return os.environ["OPENBLAS_NUM_THREADS"] == "1" and "numpy" not in sys.modules


def return_freed() -> None:
    """Has glibc give free memory back to the system now, which takes 0.04 s for some hundred MB.

    By default glibc keeps freed arrays below 32 MB, scattered over one heap per thread: two fifths
    of the memory of a calibrated conversion of stories15M. Without glibc nothing happens.
    """
    if (libc := _glibc()) is not None:
        libc.malloc_trim(0)


def return_freed_from_now_on() -> None:
    """Has arrays of 4 MB and more given back as soon as they are freed: less memory, but slower.

    Threads share two heaps from then on. Without glibc nothing happens.
    """
    if (libc := _glibc()) is not None:
        libc.mallopt(_M_MMAP_THRESHOLD, 4 << 20)
        libc.mallopt(_M_ARENA_MAX, 2)
    return_freed()


def _glibc() -> ctypes.CDLL | None:
    if sys.platform != "linux":
        return None
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim") else None
