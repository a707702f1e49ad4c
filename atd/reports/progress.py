"""Shows progress and lines for people on stderr, so that the output of a command can be piped."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich import progress as bars
from rich.console import Console
from rich.text import Text

from atd.progress import Progress, Report, Say, unheard
from atd.reports.tables import three_digits

_QUIET_SECONDS = 30  # between two lines where there is no terminal


@contextmanager
def shown(console: Console | None = None, quiet: bool = False) -> Iterator[tuple[Say, Report]]:
    """Yields `(say, progress)`: one prints a line, the other shows how far each task is.

    On a terminal every running task has a bar with its percentage, rate and time left; a task that
    is done disappears. Elsewhere, as in a log, a line is printed every 30 seconds and at the end of
    each task.

    Args:
      console: where to print; stderr by default.
      quiet: print nothing.
    """
    if quiet:
        yield lambda line: None, unheard
        return
    console = console or Console(stderr=True)

    def say(line: str) -> None:
        console.print(line, markup=False, highlight=False, soft_wrap=True)

    if not console.is_terminal:
        yield say, _Lines(say)
        return
    columns = (
        bars.TextColumn("{task.description}", markup=False),
        bars.BarColumn(),
        bars.TextColumn("{task.percentage:>3.0f} %"),
        _Rate(),
        bars.TimeRemainingColumn(compact=True),
    )
    with bars.Progress(*columns, console=console, transient=True) as display:
        yield say, _Bars(display)


class _Rate(bars.ProgressColumn):
    """Units per second over the last moments: "850 tokens/s"."""

    def render(self, task: bars.Task) -> Text:
        speed, unit = task.finished_speed or task.speed, task.fields["unit"]
        text = "" if speed is None else f"{three_digits(speed)} {unit}/s"
        return Text(text, style="progress.data.speed")


class _Bars:
    """One bar for each task that runs."""

    def __init__(self, display: bars.Progress):
        self._display = display
        self._running: dict[str, bars.Task] = {}

    def __call__(self, now: Progress) -> None:
        if now.ended:
            if task := self._running.pop(now.task, None):
                self._display.remove_task(task.id)
            return
        if now.task not in self._running:
            self._display.add_task(now.task, total=now.total, unit=now.unit)
            self._running[now.task] = self._display.tasks[-1]
        task = self._running[now.task]
        if now.done < task.completed:  # it was cut off, and begins again
            self._display.reset(task.id)
        title = f"{now.task} {now.at}".rstrip()
        self._display.update(task.id, completed=now.done, total=now.total, description=title)


class _Lines:
    """A line every half minute, and one at the end of each task."""

    def __init__(self, say: Say):
        self._say = say
        self._printed = time.monotonic()
        self._began: dict[str, float] = {}  # the running tasks
        self._ended: set[str] = set()

    def __call__(self, now: Progress) -> None:
        clock = time.monotonic()
        if now.ended and now.task in self._ended:
            return
        began = self._began.setdefault(now.task, clock)
        if now.total is not None and (now.ended or clock - self._printed >= _QUIET_SECONDS):
            self._printed = clock
            title = f"{now.task} {now.at}".rstrip()
            percentage = 100 * now.done / now.total if now.total else 100
            self._say(f"{title}: {percentage:.0f} %, {clock - began:.0f} s")
        if now.ended:
            self._ended.add(now.task)
            del self._began[now.task]
        else:
            self._ended.discard(now.task)
