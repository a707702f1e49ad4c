"""Measures how fast whole models are: time to first token, tokens/s, memory.

first token
    Reading a prompt and taking the likeliest token after it, once compiled.
decode
    One sequence, greedy, as `atd.generate` does it: the host takes a token while the device makes
    the next. `model.decode` is a compiled function, on a CPU one per block; `host` is the share of
    a step that the host spends on calls.
one jit
    The same steps in one compiled loop: what the device could do if nothing came from the host.
peak
    The most memory of the device, loading and compiled work space included; unknown on a CPU.

All figures are medians over repeats. The models take turns within each repeat, so that a busy
machine slows all alike.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median

import jax
import jax.numpy as jnp
import numpy as np

from atd.errors import BadInput
from atd.ir import Graph
from atd.kernels.tuning.timing import columns
from atd.models.model import Cache, Model
from atd.progress import Progress, Report, unheard
from atd.runtime.generate import CHUNK

_TITLES = [
    "model",
    "backend",
    "MB",
    "peak MB",
    "first token",
    "x",
    "decode",
    "x",
    "host",
    "one jit",
    "x",
]


@dataclass(frozen=True)
class Speed:
    """The figures of a model."""

    model: str
    backend: str
    weights_bytes: int
    peak_bytes: int | None
    first_token_seconds: float
    prefill_tokens_per_second: float
    decode_seconds: float  # per token
    decode_tokens_per_second: float
    host_seconds: float  # per token, of decode_seconds
    one_jit_tokens_per_second: float | None
    compile_seconds: float  # the first prompt and its steps, less what they take once compiled


def measure(
    loaders: Mapping[str, Callable[[], Model]],
    *,
    prompt: int,
    steps: int,
    repeats: int,
    one_jit: bool,
    chunk: int = CHUNK,
    progress: Report = unheard,
) -> list[Speed]:
    """Measures models, in the order of the loaders.

    Args:
        loaders: by name. Give the smallest model first: each one's peak is seen only above the
            peaks before it.
        prompt: tokens that are read.
        steps: tokens that are decoded after them.
        repeats: rounds over all models.
        one_jit: whether the steps are measured compiled as one as well.
        chunk: tokens of the prompt that are read at a time.
        progress: hears of models that are compiled and of rounds.

    Raises:
        BadInput: prompt, steps or repeats are below 1, or more than a model's context.
    """
    if min(prompt, steps, repeats) < 1:
        raise BadInput(f"prompt {prompt}, steps {steps} and repeats {repeats} must be at least 1")
    models: dict[str, Model] = {}
    peaks: dict[str, int | None] = {}
    first: dict[str, float] = {}
    tokens = np.zeros((1, prompt), np.int32)
    for name, load in loaders.items():
        progress(Progress("compiling", len(models), len(loaders), "models", name))
        before = _memory()
        models[name] = load()
        check_room(name, models[name], prompt, steps, one_jit)
        started = time.perf_counter()
        _samples(models[name], tokens, steps, one_jit, chunk)
        first[name] = time.perf_counter() - started
        peaks[name] = _peak_since(before)
    progress(Progress("compiling", len(loaders), len(loaders), "models"))
    random = np.random.default_rng(0)
    samples: dict[str, list[tuple]] = {name: [] for name in models}
    for repeat in range(repeats):
        vocabulary = min(model.vocabulary for model in models.values())
        tokens = random.integers(0, vocabulary, (1, prompt)).astype(np.int32)
        for name, model in models.items():
            samples[name].append(_samples(model, tokens, steps, one_jit, chunk))
        progress(Progress("measuring", repeat + 1, repeats, "repeats"))
    return [
        _speed(name, models[name], peaks[name], first[name], samples[name], prompt, steps)
        for name in models
    ]


def speed_table(rows: Sequence[Speed], against: str | None = None) -> str:
    """Formats figures side by side.

    Args:
        against: the model to which the others are compared, in columns "x".
    """
    base = next((row for row in rows if row.model == against), None)

    def ratio(figure: str, row: Speed) -> str:
        value, of_base = getattr(row, figure), getattr(base, figure) if base else None
        return f"{value / of_base:.2f}" if value and of_base else "-"

    def cells(row: Speed) -> list[str]:
        one_jit = row.one_jit_tokens_per_second
        return [
            row.model,
            row.backend,
            f"{row.weights_bytes / 1e6:.1f}",
            f"{row.peak_bytes / 1e6:.0f}" if row.peak_bytes else "-",
            f"{1e3 * row.first_token_seconds:.1f} ms",
            ratio("prefill_tokens_per_second", row),
            f"{row.decode_tokens_per_second:.1f}/s",
            ratio("decode_tokens_per_second", row),
            f"{row.host_seconds / row.decode_seconds:.0%}",
            f"{one_jit:.1f}/s" if one_jit else "-",
            ratio("one_jit_tokens_per_second", row),
        ]

    return columns(_TITLES, [cells(row) for row in rows])


def prefill_seconds(
    model: Model, prompt: np.ndarray, length: int, chunk: int | None = None
) -> tuple[float, Cache, jax.Array]:
    """Measures one prefill of a prompt int32 [1, T] into a new cache of `length` positions.

    Args:
        model: what `atd.load` returns.
        prompt: ids.
        length: of the cache.
        chunk: tokens that are read at a time; None: all.

    Returns:
        Seconds, the cache, and the likeliest next token [1].
    """
    cache = model.new_cache(1, length)
    jax.block_until_ready(cache.blocks)
    started = time.perf_counter()
    logits, cache = model.prefill(prompt, cache, chunk=chunk)
    token = jax.block_until_ready(logits.argmax(axis=-1))
    return time.perf_counter() - started, cache, token


def decode_seconds(
    model: Model, token: jax.Array, cache: Cache, steps: int
) -> tuple[float, float, Cache, jax.Array]:
    """Measures steps of decoding, each waited for as `atd.generate` does.

    Returns:
        Median seconds per token, those of them that the host spends on calls, the cache, and the
        last token [1].
    """
    seconds, calls = [], []
    for _ in range(steps):
        started = time.perf_counter()
        logits, cache = model.decode(token, cache)
        called = time.perf_counter()
        following = logits.argmax(axis=-1)
        jax.block_until_ready(token)  # the host looks at this one while the device makes the next
        token = following
        seconds.append(time.perf_counter() - started)
        calls.append(called - started)
    jax.block_until_ready(token)
    return median(seconds), median(calls), cache, token


def one_jit_seconds(model: Model, token: jax.Array, cache: Cache, steps: int) -> float:
    """Returns the seconds per token of this many steps compiled as one. Uses the cache up."""
    started = time.perf_counter()
    done = decode_steps(model, token, cache.blocks, cache.positions, cache.length, steps)
    jax.block_until_ready(done)
    return (time.perf_counter() - started) / steps


@partial(jax.jit, static_argnames=("length", "steps"), donate_argnames=("blocks",))
def decode_steps(
    model: Model, token: jax.Array, blocks, positions: jax.Array, length: int, steps: int
):
    """Decodes greedily without the host.

    Args:
        token: int32 [B].
        blocks, positions, length: of a `Cache`; the blocks are used up.
        steps: tokens to decode.

    Returns:
        The tokens int32 [steps, B], and the blocks of the new cache.
    """

    def step(carry, _):
        token, blocks, positions = carry
        logits, cache = model.decode(token, Cache(blocks, positions, 0, length))
        token = logits.argmax(axis=-1).astype(jnp.int32)
        return (token, cache.blocks, cache.positions), token

    carry = (token.astype(jnp.int32), blocks, positions)
    (_, blocks, _), tokens = jax.lax.scan(step, carry, length=steps)
    return tokens, blocks


def _samples(
    model: Model, tokens: np.ndarray, steps: int, one_jit: bool, chunk: int
) -> tuple[float, float, float, float | None]:
    """Seconds of (prefill, decode, host, one jit)."""
    length = tokens.shape[1] + 2 * steps
    prefill, cache, token = prefill_seconds(model, tokens, length, chunk)
    decode, host, cache, token = decode_seconds(model, token, cache, steps)
    return prefill, decode, host, one_jit_seconds(model, token, cache, steps) if one_jit else None


def _speed(
    name: str,
    model: Model,
    peak: int | None,
    first: float,
    samples: list[tuple],
    prompt: int,
    steps: int,
) -> Speed:
    prefill, decode, host = (median(sample[i] for sample in samples) for i in range(3))
    one_jit = median(sample[3] for sample in samples) if samples[0][3] is not None else None
    return Speed(
        model=name,
        backend=model.backend,
        weights_bytes=model.weights_nbytes,
        peak_bytes=peak,
        first_token_seconds=prefill,
        prefill_tokens_per_second=prompt / prefill,
        decode_seconds=decode,
        decode_tokens_per_second=1 / decode,
        host_seconds=host,
        one_jit_tokens_per_second=1 / one_jit if one_jit else None,
        compile_seconds=first - prefill - steps * (decode + (one_jit or 0)),
    )


def check_room(name: str, model: Model | Graph, prompt: int, steps: int, one_jit: bool) -> None:
    """Raises BadInput for a prompt and steps beyond the positions that a model was made for."""
    tokens = prompt + (2 if one_jit else 1) * steps
    if model.max_context and tokens > model.max_context:
        raise BadInput(
            f"{name} takes {model.max_context} tokens; prompt and steps are {tokens}: "
            f"--prompt, --steps"
        )


def _memory() -> tuple[int, int] | None:
    """(bytes in use, the most so far) on the device; None where it does not say."""
    stats = jax.devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" not in stats:
        return None
    return stats["bytes_in_use"], stats["peak_bytes_in_use"]


def _peak_since(before: tuple[int, int] | None) -> int | None:
    """The peak over what was in use before; None where an earlier peak hides it."""
    after = _memory()
    if before is None or after is None or after[1] <= before[1]:
        return None
    return after[1] - before[0]
