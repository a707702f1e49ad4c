"""Weights with a trellis code: their text, what is stored of them, and what they refuse."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atd.decomposition.trellis_codes import TABLE, known_code
from atd.weights import (
    DenseType,
    Packed,
    PackedType,
    TernaryType,
    Trellis,
    TrellisType,
    bits_per_weight,
    broken,
    build,
    parse_type,
    stored,
    ternary_of,
    values_of,
)
from atd.weights.layouts import LAYOUTS

TEXT = "trellis n=2 segment=64 taps=0.42,0.42,0.42,-0.42,0.42|1.1 f16[192,40]"
TYPE = TrellisType((192, 40), known_code(2), 64, "f16")
LAYOUT_NAMES = [name for name in LAYOUTS if name != "hf-bitnet"]  # which holds one base


def random_trellis(type: TrellisType, seed: int = 0) -> Trellis:
    random = np.random.default_rng(seed)
    trits = random.integers(-1, 2, type.trits_shape).astype(np.int8)
    return Trellis(trits, random.uniform(0.5, 2, type.scales_shape).astype(np.float16), type)


def test_text():
    assert str(TYPE) == TEXT
    assert str(PackedType(TYPE, "aligned")) == (
        "packed trellis n=2 segment=64 taps=0.42,0.42,0.42,-0.42,0.42|1.1 layout=aligned/1 "
        "f16[192,40]"
    )


@given(
    known=st.sampled_from(TABLE),
    segments=st.integers(1, 5),
    rest=st.integers(0, 3),
    layout=st.sampled_from([None, *LAYOUT_NAMES]),
    dtype=st.sampled_from(["f16", "bf16", "f32"]),
)
def test_text_round_trips(known, segments, rest, layout, dtype):
    type = TrellisType((48 * segments + 12 * rest, 7), known.code, 48, dtype)
    type = type if layout is None else PackedType(type, layout)
    assert parse_type(str(type)) == type
    assert ternary_of(type) == parse_type(str(ternary_of(type)))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (
            TEXT.replace("segment=64", "segment=0"),
            "a segment has 1 to 192 rows in a matrix of 192, not 0",
        ),
        (
            TEXT.replace("segment=64", "segment=193"),
            "a segment has 1 to 192 rows in a matrix of 192, not 193",
        ),
        (
            TEXT.replace("segment=64", "segment=4"),
            "a trit counts in 5 rows, and .* the last one has 4",
        ),
        (
            TEXT.replace("[192,40]", "[196,40]"),
            "a trit counts in 5 rows, and .* the last one has 4",
        ),
        (TEXT.replace("n=2", "n=3"), "its taps make 2 trits per weight, not 3"),
        (TEXT.replace("|1.1", "|nan"), "not a trellis code that this version of atd knows: '0.42,"),
        (TEXT.replace("|1.1", "|1e999"), "taps of a trellis code must be finite numbers"),
        (TEXT.replace("|1.1", "|1.1;max"), "not a trellis code that this version of atd knows"),
        (TEXT.replace("trellis", "trellis-2"), "not a weight type that this version of atd knows"),
        (TEXT.replace("|1.1", ""), "its taps make 1 trits per weight, not 2"),
        (TEXT.replace("taps=", "taps=1/"), "its taps make 1.5 trits per weight"),
        (TEXT.replace("[192,40]", "[192]"), "not a weight type"),
        (TEXT.replace("trellis", "ternary"), "not a weight type"),
        (TEXT.replace("trellis", "packed trellis"), "not a weight type"),
        (TEXT.replace(" f16", " layout=aligned/1 f16"), "not a weight type"),
        ("trellis n=2 g=row free f16[192,40]", "not a weight type"),
        (
            "trellis n=1.5 segment=64 taps=1,1|1/1 f16[193,40]",
            "a code of period 2 needs a multiple",
        ),
    ],
)
def test_other_text_is_refused(text, reason):
    with pytest.raises(ValueError, match=reason):
        parse_type(text)


def test_bits_count_all_that_is_stored():
    assert TYPE.nbytes == 192 * 40 * 2 + 2 * 192
    half = TrellisType((192, 40), known_code(1.5), 64, "f16")
    assert half.trits_shape == (96, 40, 3)
    packed = PackedType(half, "interleaved")  # 40 inputs are 8 cells of 3 bytes, for two rows
    assert packed.nbytes == 96 * 24 + 2 * 192
    assert bits_per_weight(packed) == pytest.approx(1.6 * 1.5 + 16 / 40)
    plain = PackedType(TernaryType((192, 40), 2, "row", True, "f16"), "interleaved")
    assert PackedType(TYPE, "interleaved").nbytes == plain.nbytes


@settings(max_examples=20)
@given(known=st.sampled_from(TABLE), layout=st.sampled_from(LAYOUT_NAMES), seed=st.integers(0, 9))
def test_packing_keeps_the_values(known, layout, seed):
    weight = random_trellis(
        TrellisType((60, 7), known.code, 24, "f16"), seed
    )  # the last segment has 12 rows
    packed = Packed(
        LAYOUTS[layout].pack(weight.trits), weight.scales, PackedType(weight.type, layout)
    )
    assert packed.codes.shape == packed.type.codes_shape
    np.testing.assert_array_equal(packed.dequantize(), weight.dequantize())
    fields = {name: getattr(packed, name) for name in stored("w.weight", packed.type)}
    assert build(packed.type, fields) == packed
    assert broken(packed) is None


def test_values_of_jax_and_numpy_agree_to_the_bit():
    weight = random_trellis(TrellisType((60, 7), known_code(2.5), 24, "f16"))
    on_device = Trellis(jnp.asarray(weight.trits), jnp.asarray(weight.scales), weight.type)
    np.testing.assert_array_equal(on_device.dequantize(), weight.dequantize())


def test_the_filter_of_products_is_the_product_of_filtered_weights():
    weight = random_trellis(TrellisType((60, 7), known_code(1.75), 24, "f32"))
    x = np.random.default_rng(1).standard_normal((7, 3)).astype(np.float32)
    products = np.einsum(
        "rkm,kb->rbm", weight.trits.astype(np.float32), x
    )  # T_i x, [rows / P, 3, M]
    filtered = values_of(products, weight.type.code, 24) * weight.scales[:, 0].astype(np.float32)
    np.testing.assert_allclose(filtered, weight.dequantize() @ x, rtol=1e-4, atol=1e-4)


def test_damage_is_found():
    weight = random_trellis(TYPE)
    weight.trits[3, 2, 1] = 2
    assert "trits other than" in str(broken(weight))
    packed = Packed(
        np.zeros(PackedType(TYPE, "aligned").codes_shape, np.uint8),
        weight.scales,
        PackedType(TYPE, "aligned"),
    )
    assert "no codes of layout aligned" in str(broken(packed))
    assert ternary_of(DenseType((2, 2), "f32")) is None
