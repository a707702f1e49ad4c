"""PTX as a program: instructions, registers, labels, parameters. See emulator.py."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

import ml_dtypes
import numpy as np

FLOATS = {"f16": np.float16, "bf16": ml_dtypes.bfloat16, "f32": np.float32, "f64": np.float64}
INTEGERS = {
    f"{kind}{bits}": f"{'i' if kind == 's' else 'u'}{bits // 8}"
    for kind in "bus"
    for bits in (8, 16, 32, 64)
}
TYPES = {name: np.dtype(type) for name, type in {**FLOATS, **INTEGERS, "pred": np.bool_}.items()}
PACKED = {"f16x2": "f16", "bf16x2": "bf16"}


class EmulationError(Exception):
    pass


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


type Operand = (
    Register | Negated | Constant | Special | Address | Name | tuple[Operand, ...]
)  # the last: { a, b }


def vector(operand: Operand) -> tuple[Operand, ...]:
    return operand if isinstance(operand, tuple) else (operand,)


def constant(operand: Operand) -> int:
    if not isinstance(operand, Constant):
        raise EmulationError(f"no constant: {operand}")
    return operand.bits


def name_of(operand: Operand) -> str:
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
        ptx = re.sub(
            r"/\*.*?\*/", lambda comment: "\n" * comment[0].count("\n"), ptx, flags=re.DOTALL
        )
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
            raise EmulationError(
                f"{entry[1]}: blocks are taken as one row of threads, of a size that .reqntid says"
            )
        self.program = Program(entry[1], int(size[1]))
        for index, name in enumerate(re.findall(r"(\w+)\s*(?:,|$)", entry[2].strip())):
            self.program.parameters[name] = index
        self.scopes: list[dict[str, Operand]] = [{}]
        shared = re.findall(r"\.shared\s+(?:\.align\s+\d+\s+)?\.b8\s+([\w$]+)\[(\d*)\]", ptx)
        for name, length in sorted(
            shared, key=lambda declared: not declared[1]
        ):  # what the launch adds comes last
            self.scopes[0][name] = Constant(self.program.declared_shared_bytes)
            self.program.declared_shared_bytes += -(-int(length or 0) // 128) * 128
        for line, statement in self.statements(ptx, entry.end()):
            self.take(line, statement)

    @staticmethod
    def statements(ptx: str, start: int) -> Iterator[tuple[int, str]]:
        """Of the body that starts there: (line, text) of each instruction, directive, label, and
        brace of a scope."""
        depth, end = 1, start
        while depth:
            piece = re.compile(r"\s*([{}]|[\w$]+:(?!:)|[^;{}]*(?:\{[^{}]*\}[^;{}]*)*;)").match(
                ptx, end
            )
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
            line,
            " ".join(text.split()),
            name,
            tuple(parts),
            tuple(map(self.operand, pieces)),
            guard,
            negation == "!",
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
