"""Measures how long this machine takes for each kind of work (`atd.calibration.work`)."""

import hashlib
import mmap
import os
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from math import prod

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from atd.calibration.work import fit_passes, paths
from atd.checkpoint.cache import Cache, cache_key
from atd.decomposition import level_walks, trellis_feedback
from atd.decomposition.least_squares import als
from atd.decomposition.options import trellis_type
from atd.decomposition.quantize import excess_kurtosis
from atd.decomposition.rmse import relative_error
from atd.decomposition.rotations import block_rotation, by_rows
from atd.decomposition.second_moments import matmul
from atd.decomposition.sweeps import BLOCK, sweep_columns
from atd.decomposition.trellis_codes import known_code
from atd.decomposition.trellis_walks import fastest_walks
from atd.errors import BadInput
from atd.ir import Node
from atd.models.execute import compiled_node
from atd.models.numerics import numerics
from atd.weights import Dense, Packed, PackedType, TernaryType
from atd.weights.layouts import DEFAULT_LAYOUT, LAYOUTS

VERSION = 1  # of what is measured: part of the cache's key
ROWS, INPUTS = 1024, 2048  # of matrices that are large enough
WIDE = 4096  # inputs, where more of them take longer for each operation
NEW = 32 << 20  # bytes of memory
PANELS = 8  # products in a row
REPEATS = 3  # of which the fastest counts

Rates = Mapping[str, float]  # kind of work -> seconds for one
# Of two cores of an EPYC processor.
NOMINAL: Rates = {
    "product": 1e-11,
    "moment": 1.2e-11,
    "panel": 1e-11,
    "cholesky": 2.5e-11,
    "solve": 1e-11,
    "column": 1e-8,
    "path": 2.3e-10,
    "fit": 7e-10,
    "sum": 1e-9,
    "page": 1.5e-9,
    "score": 2.5e-11,
    "element": 1e-9,
    "rotate": 7e-9,
    "unpack": 9e-9,
    "judge": 2e-9,
    "byte": 7e-10,
    "program": 0.1,
    "search": 1.0,
}


def rates(cache: Cache | None) -> Rates:
    """Returns the seconds that one of each kind of work takes here, measured where the cache does
    not have them.

    Raises:
        BadInput: the cache folder cannot be written to.
    """
    if cache is not None and (kept := known_rates(cache)) is not None:
        return kept
    found = measured()
    if cache is not None:
        cache.save(_key(), {kind: np.array(seconds) for kind, seconds in found.items()})
    return found


def known_rates(cache: Cache) -> Rates | None:
    """Returns what `rates` measured on this machine; None where it has not, or the cache cannot be
    used.
    """
    kept = None
    with suppress(BadInput):
        kept = cache.load(_key())
    return None if kept is None else {kind: float(seconds) for kind, seconds in kept.items()}


def _key() -> str:
    made_from = [VERSION, sorted(NOMINAL), numerics(), os.cpu_count(), _processor()]
    return cache_key("rates", made_from)


def _processor() -> str:
    """The name of the processor, where the system says it."""
    try:
        with open("/proc/cpuinfo") as file:
            return next((line for line in file if line.startswith("model name")), "")
    except OSError:
        return ""


def measured() -> Rates:
    """Measures all kinds, in some seconds on a free machine."""
    random = np.random.default_rng(0)
    rows = random.standard_normal((ROWS, INPUTS), np.float32)
    wide = random.standard_normal((ROWS, WIDE), np.float32)
    with _compiled_anew():
        return {
            **_products(wide),
            **_sweeps(rows),
            **_nodes(rows),
            **_matrices(rows),
        }


@contextmanager
def _compiled_anew() -> Iterator[None]:
    """Has jax compile what is measured, whether a cache has it or not."""
    before = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)


def _fastest(work: Callable[[], object]) -> float:
    """Seconds of the fastest of REPEATS, after one that compiles."""
    jax.block_until_ready(work())
    seconds = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        jax.block_until_ready(work())
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def _on_all_cores(work: Callable[[], object]) -> Callable[[], object]:
    """The same work once per core, each in a thread."""
    cores = os.cpu_count() or 1

    def everywhere() -> None:
        with ThreadPoolExecutor(cores) as threads:
            list(threads.map(lambda _: jax.block_until_ready(work()), range(cores)))

    return everywhere


def _products(rows: np.ndarray) -> dict[str, float]:
    """Kinds that are algebra."""
    cores, (out, inputs) = os.cpu_count() or 1, rows.shape
    gram = jax.jit(lambda x: matmul(x.T, x))
    square = gram(rows) / out
    moment = square + jnp.eye(inputs)
    factor = jnp.linalg.cholesky(moment)
    solve = jax.jit(partial(lax.linalg.triangular_solve, left_side=False, lower=True))
    block, error = square[:BLOCK] / inputs, jnp.asarray(rows.T)
    total, single = np.zeros((inputs, inputs)), np.asarray(square)

    @jax.jit
    def panel(block, error):
        def column(_, error):
            return lax.dynamic_update_slice_in_dim(error, matmul(block, error), 0, axis=0)

        return lax.fori_loop(0, PANELS, column, error)

    def add() -> None:
        np.add(total, single, out=total)

    def touch() -> None:
        with mmap.mmap(-1, NEW) as memory:
            for start in range(0, NEW, mmap.PAGESIZE):
                memory[start] = 1

    product = jax.jit(matmul)
    panels = _fastest(_on_all_cores(lambda: panel(block, error)))
    solved = _fastest(_on_all_cores(lambda: solve(factor, rows)))
    return {
        "product": _fastest(lambda: product(rows, square)) / (2 * out * inputs**2),
        "moment": _fastest(lambda: gram(rows)) / (2 * out * inputs**2),
        "panel": panels / (cores * PANELS * 2 * BLOCK * inputs * out),
        "solve": solved / (cores * out * inputs**2),
        "cholesky": _fastest(lambda: jnp.linalg.cholesky(moment)) / (inputs**3 / 3),
        "sum": _fastest(add) / inputs**2,
        "page": _fastest(touch) / NEW,
    }


def _sweeps(rows: np.ndarray) -> dict[str, float]:
    """Kinds that make a sweep over columns, and how long its program compiles."""
    cores, inputs = os.cpu_count() or 1, 2 * BLOCK
    code = known_code(2)
    type = trellis_type((len(rows), inputs), code, "f16")
    assert type is not None
    target, scale = jnp.asarray(rows[:, :inputs].T), jnp.ones(len(rows))
    matrix = jnp.zeros((inputs, inputs))

    group = jnp.zeros(inputs, jnp.int32)
    walks, steps = level_walks.fastest_walks(2, True), jnp.ones((1, 1, len(rows)))

    @jax.jit
    def rounded(target, matrix):
        walk = walks(steps, group, level_walks.top(2, True))
        return sweep_columns(target, target, (), matrix=matrix, walk=walk)

    options = {"code": code, "length": type.segment, "walks": fastest_walks(code)}
    seams = jnp.zeros((inputs, len(rows) // type.segment), jnp.int32)
    visit = partial(trellis_feedback.sweep, **options)
    program = jax.jit(lambda *given: visit(*given[:3], matrix=given[3], scale=given[4]))
    started = time.perf_counter()
    compiled = program.lower(target, target, seams, matrix, scale).compile()
    compiling = time.perf_counter() - started
    weights = cores * rows.shape[0] * inputs
    column = _fastest(_on_all_cores(lambda: rounded(target, matrix))) / weights
    searched = _fastest(_on_all_cores(lambda: compiled(target, target, seams, matrix, scale)))
    path = max(searched / weights - column, 0.0) / paths(code)
    return {"column": column, "path": path, "search": compiling}


def _nodes(rows: np.ndarray) -> dict[str, float]:
    """Kinds that are nodes of a model, and how long a small program compiles."""
    heads, head_dim, context, batch = 8, 64, 256, 4
    attrs = {"heads": heads, "kv_heads": heads, "head_dim": head_dim, "window": 0}
    attention = Node("attention", "attention", ("q", "k", "v"), {}, attrs)
    q = jnp.asarray(rows.reshape(-1)[: batch * context * heads * head_dim])
    q = q.reshape(batch, context, -1)
    joined = Node("joined", "silu_mul", ("a", "b"))
    x = jnp.asarray(rows[None])

    def node(node: Node, *inputs) -> object:
        return compiled_node(node, [*inputs], {}, None, None, None, None)[0]

    started = time.perf_counter()
    node(joined, x, x)
    compiling = time.perf_counter() - started
    scores = 4 * batch * context * (context / 2) * heads * head_dim
    return {
        "score": _fastest(lambda: node(attention, q, q, q)) / scores,
        "element": _fastest(lambda: np.array(node(joined, x, x))) / rows.size,
        "program": compiling,
    }


def _matrices(rows: np.ndarray) -> dict[str, float]:
    """Kinds that are done to a matrix, or to its bytes."""
    code, (out, inputs) = known_code(2), rows.shape
    type = trellis_type(rows.shape, code, "f16")
    assert type is not None
    trits = np.zeros(type.trits_shape, np.int8)
    layout = LAYOUTS[DEFAULT_LAYOUT]
    scales = np.ones(type.scales_shape, np.float16)
    made = Packed(layout.pack(trits), scales, PackedType(type, layout.name))
    rotation = block_rotation(np.ones(inputs), inputs)
    fitted = TernaryType((out // 4, inputs), 2, 128, False, "f16")
    weights = Dense(rows)

    def judge() -> tuple[float, float]:
        return excess_kurtosis(rows), relative_error(rows, weights)  # type: ignore[arg-type]

    fit = _fastest(lambda: als(rows[: out // 4], 2, 128, False))
    content = rows.tobytes()
    return {
        "fit": fit / (prod(fitted.shape) * fit_passes(fitted)),
        "rotate": _fastest(lambda: by_rows(rotation.apply, rows, np.dtype(np.float32))) / rows.size,
        "unpack": _fastest(lambda: np.array(made.dequantize())) / rows.size,
        "judge": _fastest(judge) / rows.size,
        "byte": _fastest(lambda: hashlib.sha256(content).digest()) / len(content),
    }
