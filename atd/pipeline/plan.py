"""Says what a conversion will do, and how long it will take, from shapes alone."""

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from atd.calibration.memory import memory
from atd.calibration.rates import NOMINAL, Rates, known_rates
from atd.calibration.self_text import text_length
from atd.calibration.text import SELF, window_count, window_length
from atd.calibration.work import Text, Work, self_text_work, stream_work
from atd.checkpoint.cache import Cache
from atd.ir import Graph
from atd.models.config import expects_bos
from atd.pipeline.base import Pass, toml_value
from atd.pipeline.context import Context
from atd.pipeline.recipe import Recipe

COMPILING = "compiling"
CODE = re.compile(r" segment=\d+ taps=\S+")  # what N does not say of a trellis code
FEW = 0.01  # of the whole time: what takes less is not worth a line


@dataclass(frozen=True)
class Plan:
    """What a conversion will do."""

    passes: tuple[Pass, ...]
    before: Graph
    after: Graph
    text: Text
    texts: tuple[str, ...]  # files of it, or "self"
    work: Work

    def seconds(self, rates: Rates) -> dict[str, float]:
        """Returns the seconds that each part takes.

        Args:
            rates: seconds of each kind of work.
        """
        parts: defaultdict[str, float] = defaultdict(float)
        for (part, kind), amount in self.work.items():
            parts[part] += amount * rates[kind]
        return dict(sorted(parts.items(), key=lambda item: -item[1]))

    def time(self, cache: Cache) -> str:
        """Returns a line for people: the time in all, on this machine where its rates are known.

        Args:
            cache: where the rates of this machine are kept.
        """
        if (known := known_rates(cache)) is not None:
            return _time(self.seconds(known))
        return f"{_time(self.seconds(NOMINAL))}, on two common cores (--plan measures this machine)"

    def shown(self, rates: Rates) -> str:
        """Returns all of it as lines for people.

        Args:
            rates: seconds of each kind of work.
        """
        lines = ["passes:", *(f"  {_changed(step)}" for step in self.passes), "types:"]
        lines += [f"  {line}" for line in _types(self.after)]
        read, written = map(_bytes, (self.before, self.after))
        lines.append(f"weights: {read:,} bytes are read, {written:,} are written")
        if self.text.tokens:
            count, context = self.text.tokens // self.text.context, self.text.context
            lines.append(
                f"calibration: {count} windows of {context} tokens, {' and '.join(self.texts)}"
            )
        seconds = self.seconds(rates)
        whole = sum(seconds.values())
        lines.append(_time(seconds))
        lines += [
            f"  {part:<26}{duration(spent):>10}"
            for part, spent in seconds.items()
            if spent >= FEW * whole
        ]
        return "\n".join(lines)


def planned(graph: Graph, recipe: Recipe, bytes: float) -> Plan:
    """Plans a conversion.

    Args:
        graph: the model as it is opened.
        recipe: what is done to it.
        bytes: of memory that values of calibration may take.
    """
    text = _text(graph, recipe, bytes)
    work, after = _work(graph, recipe.pipeline.passes, text)
    return Plan(recipe.pipeline.passes, graph, after, text, recipe.calibration, work)


def _text(graph: Graph, recipe: Recipe, bytes: float) -> Text:
    if not recipe.pipeline.calibrated:
        return Text(0)
    context = window_length(graph, recipe.calibration_context)
    count = window_count(recipe.calibration, recipe.calibration_tokens, context)
    written = count // len(recipe.calibration) if SELF in recipe.calibration else 0
    needed = memory(graph, count * context, context)
    streams = needed.streams if needed.streams <= bytes else 0
    kept = needed.inner <= bytes - streams
    return Text(count * context, context, written * context, kept)


def _work(graph: Graph, passes: Sequence[Pass], text: Text) -> tuple[Work, Graph]:
    """The work of all passes and of what stands around them, and the graph that they make."""
    context, work, source = Context(say=lambda line: None), Work(), graph
    for step in passes:
        after = graph if "written" in step.needs else step(graph, context)
        work += step.work(graph, after, text)
        graph = after
    # Files of the model are digested once and read again; tensors are digested as they are written,
    # and so is their file.
    moved = 2 * _bytes(source) + 3 * _bytes(graph)
    work += Work({("reading and writing", "byte"): float(moved)})
    if text.written:
        length = text_length(text.context, expects_bos(source.config))
        work += self_text_work(source, text.written, length)
    if any(step.scope != "graph" and "activations" in step.needs for step in passes):
        width = source.prologue.nodes[0].weights["weight"].type.shape[1]
        for unit in source.units[:-1]:
            one = stream_work(unit, width, text)
            work += one + one  # the dense stream, and the quantized one
    return work, graph


def _bytes(graph: Graph) -> int:
    """Of all weights."""
    return sum(ref.type.nbytes for _, ref in graph.weights())


def _time(seconds: dict[str, float]) -> str:
    """A line for people: the time in all."""
    whole, compiling = sum(seconds.values()), seconds.get(COMPILING, 0.0)
    line = f"time: about {duration(whole)}"
    if compiling < FEW * whole:
        return line
    return f"{line}, {duration(compiling)} of it to compile, where no earlier run has"


def _changed(step: Pass) -> str:
    """The pass with those options that are not its defaults."""
    usual = type(step)().options()
    options = {key: value for key, value in step.options().items() if usual.get(key) != value}
    return f"{step.name}{toml_value(options)}" if options else step.name


def _types(graph: Graph) -> list[str]:
    """A line for each type of matrix: how many have it, and their bytes."""
    refs = [ref for _, ref in graph.weights() if len(ref.type.shape) == 2]
    named = sorted((CODE.sub("", str(ref.type).partition("[")[0]), ref.type.nbytes) for ref in refs)
    lines = []
    for name, group in groupby(named, key=lambda pair: pair[0]):
        sizes = [bytes for _, bytes in group]
        lines.append(f"{len(sizes):4} x {name}: {sum(sizes):,} bytes")
    return lines


def duration(seconds: float) -> str:
    """Returns seconds as people say them: 45 s, 12 min, 3.5 h."""
    if seconds < 180:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
