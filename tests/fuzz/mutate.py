"""Changes inputs at random: bytes of any file, values of JSON and of lines `key = value`.

    random = Random(7)
    changed(random, b'{"a": 1}', JSON)

Equal seeds give equal inputs.
"""

import json
import re
from collections.abc import Callable
from random import Random
from typing import Any

Mutator = Callable[[Random, bytes], bytes]

INTEGERS = (0, 1, -1, 2, 3, 7, 255, 256, 65536, 10**6, 2**31 - 1, 2**31, 2**32, 2**53, 2**63 - 1,
            2**63, 2**64 - 1, 2**64, 10**30, -(2**63))  # fmt: skip
NUMBERS = (*INTEGERS, 0.0, -0.0, 0.5, -2.5, 1e-320, 1e-39, 1e39, 1e308, float("inf"),
           -float("inf"), float("nan"))  # fmt: skip
WORDS = ("", " ", "x", "x" * 5000, "é", "漢字", "\0", "\ud800", "../out", "/tmp/out", "a/b", ".",
         "..", "model", "weight", "null", "[bold]", "%s", "{0}", "{{ 1/0 }}", "{% for %}", "(",
         ".*", "(a+)+$", "\n", "<s>", "1e5", "-1", "nan", "9" * 5000)  # fmt: skip
ATOMS = (None, True, False, *NUMBERS, *WORDS)


def value(random: Random) -> Any:
    """Returns a JSON value that is seldom what a reader expects."""
    match random.randrange(12):
        case 0:
            return []
        case 1:
            return {}
        case 2:
            return [random.choice(ATOMS) for _ in range(random.randrange(1, 4))]
        case 3:
            return {random.choice(WORDS): random.choice(ATOMS)}
        case _:
            return random.choice(ATOMS)


# --- bytes ----------------------------------------------------------------------------------------


def change_bytes(random: Random, data: bytes) -> bytes:
    """Returns the bytes with one to four changes."""
    for _ in range(random.choice((1, 1, 1, 2, 4))):
        data = _change_bytes(random, data)
    return data


def _change_bytes(random: Random, data: bytes) -> bytes:
    at, end = random.randrange(len(data) + 1), random.choice((1, 1, 2, 8, 64))
    match random.randrange(11):
        case 0 | 1:  # one bit
            at = min(at, len(data) - 1)
            return (
                data[:at] + bytes([data[at] ^ 1 << random.randrange(8)]) + data[at + 1 :]
                if data
                else data
            )
        case 2:
            return data[:at] + random.randbytes(end) + data[at + end :]
        case 3:
            return data[:at] + random.randbytes(end) + data[at:]
        case 4:
            return data[:at] + data[at + end :]
        case 5:
            return data[:at]
        case 6:
            return data[: at + end] + data[at:]
        case 7:  # some other part of the same file
            other = random.randrange(len(data) + 1)
            return data[:at] + data[other : other + end] + data[at + end :]
        case 8 | 9:  # a number of 4 or 8 bytes
            width = random.choice((4, 8))
            number = random.choice(INTEGERS) % (1 << 8 * width)
            return data[:at] + number.to_bytes(width, "little") + data[at + width :]
        case _:
            return _other_number(random, data)


def _other_number(random: Random, data: bytes) -> bytes:
    """A number that stands in the text becomes another one."""
    numbers = list(re.finditer(rb"-?\d+(\.\d+)?(e-?\d+)?", data[: 1 << 16]))
    if not numbers:
        return data
    match = random.choice(numbers)
    return data[: match.start()] + str(random.choice(NUMBERS)).encode() + data[match.end() :]


# --- JSON -----------------------------------------------------------------------------------------


def change_json(random: Random, data: bytes) -> bytes:
    """Returns a JSON text with one to three of its values changed; now and then its bytes."""
    if random.random() < 0.25:
        return change_bytes(random, data)
    tree = json.loads(data)
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        tree = change_tree(random, tree)
    text = json.dumps(tree).encode()
    if random.random() < 0.02:  # nested deeper than any parser likes
        text = re.sub(rb"\d+", b"[" * 100_000 + b"]" * 100_000, text, count=1)
    if random.random() < 0.05:  # a key twice
        text = re.sub(rb'("\w+": *)(\d+)', rb"\1\2, \g<1>7", text, count=1)
    return text


def change_tree(random: Random, tree: Any) -> Any:
    """Changes one value of a tree of lists and objects, and returns it."""
    if not isinstance(tree, dict | list) or not tree:
        return value(random)
    container, key = _place(random, tree)
    match random.randrange(6):
        case 0:
            del container[key]
        case 1:
            other, other_key = _place(random, tree)
            container[key] = json.loads(json.dumps(other[other_key]))
        case 2 if isinstance(container, dict):
            container[random.choice(WORDS)] = container.pop(key)
        case 3 if isinstance(container[key], int | float):
            container[key] = random.choice(NUMBERS)
        case 4 if isinstance(container[key], str):
            container[key] = change_bytes(random, container[key].encode(errors="replace")).decode(
                "latin-1"
            )
        case _:
            container[key] = value(random)
    return tree


def _place(random: Random, tree: Any) -> tuple[Any, Any]:
    """(container, key) of a value. Each on a level is as likely, however much it holds, so that a
    vocabulary does not outweigh all else.
    """
    while True:
        key = random.choice(list(tree)) if isinstance(tree, dict) else random.randrange(len(tree))
        child = tree[key]
        if not isinstance(child, dict | list) or not child or random.random() < 0.2:
            return tree, key
        tree = child


# --- lines of TOML --------------------------------------------------------------------------------


def change_lines(random: Random, data: bytes) -> bytes:
    """Returns a text of lines `key = value` with some lines changed; now and then its bytes."""
    if random.random() < 0.25:
        return change_bytes(random, data)
    lines = data.split(b"\n")
    for _ in range(random.choice((1, 1, 2, 3))):
        at = random.randrange(len(lines))
        key, equals, old = lines[at].partition(b" = ")
        match random.randrange(7):
            case 0:
                del lines[at : at + random.choice((1, 1, 3))]
            case 1:
                lines.insert(at, random.choice(lines))
            case 2 if equals:
                lines[at] = key + equals + random.choice(lines).partition(b" = ")[2]
            case 3 if equals:
                lines[at] = change_bytes(random, key) + equals + old
            case _ if equals:
                lines[at] = key + equals + _toml(value(random)).encode(errors="replace")
        lines = lines or [b""]
    return b"\n".join(lines)


def _toml(item: Any) -> str:
    match item:
        case None:
            return "1979-05-27"
        case bool():
            return str(item).lower()
        case list():
            return f"[{', '.join(map(_toml, item))}]"
        case dict():
            return "{" + ", ".join(f"{json.dumps(k)} = {_toml(v)}" for k, v in item.items()) + "}"
        case str():
            return json.dumps(item)
        case _:
            return str(item)
