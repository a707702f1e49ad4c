"""The Triton kernels as machine code, compiled without a GPU: no spills, wide loads, few
instructions a weight.

Skipped where the CUDA plugin is not installed (`make gpu-check` installs it). Counts are those of
ptxas 13.5.
"""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atd.decomposition.options import trellis_type
from atd.decomposition.trellis_codes import known_code
from atd.kernels.settings import Settings, Shape, Tiles, heuristic
from atd.kernels.trellis import planes_type
from atd.kernels.triton import attention, decode, fold, gemm, gemv
from atd.kernels.triton.gemm import Units
from atd.kernels.triton.geometry import Geometry, most_tokens
from atd.kernels.tuning import aot
from atd.weights import PackedType, TernaryType, Trellis, TrellisType
from atd.weights.layouts import LAYOUTS
from tests.kernels.ptx.pallas import emulated_pallas_call
from tests.kernels.triton.test_attention import attend, epsilon_of, interpreted, operands

if reason := aot.missing():
    pytest.skip(reason, allow_module_level=True)
OUT = INPUTS = 4096
ONE_TOKEN = Settings(Shape(warps=4))


CODES = {bases: LAYOUTS["tiles"].codes_shape(OUT, INPUTS, bases) for bases in (1, 2, 3, 4, 5, 7)}


def compiled_gemv(
    device: str,
    bases: int,
    tied: bool,
    tokens: int = 1,
    settings: Settings = ONE_TOKEN,
    gated: bool = False,
    planes: bool = False,
) -> tuple[aot.Compiled, float]:
    """Returns (machine code, instructions in the loop per weight)."""
    type = TernaryType((OUT, INPUTS), bases, "row", tied, "f16")
    shape = settings.gemv.paired() if gated else settings.gemv
    g = Geometry(type, tokens, shape, gated, planes)
    function = partial(gemv.matmul, type=type, shape=settings.gemv, gated=gated, planes=planes)
    operands = (
        jax.ShapeDtypeStruct((tokens, INPUTS), jnp.bfloat16),
        jax.ShapeDtypeStruct(CODES[bases], jnp.uint32),
        jax.ShapeDtypeStruct(type.scales_shape, jnp.float16),
    )
    compiled = aot.compile_for(device, function, *operands, kernel=g.name)
    weights = 2 * shape.row_blocks * shape.unroll * g.plan.piece_params
    return compiled, aot.main_loop_instructions(compiled.sass).total() / weights


def loads(compiled: aot.Compiled) -> set[str]:
    """The kinds that the loop has, of constants apart."""
    return {
        name
        for name in aot.main_loop_instructions(compiled.sass)
        if name.startswith(("LDG", "LDS", "LDL"))
    }


WIDE = {"LDG.E.128", "LDG.E.EF.128"}  # activations, codes: 16 bytes at a time, nothing narrower


@pytest.mark.parametrize(
    ("bases", "tied", "most"),
    [
        (1, True, 1.2),
        (2, True, 1.65),
        (3, True, 2.0),
        (4, True, 2.8),
        (2, False, 2.35),
        (3, False, 3.9),
    ],
)
@pytest.mark.parametrize("device", ["H200", "A10", "L4"])
def test_instructions_a_weight_of_one_token(device, bases, tied, most):
    compiled, instructions = compiled_gemv(device, bases, tied)
    assert compiled.spill_bytes == 0
    assert instructions < most
    assert loads(compiled) == WIDE
    most_registers = 80 if (bases, tied) == (3, False) else 64  # 25, 32 warps a multiprocessor
    assert compiled.registers <= most_registers


@pytest.mark.parametrize(
    ("planes", "tokens", "most"),
    [(2, 1, 2.3), (2, 2, 3.0), (3, 1, 3.8), (5, 1, 9.0), (7, 1, 9.0), (7, 2, 11.0)],
)
@pytest.mark.parametrize("device", ["H200", "A10"])
def test_planes_of_a_trellis_code(device, planes, tokens, most):
    """Per parameter, which is a weight where rows have whole numbers of trits."""
    compiled, instructions = compiled_gemv(device, planes, False, tokens, planes=True)
    assert compiled.spill_bytes == 0
    assert instructions < most
    assert loads(compiled) == WIDE


@pytest.mark.parametrize("planes", [2, 3, 5, 7])
def test_planes_of_as_many_tokens_as_have_columns_do_not_spill(planes):
    type = TernaryType((OUT, INPUTS), planes, "row", False, "f16")
    for tokens in (9, 4):
        settings = heuristic(type, tokens)
        shared = most_tokens(type, min(tokens, settings.gemv_tokens))
        compiled, _ = compiled_gemv("H200", planes, False, shared, settings, planes=True)
        assert compiled.spill_bytes == 0
        assert loads(compiled) == WIDE


def coded(bases: float) -> TrellisType:
    type = trellis_type((OUT, INPUTS), known_code(bases), "f16")
    assert type is not None
    return type


@pytest.mark.parametrize(("bases", "most"), [(2, 7.5), (3, 12.0), (1.75, 7.0)])
@pytest.mark.parametrize("device", ["H200", "A10"])
def test_tiles_of_planes(device, bases, most):
    type = planes_type(coded(bases))
    tiles = heuristic(type, 32).tiles
    compiled = aot.compile_for(
        device,
        partial(gemm.matmul, type=type, tiles=tiles, apart=True),
        jax.ShapeDtypeStruct((32, INPUTS), jnp.bfloat16),
        jax.ShapeDtypeStruct(PackedType(type, "tiles").codes_shape, jnp.uint32),
        jax.ShapeDtypeStruct(type.scales_shape, jnp.float16),
        kernel=f"ternary_gemm_n{type.bases}",
    )
    weights = tiles.rows * tiles.units * Units(type).params / (32 * tiles.warps)
    period = OUT / type.shape[0]
    assert compiled.spill_bytes == 0
    assert aot.main_loop_instructions(compiled.sass).total() / weights / period < most


@pytest.mark.parametrize(("bases", "most"), [(2, 41.0), (3, 46.0), (1.5, 28.0), (1.75, 22.0)])
@pytest.mark.parametrize("device", ["H200", "A10"])
def test_decoding_with_a_code(device, bases, most):
    type = coded(bases)
    of = Units(planes_type(type))
    rows = decode.Geometry(of, 0, of.type.shape[0], type)
    compiled = aot.compile_for(
        device,
        lambda codes, scales: decode.decoded(rows, codes, scales, jnp.bfloat16),
        jax.ShapeDtypeStruct(PackedType(type, "tiles").codes_shape, jnp.uint32),
        jax.ShapeDtypeStruct(type.scales_shape, jnp.float16),
        kernel=f"ternary_decode_n{type.bases}",
    )
    block = decode.ROWS * decode.UNITS * of.params * type.code.period
    assert compiled.spill_bytes == 0
    assert set(re.findall(r"STG[.\w]*", compiled.sass)) == {"STG.E.128"}
    assert aot.main_loop_instructions(compiled.sass).total() / block * 32 * decode.WARPS < most


@pytest.mark.parametrize("bases", [2, 1.5])
def test_decoding_with_a_code_as_ptx(bases, monkeypatch):
    """In segments of 18 rows, of which the last has 12."""
    type, random = TrellisType((48, 70), known_code(bases), 18, "f16"), np.random.default_rng(0)
    trits = random.integers(-1, 2, type.trits_shape).astype(np.int8)
    scales = random.uniform(0.5, 2, type.scales_shape).astype(np.float16)
    monkeypatch.setattr(decode.pl, "pallas_call", emulated_pallas_call("A10"))
    of = Units(planes_type(type))
    codes = jnp.asarray(LAYOUTS["tiles"].pack(trits))
    rows = decode.Geometry(of, 0, of.type.shape[0], type)
    found = decode.decoded(rows, codes, jnp.asarray(scales), jnp.float16)
    found = np.asarray(found).reshape(48, of.params, of.count).swapaxes(1, 2).reshape(48, -1)
    wanted = np.asarray(Trellis(trits, scales, type).dequantize())
    np.testing.assert_allclose(found[:, :70], wanted, rtol=2**-10, atol=1e-6)


@pytest.mark.parametrize(
    ("tokens", "settings", "most"),
    [
        (2, Settings(Shape(warps=4)), 1.65),
        (1, Settings(Shape(warps=4, unroll=2)), 1.55),
        (2, Settings(Shape(warps=4, row_blocks=2)), 1.5),
        (4, Settings(Shape(warps=4)), 1.9),
        (4, Settings(Shape(warps=4, row_blocks=2)), 1.65),
        (8, Settings(Shape(warps=4, row_warps=4, row_blocks=2)), 1.65),
        (16, Settings(Shape(warps=4, row_warps=4, row_blocks=2)), 1.95),
    ],
)
def test_more_tokens_and_rows_cost_little_more(tokens, settings, most):
    compiled, instructions = compiled_gemv("H200", 2, True, tokens, settings)
    assert compiled.spill_bytes == 0
    assert instructions < most
    assert loads(compiled) == WIDE


@pytest.mark.parametrize("device", ["H200", "A10"])
@pytest.mark.parametrize(
    ("bases", "tokens", "settings", "most"),
    [
        (1, 1, Settings(Shape(warps=2, unroll=2)), 1.1),
        (2, 1, Settings(Shape(warps=2, unroll=2)), 1.45),
        (3, 1, Settings(Shape(warps=2)), 1.95),
        (2, 16, Settings(Shape(warps=4, row_warps=4, row_blocks=2)), 1.95),
    ],
)
def test_swiglu_costs_the_loop_nothing(device, bases, tokens, settings, most):
    compiled, instructions = compiled_gemv(device, bases, True, tokens, settings, gated=True)
    assert compiled.spill_bytes == 0
    assert instructions < most
    assert loads(compiled) == WIDE


@pytest.mark.parametrize("device", ["A10", "L4"])
def test_sixteen_tokens_do_not_spill(device):
    compiled, _ = compiled_gemv(
        device, 2, True, 16, Settings(Shape(warps=4, row_warps=4, row_blocks=2))
    )
    assert compiled.spill_bytes == 0
    assert loads(compiled) == WIDE


@pytest.mark.parametrize(
    ("bases", "group", "tied"),
    [
        (1, "row", True),
        (2, "row", True),
        (2, "row", False),
        (2, 128, True),
        (3, "row", True),
        (4, "row", True),
    ],
)
@pytest.mark.parametrize(("device", "exact"), [("H200", True), ("A10", False)])
def test_decoding_does_not_spill_and_writes_sixteen_bytes_at_a_time(
    device, exact, bases, group, tied
):
    type = TernaryType((OUT, INPUTS), bases, group, tied, "f16")
    rows = decode.Geometry(Units(type), 0, OUT, exact=exact)
    compiled = aot.compile_for(
        device,
        lambda codes, scales: decode.decoded(rows, codes, scales, jnp.bfloat16),
        jax.ShapeDtypeStruct(CODES[bases], jnp.uint32),
        jax.ShapeDtypeStruct(type.scales_shape, jnp.float16),
        kernel=f"ternary_decode_n{bases}",
    )
    assert compiled.spill_bytes == 0
    assert set(re.findall(r"STG[.\w]*", compiled.sass)) == {"STG.E.128"}
    if bases != 3:  # of which a unit is three words
        assert "LDG.E.EF.128" in compiled.sass


@pytest.mark.parametrize(
    ("group", "tied", "most"), [("row", True, 5.0), ("row", False, 7.5), (128, True, 14.0)]
)
@pytest.mark.parametrize("device", ["H200", "A10"])
def test_tiles_do_not_spill_and_take_few_instructions_a_weight(device, group, tied, most):
    tiles = Tiles(tokens=16)
    type = TernaryType((OUT, INPUTS), 2, group, tied, "f16")
    compiled = aot.compile_for(
        device,
        partial(gemm.matmul, type=type, tiles=tiles),
        jax.ShapeDtypeStruct((16, INPUTS), jnp.bfloat16),
        jax.ShapeDtypeStruct(CODES[2], jnp.uint32),
        jax.ShapeDtypeStruct(type.scales_shape, jnp.float16),
        kernel="ternary_gemm_n2",
    )
    assert compiled.spill_bytes == 0
    # Of a thread, in a step.
    weights = tiles.rows * tiles.units * Units(type).params / (32 * tiles.warps)
    assert aot.main_loop_instructions(compiled.sass).total() / weights < most


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize(
    ("bases", "tied", "group"), [(2, True, "row"), (3, False, "row"), (2, False, 128)]
)
def test_folding_does_not_spill(bases, tied, group, normed):
    g = Geometry(TernaryType((OUT, INPUTS), bases, group, tied, "f16"), 1, Shape())
    x = jax.ShapeDtypeStruct((1, INPUTS), jnp.float32)
    gains = [jax.ShapeDtypeStruct((INPUTS,), jnp.float32)] if normed else []

    def folded(x, *gains):
        return fold.fold(g, x, fold.Norm(*gains, eps=1e-5) if gains else None)

    compiled = aot.compile_for("H200", folded, x, *gains, kernel=f"ternary_fold_{g.plan}")
    assert compiled.spill_bytes == 0


@pytest.mark.parametrize(
    ("device", "batch", "heads", "kv_heads", "head_dim", "length", "dtype"),
    [
        ("H200", 1, 32, 8, 128, 256, "bfloat16"),
        ("H200", 16, 32, 8, 128, 256, "bfloat16"),
        ("H200", 1, 32, 8, 128, 8192, "bfloat16"),
        ("L4", 1, 9, 3, 64, 1024, "float16"),
        ("A10", 1, 32, 8, 80, 256, "float32"),
        ("H200", 1, 32, 8, 128, 256, "int8"),
        ("H200", 1, 32, 8, 128, 8192, "int8"),
        ("L4", 1, 9, 3, 64, 1024, "int8"),
    ],
)
def test_attention_reads_sixteen_bytes_at_a_time(
    device, batch, heads, kv_heads, head_dim, length, dtype
):
    shape = jax.ShapeDtypeStruct
    codes = dtype == "int8"
    compiled = aot.compile_for(
        device,
        lambda qkv, positions, *cache: attend(qkv, positions, cache, heads=heads),
        shape((batch, 1, (heads + 2 * kv_heads) * head_dim), jnp.float32),
        shape((batch, 1), jnp.int32),
        *[shape((batch, kv_heads, length, head_dim), dtype)] * 2,
        *[shape((batch, kv_heads, length), jnp.float32)] * 2 * codes,
        kernel=attention.name(head_dim, codes),
    )
    loop = aot.main_loop_instructions(compiled.sass)
    assert compiled.spill_bytes == 0
    scales = {"LDG.E"} if codes else set()
    assert {name for name in loop if name.startswith("LDG")} == {"LDG.E.128", *scales}
    assert "BAR.SYNC.DEFER_BLOCKING" not in loop  # warps wait for one another at the end alone
    # Either way a block per multiprocessor; of codes a thread holds 16 floats per tile and query.
    assert compiled.registers <= (248 if codes else 160)


@pytest.mark.parametrize(
    ("length", "dtype"), [(256, "bfloat16"), (4096, "bfloat16"), (4096, "int8")]
)
def test_attention_writes_where_the_cache_lies(length, dtype):
    """Step by step in one program: no copy of the cache, and no memory for one."""
    shape = jax.ShapeDtypeStruct

    def steps(qkv, positions, cache):
        def step(carry, _):
            positions, cache = carry
            mixed, cache = attend(qkv, positions, cache, heads=32)
            return (positions + 1, cache), mixed

        return jax.lax.scan(step, (positions, cache), length=8)

    part = shape((1, 8, length, 128), dtype)
    cache = (part, part, *[shape((1, 8, length), jnp.float32)] * 2 * (dtype == "int8"))
    arguments = shape((1, 1, 6144), jnp.float32), shape((1, 1), jnp.int32), cache
    program = aot.program_for("H200", steps, *arguments, donate_argnums=2)
    text = program.as_text() or ""
    of_cache = {"bfloat16": "bf16[", "int8": "s8["}[dtype]
    assert of_cache in text
    assert not [line for line in text.splitlines() if " copy(" in line and of_cache in line]
    memory = program.memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < part.size  # half of one in bfloat16


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "length", "position", "dtype", "options"),
    [
        (3, 1, 64, 200, 190, "bfloat16", {}),
        (4, 1, 128, 100, 99, "bfloat16", {"splits": 2}),
        (2, 1, 48, 100, 90, "float16", {"window": 20}),
        (2, 2, 16, 40, 0, "float32", {}),
        (3, 1, 64, 200, 190, "int8", {}),
    ],
)
def test_attention_as_ptx(heads, kv_heads, head_dim, length, position, dtype, options, monkeypatch):
    given = operands(heads, kv_heads, head_dim, length, (position,), dtype)
    expected, expected_new = interpreted(*given, heads=heads, **options)
    monkeypatch.setattr(attention.pl, "pallas_call", emulated_pallas_call("L4"))
    mixed, new = attend(*given, heads=heads, **options)
    np.testing.assert_allclose(mixed, expected, atol=2e-6 * np.abs(np.asarray(expected)).max())
    for found, wanted in zip(new, expected_new, strict=True):
        found, wanted = (np.asarray(x, np.float32)[0, :, position] for x in (found, wanted))
        np.testing.assert_allclose(found, wanted, atol=1e-6, rtol=epsilon_of(dtype))
