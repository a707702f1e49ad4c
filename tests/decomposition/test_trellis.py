"""Trellis codes: the search against all combinations, every code of the table against its error on
a Gaussian.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from atd.decomposition.trellis import phases, snap
from atd.decomposition.trellis_codes import KINDS, TABLE, bound, known_code
from atd.errors import BadInput
from atd.weights.codes import Code, parse_code, values_of

SMALL = [  # (code, rows of a segment), few enough for all combinations of trits
    (Code((((0.4, 0.5), (1.1,)),)), 4),
    (Code((((0.45, -0.6, 0.5),),)), 7),
    (Code((((0.4, 0.5), (0.9,)), ((0.7, 0.6),))), 6),
    (Code((((0.5, 0.8), (0.7, -0.4, 0.6)), ((0.9,),))), 6),
]


def column(rows: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """What is wanted, and scales, one of them zero."""
    random = np.random.default_rng(seed)
    scale = random.uniform(0.5, 1.5, rows).astype(np.float32)
    scale[rows // 2] = 0
    return random.standard_normal(rows).astype(np.float32), scale


def every_value(code: Code, length: int) -> np.ndarray:
    """Values of all combinations of trits of a segment, in units of the scale: float32
    [combinations, length].
    """
    trits = length // code.period * code.trits
    words = np.array(list(itertools.product((-1, 0, 1), repeat=trits)), np.int8)
    return values_of(words.reshape(-1, code.trits), code, length).reshape(len(words), length)


@pytest.mark.parametrize(("code", "length"), SMALL)
def test_the_search_finds_the_best_of_all_combinations(code, length):
    x, scale = column(length)
    least = ((x - every_value(code, length) * scale) ** 2).sum(axis=1).min()
    states = np.arange(3 ** phases(code)[0].alive, dtype=np.int32)
    wanted, scales = (
        np.tile(a, len(states)) for a in (x, scale)
    )  # a segment for each state at the seam
    trits, values, _ = snap(wanted, scales, code, length, seam=states)
    costs = ((wanted - np.asarray(values)) ** 2).reshape(len(states), length).sum(axis=1)
    np.testing.assert_allclose(costs.min(), least, rtol=1e-4)
    rebuilt = values_of(np.asarray(trits), code, length) * scales
    np.testing.assert_allclose(rebuilt, values, atol=1e-6)


@pytest.mark.exact
@pytest.mark.parametrize(
    ("code", "length"),
    [SMALL[-1], *(pytest.param(*small, marks=pytest.mark.slow) for small in SMALL[:-1])],
)
def test_the_seam_that_is_found_can_be_kept(code, length):
    x, scale = column(32 * length, seed=1)
    trits, values, seam = snap(x, scale, code, length)
    again, same, kept = snap(x, scale, code, length, seam=seam)
    np.testing.assert_array_equal(trits, again)
    np.testing.assert_array_equal(values, same)
    np.testing.assert_array_equal(seam, kept)
    # From what was found, no other search with the same seams can get worse.
    _, closer, _ = snap(values, scale, code, length, seam=seam)
    np.testing.assert_allclose(closer, values, atol=1e-6)


@pytest.mark.parametrize(
    "known",
    [
        pytest.param(
            known,
            id=f"{known.bases:g}-{known.kind}",
            marks=()
            if known.kind == "default" and known.bases in (2, 2.5, 3)
            else pytest.mark.slow,
        )
        for known in TABLE
    ],
)
def test_every_code_has_its_error(known):
    length = 240
    x = np.random.default_rng(5).standard_normal(length * 512).astype(np.float32)
    search = jax.jit(lambda x: snap(x, jnp.ones_like(x), known.code, length)[1])
    error = float(np.mean((np.asarray(search(x)) - x) ** 2))
    assert error == pytest.approx(known.error, rel=0.01)
    assert known.code.bases == known.bases
    decibels = 10 * np.log10(known.error / bound(known.bases))
    assert 0.9 < decibels < 2.3  # rounding each weight alone: 3.7 for N = 2, 4.5 for N = 3


def test_trits_count_in_the_rows_below_and_around_the_seam():
    code = Code((((2.0, 3.0, 5.0), (0.5,)),))
    trits = np.zeros((8, 2), np.int8)
    trits[3, 0], trits[4, 1] = 1, -1  # the first segment's last row, the second's first
    np.testing.assert_array_equal(values_of(trits, code, 4), [3, 5, 0, 2, -0.5, 0, 0, 0])
    np.testing.assert_array_equal(
        values_of(jnp.asarray(trits), code, 4), [3, 5, 0, 2, -0.5, 0, 0, 0]
    )


def test_phases_take_turns():
    code = Code((((1.0, 10.0), (100.0,)), ((0.25,),)))  # rows of two trits and of one
    trits = np.array([[1, 0, 0], [0, 1, -1]], np.int8)  # rows 0 and 1, rows 2 and 3
    np.testing.assert_array_equal(values_of(trits, code, 4), [1, 10, 100, -0.25])


taps = st.floats(-4, 4, allow_nan=False).map(lambda tap: round(tap, 4))


@given(
    st.lists(
        st.lists(st.lists(taps, min_size=1, max_size=4), min_size=1, max_size=3),
        min_size=1,
        max_size=3,
    )
)
def test_codes_round_trip_to_text(lists):
    code = Code(tuple(tuple(map(tuple, phase)) for phase in lists))
    assert parse_code(str(code)) == code


@pytest.mark.parametrize("text", ["", "1,", "1||2", "1/", "a", "nan", "1e999", "1 2", "inf|1"])
def test_other_text_is_no_code(text):
    with pytest.raises(ValueError, match="trellis code"):
        parse_code(text)


def test_codes_by_name():
    assert known_code(2) == known_code(2.0, "default")
    assert known_code(1.75, "best") == known_code(1.75)  # it has one kind
    assert {known.kind for known in TABLE} == set(KINDS)
    with pytest.raises(BadInput, match=r"no trellis code for N = 1; known: 1\.25, 1\.5"):
        known_code(1)
    with pytest.raises(BadInput, match="trellis 'slow' is unknown; known: fast, default, best"):
        known_code(2, "slow")
