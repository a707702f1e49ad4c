"""Reads checkpoints of Hugging Face's `bitnet`: linears of N = 1 base, inputs of 8 bits per token.

    BitLinear                 uint8 codes T, y = (T q(x)) / weight_scale
    AutoBitLinear, offline    uint8 codes T, y = (T q(x)) weight_scale
    AutoBitLinear, online     dense W; s = 1 / mean |W|, T = clip(round(s W), -1, 1),
                              y = (T q(x)) / s

with q of `atd.kernels.packed.rounded`. They become ternary weights with one scale per tensor, in
linears with the attr activations="int8". With `use_rms_norm` each has an RMS norm of its own in
front.

Source: transformers 5.24, `integrations/bitnet.py` and `quantizers/quantizer_bitnet.py`.
"""

import re
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from atd.errors import BadInput
from atd.ir import INT8, Block, Graph, Node, WeightRef
from atd.ir.notes import DIVISOR
from atd.models.binder import WEIGHT_DTYPES, Binder, Part
from atd.weights import DTYPES, DenseType, Packed, PackedType, Ternary, TernaryType
from atd.weights.layouts import LAYOUTS

LINEAR_CLASSES, MODES = ("bitlinear", "autobitlinear"), ("offline", "online")
LAYOUT = LAYOUTS["hf-bitnet"]
_EMBEDDING = "model.embed_tokens"
_LEAST = 1e-5  # of mean |W|


@dataclass(frozen=True)
class Bitnet:
    """What a quantization_config of quant_method bitnet says."""

    divides: bool  # by weight_scale; else multiplies
    online: bool
    norm_eps: float | None  # of the norm in front of each linear; None: there is none
    dense: tuple[str, ...]  # patterns of modules that are not converted
    kind = "quant_method 'bitnet'"

    def weight(self, binder: Binder, tensor: str, shape: tuple[int, ...]) -> WeightRef | None:
        """Returns the ternary weight of a linear; None for any other tensor."""
        module = tensor.removesuffix(".weight")
        if len(shape) != 2 or module == _EMBEDDING or not is_converted(module, self.dense):
            return None
        if self.online:
            return _ternarized(binder, tensor, (shape[0], shape[1]))
        return self._packed(binder, tensor, (shape[0], shape[1]))

    def _packed(self, binder: Binder, tensor: str, shape: tuple[int, int]) -> WeightRef | None:
        if reason := LAYOUT.refuses(*shape, 1):
            binder.problems.append(f"{tensor}: {reason}")
            return None
        stored = _scale(binder, tensor)
        if not 0 < stored < np.inf:
            binder.problems.append(f"{tensor}_scale is {stored}; expected a number above 0")
        with np.errstate(divide="ignore"):
            scale = np.float32(1) / stored.astype(np.float32) if self.divides else stored
        dtype = next(name for name, known in DTYPES.items() if known == scale.dtype)
        type = PackedType(TernaryType(shape, 1, "tensor", False, dtype), LAYOUT.name)

        def packed(arrays: dict[str, np.ndarray]) -> Packed:
            if count := LAYOUT.invalid_bytes(arrays["codes"]):
                raise ValueError(f"{count} bytes hold the code 3; expected codes 0, 1 and 2")
            return Packed(arrays["codes"], scale.reshape(1, 1, 1), type)

        parts = {
            "codes": Part(tensor, type.codes_shape, ("u8",)),
            "scale": Part(f"{tensor}_scale", (1,), WEIGHT_DTYPES),
        }
        return binder.made(tensor, type, parts, packed)

    def with_rounded_inputs(self, graph: Graph, binder: Binder) -> Graph:
        """Returns the graph whose ternary linears round their inputs, after norms of their own
        where there are any.
        """
        return graph.with_units(
            tuple(
                replace(
                    unit,
                    nodes=tuple(
                        new for node in unit.nodes for new in self._rounding(unit, node, binder)
                    ),
                )
                for unit in graph.units
            )
        )

    def _rounding(self, unit: Block, node: Node, binder: Binder) -> list[Node]:
        """The node, in place of which these stand."""
        ref = node.weights.get("weight")
        if node.op != "linear" or ref is None or isinstance(ref.type, DenseType):
            return [node]
        attrs = node.attrs | {"activations": INT8}
        if self.divides and not self.online:
            attrs |= {DIVISOR: float(_scale(binder, ref.tensor))}
        if self.norm_eps is None:
            return [replace(node, attrs=attrs)]
        name, gain = f"{node.name}.rms_norm", f"{unit.full_name(node)}.rms_norm.weight"
        weight = binder.dense(gain, ref.type.shape[1], place=gain)
        norm = Node(name, "rms_norm", node.inputs, {"weight": weight}, {"eps": self.norm_eps})
        return [norm, replace(node, inputs=(name,), attrs=attrs)]


def _scale(binder: Binder, tensor: str) -> np.ndarray:
    """The weight_scale of a linear, one number; 1 where the tensor is none that could be one."""
    found = binder.checkpoint.tensors.get(f"{tensor}_scale")
    if found is None or found.shape != (1,) or found.dtype not in WEIGHT_DTYPES[:3]:
        return np.ones((), np.float32)  # the binder says what is wrong
    return found.load().reshape(())


def _ternarized(binder: Binder, tensor: str, shape: tuple[int, int]) -> WeightRef:
    """The ternary weight that a dense one stands for."""
    type = TernaryType(shape, 1, "tensor", False, "f32")

    def ternary(arrays: dict[str, np.ndarray]) -> Ternary:
        dense = arrays["dense"].astype(np.float32)
        if not np.isfinite(dense).all():
            raise ValueError("it holds NaN or Inf; the checkpoint is damaged")
        scale = np.float32(1) / np.maximum(np.abs(dense).mean(), np.float32(_LEAST))
        trits = np.clip(np.rint(dense * scale), -1, 1).astype(np.int8)
        return Ternary(trits[..., None], (1 / scale).reshape(1, 1, 1), type)

    return binder.made(tensor, type, {"dense": Part(tensor, shape, WEIGHT_DTYPES)}, ternary)


def read_bitnet(quantization: dict, config: dict, path: Path) -> Bitnet:
    """Reads a quantization_config of quant_method bitnet.

    Raises:
        BadInput: a key has a value that transformers does not know either.
    """

    def wrong(key: str, expected: str) -> BadInput:
        return BadInput(
            f"{path}: config.json: quantization_config.{key} is {quantization[key]!r}; "
            f"expected {expected}"
        )

    def choice(key: str, known: tuple[str, ...]) -> str:
        if (value := quantization.get(key, known[0])) not in known:
            raise wrong(key, " or ".join(known))
        return value

    divides = choice("linear_class", LINEAR_CLASSES) == "bitlinear"
    online = choice("quantization_mode", MODES) == "online" and not divides
    has_norms, eps = quantization.get("use_rms_norm", False), quantization.get("rms_norm_eps", 1e-6)
    if type(has_norms) is not bool:
        raise wrong("use_rms_norm", "true or false")
    if type(eps) not in (int, float) or not 0 < eps < 1:
        raise wrong("rms_norm_eps", "a small number above 0")
    dense = quantization.get("modules_to_not_convert")
    if dense is None:
        dense = ["lm_head"]
    if not isinstance(dense, list) or not all(map(_is_pattern, dense)):
        raise wrong("modules_to_not_convert", 'a list of names of modules, such as ["lm_head"]')
    if config.get("tie_word_embeddings") is True and is_converted("lm_head", tuple(dense)):
        raise wrong("modules_to_not_convert", "lm_head in it, as the head is the embedding")
    return Bitnet(divides, online, float(eps) if has_norms else None, tuple(dense))


def _is_pattern(pattern: object) -> bool:
    """Whether it is the name of a module, in which ".*" may stand for anything."""
    return isinstance(pattern, str) and re.fullmatch(r"[\w.]+(\.\*[\w.]*)?", pattern) is not None


def is_converted(module: str, dense: tuple[str, ...]) -> bool:
    """Returns whether transformers converts a module, by the patterns of those that stay dense.

    A pattern matches from the start up to a dot or the end, or as a suffix.
    """
    return not any(
        re.match(rf"(?:{pattern})(?:(?<=\.)|(?=\.|$))", module) or module.endswith(pattern)
        for pattern in dense
    )
