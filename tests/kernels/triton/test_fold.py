"""The folding kernel against `prefixes.fold` and `prefixes.fragments`, which define what it
computes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atd.kernels import prefixes
from atd.kernels.settings import Shape
from atd.kernels.triton.fold import Norm, fold
from atd.kernels.triton.geometry import Geometry
from atd.weights import TernaryType
from tests.kernels.matrices import unoptimized


def geometry(inputs: int, tokens: int, bases=2, tied=True, group: int | str = "row") -> Geometry:
    type = TernaryType((16, inputs), bases, group, tied, "f16")
    return Geometry(type, tokens, Shape(warps=1), interpret=True)


def folded(g: Geometry, x: jax.Array, norm: Norm | None = None) -> tuple[jax.Array, jax.Array]:
    """In the interpreter, compiled in a hurry."""
    return unoptimized(lambda x: fold(g, x, norm))(x)


def in_order(g: Geometry, x: jax.Array) -> np.ndarray:
    """Computes by XLA what `fold` does."""
    plan, steps, columns = g.plan, g.padded_steps, g.columns
    coefficients, _ = prefixes.fold(plan, x, steps, g.group_size)
    # [steps, words, columns, 4 threads]
    words = prefixes.fragments(coefficients, 3 * columns.coefficients)
    words = np.asarray(words).reshape(steps, plan.words // 4, 4, -1, 3, 4)  # coefficients, bytes
    placed = np.zeros((steps, plan.words // 4, columns.sets, columns.kept, 4, 4), np.uint32)
    for coefficient in range(columns.coefficients):
        octet, column = divmod(coefficient, 8)
        for byte in range(3):
            set_, at = (3 * octet + byte, column) if columns.apart else (0, 3 * coefficient + byte)
            placed[:, :, set_, at] = words[:, :, :, coefficient, byte].swapaxes(2, 3)
    return placed.reshape(-1)


@pytest.mark.parametrize(
    ("bases", "tied", "tokens", "group", "dtype"),
    [
        (2, True, 4, "row", jnp.bfloat16),
        (3, True, 1, 128, jnp.float32),
        (1, True, 16, "row", jnp.float32),
        pytest.param(2, False, 2, "row", jnp.float16, marks=pytest.mark.slow),
        pytest.param(4, True, 2, "row", jnp.float32, marks=pytest.mark.slow),
        pytest.param(1, True, 1, "row", jnp.float32, marks=pytest.mark.slow),
        pytest.param(2, False, 1, 128, jnp.float32, marks=pytest.mark.slow),
        pytest.param(2, True, 16, "row", jnp.float32, marks=pytest.mark.slow),
    ],
)
def test_it_folds_as_xla_does(bases, tied, tokens, group, dtype):
    plan, random = prefixes.plan(bases, tied), np.random.default_rng(0)
    inputs = 6 * 4 * plan.piece_params - 17  # the last of six steps is not full
    g = geometry(inputs, tokens, bases, tied, group)
    assert g.padded_steps == 6
    # Integers, one of them the limit, so that both have the unit 1 and no rounding is a close call.
    x = random.integers(-99, 100, (tokens, inputs)).astype(np.float32)
    x[:, 3] = -(2.0 ** np.floor(np.log2(plan.limit)))
    x = jnp.asarray(x / 2.0**12, dtype)  # float16 ends at 65504
    words, largest = folded(g, x)
    wanted = in_order(g, x)
    np.testing.assert_array_equal(largest, np.abs(np.asarray(x, np.float32)).max(axis=1))
    parts = [v.view(np.uint8).astype(int) for v in (np.asarray(words), wanted)]
    off = np.abs(parts[0] - parts[1])
    off_at_most = np.minimum(off, 256 - off)  # halves are rounded another way
    assert (off_at_most <= 2 * plan.factor.max() + 1).all()
    assert (off > 0).mean() < 0.01


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_a_token_that_is_not_finite_is_known_by_its_largest(bad):
    x = np.ones((2, 5000), np.float32)
    x[1, 4500] = bad
    _, largest = folded(geometry(5000, 2), jnp.asarray(x))
    np.testing.assert_array_equal(largest, [1.0, np.nan])


def test_tokens_of_zeros_are_zeros():
    words, largest = folded(geometry(320, 1), jnp.zeros((1, 320)))
    assert not np.asarray(words).any()
    assert largest.tolist() == [0.0]


@pytest.mark.parametrize("inputs", [300, 5000])
def test_a_norm_is_folded_as_what_it_makes(inputs):
    """Words of the activations made first, but for close calls of rounding; and the largest of
    them."""
    g, random = geometry(inputs, 2), np.random.default_rng(0)
    norm = Norm(jnp.asarray(random.uniform(0.5, 2, inputs), jnp.float32), 1e-5)
    x = (random.standard_normal((2, inputs)) * [[0.01], [30]]).astype(np.float32)
    wide = x.astype(np.float64)
    made = (
        wide
        / np.sqrt((wide**2).mean(axis=1, keepdims=True) + norm.eps)
        * np.asarray(norm.gain, np.float64)
    )
    found, largest = folded(g, jnp.asarray(x), norm)
    wanted, _ = folded(g, jnp.asarray(made, jnp.float32))
    np.testing.assert_allclose(largest, np.abs(made).max(axis=1), rtol=1e-6)

    def coefficients(words) -> np.ndarray:
        """[..., columns, threads, words of four, 4 bytes] -> the integers that three columns' bytes
        make."""
        bytes_ = np.asarray(words).view(np.int8).reshape(-1, 8, 4, 4, 4).astype(np.int64)
        return bytes_[:, 0:6:3] + 256 * bytes_[:, 1:6:3] + 65536 * bytes_[:, 2:6:3]

    off = np.abs(coefficients(found) - coefficients(wanted))
    assert off.max() <= 4 * (1 + g.plan.factor.max())  # of up to 4e6: float32's own errors
    assert coefficients(wanted).any()


def test_the_norm_of_zeros_is_zeros():
    words, largest = folded(geometry(320, 1), jnp.zeros((1, 320)), Norm(jnp.ones(320), 1e-5))
    assert not np.asarray(words).any()
    assert largest.tolist() == [0.0]
