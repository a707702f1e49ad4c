"""Whole models on a CPU: packed, unpacked and dense ones by atd, and llama.cpp's types of blocks.

    python benchmarks/cpu.py MODEL --converted OUT ...   a dense model, and folders made from it
    python benchmarks/cpu.py --random llama-3.2-1b       random weights in these shapes
    python benchmarks/cpu.py --random tiny --tiny        whether it runs, in a minute

Tokens per second of a prompt, and of decoding behind a context; bytes of the weights; and resident
memory. All models take turns within each repeat; each turn is a process of its own, which loads
nothing but its model and may use all cores that this one may. Figures are medians over the turns.

packed
    `load(OUT, backend="cpu")`; of --random, N = 2 with tied scales, and with a trellis code. With
    --activations int8 also with activations that are rounded to 8 bits.
unpacked
    The first of the packed ones by `backend="xla-unpacked"`, in float32.
dense
    MODEL itself, in float32 and bfloat16.
llama.cpp
    `llama-bench` with as many threads, of files that `llama-quantize` makes of MODEL in float16.
    `make llama-cpp` builds both in .llama-cpp; they are also looked for in $ATD_LLAMA_CPP and on
    PATH. Where they are absent, the rest is measured.

Resident memory of atd is what the process holds after decoding (anonymous pages and mapped files),
`of it bare` what it held before the model was loaded; of llama.cpp it is the most that
`llama-bench` held while it decoded. A packed model is compared with the type that decodes fastest
among those within 15 % of its bytes; where there are none, with the type nearest in bytes.
"""

import argparse
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).parents[1]))

import jax
import llama_tools
import numpy as np

from atd.checkpoint.files import write_json
from atd.decomposition.trellis_codes import known_code
from atd.errors import AtdError
from atd.ir.rewrite import with_activations
from atd.kernels.tuning.timing import columns
from atd.models import frontend
from atd.models.model import Model, load
from atd.models.random_model import SHAPES, random_graph
from atd.runtime import bench

jax.config.update("jax_platforms", "cpu")
NEAR = 0.15  # how far the bytes of types may be away to be compared


@dataclass(frozen=True)
class Sizes:
    """How many tokens a turn has."""

    prompt: int  # of the prompt that is timed
    context: int  # in front of the first token that is decoded
    steps: int  # decoded


@dataclass(frozen=True)
class Turn:
    """The figures of one process."""

    weights_bytes: int
    resident_bytes: int | None  # None where the system does not say
    bare_bytes: int | None  # of it, before the model was loaded
    prompt_tokens_per_second: float
    decode_tokens_per_second: float


@dataclass(frozen=True)
class Row:
    """The figures of a model."""

    model: str
    engine: str  # atd or llama.cpp
    packed: bool
    turns: tuple[Turn, ...]

    @property
    def weights_bytes(self) -> int:
        """Bytes of all weights."""
        return self.turns[0].weights_bytes

    def figure(self, name: str) -> float | None:
        """Returns the median of a figure over the turns, None where it is not known."""
        values = [getattr(turn, name) for turn in self.turns]
        return None if None in values else median(values)


# --- atd --------------------------------------------------------------------------------------


def load_random(name: str, kind: str, backend: str, dtype: str, activations="model") -> Model:
    """Loads a model of random weights in some SHAPES: dense, tied or trellis."""
    shape = SHAPES[name]
    if kind == "dense":
        graph = random_graph(shape)
    elif kind == "tied":
        graph = random_graph(shape, 2, layout="aligned")
    else:
        graph = random_graph(shape, code=known_code(2, "default"), layout="aligned")
    return load(with_activations(graph, activations), backend=backend, dtype=dtype)


def load_folder(path: Path, backend: str, dtype: str, activations="model") -> Model:
    """Loads a converted model."""
    return load(with_activations(frontend.open(path), activations), backend=backend, dtype=dtype)


def our_models(options: argparse.Namespace) -> dict[str, Callable[[], Model]]:
    """How to load each model, by name; those whose name begins with "packed" are."""
    if options.random:
        packed: dict[str, Callable[..., Model]] = {
            f"N = 2 {kind}": partial(load_random, options.random, kind)
            for kind in ("trellis", "tied")
        }
        dense: Callable[..., Model] = partial(load_random, options.random, "dense")
    else:
        packed = {folder.name: partial(load_folder, folder) for folder in options.converted}
        dense = partial(load, options.model)
    how = {"backend": options.backend, "dtype": "float32"}
    models = {f"packed {name}": partial(loader, **how) for name, loader in packed.items()}
    if options.activations == "int8":
        for name, loader in packed.items():
            models[f"packed {name} int8"] = partial(loader, **how, activations="int8")
    for loader in list(packed.values())[:1]:
        models["unpacked float32"] = partial(loader, backend="xla-unpacked", dtype="float32")
    for dtype in ("float32", "bfloat16"):
        models[f"dense {dtype}"] = partial(dense, backend="xla", dtype=dtype)
    return models


def our_turn(loader: Callable[[], Model], sizes: Sizes) -> Turn:
    """Measures a model in this process. What is compiled is compiled before anything is timed."""
    jax.devices()
    bare = resident_bytes()
    model = loader()
    length = sizes.context + sizes.steps
    random = np.random.default_rng(0)
    tokens = random.integers(0, model.vocabulary, (1, max(sizes.prompt, length)), np.int32)
    for steps in (2, sizes.steps):
        _, cache, token = bench.prefill_seconds(model, tokens[:, : sizes.context], length)
        started = time.perf_counter()
        bench.decode_seconds(model, token, cache, steps)
        decode = (time.perf_counter() - started) / steps
    resident = resident_bytes()
    for _ in range(2):
        prompt, *_ = bench.prefill_seconds(model, tokens[:, : sizes.prompt], sizes.prompt)
    speeds = (sizes.prompt / prompt, 1 / decode)
    return Turn(model.weights_nbytes, resident, bare, *speeds)


def resident_bytes() -> int | None:
    """Returns the anonymous pages and those of mapped files that this process holds."""
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
    return sum(1024 * int(fields[name].split()[0]) for name in ("RssAnon", "RssFile"))


def in_process(turn: Callable[[], Turn]) -> Turn:
    """Runs a turn in a new process."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(turn).result()


# --- llama.cpp --------------------------------------------------------------------------------


def their_turns(options: argparse.Namespace, sizes: Sizes) -> dict[str, Callable[[], Turn]]:
    """What measures each type of llama.cpp's; nothing where its tools are absent."""
    quantize, tool = llama_tools.find("llama-quantize"), llama_tools.find("llama-bench")
    if not options.types:
        return {}
    if quantize is None or tool is None:
        told(f"llama.cpp is left out: {llama_tools.ABSENT}")
        return {}
    name = options.random or options.model.stem
    files = {type: options.gguf / f"{name}-{type}.gguf" for type in options.types}
    if missing := {type: file for type, file in files.items() if not file.exists()}:
        source = SHAPES[options.random] if options.random else options.model
        llama_tools.make(quantize, missing, source, threads(), told)
    return {type: partial(their_turn, tool, file, sizes) for type, file in files.items()}


def their_turn(tool: str, file: Path, sizes: Sizes) -> Turn:
    """Measures a GGUF file by `llama-bench`."""
    found = llama_tools.measure(tool, file, threads(), **asdict(sizes))
    speeds = (found.prompt_tokens_per_second, found.decode_tokens_per_second)
    return Turn(found.weights_bytes, found.peak_bytes, None, *speeds)


def threads() -> int:
    """Returns how many threads this process may run at a time, which XLA makes use of."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


# --- figures ----------------------------------------------------------------------------------


def measure(options: argparse.Namespace, sizes: Sizes) -> list[Row]:
    """Measures all models in turns."""
    theirs = their_turns(options, sizes)
    turns: dict[str, Callable[[], Turn]] = {
        name: partial(in_process, partial(our_turn, loader, sizes))
        for name, loader in our_models(options).items()
    } | theirs
    found: dict[str, list[Turn]] = {name: [] for name in turns}
    for repeat in range(options.repeats):
        for name, turn in turns.items():
            told(f"repeat {repeat + 1} of {options.repeats}: {name}")
            found[name].append(turn())
    return [
        Row(name, "llama.cpp" if name in theirs else "atd", name.startswith("packed"), tuple(taken))
        for name, taken in found.items()
    ]


def rival_of(row: Row, rows: Sequence[Row]) -> Row | None:
    """Returns the type of llama.cpp's with which a packed model is compared."""
    theirs = [other for other in rows if other.engine == "llama.cpp"]
    if not row.packed or not theirs:
        return None
    near = [r for r in theirs if abs(r.weights_bytes / row.weights_bytes - 1) <= NEAR]
    if near:
        return max(near, key=lambda r: r.figure("decode_tokens_per_second") or 0)
    return min(theirs, key=lambda r: abs(math.log(r.weights_bytes / row.weights_bytes)))


def over(row: Row, other: Row | None, name: str) -> float | None:
    """Returns a figure of a row over that of another."""
    value, base = row.figure(name), other.figure(name) if other else None
    return value / base if value and base else None


def summary(row: Row, rows: Sequence[Row]) -> dict:
    """Returns a row as it is written to a file: medians, ratios, and what each turn gave."""
    rival = rival_of(row, rows)
    unpacked = next((r for r in rows if r.model.startswith("unpacked")), None)
    speeds = ("prompt_tokens_per_second", "decode_tokens_per_second")
    return {
        "model": row.model,
        "engine": row.engine,
        "weights_bytes": row.weights_bytes,
        **{name: row.figure(name) for name in ("resident_bytes", "bare_bytes", *speeds)},
        "over_unpacked": {name: over(row, unpacked, name) for name in speeds},
        "rival": rival and rival.model,
        "rival_bytes_over_ours": rival and rival.weights_bytes / row.weights_bytes,
        "over_rival": {name: over(row, rival, name) for name in speeds},
        "turns": [asdict(turn) for turn in row.turns],
    }


def table(found: Sequence[dict]) -> str:
    """Formats summaries; each speed is followed by what it is over that of the unpacked model."""

    def number(value: float | None, form: str, unit: float = 1) -> str:
        return "-" if value is None else f"{value / unit:{form}}"

    titles = ["model", "MB", "resident MB", "of it bare", "prompt", "x", "decode", "x",
              "against", "its bytes", "prompt", "decode"]  # fmt: skip
    lines = []
    for row in found:
        cells = [f"{row['engine']} {row['model']}", number(row["weights_bytes"], ".1f", 1e6)]
        cells += [number(row[name], ".0f", 1e6) for name in ("resident_bytes", "bare_bytes")]
        for name in ("prompt_tokens_per_second", "decode_tokens_per_second"):
            cells += [number(row[name], ".1f") + "/s", number(row["over_unpacked"][name], ".2f")]
        cells += [row["rival"] or "-", number(row["rival_bytes_over_ours"], ".2f")]
        cells += [number(ratio, ".2f") for ratio in row["over_rival"].values()]
        lines.append(cells)
    return columns(titles, lines)


def told(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "model", type=Path, nargs="?", help="dense Hugging Face folder or .gguf file"
    )
    parser.add_argument(
        "--random", choices=list(SHAPES), help="instead of a model: random weights in these shapes"
    )
    parser.add_argument(
        "--converted", type=Path, nargs="+", default=[], help="folders that atd converted from it"
    )
    parser.add_argument("--backend", default="cpu", help="of the packed models (cpu)")
    parser.add_argument(
        "--activations",
        choices=("model", "int8"),
        default="model",
        help="int8: also measure packed models with 8-bit activations",
    )
    types = llama_tools.TYPES
    parser.add_argument("--types", nargs="*", default=list(types), metavar="TYPE",
                        help=f"of llama.cpp ({' '.join(types)}); none: leave it out")  # fmt: skip
    parser.add_argument("--gguf", type=Path, default=llama_tools.HOME / "models",
                        help="folder in which the files of these types are kept, "
                             "as NAME-TYPE.gguf (.llama-cpp/models)")  # fmt: skip
    parser.add_argument("--prompt", type=int, default=512, help="tokens of the prompt (512)")
    parser.add_argument(
        "--context", type=int, default=128, help="tokens in front of those decoded (128)"
    )
    parser.add_argument("--steps", type=int, default=64, help="tokens decoded (64)")
    parser.add_argument("--repeats", type=int, default=3, help="turns of each model (3)")
    parser.add_argument("--json", type=Path, help="write the figures there as well")
    parser.add_argument("--tiny", action="store_true", help="16 tokens, 8 steps, one repeat")
    options = parser.parse_args()
    if (options.model is None) == (options.random is None):
        parser.error("give a MODEL or --random")
    if options.random and options.converted:
        parser.error("--converted goes with a MODEL")
    if options.tiny:
        options.prompt, options.context, options.steps, options.repeats = 16, 16, 8, 1
    if min(options.prompt, options.context, options.steps, options.repeats) < 1:
        parser.error("--prompt, --context, --steps and --repeats must be at least 1")
    return options


def main() -> None:
    options = parse()
    sizes = Sizes(options.prompt, options.context, options.steps)
    try:
        rows = measure(options, sizes)
    except AtdError as error:
        sys.exit(f"error: {error}")
    found = [summary(row, rows) for row in rows]
    source = options.random or options.model.name
    print(f"{source}, prompt {sizes.prompt}, {sizes.steps} tokens behind {sizes.context}, "
          f"median of {options.repeats}, {threads()} threads, jax {jax.__version__}")  # fmt: skip
    print(table(found))
    if options.json:
        figures = {"source": source, "threads": threads(), "jax": jax.__version__}
        write_json(options.json, {**figures, **asdict(sizes), "rows": found})


if __name__ == "__main__":
    main()
