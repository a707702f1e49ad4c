"""The table of ops: what a node of each op must have. Their jnp references stand in `atd.models.ops`."""

from dataclasses import dataclass

# Names of the linears by which `rotate` turns the residual stream into another basis and back.
ROTATIONS = ("rotate_in", "rotate_out", "rotate_head")


@dataclass(frozen=True)
class Op:
    """What a node of this op must have. Widths are numbers of features on the last axis."""

    inputs: int
    slots: tuple[str, ...] = ()  # required
    optional: tuple[str, ...] = ()
    attrs: tuple[str, ...] = ()  # required
    optional_attrs: tuple[
        str, ...
    ] = ()  # that change what it computes; any others are notes of passes to passes


OPS = {
    "embed": Op(1, ("weight",)),  # token ids -> rows of the table
    "rms_norm": Op(
        1, ("weight",), attrs=("eps",), optional_attrs=("head_dim",)
    ),  # over the last axis, or each run of `head_dim` features of it
    "linear": Op(
        1, (), ("weight", "bias")
    ),  # x @ weight.T + bias; no weight but attrs tied_to="model.embed_tokens": the embedding's
    "rope": Op(1, attrs=("head_dim", "theta", "scaling")),
    "attention": Op(
        3, attrs=("heads", "kv_heads", "head_dim", "window")
    ),  # causal; window 0: all of the past
    "silu_mul": Op(2),  # silu(a) * b
    "add": Op(2),
    "slice": Op(1, attrs=("start", "stop")),  # features [start, stop)
}
