"""Names of stored tensors: which tensors of a file hold a weight."""

import numpy as np

from atd.weights.layouts import LAYOUTS
from atd.weights.types import DTYPES, DenseType, PackedType, WeightType
from atd.weights.values import Dense, Packed, Weight, summed


def stored(tensor: str, type: WeightType) -> dict[str, tuple[str, tuple[int, ...], np.dtype]]:
    """Returns the tensors that hold a weight in a file.

    Dense tensors keep their name; others become `<name>.weight_packed` (or `_trits`) and
    `<name>.scales`.

    Args:
        tensor: the name of the weight, "model.layers.0.self_attn.q_proj.weight".
        type: its type.

    Returns:
        Field of the weight ("array", "trits", "codes", "scales") -> (stored name, shape, dtype).
    """
    if isinstance(type, DenseType):
        return {"array": (tensor, type.shape, DTYPES[type.dtype])}
    ternary = type.ternary if isinstance(type, PackedType) else type
    scales = (
        f"{tensor.removesuffix('.weight')}.scales",
        ternary.scales_shape,
        DTYPES[ternary.dtype],
    )
    if isinstance(type, PackedType):
        return {
            "codes": (f"{tensor}_packed", type.codes_shape, LAYOUTS[type.layout].dtype),
            "scales": scales,
        }
    return {
        "trits": (f"{tensor}_trits", ternary.trits_shape, np.dtype(np.int8)),
        "scales": scales,
    }


def build(type: WeightType, fields: dict) -> Weight:
    """Returns the weight of this type whose fields, named as in `stored`, are these arrays."""
    if isinstance(type, DenseType):
        return Dense(fields["array"])
    if isinstance(type, PackedType):
        return Packed(fields["codes"], fields["scales"], type)
    return summed(fields["trits"], fields["scales"], type)
