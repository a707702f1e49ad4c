"""Instructions that reach memory or other threads of the warp: loads, stores, copies, shuffles,
matrices. See emulator.py."""

import re

import numpy as np

from tests.kernels.ptx.machine import ARRAY_SPAN, WARP, Machine, opcode
from tests.kernels.ptx.text import (
    TYPES,
    EmulationError,
    Instruction,
    Negated,
    Register,
    constant,
    name_of,
    vector,
)


@opcode("createpolicy")
def _cache_policy(machine: Machine, instruction: Instruction):
    machine.write(instruction, instruction.operands[0], np.zeros((1, 1), np.uint64))


@opcode("ld", "ldu")
def _load(machine: Machine, instruction: Instruction):
    target, place = instruction.operands[:2]
    parts, type = instruction.parts, TYPES[instruction.type]
    if parts[0] == "param":
        index = machine.program.parameters[name_of(place)]
        machine.write(instruction, target, np.full((1, 1), (index + 1) * ARRAY_SPAN, np.uint64))
        return
    targets = vector(target)
    loaded = machine.gather(
        _space(parts), place, type.itemsize * len(targets), machine.active(instruction)
    ).view(type)
    for i, item in enumerate(targets):
        machine.write(instruction, item, loaded[..., i])


@opcode("st")
def _store(machine: Machine, instruction: Instruction):
    place, source = instruction.operands[:2]
    values = [
        np.broadcast_to(machine.read(item, instruction.type), machine.shape)
        for item in vector(source)
    ]
    bytes = np.ascontiguousarray(np.stack(values, -1)).view(np.uint8)
    machine.scatter(_space(instruction.parts), place, bytes, machine.active(instruction))


def _space(parts: tuple[str, ...]) -> str:
    return next(
        (part for part in parts if part in {"global", "shared", "local", "const", "param"}),
        "generic",
    )


@opcode("cp")
def _copy(machine: Machine, instruction: Instruction):
    """cp.async from global to shared memory, done at once; zeros where fewer bytes are taken, or
    the source ignored."""
    parts = instruction.parts
    if parts[:2] in {("async", "commit_group"), ("async", "wait_group"), ("async", "wait_all")}:
        return
    if parts[0] != "async" or "shared" not in parts or "global" not in parts:
        raise EmulationError("only cp.async.c?.shared.global")
    target, source, size, *taken = instruction.operands
    length = constant(size)
    active = np.broadcast_to(machine.active(instruction), machine.shape)
    limit = taken[0] if taken else size
    if isinstance(limit, Negated) or (isinstance(limit, Register) and limit.bits == 1):
        kept = np.where(machine.read(limit, "pred"), 0, length)
    else:
        kept = machine.read(limit, "u32")
    kept = np.broadcast_to(kept, machine.shape)
    bytes = machine.gather("global", source, length, active & (kept > 0))
    bytes[np.arange(length) >= kept[..., None]] = 0
    machine.scatter("shared", target, bytes, active)


@opcode("shfl")
def _shuffle(machine: Machine, instruction: Instruction):
    targets, (value, by, clamp, *_) = instruction.operands[:-4], instruction.operands[-4:]
    mode = instruction.parts[1]
    lane = np.arange(WARP)
    bits, amount, control = (machine.lanes(operand, "u32") for operand in (value, by, clamp))
    amount, segment = amount.astype(np.int64) & 31, control.astype(np.int64) >> 8 & 31
    last = lane & segment | control.astype(np.int64) & 31 & ~segment
    first = lane & segment
    source = {
        "bfly": lambda: lane ^ amount,
        "idx": lambda: first | amount & ~segment,
        "up": lambda: lane - amount,
        "down": lambda: lane + amount,
    }[mode]()
    inside = source >= last if mode == "up" else source <= last
    source = np.where(inside, source, lane)
    machine.write(
        instruction, targets[0], machine.threads(np.take_along_axis(bits, source, axis=1))
    )
    if len(targets) > 1:
        machine.write(instruction, targets[1], machine.threads(inside))


@opcode("redux")
def _reduce_over_warp(machine: Machine, instruction: Instruction):
    reduce = {
        "add": np.add,
        "min": np.minimum,
        "max": np.maximum,
        "and": np.bitwise_and,
        "or": np.bitwise_or,
    }
    target, source, _ = instruction.operands
    type = instruction.type
    values = machine.lanes(source, type)
    result = reduce[instruction.parts[1]].reduce(values, axis=1, keepdims=True, dtype=values.dtype)
    machine.write(instruction, target, machine.threads(np.broadcast_to(result, values.shape)))


@opcode("ldmatrix")
def _load_matrices(machine: Machine, instruction: Instruction):
    """Lanes 8 m to 8 m + 7 hold the addresses of matrix m's rows; register m of a lane is two
    elements of 16 bits."""
    targets, place = vector(instruction.operands[0]), instruction.operands[1]
    if "m8n8" not in instruction.parts or "b16" not in instruction.parts:
        raise EmulationError("only m8n8 of 16 bits")
    with_address = np.arange(machine.shape[1])[None] % WARP < 8 * len(targets)
    rows = machine.gather("shared", place, 16, with_address).view(np.uint16).reshape(-1, 4, 8, 8)
    if "trans" in instruction.parts:
        rows = rows.swapaxes(2, 3)
    pairs = np.ascontiguousarray(rows).reshape(-1, 4, WARP, 2).view(np.uint32)[..., 0]
    for matrix, target in enumerate(targets):
        machine.write(instruction, target, machine.threads(pairs[:, matrix]))


@opcode("mma")
def _multiply_matrices(machine: Machine, instruction: Instruction):
    """D = A B + C by a warp, 16 x 8. Lane 4 g + t holds, as element e of E a register,

    A [16, k]: register r, row g + 8 (r & 1), column E t + e + 4 E (r >> 1)
    B [k, 8]: register r, row E t + e + 4 E r, column g
    C, D [16, 8]: register r, row g + 8 (r >> 1), column 2 t + (r & 1)
    """
    shape = next(part for part in instruction.parts if re.fullmatch(r"m\d+n\d+k\d+", part))
    type_d, type_a, type_b, type_c = instruction.parts[-4:]
    d, a, b, c = map(vector, instruction.operands)
    if shape[:6] != "m16n8k" or type_d != type_c or type_d not in {"s32", "f32"}:
        raise EmulationError("only m16n8 with sums of 32 bits")
    integer = type_d == "s32"
    if {type_a, type_b} - ({"s8", "u8"} if integer else {"f16", "bf16"}):
        raise EmulationError("only of 8-bit integers and 16-bit floats")
    per_register = 4 // TYPES[type_a].itemsize
    depth = int(shape[6:])
    if depth != 2 * per_register * len(a) or len(b) * 2 != len(a):
        raise EmulationError(f"{len(a)} and {len(b)} registers")

    def elements(operand: tuple, type: str) -> np.ndarray:
        """[warps, g, t, registers, elements]"""
        words = np.stack([machine.lanes(item, "u32") for item in operand], -1)
        return (
            np.ascontiguousarray(words)
            .view(TYPES[type])
            .reshape(-1, 8, 4, len(operand), per_register)
        )

    # Sums of k <= 32 products of two bytes are exact in float32.
    exact = np.float32 if integer else np.float64
    left = elements(a, type_a).astype(exact).reshape(-1, 8, 4, len(a) // 2, 2, per_register)
    left = left.transpose(0, 4, 1, 3, 2, 5).reshape(-1, 16, depth)
    right = elements(b, type_b).astype(exact).transpose(0, 3, 2, 4, 1).reshape(-1, depth, 8)
    sums = np.stack([machine.lanes(item, type_c) for item in c], -1).reshape(
        -1, 8, 4, 2, 2
    )  # g, t, row half, column
    product = (left @ right).reshape(-1, 2, 8, 4, 2).transpose(0, 2, 3, 1, 4)
    if "satfinite" in instruction.parts:
        result = np.clip(sums + product.astype(np.int64), -(1 << 31), (1 << 31) - 1).astype(
            np.int32
        )
    else:
        result = (
            (sums + product.astype(sums.dtype)) if integer else (sums + product).astype(np.float32)
        )
    for r, item in enumerate(d):
        machine.write(instruction, item, machine.threads(result.reshape(-1, WARP, 4)[..., r]))
