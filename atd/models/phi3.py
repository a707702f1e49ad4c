"""Takes the joined matrices of Phi-3 apart as they are read, and joins them for its checkpoints.

    self_attn.qkv_proj     rows of q, then those of k, then those of v
    mlp.gate_up_proj       rows of gate, then those of up

Graphs have linears of their own for each part; the pass `fuse` joins those that it may.

Source: transformers 5.24, `models/phi3/modeling_phi3.py`.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace

import numpy as np

from atd.checkpoint.files import StoredTensor
from atd.errors import BadInput
from atd.ir import WeightRef
from atd.models.config import PHI3, ModelConfig
from atd.weights import DTYPES, Dense, DenseType, WeightType

QKV, GATE_UP = "self_attn.qkv_proj", "mlp.gate_up_proj"


def _joined(model: ModelConfig) -> dict[str, dict[str, int]]:
    """Rows of each part, in order, by the module that joins them."""
    heads, kv_heads = model.num_attention_heads, model.num_key_value_heads
    q, kv, mlp = heads * model.head_dim, kv_heads * model.head_dim, model.intermediate_size
    return {
        QKV: {"self_attn.q_proj": q, "self_attn.k_proj": kv, "self_attn.v_proj": kv},
        GATE_UP: {"mlp.gate_proj": mlp, "mlp.up_proj": mlp},
    }


def split_tensors(
    model: ModelConfig,
    tensors: Mapping[str, StoredTensor],
    types: Mapping[str, WeightType],
    origin: object,
) -> dict[str, StoredTensor]:
    """Returns the tensors with the joined ones of Phi-3 apart; those of other families as they are.

    Args:
        model: the config.
        tensors: by Hugging Face's names.
        types: of the weights that are not dense, by name.
        origin: what messages name.

    Raises:
        BadInput: a joined matrix has another number of rows, or is not dense.
    """
    if model.model_type != PHI3:
        return dict(tensors)
    found: dict[str, StoredTensor] = {}
    for name, tensor in tensors.items():
        layer, parts = _parts(model, name)
        if not parts:
            found[name] = tensor
            continue
        if tensor.shape[:1] != (sum(parts.values()),):
            rows = " + ".join(map(str, parts.values()))
            raise BadInput(
                f"{origin}: {name} has the shape {list(tensor.shape)}, expected {rows} rows of "
                f"{', '.join(parts)}"
            )
        start = 0
        for module, count in parts.items():
            part = _rows(tensor, f"{layer}{module}.weight", start, start + count)
            found[part.name] = part
            start += count
    if joined := [name for name in types if _parts(model, name)[1]]:
        raise BadInput(
            f"{origin}: {joined[0]} is {types[joined[0]]}, and matrices that join several are read "
            "where they are dense"
        )
    return found


def _parts(model: ModelConfig, tensor: str) -> tuple[str, dict[str, int]]:
    """What stands before the module in the name of a joined tensor, and its parts; else none."""
    for module, parts in _joined(model).items():
        if tensor.endswith(f".{module}.weight"):
            return tensor.removesuffix(f"{module}.weight"), parts
    return "", {}


def _rows(tensor: StoredTensor, name: str, start: int, stop: int) -> StoredTensor:
    """Rows start..stop of a tensor."""
    rows = f" rows {start}:{stop}"
    return replace(
        tensor,
        name=name,
        shape=(stop - start, *tensor.shape[1:]),
        place=tensor.place + rows,
        load=lambda: tensor.load()[start:stop],
        source=tensor.source and tensor.source + rows,
    )


def join_weights(model: ModelConfig, refs: Iterable[WeightRef]) -> list[WeightRef]:
    """Returns dense weights as checkpoints of their family have them: those of Phi-3 joined.

    Args:
        model: the config.
        refs: dense weights by Hugging Face's names, all that are joined of one dtype.
    """
    refs = list(refs)
    if model.model_type != PHI3:
        return refs
    by_name, absent = {ref.tensor: ref for ref in refs}, set()
    whole = {}
    for ref in refs:
        for module, parts in _joined(model).items():
            first = f"{next(iter(parts))}.weight"
            if ref.tensor.endswith(first):
                layer = ref.tensor.removesuffix(first)
                names = [f"{layer}{part}.weight" for part in parts]
                whole[ref.tensor] = _concatenated(
                    f"{layer}{module}.weight", [by_name[name] for name in names]
                )
                absent |= set(names[1:])
    return [whole.get(ref.tensor, ref) for ref in refs if ref.tensor not in absent]


def _concatenated(tensor: str, refs: list[WeightRef]) -> WeightRef:
    """The rows of several dense weights, one below the other."""
    rows = sum(ref.type.shape[0] for ref in refs)
    first = refs[0].type
    assert isinstance(first, DenseType)

    def load() -> Dense:
        return Dense(np.concatenate([ref.dense() for ref in refs]).astype(DTYPES[first.dtype]))

    type = DenseType((rows, *first.shape[1:]), first.dtype)
    return WeightRef(tensor, type, load, "; ".join(ref.source for ref in refs))
