"""Instructions that compute: d = f(a, b, ...), thread by thread. See emulator.py."""

from collections.abc import Callable

import ml_dtypes
import numpy as np

from tests.kernels.ptx.machine import OPCODES, Machine, opcode
from tests.kernels.ptx.text import FLOATS, PACKED, TYPES, EmulationError, Instruction, constant


def elementwise(
    name: str, integer: Callable | None, floating: Callable | None = None, *, bits: bool = False
):
    """d = f(a, b, ...), all of one type. bits: of predicates too."""
    OPCODES[name] = lambda machine, instruction: _apply(
        machine, instruction, integer, floating, bits
    )


def _apply(
    machine: Machine,
    instruction: Instruction,
    integer: Callable | None,
    floating: Callable | None,
    bits: bool = False,
):
    target, *sources = instruction.operands
    type = instruction.type
    if type in PACKED:
        words = [machine.read(source, "u32") for source in sources]
        low, high = (
            _in_floats(
                instruction,
                floating,
                [(word >> shift).astype(np.uint16).view(TYPES[PACKED[type]]) for word in words],
            ).view(np.uint16)
            for shift in (0, 16)
        )
        machine.write(instruction, target, low.astype(np.uint32) | high.astype(np.uint32) << 16)
        return
    values = [machine.read(source, type) for source in sources]
    if type in FLOATS:
        machine.write(instruction, target, _in_floats(instruction, floating, values))
    elif integer is not None and (bits or type != "pred"):
        machine.write(instruction, target, integer(*values).astype(TYPES[type], copy=False))
    else:
        raise EmulationError(f"not of {type}")


def _in_floats(
    instruction: Instruction, function: Callable | None, values: list[np.ndarray]
) -> np.ndarray:
    """In the type of the values; .ftz takes subnormal numbers for zero, .sat cuts to [0, 1]."""
    modes = {*instruction.parts}
    if function is None:
        raise EmulationError("not of floats")
    if "NaN" in modes:
        function = np.minimum if function is np.fmin else np.maximum
    type = values[0].dtype
    if "ftz" in modes:
        values = [_without_subnormal(value) for value in values]
    result = _rounded(function(*values), type, next(iter(modes & {"rm", "rp", "rz"}), None))
    if "ftz" in modes:
        result = _without_subnormal(result)
    return np.clip(np.nan_to_num(result), type.type(0), type.type(1)) if "sat" in modes else result


def _rounded(value: np.ndarray, type: np.dtype, mode: str | None) -> np.ndarray:
    """To the nearest, or in the direction of mode: then value is one of a wider type, rounded to
    odd."""
    nearest = value.astype(type, copy=False)
    if mode is None:
        return nearest
    if value.dtype == type:
        raise EmulationError("only rounded to nearest")
    too_far, towards = {
        "rm": (nearest > value, -np.inf),
        "rp": (nearest < value, np.inf),
        "rz": (np.abs(nearest) > np.abs(value), 0),
    }[mode]
    return np.where(too_far, np.nextafter(nearest, type.type(towards)), nearest)


def _without_subnormal(value: np.ndarray) -> np.ndarray:
    tiny = ml_dtypes.finfo(value.dtype).smallest_normal
    return np.where(np.abs(value) < tiny, np.copysign(value.dtype.type(0), value), value)


def _odd_sum(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a + b in float64, rounded to odd where it isn't exact: rounded again to fewer bits, it is
    rounded correctly."""
    sum = a + b
    back = sum - a
    error = (a - (sum - back)) + (b - back)
    odd = sum.view(np.int64) & 1 == 1
    towards = np.where(error > 0, np.inf, -np.inf)
    return np.where((error == 0) | odd | ~np.isfinite(error), sum, np.nextafter(sum, towards))


def _fma(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    if a.dtype == np.float64:
        raise EmulationError("fma of float64")
    sum = _odd_sum(
        *np.broadcast_arrays(a.astype(np.float64) * b.astype(np.float64), c.astype(np.float64))
    )
    if a.dtype in (np.float32, np.float16):
        return sum
    single = sum.astype(
        np.float32
    )  # on the way to bfloat16, which ml_dtypes rounds from there: to odd as well
    even = single.view(np.int32) & 1 == 0
    towards = np.where(sum > single, np.float32(np.inf), np.float32(-np.inf))
    return np.where((single != sum) & even, np.nextafter(single, towards), single)


def _shift(left: bool, value: np.ndarray, amount: np.ndarray) -> np.ndarray:
    width = value.dtype.itemsize * 8
    beyond = amount >= width
    fill = -(value < 0).astype(value.dtype) if value.dtype.kind == "i" else np.zeros_like(value)
    kept = np.where(beyond, 0, amount).astype(value.dtype)
    return np.where(
        beyond, np.zeros_like(value) if left else fill, value << kept if left else value >> kept
    )


def _truncated_division(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    quotient = a // b
    return quotient + ((quotient < 0) & (quotient * b != a)) if a.dtype.kind == "i" else quotient


elementwise("add", np.add, np.add)
elementwise("sub", np.subtract, np.subtract)
elementwise("min", np.minimum, np.fmin)
elementwise("max", np.maximum, np.fmax)
elementwise("and", np.bitwise_and, bits=True)
elementwise("or", np.bitwise_or, bits=True)
elementwise("xor", np.bitwise_xor, bits=True)
elementwise("not", np.invert, bits=True)
elementwise("neg", np.negative, np.negative)
elementwise("abs", np.abs, np.abs)
elementwise("div", _truncated_division, np.divide)
elementwise("rem", lambda a, b: a - _truncated_division(a, b) * b)
elementwise("popc", lambda a: np.bitwise_count(a).astype(np.uint32))
elementwise("fma", None, _fma)
elementwise("rcp", None, np.reciprocal)
elementwise("sqrt", None, np.sqrt)
elementwise("rsqrt", None, lambda a: 1 / np.sqrt(a))
elementwise("ex2", None, np.exp2)
elementwise("cos", None, np.cos)
elementwise("sin", None, np.sin)
elementwise("lg2", None, np.log2)
elementwise("tanh", None, np.tanh)


@opcode("mul", "mad")
def _multiply(machine: Machine, instruction: Instruction):
    """mul of floats; mul and mad .lo, .hi, .wide of integers."""
    target, a, b, *c = instruction.operands
    type, parts = instruction.type, instruction.parts
    if type in FLOATS or type in PACKED:
        _apply(machine, instruction, None, _fma if c else np.multiply)
        return
    narrow = TYPES[type]
    wide = f"{type[0]}{narrow.itemsize * 16}"
    if "lo" in parts:
        product = machine.read(a, type) * machine.read(b, type)
        wide = type
    elif "wide" in parts:
        product = machine.read(a, type).astype(TYPES[wide]) * machine.read(b, type).astype(
            TYPES[wide]
        )
    elif "hi" in parts and narrow.itemsize <= 4:
        product = machine.read(a, type).astype(TYPES[wide]) * machine.read(b, type).astype(
            TYPES[wide]
        )
        product, wide = (product >> narrow.itemsize * 8).astype(narrow), type
    else:
        raise EmulationError("neither lo, wide nor hi of 32 bits")
    machine.write(instruction, target, product + machine.read(c[0], wide) if c else product)


@opcode("shl", "shr")
def _shifts(machine: Machine, instruction: Instruction):
    target, value, amount = instruction.operands
    left = instruction.opcode == "shl"
    machine.write(
        instruction,
        target,
        _shift(left, machine.read(value, instruction.type), machine.read(amount, "u32")),
    )


@opcode("shf")
def _funnel_shift(machine: Machine, instruction: Instruction):
    direction, mode = instruction.parts[:2]
    target, low, high, amount = instruction.operands
    value = machine.read(high, "u32").astype(np.uint64) << np.uint64(32) | machine.read(low, "u32")
    shift = machine.read(amount, "u32")
    shift = (shift & 31 if mode == "wrap" else np.minimum(shift, 32)).astype(np.uint64)
    machine.write(
        instruction,
        target,
        (value >> shift if direction == "r" else value << shift >> np.uint64(32)).astype(np.uint32),
    )


@opcode("mov")
def _move(machine: Machine, instruction: Instruction):
    """Also of a vector into one register, low part first, and back."""
    target, source = instruction.operands
    type = instruction.type
    if isinstance(source, tuple):
        part = TYPES[type].itemsize * 8 // len(source)
        value = np.zeros((1, 1), TYPES[type])
        for i, item in enumerate(source):
            value = value | machine.read(item, f"u{part}").astype(value.dtype) << value.dtype.type(
                part * i
            )
        machine.write(instruction, target, value)
    elif isinstance(target, tuple):
        part = TYPES[type].itemsize * 8 // len(target)
        value = machine.read(source, f"u{TYPES[type].itemsize * 8}")
        for i, item in enumerate(target):
            machine.write(
                instruction, item, (value >> value.dtype.type(part * i)).astype(f"u{part // 8}")
            )
    else:
        machine.write(instruction, target, machine.read(source, type))


@opcode("cvta")
def _convert_address(machine: Machine, instruction: Instruction):
    if "global" not in instruction.parts:
        raise EmulationError("only of global memory, where it changes nothing")
    machine.write(
        instruction, instruction.operands[0], machine.read(instruction.operands[1], "u64")
    )


@opcode("cvt")
def _convert(machine: Machine, instruction: Instruction):
    target, *sources = instruction.operands
    *modes, to, of = instruction.parts
    if to in PACKED:
        if modes != ["rn"]:
            raise EmulationError("only rounded to nearest")
        high, low = (
            machine.read(source, of).astype(TYPES[PACKED[to]]).view(np.uint16) for source in sources
        )
        machine.write(instruction, target, low.astype(np.uint32) | high.astype(np.uint32) << 16)
        return
    value = machine.read(sources[0], of)
    rounding = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
    for mode in modes:
        if mode in rounding:
            value = rounding[mode](value)
        elif mode not in {"rn", "sat"}:
            raise EmulationError(f"no such mode here: {mode}")
    if to in FLOATS:
        if of in FLOATS and "sat" in modes:
            value = np.clip(np.nan_to_num(value), 0, 1)
        machine.write(instruction, target, value.astype(TYPES[to]))
        return
    bounds = np.iinfo(TYPES[to])
    if of in FLOATS:  # to the nearest that there is, 0 for NaN
        wide = np.nan_to_num(value.astype(np.float64), nan=0, posinf=np.inf, neginf=-np.inf)
        result = np.clip(wide, bounds.min, bounds.max).astype(TYPES[to])
        result = np.where(wide >= bounds.max, TYPES[to].type(bounds.max), result)
    elif "sat" in modes:
        of_bounds = np.iinfo(TYPES[of])
        result = np.clip(
            value, max(bounds.min, of_bounds.min), min(bounds.max, of_bounds.max)
        ).astype(TYPES[to])
    else:
        result = value.astype(TYPES[to])
    machine.write(instruction, target, result)


COMPARISONS = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal,
    "gt": np.greater, "ge": np.greater_equal, "lo": np.less, "ls": np.less_equal,
    "hi": np.greater, "hs": np.greater_equal,
}  # fmt: skip
BOOLEANS = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}


@opcode("setp")
def _compare(machine: Machine, instruction: Instruction):
    comparison, *rest = instruction.parts
    type = instruction.type
    targets = 2 if "|" in instruction.text else 1
    operands = instruction.operands
    a, b = (machine.read(operand, type) for operand in operands[targets : targets + 2])
    if type in FLOATS:
        unordered = np.isnan(a) | np.isnan(b)
        if comparison in {"num", "nan"}:
            result = unordered if comparison == "nan" else ~unordered
        elif comparison in {"equ", "neu", "ltu", "leu", "gtu", "geu"}:
            result = COMPARISONS[comparison[:2]](a, b) | unordered
        else:
            result = COMPARISONS[comparison](a, b) & ~unordered
    else:
        result = COMPARISONS[comparison](a, b)
    results = [result, ~result]
    if combine := BOOLEANS.get(rest[0]):
        results = [combine(value, machine.read(operands[-1], "pred")) for value in results]
    for target, value in zip(operands[:targets], results, strict=False):
        machine.write(instruction, target, value)


@opcode("selp")
def _select(machine: Machine, instruction: Instruction):
    target, a, b, predicate = instruction.operands
    type = instruction.type
    machine.write(
        instruction,
        target,
        np.where(machine.read(predicate, "pred"), machine.read(a, type), machine.read(b, type)),
    )


@opcode("prmt")
def _permute_bytes(machine: Machine, instruction: Instruction):
    """Each of the selector's low four nibbles: a byte of b:a, bit 3 its sign all over."""
    if instruction.parts != ("b32",):
        raise EmulationError("only with a selector of four nibbles")
    target, *sources = instruction.operands
    a, b, selector = (machine.read(source, "u32") for source in sources)
    bytes = np.stack(np.broadcast_arrays(a, b), -1).view(np.uint8)
    nibbles = selector[..., None] >> np.arange(0, 16, 4, dtype=np.uint32) & 15
    if selector.size == 1:
        picked = bytes[..., nibbles.ravel() & 7]
    else:
        shape = np.broadcast_shapes(bytes.shape[:-1], selector.shape)
        bytes, nibbles = np.broadcast_to(bytes, (*shape, 8)), np.broadcast_to(nibbles, (*shape, 4))
        picked = np.take_along_axis(bytes, nibbles & 7, -1)
    picked = np.where(nibbles & 8, (picked >> 7) * np.uint8(255), picked)
    machine.write(instruction, target, np.ascontiguousarray(picked).view(np.uint32)[..., 0])


@opcode("lop3")
def _any_logic(machine: Machine, instruction: Instruction):
    target, *sources, table = instruction.operands
    if len(sources) != 3:
        raise EmulationError("only of three sources")
    a, b, c = (machine.read(source, "u32") for source in sources)
    result = np.zeros((1, 1), np.uint32)
    for row in range(8):
        if constant(table) >> row & 1:
            result = result | (a if row & 4 else ~a) & (b if row & 2 else ~b) & (
                c if row & 1 else ~c
            )
    machine.write(instruction, target, result)


@opcode("bfe")
def _extract_bits(machine: Machine, instruction: Instruction):
    target, value, start, length = instruction.operands
    type = instruction.type
    width = TYPES[type].itemsize * 8
    bits, first, count = (
        machine.read(value, type),
        machine.read(start, "u32") & 255,
        machine.read(length, "u32") & 255,
    )
    if (first + count > width).any():
        raise EmulationError("only within the register")
    rest = width - count
    machine.write(instruction, target, _shift(False, _shift(True, bits, rest - first), rest))


@opcode("bfi")
def _insert_bits(machine: Machine, instruction: Instruction):
    target, inserted, value, start, length = instruction.operands
    type = instruction.type
    first, count = machine.read(start, "u32") & 255, machine.read(length, "u32") & 255
    everything = np.full((1, 1), -1, np.int64).astype(TYPES[type])
    mask = _shift(True, ~_shift(True, everything, count), first)
    machine.write(
        instruction,
        target,
        machine.read(value, type) & ~mask
        | _shift(True, machine.read(inserted, type), first) & mask,
    )


@opcode("dp4a", "dp2a")
def _dot_in_a_register(machine: Machine, instruction: Instruction):
    """dp4a: four bytes times four; dp2a: two halves of a times the low or high two bytes of b."""
    target, a, b, c = instruction.operands
    *modes, type_a, type_b = instruction.parts
    signed = "s32" in (type_a, type_b)
    size = 4 // int(instruction.opcode[2])
    total = machine.read(c, "s32" if signed else "u32").astype(np.int64)
    for i in range(4 // size):
        left = machine.read(a, "u32") >> 8 * size * i
        right = machine.read(b, "u32") >> 8 * (i + 2 * (modes == ["hi"]))
        total = total + left.astype(f"u{size}").view(
            f"{'i' if type_a[0] == 's' else 'u'}{size}"
        ).astype(np.int64) * right.astype(np.uint8).view("i1" if type_b[0] == "s" else "u1")
    machine.write(instruction, target, total.astype(np.uint32))
