"""Weights as 16-bit integers out of words of codes: every code of every byte, against the layout's
own unpacking."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atd.kernels.triton import trits as kernel_trits
from atd.weights import TernaryType, level_weights
from atd.weights.layouts import DENSE_CODES, LAYOUTS, unit

KINDS = [(bases, tied) for bases in (1, 2, 3, 4) for tied in (True, False) if tied or bases > 1]


@pytest.mark.parametrize(("bases", "tied"), KINDS)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_every_code_of_every_byte(bases, tied, dtype):
    words, params = unit(bases)
    random = np.random.default_rng(0)
    codes = np.stack(
        [random.permutation(DENSE_CODES) for _ in range(4 * words)], axis=-1
    )  # [243 units, bytes]
    packed = np.ascontiguousarray(codes).view(np.uint32).reshape(243, words)
    trits = LAYOUTS["words"].unpack(jnp.asarray(packed), 243, params, bases)
    wanted = np.asarray(trits) @ level_weights(bases)[:, None] if tied else np.asarray(trits)
    type = TernaryType((243, params), bases, "row", tied, "f16")
    integers = kernel_trits.integers_of(
        [jnp.asarray(packed[:, w]) for w in range(words)], type, dtype, True
    )
    found = jnp.stack([jnp.stack(integers(p), axis=-1) for p in range(params)], axis=1)
    assert found.dtype == dtype
    np.testing.assert_array_equal(found.astype(jnp.float32), wanted)


@pytest.mark.parametrize(("bases", "tied"), KINDS)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_assembly_takes_off_what_zero_became(bases, tied, dtype):
    """All trits -1, codes 0: what the assembly subtracts is the smallest integer and the format's
    own zero."""
    count = bases if tied else 1
    text, constraints, read = kernel_trits.assembly(0, count, bases, jnp.dtype(dtype))
    above, zero, _, name = kernel_trits.FORMATS[jnp.dtype(dtype)]
    assert jax.lax.bitcast_convert_type(jnp.uint16(above << 8), dtype) == zero
    off = int(text.split("mov.b32 v, 0x")[1][:4], 16)
    assert (
        zero + float(jax.lax.bitcast_convert_type(jnp.uint16(off), dtype))
        == -level_weights(count).sum()
    )
    assert f"fma.rn.{name}" in text
    assert constraints.count("r") == 1 + 2 * len(read)
