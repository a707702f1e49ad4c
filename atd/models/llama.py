"""The graph of a model of the llama family: embedding, decoder blocks, final norm and head, as its
config says."""

from collections.abc import Callable

from atd.ir import Attr, Block, Graph, Node, WeightRef
from atd.ir.rewrite import slices
from atd.models.config import ModelConfig

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"

Reference = Callable[..., WeightRef]  # (name of the tensor, *its shape) -> the weight


def llama_graph(
    config: dict, model: ModelConfig, reference: Reference, *, fused: bool = False
) -> Graph:
    """Builds the graph of a model.

    Args:
        config: its config.json, which the graph carries.
        model: the same, parsed.
        reference: gives the weight of each tensor, under the name that Hugging Face's checkpoints
            have for it.
        fused: q, k and v are one matrix, and gate and up, as the pass `fuse` leaves them.
    """
    hidden, vocabulary = model.hidden_size, model.vocab_size
    embedding = {"weight": reference(EMBEDDING, vocabulary, hidden)}
    blocks = tuple(
        decoder_block(f"model.layers.{i}", model, i, reference, fused)
        for i in range(model.num_hidden_layers)
    )
    gain = {"weight": reference("model.norm.weight", hidden)}
    norm = Node("model.norm", "rms_norm", ("x",), gain, {"eps": model.stream_eps})
    if model.tie_word_embeddings:
        head = Node("lm_head", "linear", ("model.norm",), attrs={"tied_to": "model.embed_tokens"})
    else:
        weight = {"weight": reference(HEAD, vocabulary, hidden)}
        head = Node("lm_head", "linear", ("model.norm",), weight)
    prologue = Block("model", (Node("embed_tokens", "embed", ("x",), embedding),))
    return Graph(config, prologue, blocks, Block("", (norm, head)))


def decoder_block(
    name: str, model: ModelConfig, layer: int, reference: Reference, fused: bool
) -> Block:
    """Builds a decoder layer: h = x + attention(norm(x)), then h + mlp(norm(h)); with norms of what
    is added where the family has them.

    Args:
        name: in front of its nodes' names, "model.layers.0".
        layer: its number, from 0.
    """
    hidden, head_dim, mlp = model.hidden_size, model.head_dim, model.intermediate_size
    heads, kv_heads = model.num_attention_heads, model.num_key_value_heads

    def linear(module: str, value: str, inputs: int, out: int, bias: bool) -> Node:
        weights = {"weight": reference(f"{name}.{module}.weight", out, inputs)}
        if bias:
            weights["bias"] = reference(f"{name}.{module}.bias", out)
        return Node(module, "linear", (value,), weights)

    def linears(joined: str, value: str, outs: dict[str, int], bias: bool) -> list[Node]:
        """Linears of one input by name and width; fused: one of them, cut into these parts."""
        if not fused:
            return [linear(module, value, hidden, out, bias) for module, out in outs.items()]
        return [linear(joined, value, hidden, sum(outs.values()), bias), *slices(joined, outs)]

    def norm(module: str, value: str, width: int, **attrs: Attr) -> Node:
        weights = {"weight": reference(f"{name}.{module}.weight", width)}
        return Node(module, "rms_norm", (value,), weights, {"eps": model.rms_norm_eps, **attrs})

    def normed(node: Node, module: str, width: int, has_norm: bool) -> list[Node]:
        """The node, and the norm of its value where the family has one there."""
        return [node, norm(module, node.name, width)] if has_norm else [node]

    window = model.windows[layer]
    theta, scaling = model.rope_theta, model.rope_scaling
    if window and model.windowed_rope:
        theta, scaling = model.windowed_rope
    rope: dict[str, Attr] = {"head_dim": head_dim, "theta": theta, "scaling": scaling}
    if model.rotary < head_dim:
        rope["rotary"] = model.rotary
    attention: dict[str, Attr] = {
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": head_dim,
        "window": window,
    }
    query, key, value = (f"self_attn.{part}_proj" for part in "qkv")
    outs = {query: heads * head_dim, key: kv_heads * head_dim, value: kv_heads * head_dim}
    nodes = [
        norm("input_layernorm", "x", hidden, eps=model.stream_eps),
        *linears("self_attn.qkv_proj", "input_layernorm", outs, model.qkv_bias),
    ]
    if model.qk_norm:
        nodes.append(norm("self_attn.q_norm", query, head_dim, head_dim=head_dim))
        nodes.append(norm("self_attn.k_norm", key, head_dim, head_dim=head_dim))
        query, key = "self_attn.q_norm", "self_attn.k_norm"
    if model.ropes[layer]:
        nodes.append(Node("self_attn.q_rope", "rope", (query,), attrs=rope))
        nodes.append(Node("self_attn.k_rope", "rope", (key,), attrs=rope))
        query, key = "self_attn.q_rope", "self_attn.k_rope"
    mixed = normed(
        Node("self_attn.attention", "attention", (query, key, value), attrs=attention),
        "self_attn.attn_sub_norm",
        heads * head_dim,
        model.sub_norms,
    )
    attended = normed(
        linear("self_attn.o_proj", mixed[-1].name, heads * head_dim, hidden, model.o_bias),
        "post_attention_layernorm",
        hidden,
        model.post_norms,
    )
    before_mlp = "pre_feedforward_layernorm" if model.post_norms else "post_attention_layernorm"
    gated = normed(
        Node(f"mlp.{model.gate}", model.gate, ("mlp.gate_proj", "mlp.up_proj")),
        "mlp.ffn_sub_norm",
        mlp,
        model.sub_norms,
    )
    written = normed(
        linear("mlp.down_proj", gated[-1].name, mlp, hidden, model.mlp_bias),
        "post_feedforward_layernorm",
        hidden,
        model.post_norms,
    )
    outs = {"mlp.gate_proj": mlp, "mlp.up_proj": mlp}
    nodes += [
        *mixed,
        *attended,
        Node("self_attn.residual", "add", ("x", attended[-1].name)),
        norm(before_mlp, "self_attn.residual", hidden, eps=model.stream_eps),
        *linears("mlp.gate_up_proj", before_mlp, outs, model.mlp_bias),
        *gated,
        *written,
        Node("mlp.residual", "add", ("self_attn.residual", written[-1].name)),
    ]
    return Block(name, tuple(nodes))
