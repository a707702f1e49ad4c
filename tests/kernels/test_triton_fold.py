"""The folding kernel against `prefixes.fold` and `prefixes.fragments`, which say what it has to compute."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atd.kernels import prefixes
from atd.kernels.triton import fold as triton_fold
from atd.kernels.triton import gemv as triton_gemv
from atd.kernels.triton.gemv import Columns


def in_order(
    plan: prefixes.Plan, x: jax.Array, steps: int, columns: Columns, group_size: int | None
) -> np.ndarray:
    """What `triton_fold.fold` makes, by XLA."""
    coefficients, _ = prefixes.fold(plan, x, steps, group_size)
    words = prefixes.fragments(
        coefficients, 3 * columns.coefficients
    )  # [steps, words, columns, 4 threads]
    words = np.asarray(words).reshape(steps, plan.words // 4, 4, -1, 3, 4)  # coefficients, bytes
    placed = np.zeros((steps, plan.words // 4, columns.sets, columns.kept, 4, 4), np.uint32)
    for coefficient in range(columns.coefficients):
        octet, column = divmod(coefficient, 8)
        for byte in range(3):
            set_, at = (3 * octet + byte, column) if columns.apart else (0, 3 * coefficient + byte)
            placed[:, :, set_, at] = words[:, :, :, coefficient, byte].swapaxes(2, 3)
    return placed.reshape(-1)


@pytest.mark.parametrize(
    ("bases", "tied", "tokens", "group_size", "dtype"),
    [
        (1, True, 1, None, jnp.float32),
        (2, True, 4, None, jnp.bfloat16),
        (2, False, 2, None, jnp.float16),
        (3, True, 1, 128, jnp.float32),
        (2, False, 1, 128, jnp.float32),
        (4, True, 2, None, jnp.float32),
        (2, True, 16, None, jnp.float32),
    ],
)
def test_it_folds_as_xla_does(bases, tied, tokens, group_size, dtype):
    plan, steps = prefixes.plan(bases, tied), 6
    random = np.random.default_rng(0)
    inputs = steps * 4 * plan.piece_params - 17  # the last step is not full
    # Integers, one of them the limit, so that both have the unit 1 and no rounding is a close call.
    x = random.integers(-99, 100, (tokens, inputs)).astype(np.float32)
    x[:, 3] = -(2.0 ** np.floor(np.log2(plan.limit)))
    columns = triton_gemv.columns(plan, tokens, steps, group_size)
    x = jnp.asarray(x / 2.0**12, dtype)  # float16 ends at 65504
    folded, largest = triton_fold.fold(plan, x, steps, columns, group_size, interpret=True)
    wanted = in_order(plan, x, steps, columns, group_size)
    np.testing.assert_array_equal(largest, np.abs(np.asarray(x, np.float32)).max(axis=1))
    parts = [v.view(np.uint8).astype(int) for v in (np.asarray(folded), wanted)]
    off = np.abs(parts[0] - parts[1])
    assert (
        np.minimum(off, 256 - off) <= 2 * plan.factor.max() + 1
    ).all()  # halves are rounded another way
    assert (off > 0).mean() < 0.01


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_a_token_that_is_not_finite_is_known_by_its_largest(bad):
    x = np.ones((2, 5000), np.float32)
    x[1, 4500] = bad
    _, largest = triton_fold.fold(
        prefixes.plan(2, True), jnp.asarray(x), 32, Columns(2, 1), interpret=True
    )
    np.testing.assert_array_equal(largest, [1.0, np.nan])


def test_tokens_of_zeros_are_zeros():
    folded, largest = triton_fold.fold(
        prefixes.plan(2, True), jnp.zeros((1, 320)), 2, Columns(1, 1), interpret=True
    )
    assert not np.asarray(folded).any()
    assert largest.tolist() == [0.0]


@pytest.mark.parametrize("inputs", [300, 5000])
def test_a_norm_is_folded_as_what_it_makes(inputs):
    """Words of the activations made before, but for close calls of rounding; and the largest of them."""
    plan, random = prefixes.plan(2, True), np.random.default_rng(0)
    steps = plan.steps(-(-inputs * 2 // 20)) + 1
    norm = triton_fold.Norm(jnp.asarray(random.uniform(0.5, 2, inputs), jnp.float32), 1e-5)
    x = (random.standard_normal((2, inputs)) * [[0.01], [30]]).astype(np.float32)
    wide = x.astype(np.float64)
    made = (
        wide
        / np.sqrt((wide**2).mean(axis=1, keepdims=True) + norm.eps)
        * np.asarray(norm.gain, np.float64)
    )
    found, largest = triton_fold.fold(
        plan, jnp.asarray(x), steps, Columns(2, 1), norm=norm, interpret=True
    )
    wanted, _ = triton_fold.fold(
        plan, jnp.asarray(made, jnp.float32), steps, Columns(2, 1), interpret=True
    )
    np.testing.assert_allclose(largest, np.abs(made).max(axis=1), rtol=1e-6)

    def coefficients(words) -> np.ndarray:
        """[..., columns, threads, words of four, 4 bytes] -> the integers that three columns' bytes make."""
        bytes_ = np.asarray(words).view(np.int8).reshape(-1, 8, 4, 4, 4).astype(np.int64)
        return bytes_[:, 0:6:3] + 256 * bytes_[:, 1:6:3] + 65536 * bytes_[:, 2:6:3]

    off = np.abs(coefficients(found) - coefficients(wanted))
    assert off.max() <= 4 * (1 + plan.factor.max())  # of up to 4e6: float32's own errors
    assert coefficients(wanted).any()


def test_the_norm_of_zeros_is_zeros():
    norm = triton_fold.Norm(jnp.ones(320), 1e-5)
    folded, largest = triton_fold.fold(
        prefixes.plan(2, True), jnp.zeros((1, 320)), 2, Columns(1, 1), norm=norm, interpret=True
    )
    assert not np.asarray(folded).any()
    assert largest.tolist() == [0.0]
