"""A converted model and a text for the commands."""

from pathlib import Path

import pytest

from atd.pipeline.convert import convert


@pytest.fixture(scope="session")
def converted(stories260k, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("cli") / "out"
    return convert(stories260k, out, "datafree2", say=lambda line: None)


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
