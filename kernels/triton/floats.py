"""Arithmetic of floats in fewer PTX instructions than Triton takes, with jnp in interpret mode."""

import jax
import jax.numpy as jnp

from atd.kernels.triton.ptx import plt

# An angle without its whole turns. They are taken off in three steps, 2 pi being the sum of three
# numbers: exact enough up to angles of 10^5.
IN_A_TURN = """{
.reg .f32 turns;
mul.rn.f32 turns, $1, 0f3E22F983;
cvt.rni.f32.f32 turns, turns;
fma.rn.f32 $0, turns, 0fC0C90FDA, $1;
fma.rn.f32 $0, turns, 0fB4A22168, $0;
fma.rn.f32 $0, turns, 0fA8C234C5, $0;
}"""


def cos_sin(angle: jax.Array, interpret: bool) -> tuple[jax.Array, jax.Array]:
    """Returns (cos, sin) of angles up to 10^5 within 2^-20.

    Triton has each thread compute them for all features of its tile: too much for the exact ones.
    """
    if interpret:
        return jnp.cos(angle), jnp.sin(angle)
    rest = _computed(IN_A_TURN, angle)
    return _computed("cos.approx.f32 $0, $1;", rest), _computed("sin.approx.f32 $0, $1;", rest)


def power_of_2(x: jax.Array, interpret: bool) -> jax.Array:
    """Returns 2^x, or 0 for what is no normal number: three instructions less than jnp.exp2."""
    return jnp.exp2(x) if interpret else _computed("ex2.approx.ftz.f32 $0, $1;", x)


# Four codes int8 in a register: c + 128 becomes the last bits of 2^23 + (c + 128).
OF_CODES = "\n".join(
    ["{", ".reg .b32 codes;", "xor.b32 codes, $4, 0x80808080;"]
    + [f"prmt.b32 ${i}, codes, 0x4B000000, 0x744{i};" for i in range(4)]
    + [f"add.rn.f32 ${i}, ${i}, 0fCB000080;" for i in range(4)]
    + ["}"]
)


def wide(x: jax.Array, interpret: bool) -> jax.Array:
    """Returns x in float32, of which bfloat16 is the upper half: one instruction, not two.

    Of int8, two instructions and a quarter.
    """
    if not interpret and x.dtype == jnp.int8:
        return _computed(OF_CODES, x, constraints="=r,=r,=r,=r,r", pack=4)
    if interpret or x.dtype != jnp.bfloat16:
        return x.astype(jnp.float32)
    text = "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;"
    return _computed(text, x, constraints="=&r,=r,r", pack=2)


def nearest(x: jax.Array, interpret: bool) -> jax.Array:
    """Returns x rounded to whole numbers, halves to even, for which jax has no Triton."""
    return jnp.round(x) if interpret else _computed("cvt.rni.f32.f32 $0, $1;", x)


def multiply_add(x: jax.Array, y: jax.Array, z: jax.Array, interpret: bool) -> jax.Array:
    """Returns x y + z in one instruction, not two."""
    if interpret:
        return x * y + z
    operands = [jnp.broadcast_to(a, z.shape) for a in (x, y, z)]
    return _computed("fma.rn.f32 $0, $1, $2, $3;", *operands, constraints="=r,r,r,r")


def quotient(x: jax.Array, y: jax.Array, interpret: bool) -> jax.Array:
    """Returns x / y, rounded as IEEE rounds it: Triton's own may be off by two units."""
    if interpret:
        return x / y
    return _computed("div.rn.f32 $0, $1, $2;", x, y, constraints="=r,r,r")


def _computed(
    text: str, *operands: jax.Array, constraints: str = "=&r,r", pack: int = 1
) -> jax.Array:
    """float32 results of PTX, elements `pack` at a time."""
    result = [jax.ShapeDtypeStruct(operands[0].shape, jnp.float32)]
    return plt.elementwise_inline_asm(
        text, args=operands, constraints=constraints, pack=pack, result_shape_dtypes=result
    )[0]
