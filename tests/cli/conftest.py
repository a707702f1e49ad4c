"""A converted model and a text for the commands."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def converted(stories260k, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("cli") / "out"
    subprocess.run(
        [
            sys.executable,
            "-m",
            "atd",
            "convert",
            str(stories260k),
            str(out),
            "--recipe",
            "datafree2",
        ],
        check=True,
        cwd=ROOT,
    )
    return out


@pytest.fixture
def text(small) -> Path:
    return small.sample


@pytest.fixture(scope="session")
def refused():
    """refused(atd(...), parts...): exit code 2, one message that holds the parts, no traceback."""

    def check(result: tuple[int, str, str], *parts: str) -> None:
        code, _, err = result
        assert code == 2, err
        assert "Traceback" not in err
        error = err[err.index("error: ") :].rstrip()
        assert "\n" not in error
        for part in parts:
            assert part in error, error

    return check
