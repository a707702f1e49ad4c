"""Models and texts for tests: packaged ones, and real ones of $ATD_SHARED_DATA (see tests/data.py)
in the slow runs.
"""

import os
import re
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from tests import data, stories

GOLDEN = Path(__file__).parent / "golden"


def pytest_configure(config):
    """Compiles fast, and once: most of a cold run is compiling.

    Without XLA's optimisations compiling takes half as long. What one worker or subprocess has
    compiled is read by the others, and by the next run.
    """
    os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
    if config.pluginmanager.hasplugin("cacheprovider"):
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(config.cache.mkdir("jax")))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
    os.environ["HF_HUB_OFFLINE"] = "1"  # a path that is not there may be a name of the hub


def pytest_terminal_summary(terminalreporter):
    """Prints how many tests were skipped, for each reason."""
    skipped = terminalreporter.stats.get("skipped", [])
    reasons = Counter(
        re.sub(r"^Skipped: ", "", report.longrepr[2] if report.longrepr else "")
        for report in skipped
    )
    for reason, count in reasons.most_common():
        terminalreporter.write_line(f"skipped {count:4}: {reason}")


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """What conversions keep for one another goes into a temporary folder, and never to ~/.cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ATD_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session", autouse=True)
def small_chunks():
    """Changes no bit: small matrices are not filled up to what a core's cache holds."""
    from atd.decomposition import chunks

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunks, "CHUNK", 1 << 14)
        yield


@dataclass(frozen=True)
class Trained:
    """A trained model, and texts of its kind: to calibrate on, and held out."""

    name: str
    folder: Path
    calibration: Path
    held_out: Path
    sample: Path  # held out too; a few thousand characters

    def golden(self):
        """Tokens and their logits, of another implementation."""
        name = "stories" if self.name == "packaged" else self.name
        return np.load(GOLDEN / f"{name}.npz")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of the files that tests/data.py names."""
    if not data.FOLDER.is_dir():
        pytest.skip("real models and texts are not here: see `make data`")
    return data.FOLDER


@pytest.fixture(scope="session")
def packaged(tmp_path_factory) -> Trained:
    """tests/golden/stories, a llama of 260 thousand weights."""
    folder = tmp_path_factory.mktemp("stories")
    texts = {"calibration": (200_000, 2), "held_out": (30_000, 3), "sample": (4_000, 4)}
    for name, (characters, seed) in texts.items():
        (folder / f"{name}.txt").write_text(stories.text(characters, seed))
    return Trained("packaged", GOLDEN / "stories", *(folder / f"{name}.txt" for name in texts))


def real(shared_data: Path, name: str) -> Trained:
    text = shared_data / "text"
    return Trained(
        name,
        shared_data / "models" / name,
        text / "tinystories_197k.txt",
        text / "tinystories_valid_30k.txt",
        text / "tinystories_sample.txt",
    )


def packaged_or(name: str):
    """Makes a fixture of the packaged model, and in slow runs of the real one of this name."""

    @pytest.fixture(
        scope="session", params=["packaged", pytest.param(name, marks=pytest.mark.slow)]
    )
    def model(request) -> Trained:
        if request.param == "packaged":
            return request.getfixturevalue("packaged")
        return real(request.getfixturevalue("shared_data"), request.param)

    return model


small = packaged_or("stories260K")  # 260 thousand weights both
trained = packaged_or("stories15M")  # which is 60 times as large as the packaged one


@pytest.fixture(scope="session")
def stories260k(small: Trained) -> Path:
    return small.folder


@pytest.fixture(scope="session")
def stories15m(shared_data: Path) -> Path:
    return shared_data / "models" / "stories15M"


@pytest.fixture(scope="session")
def smollm2() -> Path:
    if (file := data.smollm2()) is None:
        pytest.skip("SmolLM2's GGUF file is not here: see `make data`")
    return file


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
