"""Where the time of a conversion goes, part by part, beside what `atd convert --plan` predicts.

    python benchmarks/conversion_time.py MODEL --set calibrate.steps=0
    python benchmarks/conversion_time.py --shapes llama3-8b --tokens 2048  ten minutes, 9 GB
    python benchmarks/conversion_time.py --shapes llama3-8b --tokens 131072 --memory 16GB
    python benchmarks/conversion_time.py --hidden 256 --mlp 512 --tokens 1024  seconds, for CI

Without MODEL weights are random, with a spectrum of inputs that falls like a power law and a few
large features (`random_checkpoint.write_checkpoint`), and the vocabulary is small, so that the ends
cost nothing. The speeds of the machine are measured anew, and nothing is taken from atd's cache.

The conversion runs in this process, with timers around functions of atd; what a function calls
counts for the innermost timer alone. Parts that run in several threads share the wall time of the
matrix they work on in proportion to the time of their threads.
"""

import argparse
import importlib
import os
import resource
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import jax
from random_checkpoint import SHAPES, shapes, write_checkpoint, write_text, write_words
from rich.console import Console
from rich.table import Table

from atd.calibration.rates import rates
from atd.checkpoint.cache import Cache
from atd.checkpoint.files import write_json
from atd.decomposition.allocation import parse_bytes
from atd.pipeline.convert import convert, plan
from atd.pipeline.recipe import read_recipe

VOCABULARY, CONTEXT = 4096, 512
REST, COMPILING = "other", "compiling"
# part -> "module:name" of what is timed as it; those of WITHIN run in threads of one matrix
PARTS = {
    "forward": ("atd.calibration.streams:Stream.each",),
    "moments": ("atd.calibration.streams:_moments",),
    "sensitivities": ("atd.passes.allocate:fisher_losses",),
    "factorisation": ("atd.decomposition.error_feedback:factor",),
    "target correction": ("atd.passes.decompose:asymmetric_target",),
    "rotation": ("atd.decomposition.rotations:Rotation.apply",),
    "weights made dense": ("atd.ir.graph:WeightRef.dense",),
    "sweeps": ("atd.decomposition.quantize:calibrated",),
    "writing calibration text": ("atd.pipeline.convert:calibration_text",),
    "following the gradient": ("atd.passes.calibrate:Calibrate.rewrite",),
    "least squares": ("atd.decomposition.quantize:nearest",),
    "error of each matrix": (
        "atd.passes.decompose:relative_error",
        "atd.passes.decompose:_warn_of_other_weights",
    ),
    "packing": ("atd.weights.layouts:Layout.pack",),
    "reading and writing": (
        "atd.pipeline.convert:checkpoint_contents",
        "atd.pipeline.convert:check_unchanged",
        "atd.pipeline.driver:write_shard",
        "atd.pipeline.driver:file_digest",
        "atd.pipeline.output:write_metadata",
    ),
    "verifying": ("atd.passes.verify:Verify.rewrite",),
}
WITHIN = {
    "least squares": ("atd.decomposition.trellis_feedback:_nearest",),
    "sweeps": (
        "atd.decomposition.trellis_feedback:sweep",
        "atd.decomposition.error_feedback:_sweep",
    ),
    "refits": (
        "atd.decomposition.trellis_feedback:_refit",
        "atd.decomposition.trellis_feedback:_product",
        "atd.decomposition.trellis_feedback:_equal_energy",
        "atd.decomposition.error_feedback:_refit",
    ),
    "first scales": ("atd.decomposition.error_feedback:als",),
}


class Timers:
    """Seconds of each part; a timer that begins inside another one pauses it."""

    def __init__(self):
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.within: defaultdict[str, float] = defaultdict(float)
        self._local = threading.local()
        self._stack, self._since, self._lock = [REST], time.perf_counter(), threading.Lock()

    def enter(self, part: str) -> None:
        self._count()
        self._stack.append(part)

    def leave(self) -> None:
        self._count()
        self._stack.pop()

    def _count(self) -> None:
        now = time.perf_counter()
        self.seconds[self._stack[-1]] += now - self._since
        self._since = now

    def around(self, part: str, function: Callable) -> Callable:
        """The function, timed in the main thread."""

        def timed(*args, **kwargs):
            self.enter(part)
            try:
                found = function(*args, **kwargs)
                if isinstance(found, Iterator):
                    return self._each(part, found)
                return jax.block_until_ready(found)
            finally:
                self.leave()

        return timed

    def _each(self, part: str, values: Iterator) -> Iterator:
        while True:
            self.enter(part)
            try:
                value = next(values)
            except StopIteration:
                return
            finally:
                self.leave()
            yield value

    def inside(self, part: str, function: Callable) -> Callable:
        """The function, timed in whichever thread it runs."""

        def timed(*args, **kwargs):
            started, self._local.part = time.perf_counter(), part
            found = jax.block_until_ready(function(*args, **kwargs))
            self._local.part = None
            with self._lock:
                self.within[part] += time.perf_counter() - started
            return found

        return timed

    def compiled(self, event: str, duration_secs: float, **_: str | int) -> None:
        """Hears of what jax traces and compiles, and takes it out of the part that waits for it."""
        if not event.startswith("/jax/core/compile/"):
            return
        if threading.current_thread() is threading.main_thread():
            seconds, part = self.seconds, self._stack[-1]
        else:
            seconds, part = self.within, getattr(self._local, "part", None)
        with self._lock:
            seconds[COMPILING] += duration_secs
            if part is not None:
                seconds[part] -= duration_secs

    def parts(self) -> dict[str, float]:
        """Seconds of wall time by part, those of threads shared out."""
        self._count()
        seconds, whole = dict(self.seconds), sum(self.within.values())
        shared = seconds.pop("sweeps", 0.0) + (
            seconds.pop("least squares", 0.0) if "least squares" in self.within else 0.0
        )
        for part, spent in self.within.items():
            seconds[part] = seconds.get(part, 0.0) + shared * spent / whole
        return seconds


def replaced(where: str, wrap: Callable[[Callable], Callable]) -> None:
    """Puts wrap(function) in the place of "module:name" or "module:Class.name"."""
    module, _, name = where.partition(":")
    *owners, last = name.split(".")
    owner = importlib.import_module(module)
    for part in owners:
        owner = getattr(owner, part)
    setattr(owner, last, wrap(getattr(owner, last)))


def watched() -> Timers:
    """Timers around all functions of PARTS and WITHIN."""
    timers = Timers()
    for parts, wrap in ((PARTS, timers.around), (WITHIN, timers.inside)):
        for part, names in parts.items():
            for where in names:
                replaced(where, lambda f, part=part, wrap=wrap: wrap(part, f))
    jax.monitoring.register_event_duration_secs_listener(timers.compiled)
    return timers


def random_model(options: argparse.Namespace, folder: Path) -> tuple[Path, Path]:
    """Writes a model with random weights and text for it; (model, text)."""
    sizes = {"hidden_size": options.hidden, "intermediate_size": options.mlp}
    if options.hidden:
        heads = options.hidden // 64
        sizes |= {"num_attention_heads": heads, "num_key_value_heads": max(1, heads // 4)}
    sizes |= {"num_hidden_layers": options.blocks, "vocab_size": VOCABULARY}
    sizes |= {"max_position_embeddings": CONTEXT}
    config = shapes(options.shapes, **{key: size for key, size in sizes.items() if size})
    write_checkpoint(folder / "model", config, spectrum=True)
    write_words(folder / "model", VOCABULARY)
    text = write_text(folder / "text.txt", VOCABULARY, options.tokens or CONTEXT)
    return folder / "model", text


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("--calib", type=Path, help="text for MODEL; by default the recipe's")
    parser.add_argument("--shapes", choices=sorted(SHAPES), default="llama-3.2-1b")
    parser.add_argument("--hidden", type=int, help="instead of the shapes'")
    parser.add_argument("--mlp", type=int, help="instead of the shapes'")
    parser.add_argument("--blocks", type=int, default=1)
    parser.add_argument("--tokens", type=int, help="of calibration text; the recipe's by default")
    parser.add_argument("--recipe", default="ternary2")
    parser.add_argument("--set", dest="overrides", action="append", default=[])
    parser.add_argument("--memory", help="limit of the conversion, like 16GB")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    recipe = read_recipe(options.recipe, options.overrides)
    limit = parse_bytes(options.memory) if options.memory else None
    if options.tokens:
        recipe = replace(recipe, calibration_tokens=options.tokens)
    with tempfile.TemporaryDirectory() as temporary:
        folder, model, calib = Path(temporary), options.model, options.calib
        speeds = rates(Cache(folder / "cache"))
        if model is None:
            model, calib = random_model(options, folder)
        calib = () if calib is None else calib
        planned = plan(model, recipe, calib=calib, limit=limit, say=lambda line: None)
        predicted = planned.seconds(speeds)
        timers = watched()
        cache = folder / "cache"
        convert(model, folder / "out", recipe, calib=calib, limit=limit, cache=cache)
        seconds = timers.parts()
    table = Table("part", "predicted", "measured", "share")
    whole = sum(seconds.values())
    for part in sorted({**predicted, **seconds}, key=lambda part: -seconds.get(part, 0.0)):
        said, spent = predicted.get(part, 0.0), seconds.get(part, 0.0)
        table.add_row(part, f"{said:.1f} s", f"{spent:.1f} s", f"{spent / whole:.0%}")
    said = sum(predicted.values())
    table.add_row("all", f"{said:.0f} s", f"{whole:.0f} s", f"{said / whole - 1:+.0%}")
    Console(width=100).print(table)
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f"peak of resident memory: {peak / 1e9:.2f} GB")
    if options.json:
        write_json(options.json, {"predicted": predicted, "measured": seconds})


if __name__ == "__main__":
    main()
