"""Processes that work together: two real ones on this machine, also killed; and what they say."""

import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from atd.checkpoint.folder import partial_folder, read_manifest
from atd.errors import BadInput, RunFailed
from atd.parallel import hosts as together
from atd.parallel.lost import told_of
from tests import stories
from tests.parallel.small import one_layer

FATAL = "Terminating process because the JAX distributed service detected fatal errors. "
NAMES = ["process 0 (a)", "process 1 (b)"]
QUICK = ("--set", "decompose.trellis=", "--set", "decompose.refits=0", "--recipe", "ternary2")
SECONDS = 240  # that a run may take on a busy machine


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (f"{FATAL}... unhealthy (stopped sending heartbeats):\n1\nThe tasks", "process 1 (b) has"),
        (f"{FATAL}UNAVAILABLE: Failed to send RPC to coordination service.", "process 0 (a) has"),
        (f"{FATAL}DEADLINE_EXCEEDED: .../RegisterTask", "nobody came"),
        ("free(): invalid pointer", ""),
    ],
)
def test_what_is_said_of_a_lost_process(text, said):
    told = told_of(text, NAMES, "nobody came")
    assert said in told
    assert bool(said) == bool(told)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--processes", 2), "--processes: give --coordinator HOST:PORT as well"),
        (("--coordinator", "here"), "--coordinator here: expected HOST:PORT"),
        (("--coordinator", "h:1"), "needs --processes N and --process-id I"),
        (("--coordinator", "h:1", "--processes", 2, "--process-id", 2), "have the numbers 0 to 1"),
        (("--coordinator", "auto", "--processes", 2), "--processes: not with --coordinator auto"),
    ],
)
def test_numbers_that_cannot_be_are_refused(atd, tmp_path, options, said):
    code, _, err = atd("convert", "model", tmp_path / "out", *options)
    assert code == 2
    assert said in err


@pytest.fixture
def two(monkeypatch):
    """Makes this process the first of two, of which the other tells what it is given."""

    def other_tells(*arrays: np.ndarray) -> None:
        monkeypatch.setattr(together, "_joined", together.Hosts(0, tuple(NAMES)))
        monkeypatch.setattr(together, "_all", lambda mine: [mine, [*arrays]])

    return other_tells


def bytes_of(text: str) -> np.ndarray:
    return np.frombuffer(text.encode(), np.uint8)


def test_results_come_in_the_order_of_the_work(two):
    two(bytes_of(""), np.asarray([1], np.int32), np.asarray("b"))
    found = together.in_turns([(np.asarray("a"),), (np.asarray("c"),)])
    assert [str(text) for (text,) in found] == ["a", "b", "c"]


def test_facts_that_differ_are_refused_by_name(two):
    two(bytes_of(""), bytes_of('{"version of atd": "0.0"}'))
    said = "process 1 (b) has another version of atd than process 0 (a): 0.0, not 0.1"
    with pytest.raises(BadInput, match=re.escape(said)):
        together.agree({"version of atd": "0.1"})


def test_an_error_in_one_process_ends_all(two):
    two(bytes_of("1 disk full"))
    with pytest.raises(RunFailed, match=r"process 1 \(b\): disk full"), together.agreeing():
        pass


def test_arrays_go_there_and_back():
    arrays = [np.ones((2, 3), np.int8), np.zeros(0, np.float32), np.asarray(5, np.int64)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            together.multihost_utils, "process_allgather", lambda array: np.stack([array, array])
        )
        for of_process in together._all(arrays):
            for found, array in zip(of_process, arrays, strict=True):
                assert found.dtype == array.dtype
                assert np.array_equal(found, array)
                assert found.shape == array.shape


# --- real processes -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = one_layer(tmp_path_factory.mktemp("model"))
    (folder / "text").write_text(stories.text(40_000, 2))
    return folder


def conversion(model: Path, out: Path) -> tuple[str, ...]:
    text = ("--calib", str(model / "text"), "--calibration-tokens", "12288", "--ignore-extra")
    return ("convert", str(model), str(out), *QUICK, *text)


def started(command: tuple[str, ...]) -> list[subprocess.Popen]:
    """Starts two processes that work together."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    there = ("--coordinator", f"127.0.0.1:{port}", "--processes", "2")
    there += ("--coordinator-timeout", "60")
    return [
        subprocess.Popen(
            [sys.executable, "-m", "atd", *command, *there, "--process-id", str(i)],
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
            cwd=Path(__file__).parents[2],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]


def finished(processes: list[subprocess.Popen]) -> None:
    for process in processes:
        _, said = process.communicate(timeout=SECONDS)
        assert process.returncode == 0, said


@pytest.fixture(scope="module")
def alone(model, tmp_path_factory) -> dict[str, str]:
    out = tmp_path_factory.mktemp("alone") / "out"
    command = [sys.executable, "-m", "atd", *conversion(model, out)]
    root = Path(__file__).parents[2]
    subprocess.run(command, cwd=root, check=True, env=os.environ | {"JAX_PLATFORMS": "cpu"})
    return read_manifest(out)


@pytest.mark.slow
def test_two_processes_make_the_bytes_of_one(model, alone, tmp_path):
    finished(started(conversion(model, tmp_path / "out")))
    assert read_manifest(tmp_path / "out") == alone


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_the_other_and_the_run_goes_on(model, alone, tmp_path, victim):
    out = tmp_path / "out"
    told = killed(conversion(model, out), out, victim, random.uniform(0, 8))
    assert not told or f"error: process {victim} (" in told
    if not out.exists():
        finished(started(conversion(model, out)))
    assert read_manifest(out) == alone


def killed(command: tuple[str, ...], out: Path, victim: int, seconds: float) -> str:
    """Kills one of two processes, some time after they began to write; returns what the other one
    said on stderr, "" where both were done.
    """
    processes = started(command)
    while not partial_folder(out).exists() and processes[victim].poll() is None:
        time.sleep(0.05)
    time.sleep(seconds)
    done = processes[victim].poll() is not None
    processes[victim].send_signal(signal.SIGKILL)
    processes[victim].communicate()
    other = processes[1 - victim]
    _, said = other.communicate(timeout=SECONDS)
    assert done or other.returncode in (0, 1), said
    return "" if other.returncode == 0 else said
