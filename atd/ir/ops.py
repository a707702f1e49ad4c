"""The table of ops: what a node of each op must have. Their jnp references stand in
`atd.models.ops`.
"""

from dataclasses import dataclass

INT8 = "int8"  # the value of a linear's attr `activations`, and of an attention's `kv`
# Names of the linears by which `rotate` turns the residual stream into another basis and back.
ROTATIONS = ("rotate_in", "rotate_out", "rotate_head")
GATED = ("silu_mul", "relu2_mul", "gelu_mul")  # ops of gate and up, linear in up


@dataclass(frozen=True)
class Op:
    """What a node of this op must have. A node may have other attrs, which are notes of passes to
    passes.
    """

    inputs: int  # how many
    slots: tuple[str, ...] = ()  # of required weights
    optional: tuple[str, ...] = ()  # slots of further weights
    attrs: tuple[str, ...] = ()  # required
    optional_attrs: tuple[str, ...] = ()  # that change what the op computes


OPS = {
    # Token ids -> rows of the table.
    "embed": Op(1, ("weight",), optional_attrs=("over",)),
    # Over the last axis, or over each run of `head_dim` features of it.
    "rms_norm": Op(1, ("weight",), attrs=("eps",), optional_attrs=("head_dim", "over")),
    # x @ weight.T + bias. Without a weight but with the attr tied_to="model.embed_tokens": the
    # embedding's weight. With activations="int8" x is rounded to 8 bits per token first.
    "linear": Op(1, (), ("weight", "bias"), optional_attrs=("activations",)),
    # Over the first `rotary` features of each head; without the attr over all of them.
    "rope": Op(1, attrs=("head_dim", "theta", "scaling"), optional_attrs=("rotary",)),
    # Causal, over the last `window` positions; 0: over all of the past. Scores are scale q k', with
    # 1 / sqrt(head_dim) without the attr, and with `softcap` softcap tanh(scores / softcap). With
    # kv="int8" keys and values are rounded to 8 bits, with a scale per KV head and position.
    "attention": Op(
        3,
        attrs=("heads", "kv_heads", "head_dim", "window"),
        optional_attrs=("scale", "softcap", "kv"),
    ),
    "silu_mul": Op(2),  # silu(a) * b
    "relu2_mul": Op(2),  # max(a, 0)^2 * b
    "gelu_mul": Op(2),  # gelu(a) * b, gelu by tanh
    # Each run of `block` features times Sylvester's Hadamard matrix over sqrt(block).
    "hadamard": Op(1, attrs=("block",)),
    "softcap": Op(1, attrs=("cap",)),  # cap tanh(x / cap)
    "add": Op(2),
    "slice": Op(1, attrs=("start", "stop")),  # features [start, stop)
    # What the devices of a mesh's axis `over` have, added up, and with features side by side; and
    # of features that all have a device's equal share. Only graphs of one of several devices have
    # these, and others' attrs `over` (`atd.parallel`): an embed has zeros for the rows of others,
    # and the mean of an rms_norm is over the features of all, as is the maximum of `rounded`, which
    # rounds to 8 bits per token in place of a linear.
    "all_sum": Op(1, attrs=("over",)),
    "all_gather": Op(1, attrs=("over",)),
    "share": Op(1, attrs=("over",)),
    "rounded": Op(1, attrs=("over",)),
}
