"""The quantizer of transformers for folders of atd's: what `from_pretrained` calls.

In front of the weights it reads atd_graph.json and puts modules that hold packed weights in the
place of those of the model, under the names of the file:

    joined linears        q, k and v hold their rows; the file's matrix is split as it is read
    rotations             modules rotate_in, rotate_out, rotate_head, as hooks of embedding, final
                          norm and head
    Hadamard transforms   a hook of the linear behind
    a tied, packed head   holds the embedding's codes
"""
# pyright: reportMissingImports=false

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import Split, WeightConverter
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils import cached_file
from transformers.utils.quantization_config import QuantizationConfigMixin

from atd.errors import BadInput
from atd.hf.modules import PackedEmbedding, PackedLinear, PackedWeight, hadamard
from atd.hf.unpack import READ
from atd.ir import ROTATIONS, Block, Graph, Node, WeightRef, graph_from_json
from atd.ir.rewrite import joined_parts
from atd.models.structure import difference
from atd.weights import DenseType, PackedType, WeightType

FORMAT_VERSION, GRAPH = 1, "atd_graph.json"  # docs/reference/format.md
IN, OUT, HEAD = ROTATIONS


@register_quantization_config("atd")
class AtdConfig(QuantizationConfigMixin):
    """Holds the `quantization_config` of a folder of atd's."""

    def __init__(self, format_version: int = 0, passes: Any = (), **others: Any):
        self.quant_method = "atd"  # type: ignore[assignment]
        self.format_version = format_version
        self.passes = list(passes)


@register_quantizer("atd")
class AtdQuantizer(HfQuantizer):
    """Builds a model whose weights stay packed."""

    requires_calibration = True
    quantization_config: AtdConfig

    def __init__(self, quantization_config: AtdConfig, **options: Any):
        super().__init__(quantization_config, **options)
        self._splits: list[WeightConverter] = []

    def validate_environment(self, *args: Any, **options: Any) -> None:
        version = self.quantization_config.format_version
        if type(version) is not int or not 0 < version <= FORMAT_VERSION:
            raise BadInput(
                f"quantization_config.format_version is {version!r}; this atd reads versions from "
                f"1 to {FORMAT_VERSION}"
            )

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **options: Any
    ) -> PreTrainedModel:
        graph = _read_graph(model, checkpoint_files)
        self._splits = [split for unit in graph.units for split in build_unit(model, unit)]
        return model

    def _process_model_after_weight_loading(
        self, model: PreTrainedModel, **options: Any
    ) -> PreTrainedModel:
        for module in model.modules():
            if isinstance(module, PackedWeight):
                module.requires_grad_(False)
        return model

    def get_weight_conversions(self) -> list[WeightConverter]:
        return self._splits

    def is_serializable(self) -> bool:
        """The folder itself is the stored form: copy it, or `atd push` it."""
        return False

    @property
    def is_trainable(self) -> bool:
        return False


def _read_graph(model: PreTrainedModel, files: list[str] | None) -> Graph:
    """The graph beside the weights. Raises BadInput for one that no model of transformers has."""
    config = model.config
    beside = Path(files[0]).parent / GRAPH if files else None
    if beside is None or not beside.is_file():
        commit = getattr(config, "_commit_hash", None)
        beside = Path(cached_file(config.name_or_path, GRAPH, revision=commit))
    graph = graph_from_json(json.loads(beside.read_bytes()), config.to_dict(), _known_by_type)
    if not type(model).__name__.endswith("ForCausalLM"):
        raise BadInput(
            f"{beside.parent}: atd.hf builds models with a head; load it by AutoModelForCausalLM, "
            f"not as {type(model).__name__}"
        )
    stored_config = json.loads((beside.parent / "config.json").read_bytes())
    if different := difference(replace(graph, config=stored_config), beside.parent):
        raise BadInput(
            f"{beside.parent}: its graph is not that of a {config.model_type} model of "
            f"transformers: {different}; export it with atd export --to hf"
        )
    return graph


def _known_by_type(tensor: str, type: WeightType) -> WeightRef:
    if isinstance(type, PackedType) and type.layout not in READ:
        raise BadInput(f"{tensor}: atd.hf reads the layouts {', '.join(READ)}, not {type.layout}")

    def load():
        raise AssertionError(f"{tensor} is read by transformers")

    return WeightRef(tensor, type, load)


def build_unit(model: PreTrainedModel, unit: Block) -> list[WeightConverter]:
    """Changes the modules of a unit into those that its nodes say; returns what is to be split as
    it is read.
    """
    splits: list[WeightConverter] = []
    for node in unit.nodes:
        name = unit.full_name(node)
        if parts := joined_parts(unit, node):
            splits += _split(model, unit, node, parts)
        elif node.op == "embed":
            _replace_embedding(model, name, node)
        elif node.op == "linear" and "tied_to" in node.attrs:
            _tie_head(model, name, node.attrs["tied_to"])
        elif node.op == "linear" and node.name not in ROTATIONS:
            _replace_linear(model, name, node.weights["weight"].type, "bias" in node.weights)
    for node in unit.nodes:  # hooks of the modules that are there now
        if node.op == "hadamard":
            for reader in unit.readers(node.name):
                linear = model.get_submodule(unit.full_name(reader))
                linear.register_forward_pre_hook(partial(_before, _Hadamard(node.attrs["block"])))
        elif node.name in ROTATIONS:
            _add_rotation(model, unit, node)
    return splits


def _replace_linear(model: nn.Module, name: str, type: WeightType, bias: bool) -> None:
    """Puts a packed linear in the place of a dense one; a dense one stays."""
    linear = model.get_submodule(name)
    assert isinstance(linear, nn.Linear)
    if type.shape != (linear.out_features, linear.in_features) or bias != (linear.bias is not None):
        raise BadInput(
            f"{name} is {linear} in transformers, and {type}{' with a bias' if bias else ''} here"
        )
    if not isinstance(type, DenseType):
        with torch.device("meta"):
            model.set_submodule(name, PackedLinear(type, linear.bias))


def _replace_embedding(model: nn.Module, name: str, node: Node) -> None:
    type = node.weights["weight"].type
    if not isinstance(type, DenseType):
        dtype = model.get_submodule(name).weight.dtype
        with torch.device("meta"):
            model.set_submodule(name, PackedEmbedding(type, dtype))


def _tie_head(model: PreTrainedModel, name: str, embedding: str) -> None:
    """Has the head hold the codes of the embedding, where they are packed."""
    source = model.get_submodule(embedding)
    if not isinstance(source, PackedEmbedding):
        return
    with torch.device("meta"):
        model.set_submodule(name, PackedLinear(source.type))
    names = [key for key, _ in source.named_parameters()]
    tied = {f"{name}.{key}": f"{embedding}.{key}" for key in names}
    model._tied_weights_keys = tied
    model.all_tied_weights_keys = dict(tied)


# --- joined linears -------------------------------------------------------------------------------


def _split(model: nn.Module, unit: Block, node: Node, parts: list[Node]) -> list[WeightConverter]:
    """Gives each part of a joined linear its rows; returns how the file's tensors are split."""
    whole = node.weights["weight"].type
    for part in parts:
        rows = part.attrs["stop"] - part.attrs["start"]
        type = _with_rows(whole, rows)
        _replace_linear(model, unit.full_name(part), type, "bias" in node.weights)
    module, names = unit.full_name(node), [unit.full_name(part) for part in parts]
    fields = [name for name, _ in model.get_submodule(names[0]).named_parameters()]
    return [
        WeightConverter(
            _exactly(f"{module}.{field}"), [f"{name}.{field}" for name in names], [Split(0)]
        )
        for field in fields
    ]


def _exactly(name: str) -> str:
    """A pattern of transformers that this name alone matches."""
    return "^" + name.replace(".", r"\.") + "$"


def _with_rows(type: WeightType, rows: int) -> WeightType:
    """The type of some rows of a joined matrix."""
    if isinstance(type, PackedType):
        return replace(type, ternary=_with_rows(type.ternary, rows))
    return replace(type, shape=(rows, *type.shape[1:]))


# --- rotations ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Hadamard:
    block: int

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return hadamard(x, self.block)


def _add_rotation(model: nn.Module, unit: Block, node: Node) -> None:
    """Puts a rotation of the stream behind the embedding, or in front of the final norm or the
    head.
    """
    type = node.weights["weight"].type
    with torch.device("meta"):
        rotation = (
            nn.Linear(*reversed(type.shape), bias=False)
            if isinstance(type, DenseType)
            else PackedLinear(type)
        )
    model.get_submodule(unit.name).add_module(node.name, rotation)
    if node.name == IN:
        embedding = model.get_submodule(unit.full_name(unit.node(node.inputs[0])))
        embedding.register_forward_hook(partial(_behind, rotation))
    else:
        (reader,) = unit.readers(node.name)
        module = model.get_submodule(unit.full_name(reader))
        module.register_forward_pre_hook(partial(_before, rotation))


def _before(
    turn: Callable[[torch.Tensor], torch.Tensor], module: nn.Module, inputs: tuple
) -> tuple:
    return (turn(inputs[0]), *inputs[1:])


def _behind(
    turn: Callable[[torch.Tensor], torch.Tensor], module: nn.Module, inputs: tuple, output: Any
) -> torch.Tensor:
    return turn(output)
