"""Runs the PTX of a kernel on a CPU: all threads of many blocks in step, each register a numpy array [blocks, threads].

What compilers make of Pallas-Triton kernels, not all of PTX: an instruction that is not known here raises with its line,
and so does an access outside of an array or not aligned. All threads of a block must branch the same way; blocks may
part. Threads run in step, so a missing barrier goes unnoticed; what nobody wrote is poison.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import ml_dtypes
import numpy as np

WARP = 32
THREADS_AT_A_TIME = 1 << 15
ARRAY_SPAN = 1 << 40  # array i lies at (i + 1) * ARRAY_SPAN
POISON = 0xA5

FLOATS = {"f16": np.float16, "bf16": ml_dtypes.bfloat16, "f32": np.float32, "f64": np.float64}
INTEGERS = {f"{kind}{bits}": f"{'i' if kind == 's' else 'u'}{bits // 8}" for kind in "bus" for bits in (8, 16, 32, 64)}
TYPES = {name: np.dtype(type) for name, type in {**FLOATS, **INTEGERS, "pred": np.bool_}.items()}
PACKED = {"f16x2": "f16", "bf16x2": "bf16"}


class EmulationError(Exception):
    pass


# What the text says ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Register:
    name: str
    bits: int  # 1 for a predicate


@dataclass(frozen=True)
class Negated:
    predicate: Register


@dataclass(frozen=True)
class Constant:
    bits: int  # two's complement


@dataclass(frozen=True)
class Special:
    name: str  # %tid.x and its like


@dataclass(frozen=True)
class Address:
    base: Register | Constant
    offset: int


@dataclass(frozen=True)
class Name:
    text: str  # a label, a parameter


type Operand = Register | Negated | Constant | Special | Address | Name | tuple[Operand, ...]  # the last: { a, b }


def _vector(operand: Operand) -> tuple[Operand, ...]:
    return operand if isinstance(operand, tuple) else (operand,)


def _constant(operand: Operand) -> int:
    if not isinstance(operand, Constant):
        raise EmulationError(f"no constant: {operand}")
    return operand.bits


def _name(operand: Operand) -> str:
    if not isinstance(operand, Name):
        raise EmulationError(f"no name: {operand}")
    return operand.text


@dataclass(frozen=True)
class Instruction:
    line: int
    text: str
    opcode: str  # "ld"
    parts: tuple[str, ...]  # ("global", "v4", "b32")
    operands: tuple[Operand, ...]
    guard: Register | None
    negated: bool  # the guard

    @property
    def type(self) -> str:
        """The last type that the opcode names."""
        return next(part for part in reversed(self.parts) if part in TYPES or part in PACKED)


@dataclass
class Program:
    name: str
    threads: int
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    parameters: dict[str, int] = field(default_factory=dict)
    declared_shared_bytes: int = 0


class Parser:
    def __init__(self, ptx: str, kernel: str | None):
        ptx = re.sub(r"/\*.*?\*/", lambda comment: "\n" * comment[0].count("\n"), ptx, flags=re.DOTALL)
        ptx = re.sub(r"//[^\n]*", "", ptx)
        ptx = re.sub(r"^\s*\.(loc|file)\b[^\n]*", "", ptx, flags=re.MULTILINE)
        entries = [*re.finditer(r"\.entry\s+([\w$]+)\s*\(([^)]*)\)([^{;]*)\{", ptx)]
        names = [entry[1] for entry in entries]
        chosen = [entry for entry in entries if kernel in (None, entry[1])]
        if len(chosen) != 1:
            raise EmulationError(f"which kernel is {kernel}? There are: {names}")
        entry = chosen[0]
        size = re.search(r"\.reqntid\s+(\d+)(?:\s*,\s*(\d+)\s*,\s*(\d+))?", entry[3])
        if size is None or {size[2], size[3]} - {None, "1"}:
            raise EmulationError(f"{entry[1]}: blocks are taken as one row of threads, of a size that .reqntid says")
        self.program = Program(entry[1], int(size[1]))
        for index, name in enumerate(re.findall(r"(\w+)\s*(?:,|$)", entry[2].strip())):
            self.program.parameters[name] = index
        self.scopes: list[dict[str, Operand]] = [{}]
        shared = re.findall(r"\.shared\s+(?:\.align\s+\d+\s+)?\.b8\s+([\w$]+)\[(\d*)\]", ptx)
        for name, length in sorted(shared, key=lambda declared: not declared[1]):  # what the launch adds comes last
            self.scopes[0][name] = Constant(self.program.declared_shared_bytes)
            self.program.declared_shared_bytes += -(-int(length or 0) // 128) * 128
        for line, statement in self.statements(ptx, entry.end()):
            self.take(line, statement)

    @staticmethod
    def statements(ptx: str, start: int) -> Iterator[tuple[int, str]]:
        """Of the body that starts there: (line, text) of each instruction, directive, label, and brace of a scope."""
        depth, end = 1, start
        while depth:
            piece = re.compile(r"\s*([{}]|[\w$]+:(?!:)|[^;{}]*(?:\{[^{}]*\}[^;{}]*)*;)").match(ptx, end)
            if piece is None:
                raise EmulationError(f"line {ptx.count(chr(10), 0, end) + 1}: no statement")
            depth += {"{": 1, "}": -1}.get(piece[1], 0)
            yield ptx.count("\n", 0, piece.start(1)) + 1, piece[1].rstrip(";").strip()
            end = piece.end()

    def take(self, line: int, text: str):
        if text == "{":
            self.scopes.append({})
        elif text == "}":
            self.scopes.pop()
        elif text.endswith(":"):
            self.program.labels[text[:-1]] = len(self.program.instructions)
        elif text.startswith(".reg"):
            self.declare_registers(line, text)
        elif text and not text.startswith((".pragma", ".shared")):
            self.program.instructions.append(self.instruction(line, text))

    def declare_registers(self, line: int, text: str):
        declaration = re.match(r"\.reg\s+\.(\w+)\s+(.*)", text, re.DOTALL)
        if declaration is None or declaration[1] not in TYPES:
            raise EmulationError(f"line {line}: {text}")
        bits = 1 if declaration[1] == "pred" else TYPES[declaration[1]].itemsize * 8
        scope = f"@{line}" if len(self.scopes) > 1 else ""
        for item in declaration[2].split(","):
            family = re.fullmatch(r"([%\w$]+)<(\d+)>", item.strip())
            names = [f"{family[1]}{i}" for i in range(int(family[2]))] if family else [item.strip()]
            self.scopes[-1] |= {name: Register(name + scope, bits) for name in names}

    def instruction(self, line: int, text: str) -> Instruction:
        found = re.match(r"(?:@(!?)([%\w$]+)\s+)?([\w.:]+)\s*(.*)", text, re.DOTALL)
        if found is None:
            raise EmulationError(f"line {line}: {text}")
        negation, guard, opcode, operands = found.groups()
        guard = self.operand(guard) if guard else None
        if guard is not None and not isinstance(guard, Register):
            raise EmulationError(f"line {line}: no guard: {text}")
        name, *parts = re.split(r"\.|::", opcode)
        pieces = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,|\s{[][^,|]*", operands)
        return Instruction(
            line, " ".join(text.split()), name, tuple(parts), tuple(map(self.operand, pieces)), guard, negation == "!"
        )

    def operand(self, text: str) -> Operand:
        text = text.strip()
        if text.startswith("{"):
            return tuple(self.operand(item) for item in text[1:-1].split(","))
        if text.startswith("["):
            base, _, offset = text[1:-1].partition("+")
            place = self.operand(base)
            if isinstance(place, Register | Constant):
                return Address(place, int(offset or "0", 0))
            return Name(text[1:-1].strip())
        if text.startswith("!"):
            predicate = self.operand(text[1:])
            return Negated(predicate) if isinstance(predicate, Register) else Name(text)
        if float_bits := re.fullmatch(r"0[fFdD]([0-9a-fA-F]+)", text):
            return Constant(int(float_bits[1], 16))
        if re.fullmatch(r"-?(0[xX][0-9a-fA-F]+|\d+)U?", text):
            return Constant(int(text.rstrip("U"), 0))
        for scope in reversed(self.scopes):
            if text in scope:
                return scope[text]
        return Special(text) if text.startswith("%") else Name(text)


# What it does ----------------------------------------------------------------------------------------------------------


@dataclass
class Blocks:
    """Some blocks at the same instruction."""

    indices: np.ndarray  # [blocks, 3]: each one's %ctaid
    at: int
    registers: dict[Register, np.ndarray]  # bits, [blocks or 1, threads or 1]
    shared: np.ndarray  # uint8 [blocks, bytes]

    def some(self, chosen: np.ndarray, at: int) -> "Blocks":
        registers = {name: bits[chosen] if len(bits) > 1 else bits for name, bits in self.registers.items()}
        return Blocks(self.indices[chosen], at, registers, self.shared[chosen])


def run_ptx(
    ptx: str,
    grid: Sequence[int],
    arrays: Sequence[np.ndarray],
    *,
    kernel: str | None = None,
    shared_bytes: int = 48 << 10,
) -> None:
    """Launches the kernel (the only one, or that of this name) on arrays, its parameters in order: inputs and outputs,
    which are written in place. shared_bytes is what a launch adds to the shared memory that the PTX declares."""
    program = Parser(ptx, kernel).program
    if len(arrays) != len(program.parameters):
        raise EmulationError(f"{program.name} has {len(program.parameters)} parameters, not {len(arrays)}")
    if any(not array.flags.c_contiguous for array in arrays):
        raise EmulationError("arrays must be contiguous")
    memory = [array.reshape(-1).view(np.uint8) for array in arrays]
    sizes = (*grid, 1, 1)[:3]
    indices = np.array(
        [(x, y, z) for z in range(sizes[2]) for y in range(sizes[1]) for x in range(sizes[0])], np.uint32
    )
    at_a_time = max(1, THREADS_AT_A_TIME // program.threads)
    with np.errstate(all="ignore"):
        for first in range(0, len(indices), at_a_time):
            some = indices[first : first + at_a_time]
            shared = np.full((len(some), program.declared_shared_bytes + -(-shared_bytes // 16) * 16), POISON, np.uint8)
            waiting = [Blocks(some, 0, {}, shared)]
            while waiting:
                waiting += Machine(program, memory, sizes, waiting.pop()).run()


class Machine:
    def __init__(self, program: Program, memory: list[np.ndarray], grid: Sequence[int], blocks: Blocks):
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
        return EmulationError(f"{self.program.name}, line {instruction.line}: {instruction.text}\n{reason}")

    def branch(self, instruction: Instruction) -> list[Blocks]:
        end = len(self.program.instructions)
        target = self.program.labels[_name(instruction.operands[0])] if instruction.opcode == "bra" else end
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

    # Registers hold bits, as unsigned integers of their own width; what is read is of the type asked for.

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
            if width == np.bool_ or value.dtype == np.bool_ or value.dtype.itemsize > width.itemsize:
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
        """(memory, threads, offsets): by array of global memory, who of the active threads accesses it, and where."""
        wide = isinstance(operand, Address) and isinstance(operand.base, Register) and operand.base.bits == 64
        address = np.broadcast_to(self.address(operand, "u64" if wide else "u32"), self.shape)
        active = np.broadcast_to(active, self.shape)
        if space == "shared":
            shared = self.blocks.shared
            self.check(address[active], size, shared.shape[1], "shared memory")
            yield shared.reshape(-1), active, (address + np.arange(len(shared))[:, None] * shared.shape[1])[active]
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
            raise EmulationError(f"{size} bytes at {offsets[outside][0]} of {what}, which has {length}")
        if (offsets % size).any():
            raise EmulationError(f"{size} bytes at {offsets[offsets % size != 0][0]} of {what}: not aligned")

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


# Instructions ----------------------------------------------------------------------------------------------------------

OPCODES: dict[str, Callable[[Machine, Instruction], None]] = {}
NOTHING = {"bar", "barrier", "griddepcontrol", "membar", "fence", "prefetch", "applypriority", "discard", "nanosleep"}


def opcode(*names: str):
    def register(function: Callable[[Machine, Instruction], None]):
        OPCODES.update(dict.fromkeys(names, function))
        return function

    return register


def elementwise(name: str, integer: Callable | None, floating: Callable | None = None, *, bits: bool = False):
    """d = f(a, b, ...), all of one type. bits: of predicates too."""
    OPCODES[name] = lambda machine, instruction: _apply(machine, instruction, integer, floating, bits)


def _apply(
    machine: Machine, instruction: Instruction, integer: Callable | None, floating: Callable | None, bits: bool = False
):
    target, *sources = instruction.operands
    type = instruction.type
    if type in PACKED:
        words = [machine.read(source, "u32") for source in sources]
        low, high = (
            _in_floats(
                instruction, floating, [(word >> shift).astype(np.uint16).view(TYPES[PACKED[type]]) for word in words]
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


def _in_floats(instruction: Instruction, function: Callable | None, values: list[np.ndarray]) -> np.ndarray:
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
    """To the nearest, or in the direction of mode: then value is one of a wider type, rounded to odd."""
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
    """a + b in float64, rounded to odd where it isn't exact: rounded again to fewer bits, it is rounded correctly."""
    sum = a + b
    back = sum - a
    error = (a - (sum - back)) + (b - back)
    odd = sum.view(np.int64) & 1 == 1
    towards = np.where(error > 0, np.inf, -np.inf)
    return np.where((error == 0) | odd | ~np.isfinite(error), sum, np.nextafter(sum, towards))


def _fma(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    if a.dtype not in (np.float32, np.float16):
        raise EmulationError("fma of float32 and float16 only")
    return _odd_sum(*np.broadcast_arrays(a.astype(np.float64) * b, c.astype(np.float64)))


def _shift(left: bool, value: np.ndarray, amount: np.ndarray) -> np.ndarray:
    width = value.dtype.itemsize * 8
    beyond = amount >= width
    fill = -(value < 0).astype(value.dtype) if value.dtype.kind == "i" else np.zeros_like(value)
    kept = np.where(beyond, 0, amount).astype(value.dtype)
    return np.where(beyond, np.zeros_like(value) if left else fill, value << kept if left else value >> kept)


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
        product = machine.read(a, type).astype(TYPES[wide]) * machine.read(b, type).astype(TYPES[wide])
    elif "hi" in parts and narrow.itemsize <= 4:
        product = machine.read(a, type).astype(TYPES[wide]) * machine.read(b, type).astype(TYPES[wide])
        product, wide = (product >> narrow.itemsize * 8).astype(narrow), type
    else:
        raise EmulationError("neither lo, wide nor hi of 32 bits")
    machine.write(instruction, target, product + machine.read(c[0], wide) if c else product)


@opcode("shl", "shr")
def _shifts(machine: Machine, instruction: Instruction):
    target, value, amount = instruction.operands
    left = instruction.opcode == "shl"
    machine.write(instruction, target, _shift(left, machine.read(value, instruction.type), machine.read(amount, "u32")))


@opcode("shf")
def _funnel_shift(machine: Machine, instruction: Instruction):
    direction, mode = instruction.parts[:2]
    target, low, high, amount = instruction.operands
    value = machine.read(high, "u32").astype(np.uint64) << np.uint64(32) | machine.read(low, "u32")
    shift = machine.read(amount, "u32")
    shift = (shift & 31 if mode == "wrap" else np.minimum(shift, 32)).astype(np.uint64)
    machine.write(
        instruction, target, (value >> shift if direction == "r" else value << shift >> np.uint64(32)).astype(np.uint32)
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
            value = value | machine.read(item, f"u{part}").astype(value.dtype) << value.dtype.type(part * i)
        machine.write(instruction, target, value)
    elif isinstance(target, tuple):
        part = TYPES[type].itemsize * 8 // len(target)
        value = machine.read(source, f"u{TYPES[type].itemsize * 8}")
        for i, item in enumerate(target):
            machine.write(instruction, item, (value >> value.dtype.type(part * i)).astype(f"u{part // 8}"))
    else:
        machine.write(instruction, target, machine.read(source, type))


@opcode("cvta")
def _convert_address(machine: Machine, instruction: Instruction):
    if "global" not in instruction.parts:
        raise EmulationError("only of global memory, where it changes nothing")
    machine.write(instruction, instruction.operands[0], machine.read(instruction.operands[1], "u64"))


@opcode("cvt")
def _convert(machine: Machine, instruction: Instruction):
    target, *sources = instruction.operands
    *modes, to, of = instruction.parts
    if to in PACKED:
        if modes != ["rn"]:
            raise EmulationError("only rounded to nearest")
        high, low = (machine.read(source, of).astype(TYPES[PACKED[to]]).view(np.uint16) for source in sources)
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
        result = np.clip(value, max(bounds.min, of_bounds.min), min(bounds.max, of_bounds.max)).astype(TYPES[to])
    else:
        result = value.astype(TYPES[to])
    machine.write(instruction, target, result)


COMPARISONS = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal,
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
        instruction, target, np.where(machine.read(predicate, "pred"), machine.read(a, type), machine.read(b, type))
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
        if _constant(table) >> row & 1:
            result = result | (a if row & 4 else ~a) & (b if row & 2 else ~b) & (c if row & 1 else ~c)
    machine.write(instruction, target, result)


@opcode("bfe")
def _extract_bits(machine: Machine, instruction: Instruction):
    target, value, start, length = instruction.operands
    type = instruction.type
    width = TYPES[type].itemsize * 8
    bits, first, count = machine.read(value, type), machine.read(start, "u32") & 255, machine.read(length, "u32") & 255
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
        machine.read(value, type) & ~mask | _shift(True, machine.read(inserted, type), first) & mask,
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
        total = total + left.astype(f"u{size}").view(f"{'i' if type_a[0] == 's' else 'u'}{size}").astype(
            np.int64
        ) * right.astype(np.uint8).view("i1" if type_b[0] == "s" else "u1")
    machine.write(instruction, target, total.astype(np.uint32))


@opcode("createpolicy")
def _cache_policy(machine: Machine, instruction: Instruction):
    machine.write(instruction, instruction.operands[0], np.zeros((1, 1), np.uint64))


@opcode("ld", "ldu")
def _load(machine: Machine, instruction: Instruction):
    target, place = instruction.operands[:2]
    parts, type = instruction.parts, TYPES[instruction.type]
    if parts[0] == "param":
        index = machine.program.parameters[_name(place)]
        machine.write(instruction, target, np.full((1, 1), (index + 1) * ARRAY_SPAN, np.uint64))
        return
    targets = _vector(target)
    loaded = machine.gather(_space(parts), place, type.itemsize * len(targets), machine.active(instruction)).view(type)
    for i, item in enumerate(targets):
        machine.write(instruction, item, loaded[..., i])


@opcode("st")
def _store(machine: Machine, instruction: Instruction):
    place, source = instruction.operands[:2]
    values = [np.broadcast_to(machine.read(item, instruction.type), machine.shape) for item in _vector(source)]
    bytes = np.ascontiguousarray(np.stack(values, -1)).view(np.uint8)
    machine.scatter(_space(instruction.parts), place, bytes, machine.active(instruction))


def _space(parts: tuple[str, ...]) -> str:
    return next((part for part in parts if part in {"global", "shared", "local", "const", "param"}), "generic")


@opcode("cp")
def _copy(machine: Machine, instruction: Instruction):
    """cp.async from global to shared memory, done at once; zeros where fewer bytes are taken, or the source ignored."""
    parts = instruction.parts
    if parts[:2] in {("async", "commit_group"), ("async", "wait_group"), ("async", "wait_all")}:
        return
    if parts[0] != "async" or "shared" not in parts or "global" not in parts:
        raise EmulationError("only cp.async.c?.shared.global")
    target, source, size, *taken = instruction.operands
    length = _constant(size)
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
    machine.write(instruction, targets[0], machine.threads(np.take_along_axis(bits, source, axis=1)))
    if len(targets) > 1:
        machine.write(instruction, targets[1], machine.threads(inside))


@opcode("redux")
def _reduce_over_warp(machine: Machine, instruction: Instruction):
    reduce = {"add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and, "or": np.bitwise_or}
    target, source, _ = instruction.operands
    type = instruction.type
    values = machine.lanes(source, type)
    result = reduce[instruction.parts[1]].reduce(values, axis=1, keepdims=True, dtype=values.dtype)
    machine.write(instruction, target, machine.threads(np.broadcast_to(result, values.shape)))


@opcode("ldmatrix")
def _load_matrices(machine: Machine, instruction: Instruction):
    """Lanes 8 m to 8 m + 7 hold the addresses of matrix m's rows; register m of a lane is two elements of 16 bits."""
    targets, place = _vector(instruction.operands[0]), instruction.operands[1]
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
    d, a, b, c = map(_vector, instruction.operands)
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
        return np.ascontiguousarray(words).view(TYPES[type]).reshape(-1, 8, 4, len(operand), per_register)

    # Sums of k <= 32 products of two bytes are exact in float32.
    exact = np.float32 if integer else np.float64
    left = elements(a, type_a).astype(exact).reshape(-1, 8, 4, len(a) // 2, 2, per_register)
    left = left.transpose(0, 4, 1, 3, 2, 5).reshape(-1, 16, depth)
    right = elements(b, type_b).astype(exact).transpose(0, 3, 2, 4, 1).reshape(-1, depth, 8)
    sums = np.stack([machine.lanes(item, type_c) for item in c], -1).reshape(-1, 8, 4, 2, 2)  # g, t, row half, column
    product = (left @ right).reshape(-1, 2, 8, 4, 2).transpose(0, 2, 3, 1, 4)
    if "satfinite" in instruction.parts:
        result = np.clip(sums + product.astype(np.int64), -(1 << 31), (1 << 31) - 1).astype(np.int32)
    else:
        result = (sums + product.astype(sums.dtype)) if integer else (sums + product).astype(np.float32)
    for r, item in enumerate(d):
        machine.write(instruction, item, machine.threads(result.reshape(-1, WARP, 4)[..., r]))
