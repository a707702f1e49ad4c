"""Compiles `calls.cc` on this machine, once, and calls what it defines through `jax.ffi`.

The library lies in the user's cache folder, `$ATD_CACHE/kernels` (without ATD_CACHE
`$XDG_CACHE_HOME/atd/kernels`, or `~/.cache/atd/kernels`), under a name made from the sources, the
compiler, its flags, jaxlib's headers and the processor. Its last bytes are its digest: a damaged
file is made anew. The compiler is `$CXX`, or c++.
"""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import subprocess
import sys
import tempfile
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

import jax

from atd.errors import RunFailed
from atd.kernels.settings import cache_folder

SOURCES = (
    "calls.cc",
    "gemv.h",
    "gemm.h",
    "gemm8.h",
    "attention.h",
    "matrix.h",
    "prefixes.h",
    "lanes.h",
    "floats.h",
    "threads.h",
)
HANDLERS = ("atd_gemv", "atd_gemm", "atd_attend")
FLAGS = ("-O3", "-std=c++17", "-fPIC", "-shared", "-w")
SECONDS = 300  # that a compiler may take
_DIGEST = 32  # bytes of a sha256
_log = logging.getLogger("atd.kernels")


@functools.cache
def unavailable() -> str | None:
    """Returns why the kernels cannot be compiled or loaded here, or None: then they are registered
    with jax under the names of HANDLERS.

    The first call in a process does the work. A reason is logged once, at level WARNING.
    """
    try:
        library = ctypes.CDLL(str(built(cache_folder() / "kernels")))
        for name in HANDLERS:
            handler = jax.ffi.pycapsule(getattr(library, name))
            jax.ffi.register_ffi_target(name, handler, platform="cpu")
    except (OSError, RunFailed) as error:
        reason = f"its kernels cannot be compiled here: {error}; backend 'xla' needs no compiler"
        _log.warning("cpu: %s", reason)
        return reason
    return None


def built(folder: Path, flags: tuple[str, ...] = ()) -> Path:
    """Returns the library in a folder, compiled now where it is not there or damaged.

    Args:
        flags: added to those of the compiler.

    Raises:
        RunFailed: there is no compiler, or it fails, with its last lines.
        OSError: the folder cannot be written.
    """
    compiler = shlex.split(os.environ.get("CXX") or "c++")
    native = "-mcpu=native" if platform.machine() in ("arm64", "aarch64") else "-march=native"
    command = [*compiler, *FLAGS, native, *flags]
    sources = [Path(__file__).with_name(name) for name in SOURCES]
    made_from = [
        *(source.read_bytes() for source in sources),
        _run([*compiler, "--version"]).encode(),
        repr((command, version("jaxlib"), processor())).encode(),
    ]
    digests = b"".join(hashlib.sha256(part).digest() for part in made_from)
    path = folder / f"cpu-{hashlib.sha256(digests).hexdigest()[:32]}.so"
    if _whole(path):
        return path
    folder.mkdir(parents=True, exist_ok=True)
    _log.warning("cpu: compiling kernels for this processor, once")
    with tempfile.TemporaryDirectory(dir=folder) as work:
        made = Path(work) / path.name
        _run([*command, "-I", jax.ffi.include_dir(), str(sources[0]), "-o", str(made)])
        library = made.read_bytes()
        made.write_bytes(library + hashlib.sha256(library).digest())  # loaders ignore what follows
        made.replace(path)
    return path


def processor() -> str:
    """Returns what tells processors apart for which a compiler makes different code."""
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        told = dict(line.split(":", 1) for line in reversed(lines) if ":" in line)
        return "".join(text for name, text in sorted(told.items()) if _tells(name))
    return f"{platform.machine()} {platform.processor()} {sys.platform}"


def _tells(name: str) -> bool:
    return name.strip() in ("model name", "flags", "Features", "CPU part", "CPU implementer")


def _whole(path: Path) -> bool:
    with suppress(OSError):
        content = path.read_bytes()
        return content[-_DIGEST:] == hashlib.sha256(content[:-_DIGEST]).digest()
    return False


def _run(command: list[str]) -> str:
    """Runs a compiler and returns what it prints."""
    try:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=SECONDS, text=True
        )
    except FileNotFoundError:
        raise RunFailed(
            f"there is no compiler {command[0]!r}; install one (for instance: apt install g++) or "
            "name it in CXX"
        ) from None
    except subprocess.TimeoutExpired:
        raise RunFailed(f"{command[0]} took more than {SECONDS} s") from None
    if done.returncode:
        last = "\n".join(done.stdout.strip().splitlines()[-5:])
        raise RunFailed(f"{shlex.join(command[:1])} failed:\n{last}")
    return done.stdout
