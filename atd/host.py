"""Settings of the host: the threads of BLAS, memory that is given back to the system, the folder of
the cache, and compiled programs in it.
"""

import ctypes
import os
import sys
import warnings
from pathlib import Path

COMPILED_BYTES = 1 << 29  # most bytes of compiled programs; those that were used last stay
COMPILED_SECONDS = "0.2"  # programs that compile faster are not kept
_M_MMAP_THRESHOLD, _M_ARENA_MAX = -3, -8  # of glibc's malloc.h


def default_cache() -> Path:
    """Returns the folder $ATD_CACHE, or $XDG_CACHE_HOME/atd, or ~/.cache/atd."""
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("ATD_CACHE") or caches / "atd")


def keep_compiled() -> bool:
    """Has jax keep compiled programs in `default_cache`, and take them from there in later runs;
    returns whether it will.

    At most COMPILED_BYTES are kept. Where the user has chosen a folder (JAX_COMPILATION_CACHE_DIR),
    that one is taken; where this one cannot be written to, or the disk is full, programs are
    compiled in each run, in silence.

    To be called before jax is imported, which reads its environment variables once. The command
    `atd` calls this; `import atd` does not, for jax's settings belong to the program.
    """
    if "JAX_COMPILATION_CACHE_DIR" in os.environ or "jax" in sys.modules:
        return False
    try:
        folder = default_cache().absolute() / "compiled"
    except RuntimeError:  # this user has no home
        return False
    there = next(path for path in (folder, *folder.parents) if os.path.exists(path))
    if not (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
        return False
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder)
    os.environ.setdefault("JAX_COMPILATION_CACHE_MAX_SIZE", str(COMPILED_BYTES))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", COMPILED_SECONDS)
    warnings.filterwarnings("ignore", "Error (read|writ)ing persistent compilation cache entry")
    return True


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
