"""Gives the weights of a graph out of the tensors of a checkpoint, and says what does not fit."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from atd.checkpoint.files import StoredTensor
from atd.checkpoint.reader import Checkpoint
from atd.errors import BadInput
from atd.ir import WeightRef
from atd.weights import DTYPE_NAMES, Dense, DenseType, Weight, WeightType, build, stored

WEIGHT_DTYPES = ("f32", "f16", "bf16", "f64")
_NAMES = {**DTYPE_NAMES, np.dtype(np.int8): "i8", np.dtype(np.uint8): "u8"}
_HARMLESS = re.compile(r"(.*\.)?rotary_emb\.inv_freq")  # a buffer of older transformers
_SHOWN = 20  # most problems in one message


@dataclass(frozen=True)
class Part:
    """A tensor of a file that a weight is made of: what it must be."""

    name: str
    shape: tuple[int, ...]
    dtypes: tuple[str, ...]


@dataclass
class Binder:
    """Gives out references to a checkpoint's tensors; notes which were used, and what is wrong."""

    checkpoint: Checkpoint
    used: set[str] = field(default_factory=set)
    problems: list[str] = field(default_factory=list)
    kind: str = ""  # of a checkpoint that is not dense, for messages

    def reference(self, tensor: str, type: WeightType) -> WeightRef:
        """Returns the weight of this type called `tensor`, wherever `atd.weights.stored` puts its
        parts.
        """
        parts = {
            slot: Part(name, shape, (_NAMES[dtype],))
            for slot, (name, shape, dtype) in stored(tensor, type).items()
        }
        return self.made(tensor, type, parts, lambda arrays: build(type, arrays))

    def dense(self, tensor: str, *shape: int, place: str) -> WeightRef:
        """Returns the weight called `tensor`, of this shape, and the dtype that the file has at
        `place`; f32 for f64.
        """
        found = self.checkpoint.tensors.get(place)
        dtype = found.dtype if found and found.dtype in ("f32", "f16", "bf16") else "f32"

        def cast(arrays: dict[str, np.ndarray]) -> Dense:
            if arrays["array"].dtype != np.float64:
                return Dense(arrays["array"])
            with np.errstate(over="ignore"):  # Inf, which the converter refuses by name
                return Dense(arrays["array"].astype(np.float32))

        part = Part(place, shape, WEIGHT_DTYPES)
        return self.made(tensor, DenseType(shape, dtype), {"array": part}, cast)

    def of_type(self, tensor: str, type: WeightType, *shape: int) -> WeightRef:
        """Returns the weight called `tensor`, of a type that is not dense, where this shape is
        expected.
        """
        if type.shape != shape:
            self.problems.append(
                f"{tensor} has the shape {list(type.shape)}, expected {list(shape)}"
            )
        return self.reference(tensor, type)

    def made(
        self,
        tensor: str,
        type: WeightType,
        parts: Mapping[str, Part],
        make: Callable[[dict[str, np.ndarray]], Weight],
    ) -> WeightRef:
        """Returns the weight called `tensor` that `make` makes of the data of its parts, by slot.

        A ValueError of `make` becomes a BadInput that names the file and the first part.
        """
        found = [self.find(part) for part in parts.values()]

        def load() -> Weight:
            arrays = {slot: self.checkpoint.read(part.name) for slot, part in parts.items()}
            try:
                return make(arrays)
            except ValueError as error:
                first = next(iter(parts.values())).name
                file = self.checkpoint.tensors[first].file
                raise BadInput(f"{file}: tensor {first}: {error}") from None

        sources = [part.source for part in found if part]
        return WeightRef(tensor, type, load, "; ".join(sources) if all(sources) else "")

    def find(self, part: Part) -> StoredTensor | None:
        """Returns a tensor; notes that it is used, and what is wrong with it."""
        self.used.add(part.name)
        found = self.checkpoint.tensors.get(part.name)
        if found is None:
            self.problems.append(f"{part.name} {list(part.shape)} is missing")
            return None
        if found.shape != part.shape:
            empty = "; its data was not saved" if 0 in found.shape else ""
            self.problems.append(
                f"{part.name} has the shape {list(found.shape)}, expected {list(part.shape)}{empty}"
            )
        if found.dtype not in part.dtypes:
            self.problems.append(
                f"{part.name} has the dtype {found.dtype}, expected {' or '.join(part.dtypes)}"
            )
        return found

    def finish(self, ignore_extra: bool | None = None) -> None:
        """Raises BadInput with all problems, if there are any.

        `ignore_extra` leaves out tensors that are not part of the model; None: it is no choice.
        """
        extra = sorted(
            name
            for name, tensor in self.checkpoint.tensors.items()
            if name not in self.used and not _HARMLESS.fullmatch(name) and 0 not in tensor.shape
        )
        problems = list(self.problems)
        if not ignore_extra:
            problems += [f"{name} is not part of the model" for name in extra]
        if problems:
            shown = problems[:_SHOWN] + (
                [f"and {len(problems) - _SHOWN} more"] if problems[_SHOWN:] else []
            )
            if extra and not self.problems and ignore_extra is not None:
                shown.append("leave them out with --ignore-extra, if the model works without them")
            raise BadInput(
                f"{self.checkpoint.path}: the tensors do not fit the model{self.kind}:\n  "
                + "\n  ".join(shown)
            )
