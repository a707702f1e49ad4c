"""Notes: attrs by which a pass tells later passes something.

No op reads them; the text of a graph shows them.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

UNIT_GAIN = "unit_gain"  # of a norm whose gains are all ones: rotations commute with it
DECISION = "ternary"  # of a dense matrix, from `allocate` to `decompose`: what it becomes, as text
MOMENTS = "moments"  # of an embedding, likewise: `SecondMoments` that its errors are weighted by
# Of a linear, likewise: E[g^2] float32 [out] of the gradients at its outputs, as `SecondMoments`.
FISHER = "fisher"
# Of a linear whose one scale is 1 / divisor: the number that its `bitnet` checkpoint stores.
DIVISOR = "divisor"


@dataclass(frozen=True, eq=False)
class SecondMoments:
    """A second moment E[x x'], or its diagonal, as an attr: its shape alone is shown, and it is not
    stored.
    """

    matrix: np.ndarray  # float32 [in, in], or [in]

    def __str__(self) -> str:
        return f"f32[{','.join(map(str, self.matrix.shape))}]"


def without(attrs: dict[str, Any], *names: str) -> dict[str, Any]:
    """Returns the attrs but for these."""
    return {key: value for key, value in attrs.items() if key not in names}
