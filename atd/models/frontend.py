"""Checkpoints to graphs: a config and a table of tensors become the IR, checked on shapes and dtypes, without data.

`open(path)` takes a Hugging Face folder or a GGUF file of a family in `atd.models.config`, and folders that atd wrote,
whose graph is stored beside the weights.
"""

import re
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from atd.checkpoint.files import StoredTensor, read_json
from atd.checkpoint.folder import GRAPH
from atd.checkpoint.reader import Checkpoint, is_gguf, open_checkpoint, read_config
from atd.errors import BadInput
from atd.ir import Attr, Block, Graph, InvalidGraph, Node, WeightRef, graph_from_json, verify
from atd.models.config import ModelConfig, check_architecture, parse_config
from atd.weights import SHORT, DenseType, Weight, WeightType, build, stored

FORMAT_VERSION = 1
_WEIGHT_DTYPES = ("f32", "f16", "bf16")
_HARMLESS = re.compile(
    r"(.*\.)?rotary_emb\.inv_freq"
)  # a buffer that older versions of transformers saved
_SHOWN = 20  # problems in one message
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"


def open(path: str | Path) -> Graph:
    """The verified graph of the checkpoint at `path`; headers alone are read.

    Raises BadInput: for an architecture that is not supported (before anything but the config is read), for a broken
    checkpoint, and, in one message, for all tensors that are missing, left over, or of the wrong shape or dtype.
    """
    path = Path(path)
    if is_gguf(path):
        checkpoint = open_checkpoint(path)
        return _verified(_from_config(checkpoint, parse_config(checkpoint.config, path)), path)
    config = read_config(path)
    quantization = config.get("quantization_config")
    if quantization is None:
        parsed = parse_config(config, path)
        return _verified(_from_config(open_checkpoint(path), parsed), path)
    method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
    if method != "atd":
        check_architecture(config, path)
        raise BadInput(
            f"{path}: its weights are quantized already, with {method!r}; "
            f"give the original checkpoint, in f32, f16 or bf16"
        )
    version = quantization.get("format_version")
    if type(version) is not int or version < 1:
        raise BadInput(
            f"{path}: config.json: quantization_config.format_version is {version!r}; "
            f"expected an integer from 1 to {FORMAT_VERSION}"
        )
    if version > FORMAT_VERSION:
        raise BadInput(
            f"{path}: written in version {version} of atd's format; this atd reads versions up to {FORMAT_VERSION}; "
            f"install a newer atd"
        )
    return _verified(_from_stored_graph(open_checkpoint(path)), path)


def _verified(graph: Graph, path: Path) -> Graph:
    try:
        verify(graph)
    except (InvalidGraph, ValueError, KeyError, TypeError, IndexError, ZeroDivisionError) as error:
        raise BadInput(f"{path}: not a valid model: {error}") from None
    return graph


@dataclass
class _Binder:
    """Gives out references to a checkpoint's tensors, and remembers what was used and what was wrong with it."""

    checkpoint: Checkpoint
    used: set[str] = field(default_factory=set)
    problems: list[str] = field(default_factory=list)

    def reference(self, tensor: str, type: WeightType) -> WeightRef:
        """The weight of this type called `tensor`, wherever `atd.weights.stored` puts its parts."""
        parts = stored(tensor, type)
        found = [self._find(name, shape, (_SHORT[dtype],)) for name, shape, dtype in parts.values()]
        names = {slot: name for slot, (name, _, _) in parts.items()}
        return WeightRef(
            tensor,
            type,
            partial(_load, self.checkpoint, type, names),
            "; ".join(part.source for part in found if part),
        )

    def dense(self, tensor: str, *shape: int, place: str | None = None) -> WeightRef:
        """A plain tensor of this shape in the dtype in which it is stored, under its own name or that of `place`."""
        found = self._find(place or tensor, shape, _WEIGHT_DTYPES)
        type = DenseType(shape, found.dtype if found else "f32")
        return WeightRef(
            tensor,
            type,
            partial(_load, self.checkpoint, type, {"array": place or tensor}),
            found.source if found else "",
        )

    def _find(
        self, name: str, shape: tuple[int, ...], dtypes: tuple[str, ...]
    ) -> StoredTensor | None:
        self.used.add(name)
        found = self.checkpoint.tensors.get(name)
        if found is None:
            self.problems.append(f"{name} {list(shape)} is missing")
            return None
        if found.shape != tuple(shape):
            self.problems.append(
                f"{name} has the shape {list(found.shape)}, expected {list(shape)}"
            )
        if found.dtype not in dtypes:
            self.problems.append(
                f"{name} has the dtype {found.dtype}, expected {' or '.join(dtypes)}"
            )
        return found

    def finish(self) -> None:
        """Raises BadInput with all problems, if there are any."""
        extra = sorted(
            name
            for name in self.checkpoint.tensors
            if name not in self.used and not _HARMLESS.fullmatch(name)
        )
        problems = self.problems + [f"{name} is not part of the model" for name in extra]
        if problems:
            shown = problems[:_SHOWN] + (
                [f"and {len(problems) - _SHOWN} more"] if problems[_SHOWN:] else []
            )
            raise BadInput(
                f"{self.checkpoint.path}: the tensors do not fit the model:\n  "
                + "\n  ".join(shown)
            )


_SHORT = {**SHORT, np.dtype(np.int8): "i8", np.dtype(np.uint8): "u8"}


def _load(checkpoint: Checkpoint, type: WeightType, names: dict[str, str]) -> Weight:
    return build(type, {slot: checkpoint.read(name) for slot, name in names.items()})


# --- folders that atd wrote -------------------------------------------------------------------------------------------


def _from_stored_graph(checkpoint: Checkpoint) -> Graph:
    file = checkpoint.path / GRAPH
    data = read_json(file)
    binder = _Binder(checkpoint)
    try:
        graph = graph_from_json(data, checkpoint.config, binder.reference)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BadInput(f"{file}: malformed graph: {type(error).__name__}: {error}") from None
    binder.finish()
    return graph


# --- Hugging Face's models --------------------------------------------------------------------------------------------


def _from_config(checkpoint: Checkpoint, config: ModelConfig) -> Graph:
    binder = _Binder(checkpoint)
    tied = config.tie_word_embeddings and _head_is_embedding(checkpoint)
    # Tied, with the head alone in the file: it is the embedding (transformers ties either way).
    place = (
        _HEAD
        if tied and _EMBEDDING not in checkpoint.tensors and _HEAD in checkpoint.tensors
        else None
    )
    embedding = binder.dense(_EMBEDDING, config.vocab_size, config.hidden_size, place=place)
    prologue = Block("model", (Node("embed_tokens", "embed", ("x",), {"weight": embedding}),))
    blocks = tuple(
        _block(f"model.layers.{i}", config, window, binder)
        for i, window in enumerate(config.windows)
    )
    norm = Node(
        "model.norm",
        "rms_norm",
        ("x",),
        {"weight": binder.dense("model.norm.weight", config.hidden_size)},
        {"eps": config.rms_norm_eps},
    )
    if tied:
        head = Node("lm_head", "linear", ("model.norm",), attrs={"tied_to": "model.embed_tokens"})
        binder.used.add(_HEAD)
    else:
        head = Node(
            "lm_head",
            "linear",
            ("model.norm",),
            {"weight": binder.dense(_HEAD, config.vocab_size, config.hidden_size)},
        )
    binder.finish()
    return Graph(checkpoint.config, prologue, blocks, Block("", (norm, head)))


def _head_is_embedding(checkpoint: Checkpoint) -> bool:
    """For a tied model: false where the file has both tensors and they differ (transformers' rule). This reads them."""
    if not {_EMBEDDING, _HEAD} <= checkpoint.tensors.keys():
        return True
    if checkpoint.tensors[_EMBEDDING].shape != checkpoint.tensors[_HEAD].shape:
        return False
    return np.array_equal(checkpoint.read(_EMBEDDING), checkpoint.read(_HEAD))


def _block(name: str, config: ModelConfig, window: int, binder: _Binder) -> Block:
    """A decoder layer: x + attention(norm(x)), then that + mlp(norm(that))."""
    hidden, head_dim = config.hidden_size, config.head_dim
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads

    def linear(module: str, value: str, inputs: int, out: int, bias: bool) -> Node:
        weights = {"weight": binder.dense(f"{name}.{module}.weight", out, inputs)}
        if bias:
            weights["bias"] = binder.dense(f"{name}.{module}.bias", out)
        return Node(module, "linear", (value,), weights)

    def norm(module: str, value: str, width: int, **attrs) -> Node:
        weights = {"weight": binder.dense(f"{name}.{module}.weight", width)}
        return Node(module, "rms_norm", (value,), weights, {"eps": config.rms_norm_eps, **attrs})

    rope = {"head_dim": head_dim, "theta": config.rope_theta, "scaling": config.rope_scaling}
    attention: dict[str, Attr] = {
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": head_dim,
        "window": window,
    }
    nodes = [
        norm("input_layernorm", "x", hidden),
        linear("self_attn.q_proj", "input_layernorm", hidden, heads * head_dim, config.qkv_bias),
        linear("self_attn.k_proj", "input_layernorm", hidden, kv_heads * head_dim, config.qkv_bias),
        linear("self_attn.v_proj", "input_layernorm", hidden, kv_heads * head_dim, config.qkv_bias),
    ]
    query, key = "self_attn.q_proj", "self_attn.k_proj"
    if config.qk_norm:
        nodes.append(norm("self_attn.q_norm", query, head_dim, head_dim=head_dim))
        nodes.append(norm("self_attn.k_norm", key, head_dim, head_dim=head_dim))
        query, key = "self_attn.q_norm", "self_attn.k_norm"
    nodes += [
        Node("self_attn.q_rope", "rope", (query,), attrs=rope),
        Node("self_attn.k_rope", "rope", (key,), attrs=rope),
        Node(
            "self_attn.attention",
            "attention",
            ("self_attn.q_rope", "self_attn.k_rope", "self_attn.v_proj"),
            attrs=attention,
        ),
        linear("self_attn.o_proj", "self_attn.attention", heads * head_dim, hidden, config.o_bias),
        Node("self_attn.residual", "add", ("x", "self_attn.o_proj")),
        norm("post_attention_layernorm", "self_attn.residual", hidden),
        linear(
            "mlp.gate_proj",
            "post_attention_layernorm",
            hidden,
            config.intermediate_size,
            config.mlp_bias,
        ),
        linear(
            "mlp.up_proj",
            "post_attention_layernorm",
            hidden,
            config.intermediate_size,
            config.mlp_bias,
        ),
        Node("mlp.silu_mul", "silu_mul", ("mlp.gate_proj", "mlp.up_proj")),
        linear("mlp.down_proj", "mlp.silu_mul", config.intermediate_size, hidden, config.mlp_bias),
        Node("mlp.residual", "add", ("self_attn.residual", "mlp.down_proj")),
    ]
    return Block(name, tuple(nodes))
