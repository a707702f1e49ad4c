"""Settings of the host: compiled programs that the command line keeps for later runs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from atd import host

ROOT = Path(__file__).parents[1]
COMPILES = """
import sys
from atd import host
print(host.keep_compiled())
import jax
jax.jit(lambda x: x @ x + 1)(jax.numpy.ones((8, 8))).block_until_ready()
if sys.argv[1:]:  # the disk is full
    import pathlib
    def full(*given):
        raise OSError(28, "No space left on device")
    pathlib.Path.write_bytes = full
    jax.jit(lambda x: x @ x + 2)(jax.numpy.ones((8, 8))).block_until_ready()
"""


def compiles(cache: Path, *arguments: str, **given: str) -> str:
    """What a program that has jax keep what it compiles prints, warnings and all."""
    environment = {name: value for name, value in os.environ.items() if "CACHE" not in name}
    environment |= {"ATD_CACHE": str(cache), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    environment |= {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"} | given
    done = subprocess.run(
        [sys.executable, "-c", COMPILES, *arguments],
        capture_output=True,
        text=True,
        env=environment,
        check=True,
    )
    return done.stdout + done.stderr


def test_compiled_programs_are_kept(tmp_path):
    """Also behind an entry that another run was stopped in the middle of."""
    assert compiles(tmp_path) == "True\n"
    kept = sorted((tmp_path / "compiled").glob("*-cache"))
    assert kept
    for entry in kept:
        entry.write_bytes(entry.read_bytes()[:10])
    assert compiles(tmp_path) == "True\n"
    assert sorted((tmp_path / "compiled").glob("*-cache")) == kept


def test_they_are_compiled_where_they_cannot_be_kept(tmp_path):
    (tmp_path / "file").write_text("")
    assert compiles(tmp_path / "file") == "False\n"
    assert compiles(tmp_path / "full", "full") == "True\n"


def test_the_users_own_folder_stays(tmp_path):
    mine = tmp_path / "mine"
    assert compiles(tmp_path / "atd", JAX_COMPILATION_CACHE_DIR=str(mine)) == "False\n"
    assert list(mine.glob("*-cache"))
    assert not (tmp_path / "atd").exists()


@pytest.mark.parametrize("why", ["jax is there", "no home"])
def test_nothing_is_set_where_it_would_be_too_late_or_in_vain(monkeypatch, why):
    for name in ("JAX_COMPILATION_CACHE_DIR", "ATD_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    if why == "no home":
        monkeypatch.delitem(sys.modules, "jax", raising=False)

        def no_home() -> Path:
            raise RuntimeError("Could not determine home directory.")

        monkeypatch.setattr(Path, "home", no_home)
    else:
        monkeypatch.setitem(sys.modules, "jax", sys)
    assert not host.keep_compiled()
    assert "JAX_COMPILATION_CACHE_DIR" not in os.environ
