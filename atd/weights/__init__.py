"""Weights: what a tensor can be (types), and the tensors, each defined by `dequantize()`.

    dense f16[out,in]                                       the array
    ternary n=2 g=128 free f16[out,in]                      w = sum_i s_i t_i, one trit per byte
    trellis n=2 segment=64 taps=0.4,0.5|1.1 f16[out,in]     trits count in several rows (codes)
    packed n=2 g=128 free layout=aligned/1 f16[out,in]      the same, trits in a layout

The dtype is that of the array (dense) or of the scales. `g` is the group size along the inputs,
`row` (one group per row) or `tensor` (one for all). Scales lie interleaved, [rows, groups, N].
*Tied* scales store the last one alone, u [rows, groups, 1], with s_i = u 3^(N-1-i): then w = u q
with q an integer, on a uniform grid of 3^N levels. A type's text is its stored form:
`parse_type(str(t)) == t`. Values are registered pytrees whose types are static.

    types     DenseType, TernaryType, TrellisType, PackedType and their text
    values    Dense, Ternary, Trellis, Packed: what their arrays stand for
    codes     trellis codes: taps, and values made of trits
    stored    which tensors of a file hold a weight
    layouts   how trits lie in bytes
    groups    groups of inputs that share a scale
"""

from atd.weights.codes import Code, parse_code, values_of
from atd.weights.stored import build, stored
from atd.weights.types import (
    DTYPE_NAMES,
    DTYPES,
    DenseType,
    Group,
    PackedType,
    TernaryType,
    TrellisType,
    WeightType,
    bits_per_weight,
    canonical_group,
    parse_type,
    ternary_of,
)
from atd.weights.values import (
    Dense,
    Packed,
    Ternary,
    Trellis,
    Weight,
    broken,
    combine,
    level_weights,
    summed,
)
