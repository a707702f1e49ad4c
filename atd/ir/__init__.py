"""The IR: a model as a prologue, blocks and an epilogue of nodes whose weights have types.

    Graph       config, prologue (embedding), blocks (decoder layers), epilogue (final norm, head).
                Immutable: a rewrite returns a new one.
    Block       nodes in order of execution. `x` is its input (token ids for the prologue, the
                residual stream elsewhere), the last node its output.
    Node        name, op, inputs (names of earlier nodes or `x`), weights by slot, attrs. Its full
                name is the Hugging Face module path.
    WeightRef   the tensor name and the type of a weight, known without data; `load()` is the only
                reader.

    notes       attrs by which a pass tells later passes something
    rewrite     rewrites of graphs, nodes and weights that several passes share

Every op has a jnp reference in `atd.models.ops`, so a graph runs at every stage. `str(graph)` is
stable text, which golden tests compare. `verify` checks single assignment, slots, attrs and widths.
`Graph.to_json` and `graph_from_json` are the stored form.
"""

from atd.ir.graph import (
    Attr,
    Block,
    Graph,
    InvalidGraph,
    Node,
    WeightRef,
    graph_from_json,
    in_memory,
)
from atd.ir.ops import GATED, INT8, OPS, ROTATIONS, Op
from atd.ir.verification import verify
