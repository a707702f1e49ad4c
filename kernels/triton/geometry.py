"""The sizes of a product of few tokens, from which the kernels of `fold` and `gemv` take theirs,
and where layout `tiles` has a word."""

from dataclasses import dataclass

import jax
from jax.experimental import pallas as pl

from atd.kernels import prefixes
from atd.kernels.prefixes import Plan
from atd.kernels.settings import Shape
from atd.kernels.triton.ptx import divided
from atd.weights import TernaryType
from atd.weights.layouts import LAYOUTS, LOAD_WORDS, THREADS_PER_ROW, TILE_ROWS, unit

ROWS, SET = TILE_ROWS, 8  # of one matrix instruction: rows of the matrix, columns of activations
BYTES = 3  # of a coefficient
MOST_SETS = 6  # of columns: a thread holds 4 sums of each, and as many activations


@dataclass(frozen=True)
class Columns:
    """Where activations lie among the columns of matrix instructions, which come in *sets* of 8.

    A token has sums x slots coefficients per prefix (`prefixes.fold`), of three bytes each. Where
    all of them fit into one set, a column holds one byte of one coefficient: column (token, sum,
    slot, byte). Else a column holds one coefficient, in three sets, one for each of its bytes:
    column (token, sum, slot). A group of 8 such columns is an *octet*.

    Attributes:
        tokens: multiplied together.
        sums: `Plan.sums`, 1 for tied scales, N for free ones.
        slots: scale groups that one step can touch; 1 where a row has one scale.
    """

    tokens: int
    sums: int
    slots: int = 1

    @property
    def coefficients(self) -> int:
        return self.tokens * self.sums * self.slots

    @property
    def apart(self) -> bool:
        """Whether each byte has sets of its own."""
        return BYTES * self.coefficients > SET

    @property
    def octets(self) -> int:
        return -(-self.coefficients // SET)

    @property
    def sets(self) -> int:
        return BYTES * self.octets if self.apart else 1

    @property
    def kept(self) -> int:
        """Columns of a set in memory, a power of two; those that are missing are read again."""
        used = self.coefficients if self.apart else BYTES * self.coefficients
        return pl.next_power_of_2(min(SET, used))

    def of(self, octet, column: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """Returns (token, sum, slot, byte) of a column of an octet's sets.

        The byte is that of columns which are not `apart`. Tokens of columns beyond the last one are
        too large.
        """
        rest, byte = (column + octet * SET, column * 0) if self.apart else divided(column, BYTES)
        rest, slot = divided(rest, self.slots)
        token, sum_ = divided(rest, self.sums)
        return token, sum_, slot, byte


@dataclass(frozen=True)
class Geometry:
    """One product of few tokens: what is multiplied, and how the work is cut.

    Attributes:
        type: of the matrix [out, in].
        tokens: multiplied together.
        shape: how the work is cut into blocks of threads; `paired` where the product is gated.
        gated: whether the matrix is a gate above an up matrix, and the result silu(gate) * up
            [tokens, out / 2].
        planes: whether the sums of the bases are results of their own, without scales:
            T_i x [tokens x N, out]. The type has free scales.
        interpret: whether jax's interpreter runs the kernels, in which PTX is replaced by its twins
            in jnp.
    """

    type: TernaryType
    tokens: int
    shape: Shape
    gated: bool = False
    planes: bool = False
    interpret: bool = False

    @property
    def plan(self) -> Plan:
        return prefixes.plan(self.type.bases, self.type.tied)

    @property
    def out(self) -> int:
        """Rows of the matrix."""
        return self.type.shape[0]

    @property
    def inputs(self) -> int:
        """Columns of the matrix."""
        return self.type.shape[1]

    @property
    def results(self) -> int:
        """Values of y per token."""
        return self.out // 2 if self.gated else self.out

    @property
    def tiles(self) -> int:
        """Groups of 16 rows, the last one padded."""
        return LAYOUTS["tiles"].codes_shape(*self.type.shape, self.type.bases)[0]

    @property
    def steps(self) -> int:
        """Steps of a row: 4 pieces each, the last one padded."""
        return LAYOUTS["tiles"].codes_shape(*self.type.shape, self.type.bases)[1]

    @property
    def padded_steps(self) -> int:
        """Steps that the warps of a block take together, the last turn of their loop full."""
        return self.turns * self.shape.splits * self.shape.unroll

    @property
    def turns(self) -> int:
        """Turns of a block's loop."""
        return -(-self.steps // (self.shape.splits * self.shape.unroll))

    @property
    def groups(self) -> int:
        """Scale groups of a row."""
        return self.type.scales_shape[1]

    @property
    def group_size(self) -> int | None:
        """Inputs per scale; None where a row has one scale, or all rows the same one."""
        return self.type.group_size if self.groups > 1 else None

    @property
    def columns(self) -> Columns:
        slots = 1
        if self.group_size is not None:
            slots = prefixes.slots_of(self.plan, self.steps, self.group_size)[1]
        return Columns(self.tokens, self.plan.sums, slots)

    @property
    def vectors(self) -> int:
        """Vectors of results: one per token, or per token and base."""
        return self.tokens * (self.plan.sums if self.planes else 1)

    @property
    def result_columns(self) -> Columns:
        """The columns as parts of vectors of results instead of tokens."""
        return Columns(self.vectors, 1) if self.planes else self.columns

    @property
    def name(self) -> str:
        """The gemv kernel's name in traces and dumps."""
        columns = self.columns
        kind = "planes" if self.planes else "gemv"
        return f"ternary_{kind}_{self.plan}_c{columns.sets * columns.kept}"


def most_tokens(type: TernaryType, tokens: int) -> int:
    """Returns how many of some tokens one product can have; 0: not even one."""
    fits = (m for m in range(tokens, 0, -1) if Geometry(type, m, Shape()).columns.sets <= MOST_SETS)
    return next(fits, 0)


def word_at(row: jax.Array, word: jax.Array, bases: int, steps: int) -> jax.Array:
    """Returns where a word of a row lies in the flat codes of layout `tiles`, int32.

    Args:
        row, word: int32 arrays that broadcast.
        bases: N.
        steps: of a row.
    """
    loads = unit(bases)[0]
    step, rest = divided(word, THREADS_PER_ROW * loads * LOAD_WORDS)
    if loads > 1:  # of a thread, one after the other
        thread, rest = divided(rest, loads * LOAD_WORDS)
        load, e = divided(rest, LOAD_WORDS)
        rest = load * 256 + thread * LOAD_WORDS + e
    group, of_group = divided(row, ROWS)
    half, g = divided(of_group, ROWS // 2)
    return (group * (steps * loads * 256) + half * 128 + g * 16) + (step * (loads * 256) + rest)
