"""Progress as people see it: bars on a terminal, lines in a log."""

import io
import re
import time

from rich.console import Console

from atd.progress import Progress
from atd.reports.progress import shown


def test_on_a_terminal_there_is_a_bar_with_a_rate():
    text = io.StringIO()
    console = Console(file=text, force_terminal=True, width=100)
    with shown(console) as (_, progress):
        for done in (0, 500_000, 1_500_000):
            progress(Progress("evaluating", done, 2_000_000, "tokens", "on [b]"))
            time.sleep(0.01)
        time.sleep(0.2)  # the display is refreshed ten times per second
    assert "evaluating on [b]" in text.getvalue()
    assert "75 %" in text.getvalue()
    assert re.search(r"[\d.]+[kMG] tokens/s", text.getvalue())


def test_a_bar_goes_when_its_task_ends_and_begins_anew_with_it():
    text = io.StringIO()
    with shown(Console(file=text, force_terminal=True, width=100)) as (_, progress):
        for task, done in (("loading", 1), ("evaluating", 1), ("loading", 4), ("loading", 4)):
            progress(Progress(task, done, 4, "tensors"))
        text.truncate(0)
        time.sleep(0.3)
        assert "evaluating" in text.getvalue()
        assert "loading" not in text.getvalue()
        progress(Progress("loading", 3, 4, "tensors"))
        progress(Progress("loading", 1, 4, "tensors", "of another"))  # the first was cut off
        time.sleep(0.3)
        assert re.search("loading of another.* 25 %", text.getvalue())


def test_in_a_log_there_is_a_line_now_and_then_and_one_at_the_end(monkeypatch):
    text = io.StringIO()
    clock = [0.0]
    monkeypatch.setattr("atd.reports.progress.time.monotonic", lambda: clock[0])
    with shown(Console(file=text, width=100)) as (_, progress):
        for done in (*range(10, 110, 10), 100):
            clock[0] += 8
            progress(Progress("evaluating", done, 100, "tokens"))
    percentages = [
        line.split(":")[1].split(",")[0].strip() for line in text.getvalue().splitlines()
    ]
    assert percentages == ["40 %", "80 %", "100 %"]


def test_each_run_of_a_task_has_its_line():
    text = io.StringIO()
    with shown(Console(file=text, width=100)) as (_, progress):
        for done in (1, 2, 1, 2):
            progress(Progress("evaluating", done, 2, "tokens"))
        progress(Progress("study", 0, 0, "points"))
    assert [line.partition(",")[0] for line in text.getvalue().splitlines()] == [
        "evaluating: 100 %",
        "evaluating: 100 %",
        "study: 100 %",
    ]


def test_lines_are_said_as_they_are():
    text = io.StringIO()
    with shown(Console(file=text, width=40)) as (say, progress):
        say("warning: [bold] stays as it is, and a long line is not cut")
        progress(Progress("converting", 3, 3, "weights", "model.layers.0"))
    lines = text.getvalue().splitlines()
    assert lines[0] == "warning: [bold] stays as it is, and a long line is not cut"
    assert lines[1].startswith("converting model.layers.0: 100 %")
