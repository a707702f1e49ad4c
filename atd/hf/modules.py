"""PyTorch modules that hold packed weights, and unpack them as they compute."""
# pyright: reportMissingImports=false

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from atd.hf.unpack import Quantized, matrix_rows, picked_rows, row_unit
from atd.weights import PackedType, stored

UNPACKED = 1 << 22  # weights that are unpacked at a time, more only where rows belong together
_TORCH = {
    "uint8": torch.uint8,
    "int8": torch.int8,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
}


class PackedWeight(nn.Module):
    """Holds the codes (or trits) and the scales of a matrix [out, in], under the names of files."""

    def __init__(self, type: Quantized):
        super().__init__()
        self.type = type
        self.out_features, self.in_features = type.shape
        self.codes_name = "weight_packed" if isinstance(type, PackedType) else "weight_trits"
        for name, shape, dtype in stored("weight", type).values():
            own = "scales" if name.endswith("scales") else name
            empty = torch.empty(shape, dtype=_TORCH[np.dtype(dtype).name])
            self.register_parameter(own, nn.Parameter(empty, requires_grad=False))
        unit = row_unit(type)
        self._step = max(UNPACKED // (unit * self.in_features), 1) * unit

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Returns rows start..stop, multiples of `row_unit` or the end, float32."""
        return matrix_rows(getattr(self, self.codes_name), self.scales, self.type, start, stop)

    def pieces(self):
        """Yields the matrix piece by piece of rows, float32."""
        for start in range(0, self.out_features, self._step):
            yield self.rows(start, min(start + self._step, self.out_features))

    def extra_repr(self) -> str:
        return str(self.type)


class PackedLinear(PackedWeight):
    """Computes x W' + b from packed codes."""

    def __init__(self, type: Quantized, bias: nn.Parameter | None = None):
        super().__init__(type)
        self.register_parameter("bias", bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = [functional.linear(x, piece.to(x.dtype)) for piece in self.pieces()]
        y = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
        return y if self.bias is None else y + self.bias


class PackedEmbedding(PackedWeight):
    """Looks rows of a packed matrix up."""

    def __init__(self, type: Quantized, dtype: torch.dtype):
        super().__init__(type)
        self.dtype = dtype

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Returns the rows of the ids, [*ids.shape, in]."""
        codes = getattr(self, self.codes_name)
        rows = picked_rows(codes, self.scales, self.type, ids.flatten())
        return rows.reshape(*ids.shape, -1).to(self.dtype)


def hadamard(x: torch.Tensor, block: int) -> torch.Tensor:
    """Returns each run of `block` features times H / sqrt(block), H Sylvester's Hadamard matrix, by
    log2(block) rounds of sums and differences in float32.
    """
    runs, half = x.float().reshape(-1, block), 1
    while half < block:
        pairs = runs.reshape(-1, block // (2 * half), 2, half)
        first, second = pairs[:, :, 0], pairs[:, :, 1]
        runs = torch.stack([first + second, first - second], dim=2).reshape(-1, block)
        half *= 2
    return (runs * block**-0.5).reshape(x.shape).to(x.dtype)
