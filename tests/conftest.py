"""Real weights and text for tests: at $ATD_SHARED_DATA or ../shared/data; tests that need them skip where they are absent."""

import os
import sys
from pathlib import Path

import pytest


def pytest_configure(config):
    """Most of a run is compiling. What one worker or subprocess has compiled is read by the others, and by the next run."""
    if config.pluginmanager.hasplugin("cacheprovider"):
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(config.cache.mkdir("jax")))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """What conversions keep for one another goes into a temporary folder, and never to ~/.cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ATD_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def shared_data() -> Path:
    root = Path(os.environ.get("ATD_SHARED_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not root.is_dir():
        pytest.skip(
            f"needs the real models and texts of {root}; set ATD_SHARED_DATA to where they are"
        )
    return root


@pytest.fixture(scope="session")
def stories260k(shared_data: Path) -> Path:
    return shared_data / "models" / "stories260K"


@pytest.fixture(scope="session")
def stories15m(shared_data: Path) -> Path:
    return shared_data / "models" / "stories15M"


@pytest.fixture
def atd(monkeypatch, capsys):
    """atd("convert", ...) -> (exit code, stdout, stderr)."""

    from atd.cli import (
        main,  # not for all: tests of kernels run where jax, numpy and pytest are all there is
    )

    def run(*arguments) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["atd", *map(str, arguments)])
        code = 0
        try:
            main.main()
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
        return code, *capsys.readouterr()

    return run
