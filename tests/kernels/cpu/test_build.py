"""The library for CPUs: compiled once, whole or not at all; errors say what is missing."""

import ctypes
import functools
import os
import stat

import pytest

from atd.errors import RunFailed
from atd.kernels.cpu import build
from tests.kernels.backends import ABSENT

pytestmark = pytest.mark.skipif(bool(ABSENT["cpu"]), reason=str(ABSENT["cpu"]))


@pytest.fixture
def compilations(monkeypatch):
    """The commands that compile; what they make is three bytes, since compiling takes seconds."""
    commands = []

    def run(command):
        if "-o" in command:
            commands.append(command)
            with open(command[-1], "wb") as made:
                made.write(b"elf")
        return "a compiler"

    monkeypatch.setattr(build, "_run", run)
    return commands


def test_a_library_is_compiled_once(tmp_path, compilations):
    first = build.built(tmp_path / "kernels")
    assert build.built(tmp_path / "kernels") == first
    assert len(compilations) == 1
    assert [path.name for path in first.parent.iterdir()] == [first.name]


def test_a_damaged_library_is_compiled_anew(tmp_path, compilations):
    path = build.built(tmp_path)
    whole = path.read_bytes()
    for damaged in (whole[:-1], b"e" + b"x" + whole[2:], b""):
        path.write_bytes(damaged)
        assert build.built(tmp_path).read_bytes() == whole
    assert len(compilations) == 4


@pytest.mark.parametrize("what", ["processor", "flags", "compiler", "source"])
def test_another_processor_compiler_or_source_is_another_library(
    tmp_path, compilations, monkeypatch, what
):
    first = build.built(tmp_path)
    flags = ("-DATD_PORTABLE",) if what == "flags" else ()
    if what == "processor":
        monkeypatch.setattr(build, "processor", lambda: "another")
    if what == "compiler":
        monkeypatch.setenv("CXX", "g++ -O1")
    if what == "source":
        monkeypatch.setattr(build, "SOURCES", build.SOURCES[:1])
    assert build.built(tmp_path, flags) != first


def test_a_machine_without_a_compiler(tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(RunFailed, match="no compiler 'no-such-compiler'; install one"):
        build.built(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_compiler_that_fails_shows_its_last_lines(tmp_path, monkeypatch):
    with pytest.raises(RunFailed, match=r"failed:\n.*no-such-option"):
        build.built(tmp_path, ("--no-such-option",))
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write everywhere")
def test_a_folder_that_cannot_be_written(tmp_path, compilations):
    tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
    with pytest.raises(OSError, match="Permission"):
        build.built(tmp_path / "kernels")


def test_a_reason_is_said_once(monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("ATD_CACHE", str(tmp_path))
    unavailable = functools.cache(build.unavailable.__wrapped__)
    (reason,) = {unavailable() for _ in range(3)}
    assert reason
    assert "backend 'xla' needs no compiler" in reason
    assert [record.getMessage() for record in caplog.records] == [f"cpu: {reason}"]


def test_the_library_has_what_it_is_asked_for():
    library = ctypes.CDLL(str(build.built(build.cache_folder() / "kernels")))
    assert all(hasattr(library, name) for name in build.HANDLERS)
