"""Progress bars, on stderr, so that a command's output can be piped."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from atd.progress import Progress as Now
from atd.progress import Report, Say
from atd.reports.tables import three_digits

_QUIET_SECONDS = 30  # between two lines where there is no terminal


class _Rate(ProgressColumn):
    """Units a second, over the last moments: "850 tokens/s" for a task with the field unit="tokens"."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        unit = task.fields.get("unit", "")
        return Text(
            "" if speed is None else f"{three_digits(speed)} {unit}/s".replace(" /", "/"),
            style="progress.data.speed",
        )


class _Lines(Progress):
    """Progress where there is no terminal: no bar, but a line every half minute and one at each end, for logs."""

    def __init__(self, console: Console):
        super().__init__(console=console, disable=True)
        self._printed = time.monotonic()

    def update(self, task_id, **fields) -> None:
        super().update(task_id, **fields)
        self._line(task_id)

    def advance(self, task_id, advance: float = 1) -> None:
        super().advance(task_id, advance)
        self._line(task_id)

    def _line(self, task_id) -> None:
        task = self._tasks[task_id]
        now = time.monotonic()
        if task.total is None or (not task.finished and now - self._printed < _QUIET_SECONDS):
            return
        if task.finished and task.fields.get("ended"):
            return
        task.fields["ended"] = task.finished
        self._printed = now
        self.console.print(
            f"{task.description}: {task.percentage:.0f} %, {task.elapsed or 0:.0f} s",
            markup=False,
            highlight=False,
        )


@contextmanager
def progress_bar(console: Console | None = None) -> Iterator[Progress]:
    """The one look of progress in all commands: description, bar, percentage, rate, time left; on stderr by default.

    `bar.add_task("evaluating", total=n, unit="tokens")`, then `bar.update(task, completed=k)`. The bar vanishes at the
    end. Where there is no terminal there is no bar, but a line every 30 seconds, and one at the end of a task.
    """
    console = console or Console(stderr=True)
    if not console.is_terminal:
        with _Lines(console) as bar:
            yield bar
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        _Rate(),
        TimeRemainingColumn(compact=True),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        yield bar


@contextmanager
def conversion_progress(
    console: Console | None = None,
) -> Iterator[tuple[Say, Report]]:
    """Shows progress as bars, one for each task, and lines above them: yields (say, progress)."""
    with progress_bar(console) as bar:
        tasks: dict[str, TaskID] = {}

        def say(line: str) -> None:
            bar.console.print(line, markup=False, highlight=False)

        def progress(now: Now) -> None:
            if now.task not in tasks:
                tasks[now.task] = bar.add_task(now.task, total=now.total, unit=now.unit)
            title = f"{now.task} {now.at}".rstrip()
            bar.update(tasks[now.task], completed=now.done, total=now.total, description=title)

        yield say, progress
