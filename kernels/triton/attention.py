"""Attention of one new token of each sequence, in one Pallas kernel for Triton.

    q, k   rotated to their position
    cache  k and v written into the place of their position, where the cache lies
    mixed  softmax(q k^T / sqrt(head_dim)) v over the places up to it

XLA takes six launches for it: rope of q and of k, two updates of the cache, scores and softmax,
mix. For so little work a launch costs more than the work.

A block of threads has one head of keys, and one or a few of the query heads that attend to it. It
reads the cache in *tiles* [places, features], 16 bytes per thread, and every row of the tiles keeps
a softmax of its own: the largest score so far, the sum of its weights and of its weighted values.
So rows, and the warps that hold them, need nothing of one another until the end, where they are
joined, together with the new token. That one never comes out of the cache, where another block may
not have written it yet. Tiles beyond the position are not read.

A cache in 8 bits is read as it lies: codes, and a scale per place. Scales of keys multiply scores,
and those of values the weights. The new token's are rounded as `atd.models.ops.codes_of` does.

In a long cache several blocks share the places of a head; what they find is joined by a second,
small kernel.
"""

import functools
import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl

from atd.kernels.packed import Part
from atd.kernels.triton.floats import cos_sin, multiply_add, nearest, power_of_2, wide
from atd.kernels.triton.ptx import plt

WARPS = 8
PROGRAMS = 128  # blocks that a GPU runs at once, about: one per multiprocessor
MOST_QUERIES = 4  # of a block; more do not fit the registers
LONG = 1024  # places of a cache that one block reads alone
LEAST_SHARE = 512  # places for each of several blocks
FLOOR = -1e30  # of the largest score: finite, so that a row without a place weighs 0 and not NaN


def refuses(cache: tuple[jax.Array, ...]) -> str | None:
    """Returns why the kernel cannot attend to this cache, or None."""
    head_dim = cache[0].shape[-1]
    if cache[0].dtype not in (jnp.float32, jnp.bfloat16, jnp.float16, jnp.int8):
        return f"it reads caches in float32, bfloat16, float16 or int8, not {cache[0].dtype}"
    if head_dim % 2 or head_dim > 256:
        return f"it takes even sizes of heads up to 256, not {head_dim}"
    if cache[0].size >= 2**31:
        return "it counts the elements of a cache in 32 bits"
    return None


@dataclass(frozen=True)
class Geometry:
    """One attention of a new token of each sequence.

    Attributes:
        batch: sequences.
        heads, kv_heads: of queries, and of keys and values.
        head_dim: features of a head.
        length: places of the cache.
        window: places that a token attends to, its own included; 0: all up to its own.
        starts, widths: of q, k and v: the first feature in its array, and the features of that
            array.
        splits: blocks of threads that share the places of a head.
        rows: places of a tile.
        codes: whether the cache is in 8 bits.
        interpret: whether jax's interpreter runs the kernel, in which PTX is replaced by its twins
            in jnp.
    """

    batch: int
    heads: int
    kv_heads: int
    head_dim: int
    length: int
    window: int
    starts: tuple[int, int, int]
    widths: tuple[int, int, int]
    splits: int
    rows: int
    codes: bool = False
    interpret: bool = False

    @property
    def group(self) -> int:
        """Query heads that attend to one head of keys."""
        return self.heads // self.kv_heads

    @property
    def queries(self) -> int:
        """Query heads of a block."""
        return queries_of(self.batch * self.heads, self.group, self.splits)

    @property
    def tiles(self) -> int:
        """Tiles that a block reads in one turn of its loop."""
        most = (4 if self.queries == 1 else 2) // (1 + self.codes)  # with codes tiles are larger
        return max(1, min(most, 128 // self.rows))

    @property
    def padded_dim(self) -> int:
        return pl.next_power_of_2(self.head_dim)


def attend(
    q: Part,
    k: Part,
    v: Part,
    positions: jax.Array,
    cache: tuple[jax.Array, ...],
    frequencies: np.ndarray,
    heads: int,
    window: int = 0,
    *,
    splits: int | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """Computes softmax(q k^T / sqrt(head_dim)) v, and updates the cache where it lies.

    Args:
        q, k, v, positions, cache, frequencies, heads, window: as in `packed.Backend.attend`, which
            says what is returned.
        splits: blocks that share the places of a head, instead of as many as suit the cache.
    """
    batch, kv_heads, length, head_dim = cache[0].shape
    splits = splits or splits_of(batch * kv_heads, length)
    at_once = WARPS * 32 * 16 // cache[0].dtype.itemsize  # elements, of 16 bytes per thread
    g = Geometry(
        batch=batch, heads=heads, kv_heads=kv_heads, head_dim=head_dim, length=length,
        window=window, starts=(q[1], k[1], v[1]), widths=tuple(x.shape[-1] for x, _ in (q, k, v)),
        splits=splits, rows=max(1, at_once // pl.next_power_of_2(head_dim)),
        codes=cache[0].dtype == jnp.int8, interpret=interpret,
    )  # fmt: skip
    shape = jax.ShapeDtypeStruct
    cache_shapes = [shape((c.size,), c.dtype) for c in cache]
    parts = batch * heads * splits
    if splits == 1:
        found_shapes = [shape((parts * head_dim,), q[0].dtype)]
    else:
        found_shapes = [shape((size,), jnp.float32) for size in (parts * head_dim, parts, parts)]
    angles = jnp.asarray(np.concatenate([frequencies, frequencies]))  # of both features of a pair
    inputs = [positions, angles, q[0], k[0], v[0], *cache]
    caches_in, caches_out = len(inputs) - len(cache), len(found_shapes)
    results = pl.pallas_call(
        functools.partial(_kernel, g=g),
        out_shape=[*found_shapes, *cache_shapes],
        grid=(batch, heads // g.queries, splits),
        input_output_aliases={caches_in + i: caches_out + i for i in range(len(cache))},
        compiler_params=plt.CompilerParams(num_warps=WARPS, num_stages=1),
        interpret=interpret,
        name=name(head_dim, g.codes),
    )(*(x.reshape(-1) for x in inputs))
    found, new = results[:caches_out], results[caches_out:]
    mixed = found[0] if splits == 1 else _joined(g, found, q[0].dtype)
    mixed = mixed.reshape(batch, 1, heads * head_dim)
    return mixed, tuple(part.reshape(old.shape) for part, old in zip(new, cache, strict=True))


def name(head_dim: int, codes: bool = False) -> str:
    """Returns the kernel's name in traces and dumps."""
    return f"attention_d{head_dim}{'_int8' if codes else ''}"


def splits_of(kv_programs: int, length: int) -> int:
    """Returns how many blocks share the places of a head of keys, enough to fill a GPU.

    Args:
        kv_programs: heads of keys of all sequences.
        length: places of the cache.
    """
    if length <= LONG:
        return 1
    return max(1, min(PROGRAMS // kv_programs, length // LEAST_SHARE))


def queries_of(heads: int, group: int, splits: int) -> int:
    """Returns the query heads of a block, a divisor of the group.

    In a short cache as few as a GPU has room for, which is fastest though keys are read several
    times, out of the L2; in a long one as many as there may be.
    """
    divisors = [n for n in range(1, min(group, MOST_QUERIES) + 1) if group % n == 0]
    few = (n for n in divisors if heads // n <= PROGRAMS)
    return next(few, divisors[-1]) if splits == 1 else divisors[-1]


def _kernel(positions_ref, angles_ref, q_ref, k_ref, v_ref, *refs, g: Geometry):
    parts = 4 if g.codes else 2  # of a cache
    cache_refs, found_refs, new_refs = refs[:parts], refs[parts:-parts], refs[-parts:]
    batch, part, split = (pl.program_id(axis) for axis in range(3))
    first_head = part * g.queries
    kv_head = lax.div(first_head, g.group)
    cache_at = (batch * g.kv_heads + kv_head) * g.length
    feature, half = lax.iota(jnp.int32, g.padded_dim), g.head_dim // 2
    used = feature < g.head_dim
    position = positions_ref[batch]

    # Tiles of this block: number split, split + splits, ... of those from the window's beginning to
    # the position.
    tile_places = g.rows * g.tiles
    first = jnp.maximum(position - g.window + 1, 0) if g.window else 0
    last = jnp.minimum(position, g.length)  # the new token's own place is not read
    first_tile = lax.div(first, tile_places) + split if g.window else split
    of_turn = tile_places * g.splits
    turns = lax.div(jnp.maximum(last - first_tile * tile_places, 0) + (of_turn - 1), of_turn)
    shape = g.rows, feature.size
    row, column = (lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (0, 1))

    def seen(row: jax.Array, turn, tile: int) -> tuple[jax.Array, jax.Array]:
        """(places of rows, which of them are attended to)."""
        place = (first_tile + turn * g.splits) * tile_places + tile * g.rows + row
        return place, (place >= first) & (place < last)

    def read(turn) -> list[list[jax.Array]]:
        """k of each tile of a turn, and v of each: [rows, features], 0 where nothing is attended
        to; with codes their scales [rows] too."""

        def load(ref, tile: int) -> jax.Array:
            place, mine = seen(row, turn, tile)
            at, mask = (cache_at + place) * g.head_dim + column, mine & (column < g.head_dim)
            return plt.load(ref.at[at], mask=mask, other=jnp.zeros((), ref.dtype))

        def load_scales(ref, tile: int) -> jax.Array:
            place, mine = seen(lax.iota(jnp.int32, g.rows), turn, tile)
            return plt.load(ref.at[cache_at + place], mask=mine, other=0.0)

        loads = zip((load, load, load_scales, load_scales), cache_refs, strict=False)
        return [[of(ref, tile) for tile in range(g.tiles)] for of, ref in loads]

    ahead = read(0)  # on its way while q and k are rotated

    def load_new(ref, part: int, head, feature: jax.Array) -> jax.Array:
        """One head of the new token's q, k or v."""
        at = batch * g.widths[part] + g.starts[part] + head * g.head_dim + feature
        return plt.load(ref.at[at], mask=used, other=jnp.zeros((), ref.dtype)).astype(jnp.float32)

    angle = position.astype(jnp.float32) * plt.load(angles_ref.at[feature], mask=used, other=0.0)
    cos, sin = cos_sin(angle, g.interpret)

    def rotated(ref, part: int, head) -> jax.Array:
        partner = jnp.where(feature < half, feature + half, feature - half)
        other = load_new(ref, part, head, partner)
        straight = load_new(ref, part, head, feature) * cos
        turned = straight + jnp.where(feature < half, -other, other) * sin
        return turned.astype(ref.dtype).astype(jnp.float32)  # as it would be in memory

    # One block of those with this head writes.
    writes = (first_head == kv_head * g.group) & (split == 0) & (position < g.length)

    def stored(part: int, new: jax.Array) -> jax.Array:
        """The new token's k (part 0) or v (1) as the cache holds it."""
        codes, scale = _codes_of(new, g.interpret) if g.codes else (new, 1.0)
        ref, place = new_refs[part], cache_at + position
        codes = codes.astype(ref.dtype)
        plt.store(ref.at[place * g.head_dim + feature], codes, mask=used & writes)
        if not g.codes:
            return codes.astype(jnp.float32)
        plt.store(new_refs[2 + part].at[place], scale, mask=writes)
        return codes.astype(jnp.float32) * scale

    new_k = stored(0, rotated(k_ref, 1, kv_head))
    new_v = stored(1, load_new(v_ref, 2, kv_head, feature))
    factor = math.log2(math.e) / math.sqrt(g.head_dim)  # weights are powers of 2
    qs = [rotated(q_ref, 0, first_head + i) * factor for i in range(g.queries)]
    new_scores = [jnp.where(split == 0, jnp.sum(q * new_k), -jnp.inf) for q in qs]

    def turn(i, carry):
        states, now = carry
        ahead = read(i + 1)
        mine = [seen(lax.iota(jnp.int32, g.rows), i, tile)[1] for tile in range(g.tiles)]
        ks, vs = ([wide(tile, g.interpret) for tile in tiles] for tiles in now[:2])
        tiles = {"ks": ks, "vs": vs, "scales": now[2:], "mine": mine}
        attended = functools.partial(_attended, **tiles, interpret=g.interpret)
        return tuple(attended(q, state) for q, state in zip(qs, states, strict=True)), ahead

    nothing = (
        jnp.full((g.rows,), FLOOR, jnp.float32),
        jnp.zeros((g.rows,), jnp.float32),
        jnp.zeros(shape, jnp.float32),
    )
    states, _ = lax.fori_loop(0, turns, turn, ((nothing,) * g.queries, ahead))

    for i, (largest, total, mixed) in enumerate(states):
        largest_of_all = jnp.maximum(jnp.max(largest), new_scores[i])
        scale = jnp.exp2(largest - largest_of_all)
        new_weight = jnp.exp2(new_scores[i] - largest_of_all)
        total = jnp.sum(total * scale) + new_weight
        found = jnp.sum(mixed * scale[:, None], axis=0) + new_weight * new_v
        head = (batch * (g.kv_heads * g.group) + first_head + i) * g.splits + split
        if g.splits == 1:
            found = (found / total).astype(q_ref.dtype)
        else:
            found_refs[1][head] = largest_of_all
            found_refs[2][head] = total
        plt.store(found_refs[0].at[head * g.head_dim + feature], found, mask=used)


def _codes_of(x: jax.Array, interpret: bool) -> tuple[jax.Array, jax.Array]:
    """(codes int32, scale) of x float32 [features]."""
    largest = jnp.max(jnp.abs(x))
    inverse = jnp.where(largest > 0, 127 / largest, 0.0)
    return nearest(x * inverse, interpret).astype(jnp.int32), largest / 127


def _attended(
    q,
    state,
    *,
    ks: list[jax.Array],
    vs: list[jax.Array],
    scales: list[list[jax.Array]],
    mine: list[jax.Array],
    interpret: bool,
):
    """The state of one query after more tiles.

    Args:
        state: (largest score [rows], sum of weights [rows], weighted values [rows, features]).
        ks, vs: [rows, features] of each tile.
        scales: of ks and of vs, [rows] of each tile; of those without codes none.
        mine: which rows count, [rows] of each tile.
    """
    largest, total, mixed = state
    sums = [jnp.sum(q[None] * k, axis=1) for k in ks]
    if scales:
        sums = [s * scale for s, scale in zip(sums, scales[0], strict=True)]
    scores = [jnp.where(m, s, -jnp.inf) for s, m in zip(sums, mine, strict=True)]
    new_largest = functools.reduce(jnp.maximum, scores, largest)
    scale = power_of_2(largest - new_largest, interpret)
    total, mixed = total * scale, mixed * scale[:, None]
    for i, (v, score) in enumerate(zip(vs, scores, strict=True)):
        weight = power_of_2(score - new_largest, interpret)
        total = total + weight
        weight = weight * scales[1][i] if scales else weight
        mixed = multiply_add(weight[:, None], v, mixed, interpret)
    return new_largest, total, mixed


def _joined(g: Geometry, found: list[jax.Array], dtype) -> jax.Array:
    """Joins what the blocks of each head found -> [heads x head_dim] of all sequences.

    found: weighted values [heads x splits x head_dim], largest scores and sums of weights [heads x
    splits].
    """
    heads = g.batch * g.heads

    def kernel(mixed_ref, largest_ref, total_ref, joined_ref):
        head = pl.program_id(0)
        shape = pl.next_power_of_2(g.splits), g.padded_dim
        split, feature = (lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (0, 1))
        each = lax.iota(jnp.int32, shape[0])

        def of_each(ref, other: float) -> jax.Array:
            return plt.load(ref.at[head * g.splits + each], mask=each < g.splits, other=other)

        largest, total = of_each(largest_ref, FLOOR), of_each(total_ref, 0.0)
        at = (head * g.splits + split) * g.head_dim + feature
        mask = (split < g.splits) & (feature < g.head_dim)
        mixed = plt.load(mixed_ref.at[at], mask=mask, other=0.0)
        scale = jnp.exp2(largest - jnp.max(largest))
        joined = jnp.sum(mixed * scale[:, None], axis=0) / jnp.sum(total * scale)
        feature = lax.iota(jnp.int32, shape[1])
        place = joined_ref.at[head * g.head_dim + feature]
        plt.store(place, joined.astype(joined_ref.dtype), mask=feature < g.head_dim)

    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((heads * g.head_dim,), dtype),
        grid=(heads,),
        compiler_params=plt.CompilerParams(num_warps=4, num_stages=1),
        interpret=g.interpret,
        name="attention_join",
    )(*found)
