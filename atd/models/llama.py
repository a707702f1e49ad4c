"""The graph of a model of the llama family: embedding, decoder blocks, final norm and head, as its
config says."""

from collections.abc import Callable
from dataclasses import dataclass

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
    epilogue = [norm, head]
    if model.logit_softcap:
        attrs: dict[str, Attr] = {"cap": model.logit_softcap}
        epilogue.append(Node("softcap", "softcap", ("lm_head",), attrs=attrs))
    return Graph(config, prologue, blocks, Block("", tuple(epilogue)))


def decoder_block(
    name: str, model: ModelConfig, layer: int, reference: Reference, fused: bool
) -> Block:
    """Builds a decoder layer: h = x + attention(norm(x)), then h + mlp(norm(h)); with norms of what
    is added where the family has them, in place of these or besides.

    Args:
        name: in front of its nodes' names, "model.layers.0".
        layer: its number, from 0.
    """
    make = _Layer(name, model, layer, reference, fused)
    attended = make.attention("x")
    between = Node("self_attn.residual", "add", ("x", attended[-1].name))
    gated = make.mlp(between.name)
    last = Node("mlp.residual", "add", (between.name, gated[-1].name))
    return Block(name, (*attended, between, *gated, last))


@dataclass(frozen=True)
class _Layer:
    """Makes the nodes of a decoder layer; fields as the arguments of `decoder_block`."""

    name: str
    model: ModelConfig
    layer: int
    reference: Reference
    fused: bool

    def attention(self, stream: str) -> list[Node]:
        """The nodes from a value of the stream to what attention adds to it."""
        model, head_dim = self.model, self.model.head_dim
        heads, kv_heads = model.num_attention_heads, model.num_key_value_heads
        before, source = self._before(stream, "input_layernorm")
        query, key, value = (f"self_attn.{part}_proj" for part in "qkv")
        outs = {query: heads * head_dim, key: kv_heads * head_dim, value: kv_heads * head_dim}
        nodes = [*before, *self._linears("self_attn.qkv_proj", source, outs, model.qkv_bias)]
        if model.qk_norm:
            nodes.append(self._qk_norm("self_attn.q_norm", query, heads))
            nodes.append(self._qk_norm("self_attn.k_norm", key, kv_heads))
            query, key = "self_attn.q_norm", "self_attn.k_norm"
        if model.ropes[self.layer]:
            nodes.append(Node("self_attn.q_rope", "rope", (query,), attrs=self._rope()))
            nodes.append(Node("self_attn.k_rope", "rope", (key,), attrs=self._rope()))
            query, key = "self_attn.q_rope", "self_attn.k_rope"
        attrs: dict[str, Attr] = {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim}
        attrs["window"] = model.windows[self.layer]
        if model.attention_scale not in (None, head_dim**-0.5):
            attrs["scale"] = model.attention_scale
        if model.attention_softcap:
            attrs["softcap"] = model.attention_softcap
        nodes.append(Node("self_attn.attention", "attention", (query, key, value), attrs=attrs))
        return nodes + self._out(
            ("self_attn.attn_sub_norm", "self_attn.o_proj", "post_attention_layernorm"),
            nodes[-1].name,
            heads * head_dim,
            model.o_bias,
        )

    def mlp(self, stream: str) -> list[Node]:
        """The nodes from a value of the stream to what the MLP adds to it."""
        model, width = self.model, self.model.intermediate_size
        norm = "pre_feedforward_layernorm" if model.post_norms else "post_attention_layernorm"
        before, source = self._before(stream, norm)
        outs = {"mlp.gate_proj": width, "mlp.up_proj": width}
        gate = Node(f"mlp.{model.gate}", model.gate, ("mlp.gate_proj", "mlp.up_proj"))
        return [
            *before,
            *self._linears("mlp.gate_up_proj", source, outs, model.mlp_bias),
            gate,
            *self._out(
                ("mlp.ffn_sub_norm", "mlp.down_proj", "post_feedforward_layernorm"),
                gate.name,
                width,
                model.mlp_bias,
            ),
        ]

    def _before(self, stream: str, module: str) -> tuple[list[Node], str]:
        """The norm in front of what reads the stream, none in some families; and what is read."""
        if not self.model.pre_norms:
            return [], stream
        norm = self._norm(module, stream, self.model.hidden_size, eps=self.model.stream_eps)
        return [norm], norm.name

    def _out(self, modules: tuple[str, str, str], value: str, width: int, bias: bool) -> list[Node]:
        """The linear that writes to the stream, with the norms around it that the family has.

        modules: the norm in front of it, itself, the norm behind it.
        """
        before, module, behind = modules
        hidden, nodes = self.model.hidden_size, []
        if self.model.sub_norms:
            nodes.append(self._norm(before, value, width))
        source = before if self.model.sub_norms else value
        nodes.append(self._linear(module, source, width, hidden, bias))
        if self.model.post_norms:
            nodes.append(self._norm(behind, module, hidden))
        return nodes

    def _linear(self, module: str, value: str, inputs: int, out: int, bias: bool) -> Node:
        weights = {"weight": self.reference(f"{self.name}.{module}.weight", out, inputs)}
        if bias:
            weights["bias"] = self.reference(f"{self.name}.{module}.bias", out)
        return Node(module, "linear", (value,), weights)

    def _linears(self, joined: str, value: str, outs: dict[str, int], bias: bool) -> list[Node]:
        """Linears of one input by name and width; fused: one of them, cut into these parts."""
        inputs = self.model.hidden_size
        if not self.fused:
            return [self._linear(module, value, inputs, out, bias) for module, out in outs.items()]
        whole = self._linear(joined, value, inputs, sum(outs.values()), bias)
        return [whole, *slices(joined, outs)]

    def _norm(self, module: str, value: str, width: int, **attrs: Attr) -> Node:
        weights = {"weight": self.reference(f"{self.name}.{module}.weight", width)}
        eps = {"eps": self.model.rms_norm_eps}
        return Node(module, "rms_norm", (value,), weights, eps | attrs)

    def _qk_norm(self, module: str, value: str, heads: int) -> Node:
        """The norm of q or k, over each head or over all."""
        head_dim = self.model.head_dim
        if self.model.wide_qk_norm:
            return self._norm(module, value, heads * head_dim)
        return self._norm(module, value, head_dim, head_dim=head_dim)

    def _rope(self) -> dict[str, Attr]:
        """The attrs of a rope."""
        model = self.model
        theta, scaling = model.rope_theta, model.rope_scaling
        if model.windows[self.layer] and model.windowed_rope:
            theta, scaling = model.windowed_rope
        attrs: dict[str, Attr] = {"head_dim": model.head_dim, "theta": theta, "scaling": scaling}
        return attrs | ({"rotary": model.rotary} if model.rotary < model.head_dim else {})
