"""Reads checkpoints of Bit-TTT-Engine: N bases with one scale per base and tensor.

    <linear>.weight_packed   uint8 [out, in/4, N], layout `bit-ttt`; [out, in/4] where N = 1
                             older: uint8 [out, in/4, N, 4], one trit per byte, 255 for -1
    <linear>.scales          float32 [N]

All other tensors are dense, the head among them. config.json says arch = "llama" and has names of
its own, or those of Hugging Face. RMS norms have eps = 1e-5 there.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from atd.errors import BadInput
from atd.ir import WeightRef
from atd.models.binder import Binder, Part
from atd.weights import Packed, PackedType, Ternary, TernaryType
from atd.weights.layouts import LAYOUTS

EPS = 1e-5
MOST_BASES = 4
LAYOUT = LAYOUTS["bit-ttt"]
# Its names of what config.json says -> Hugging Face's.
NAMES = {
    "hidden_dim": "hidden_size",
    "num_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "intermediate_dim": "intermediate_size",
}


def is_bit_ttt(config: dict) -> bool:
    """Returns whether a config.json is one of Bit-TTT-Engine: it alone has the key `arch`."""
    return "arch" in config and "quantization_config" not in config


@dataclass(frozen=True)
class BitTtt:
    """A checkpoint of Bit-TTT-Engine."""

    path: Path
    kind = "Bit-TTT-Engine"

    def hf_config(self, config: dict) -> dict:
        """Returns its config.json in Hugging Face's names.

        Raises:
            BadInput: the architecture is another than llama, or two names of one thing disagree.
        """
        if config["arch"] != "llama":
            raise BadInput(
                f"{self.path}: config.json: arch is {config['arch']!r}; expected 'llama'"
            )
        fixed = {"model_type": "llama", "rms_norm_eps": EPS, "tie_word_embeddings": False}
        found = {key: value for key, value in config.items() if key != "arch"} | fixed
        for own, name in NAMES.items():
            if own in found:
                value = found.pop(own)
                if found.setdefault(name, value) != value:
                    raise BadInput(
                        f"{self.path}: config.json: {own} is {value!r} and {name} is "
                        f"{found[name]!r}, which are one thing; keep one of them"
                    )
        return found

    def weight(self, binder: Binder, tensor: str, shape: tuple[int, ...]) -> WeightRef | None:
        """Returns the ternary weight of a linear of a decoder layer; None for other tensors."""
        if len(shape) != 2 or not tensor.startswith("model.layers."):
            return None
        name, out, inputs = f"{tensor}_packed", shape[0], shape[1]
        found = binder.checkpoint.tensors.get(name)
        if inputs % 4:
            binder.problems.append(f"{tensor} has {inputs} inputs, expected a multiple of 4")
            return None
        sizes = found.shape if found else (out, inputs // 4, 1)
        bases = sizes[2] if len(sizes) > 2 else 1
        if found and not 1 <= bases <= MOST_BASES:
            raise BadInput(
                f"{found.file}: tensor {name} has N = {bases} bases (its shape is {list(sizes)}); "
                f"expected 1 to {MOST_BASES}, the most that atd has; convert from the original "
                "checkpoint instead: atd convert MODEL OUT --recipe greedy3"
            )
        ternary = TernaryType((out, inputs), bases, "tensor", False, "f32")
        scales = Part(f"{tensor.removesuffix('.weight')}.scales", (bases,), ("f32",))
        if len(sizes) == 4:
            codes = Part(name, (out, inputs // 4, bases, 4), ("u8",))
            parts = {"codes": codes, "scales": scales}
            return binder.made(tensor, ternary, parts, lambda arrays: _unpacked(arrays, ternary))
        type = PackedType(ternary, LAYOUT.name)
        expected = type.codes_shape if len(sizes) == 3 else type.codes_shape[:2]
        parts = {"codes": Part(name, expected, ("u8",)), "scales": scales}
        return binder.made(tensor, type, parts, lambda arrays: _packed(arrays, type))


def _packed(arrays: dict[str, np.ndarray], type: PackedType) -> Packed:
    codes = arrays["codes"]
    if count := LAYOUT.invalid_bytes(codes):
        raise ValueError(f"{count} bytes hold the code 3; expected codes 0, 1 and 2")
    return Packed(codes.reshape(type.codes_shape), _scales(arrays), type)


def _unpacked(arrays: dict[str, np.ndarray], type: TernaryType) -> Ternary:
    trits = arrays["codes"].view(np.int8)  # [out, in/4, N, 4]
    if (wrong := np.abs(trits.astype(np.int16)) > 1).any():
        raise ValueError(f"{int(wrong.sum())} bytes are no trits; expected 0, 1 and 255")
    return Ternary(trits.swapaxes(2, 3).reshape(type.trits_shape), _scales(arrays), type)


def _scales(arrays: dict[str, np.ndarray]) -> np.ndarray:
    """float32 [N] -> [1, 1, N]."""
    scales = arrays["scales"]
    if not np.isfinite(scales).all():
        raise ValueError(f"its scales are {scales.tolist()}; expected finite numbers")
    return scales.reshape(1, 1, -1)
