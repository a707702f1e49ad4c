"""What a block of threads has, and how instructions reach it: registers, memory, branches. See
emulator.py."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from tests.kernels.ptx.text import (
    TYPES,
    Address,
    Constant,
    EmulationError,
    Instruction,
    Name,
    Negated,
    Operand,
    Program,
    Register,
    Special,
    name_of,
)

WARP = 32
ARRAY_SPAN = 1 << 40  # array i lies at (i + 1) * ARRAY_SPAN
POISON = 0xA5

# Instructions by opcode: ptx_arithmetic.py and ptx_memory.py enter theirs.
OPCODES: dict[str, Callable[["Machine", Instruction], None]] = {}
NOTHING = {
    "bar",
    "barrier",
    "griddepcontrol",
    "membar",
    "fence",
    "prefetch",
    "applypriority",
    "discard",
    "nanosleep",
}


def opcode(*names: str):
    def register(function: Callable[["Machine", Instruction], None]):
        OPCODES.update(dict.fromkeys(names, function))
        return function

    return register


@dataclass
class Blocks:
    """Some blocks at the same instruction."""

    indices: np.ndarray  # [blocks, 3]: each one's %ctaid
    at: int
    registers: dict[Register, np.ndarray]  # bits, [blocks or 1, threads or 1]
    shared: np.ndarray  # uint8 [blocks, bytes]

    def some(self, chosen: np.ndarray, at: int) -> "Blocks":
        registers = {
            name: bits[chosen] if len(bits) > 1 else bits for name, bits in self.registers.items()
        }
        return Blocks(self.indices[chosen], at, registers, self.shared[chosen])


class Machine:
    def __init__(
        self, program: Program, memory: list[np.ndarray], grid: Sequence[int], blocks: Blocks
    ):
        self.program = program
        self.memory = memory
        self.grid = grid
        self.blocks = blocks
        self.shape = len(blocks.indices), program.threads
        self.thread = np.arange(program.threads, dtype=np.uint32)[None]

    def run(self) -> list[Blocks]:
        """To the end, or to where the blocks part: the parts."""
        instructions = self.program.instructions
        while self.blocks.at < len(instructions):
            instruction = instructions[self.blocks.at]
            self.blocks.at += 1
            try:
                if instruction.opcode in {"bra", "ret", "exit"}:
                    if parts := self.branch(instruction):
                        return parts
                elif instruction.opcode not in NOTHING:
                    OPCODES[instruction.opcode](self, instruction)
            except KeyError as missing:
                raise self.error(instruction, f"not known here: {missing}") from missing
            except EmulationError as error:
                raise self.error(instruction, str(error)) from error
            except (StopIteration, TypeError, ValueError, AttributeError) as error:
                raise self.error(instruction, f"not in this form: {error!r}") from error
        return []

    def error(self, instruction: Instruction, reason: str) -> EmulationError:
        return EmulationError(
            f"{self.program.name}, line {instruction.line}: {instruction.text}\n{reason}"
        )

    def branch(self, instruction: Instruction) -> list[Blocks]:
        end = len(self.program.instructions)
        target = (
            self.program.labels[name_of(instruction.operands[0])]
            if instruction.opcode == "bra"
            else end
        )
        taken = np.broadcast_to(self.active(instruction), self.shape)
        all_take, some_take = taken.all(axis=1), taken.any(axis=1)
        if (all_take != some_take).any():
            raise EmulationError("threads of a block part here")
        if all_take.all():
            self.blocks.at = target
        elif some_take.any():
            return [self.blocks.some(all_take, target), self.blocks.some(~all_take, self.blocks.at)]
        return []

    def active(self, instruction: Instruction) -> np.ndarray:
        if instruction.guard is None:
            return np.ones((1, 1), np.bool_)
        return self.read(instruction.guard, "pred") ^ instruction.negated

    # Registers hold bits, as unsigned integers of their own width; what is read is of the type
    # asked for.

    def read(self, operand: Operand, type: str) -> np.ndarray:
        wanted = TYPES[type]
        if isinstance(operand, Negated):
            return ~self.read(operand.predicate, type)
        if isinstance(operand, Register):
            bits = self.blocks.registers.get(operand)
            if bits is None:
                raise EmulationError(f"{operand.name} was never written")
        elif isinstance(operand, Constant):
            if type == "pred":
                return np.full((1, 1), operand.bits != 0)
            bits = np.full((1, 1), operand.bits & 0xFFFFFFFFFFFFFFFF, np.uint64)
        elif isinstance(operand, Special):
            bits = self.special(operand.name)
        else:
            raise EmulationError(f"no value: {operand}")
        if type == "pred" or bits.dtype == np.bool_:
            if bits.dtype != wanted:
                raise EmulationError(f"{operand} is not of type {type}")
            return bits
        return bits.astype(f"u{wanted.itemsize}", copy=False).view(wanted)

    def special(self, name: str) -> np.ndarray:
        index, axis = self.blocks.indices, "xyz".find(name[-1])
        match name.removesuffix(".x").removesuffix(".y").removesuffix(".z"):
            case "%tid":
                return self.thread if axis == 0 else np.zeros((1, 1), np.uint32)
            case "%ntid":
                return np.full((1, 1), self.program.threads if axis == 0 else 1, np.uint32)
            case "%ctaid":
                return index[:, axis : axis + 1]
            case "%nctaid":
                return np.full((1, 1), self.grid[axis], np.uint32)
            case "%laneid":
                return self.thread % WARP
            case "%warpid":
                return self.thread // WARP
        raise EmulationError(f"{name} is not known here")

    def write(self, instruction: Instruction, operand: Operand, value: np.ndarray):
        if operand == Name("_"):
            return
        if not isinstance(operand, Register):
            raise EmulationError(f"no register: {operand}")
        width = np.dtype(np.bool_) if operand.bits == 1 else np.dtype(f"u{operand.bits // 8}")
        if value.dtype != width:
            if (
                width == np.bool_
                or value.dtype == np.bool_
                or value.dtype.itemsize > width.itemsize
            ):
                raise EmulationError(f"{operand.name} can't hold {value.dtype}")
            if value.dtype.kind not in "iu":
                value = value.view(f"u{value.dtype.itemsize}")
            value = value.astype(width)  # a signed one keeps its sign
        active = self.active(instruction)
        if not active.all():
            nobody = np.full((1, 1), 0 if width == np.bool_ else POISON, width)
            value = np.where(active, value, self.blocks.registers.get(operand, nobody))
        self.blocks.registers[operand] = value

    def lanes(self, operand: Operand, type: str) -> np.ndarray:
        """[warps, 32]"""
        return np.broadcast_to(self.read(operand, type), self.shape).reshape(-1, WARP)

    def threads(self, lanes: np.ndarray) -> np.ndarray:
        return lanes.reshape(self.shape)

    # Memory.

    def address(self, operand: Operand, type: str = "u64") -> np.ndarray:
        if not isinstance(operand, Address):
            raise EmulationError(f"no address: {operand}")
        return self.read(operand.base, type).astype(np.int64) + operand.offset

    def places(
        self, space: str, operand: Operand, size: int, active: np.ndarray
    ) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """(memory, threads, offsets): by array of global memory, who of the active threads accesses
        it, and where."""
        wide = (
            isinstance(operand, Address)
            and isinstance(operand.base, Register)
            and operand.base.bits == 64
        )
        address = np.broadcast_to(self.address(operand, "u64" if wide else "u32"), self.shape)
        active = np.broadcast_to(active, self.shape)
        if space == "shared":
            shared = self.blocks.shared
            self.check(address[active], size, shared.shape[1], "shared memory")
            yield (
                shared.reshape(-1),
                active,
                (address + np.arange(len(shared))[:, None] * shared.shape[1])[active],
            )
        elif space == "global":
            array = address // ARRAY_SPAN - 1
            for index in np.unique(array[active]):
                if not 0 <= index < len(self.memory):
                    raise EmulationError("an address of no array")
                chosen = active & (array == index)
                offsets = (address % ARRAY_SPAN)[chosen]
                self.check(offsets, size, len(self.memory[index]), f"parameter {index}")
                yield self.memory[index], chosen, offsets
        else:
            raise EmulationError(f"no such memory here: {space}")

    def check(self, offsets: np.ndarray, size: int, length: int, what: str):
        """Addresses that wrapped around below an array are far beyond its end."""
        outside = (offsets < 0) | (offsets + size > length)
        if outside.any():
            raise EmulationError(
                f"{size} bytes at {offsets[outside][0]} of {what}, which has {length}"
            )
        if (offsets % size).any():
            raise EmulationError(
                f"{size} bytes at {offsets[offsets % size != 0][0]} of {what}: not aligned"
            )

    def gather(self, space: str, operand: Operand, size: int, active: np.ndarray) -> np.ndarray:
        """uint8 [blocks, threads, size]; poison where a thread is not active."""
        result = np.full((*self.shape, size), POISON, np.uint8)
        for memory, threads, offsets in self.places(space, operand, size, active):
            result[threads] = _in_pieces(memory, size)[offsets // size]
        return result

    def scatter(self, space: str, operand: Operand, bytes: np.ndarray, active: np.ndarray):
        size = bytes.shape[-1]
        for memory, threads, offsets in self.places(space, operand, size, active):
            _in_pieces(memory, size)[offsets // size] = bytes[threads]


def _in_pieces(memory: np.ndarray, size: int) -> np.ndarray:
    return memory[: len(memory) // size * size].reshape(-1, size)
