"""Exports the dequantized weights of a model as a dense Hugging Face folder for other tools."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np

from atd.checkpoint.folder import MANIFEST, check_space, check_target, finish, open_result
from atd.checkpoint.safetensors import INDEX, shard_name
from atd.checkpoint.writer import file_digest, write_file, write_shard
from atd.decomposition.rotations import block_rotation, by_rows
from atd.errors import BadInput, RunFailed
from atd.ir import ROTATIONS, Block, Graph, Node, WeightRef
from atd.ir.notes import without
from atd.ir.rewrite import joined_parts, map_array, unit_gain, with_weight
from atd.models import frontend
from atd.pipeline.output import index_text, tokenizer_files
from atd.progress import Progress, Report, Say, unheard
from atd.weights import DTYPES, Dense, DenseType

IN, OUT, HEAD = ROTATIONS
TORCH_DTYPES = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}


def export_hf(
    model: str | Path,
    out: str | Path,
    *,
    dtype: str = "float32",
    overwrite: bool = False,
    ignore_extra: bool = False,
    say: Say = print,
    progress: Report = unheard,
) -> Path:
    """Writes a model as a dense Hugging Face folder and returns that folder.

    The folder has config.json, safetensors under their Hugging Face names, and the tokenizer.

    Args:
      model: a folder that atd made, or any other checkpoint.
      out: the folder to write.
      dtype: float32, which holds every ternary sum exactly, float16 or bfloat16.
      overwrite: replace `out` if atd made it.
      ignore_extra: leave out tensors of `model` that are not part of its architecture.

    Raises RunFailed where a value does not fit the dtype, BadInput for a graph whose function no
    dense checkpoint has.
    """
    source, target = Path(model), Path(out).absolute()
    # Other tools do not know the nodes of a rotated model.
    graph = absorb(frontend.open(source, ignore_extra=ignore_extra))
    check_target(target, source, overwrite)
    tokenizer = tokenizer_files(source, say)
    units = [
        [ref for node in unit.nodes for ref in _dense(unit, node, TORCH_DTYPES[dtype])]
        for unit in graph.units
    ]
    names = [unit.name or "epilogue" for unit in graph.units]
    total = sum(ref.type.nbytes for refs in units for ref in refs)
    with open_result(target) as result:
        check_space(result, total)
        weight_map, done = {}, 0
        for i, refs in enumerate(units):
            shard = shard_name(i, len(units))
            weight_map |= dict.fromkeys(write_shard(result / shard, refs), shard)
            done += sum(ref.type.nbytes for ref in refs)
            progress(Progress("exporting", done, total, "bytes", names[i]))
        files = {
            "config.json": json.dumps(_config(graph, dtype), indent=2) + "\n",
            INDEX: index_text(total, weight_map),
            **tokenizer,
        }
        for name, content in files.items():
            write_file(result / name, content)
        written = sorted({*files, *weight_map.values()})
        digests = {name: file_digest(result / name) for name in written}
        manifest = {"export": "hf", "files": digests}
        write_file(result / MANIFEST, json.dumps(manifest, indent=1) + "\n")
        finish(target, result, [*digests, MANIFEST], overwrite)
    return target


def _config(graph: Graph, dtype: str) -> dict:
    """The model's config.json as that of dense weights."""
    return without(graph.config, "quantization_config", "dtype") | {"torch_dtype": dtype}


def _dense(unit: Block, node: Node, dtype: str) -> list[WeightRef]:
    """The node's weights, dense and under their Hugging Face names; a joined linear is taken apart
    by its slices.
    """
    refs, parts = [], joined_parts(unit, node)
    for slot, ref in node.weights.items():
        if not parts:
            refs.append(_dense_rows(ref, ref.tensor, 0, ref.type.shape[0], dtype))
        for part in parts:
            tensor, rows = (
                f"{unit.full_name(part)}.{slot}",
                (part.attrs["start"], part.attrs["stop"]),
            )
            refs.append(_dense_rows(ref, tensor, *rows, dtype))
    return refs


def _dense_rows(ref: WeightRef, tensor: str, start: int, stop: int, dtype: str) -> WeightRef:
    """Rows start..stop of a weight as a dense one."""
    type = DenseType((stop - start, *ref.type.shape[1:]), dtype)

    def load() -> Dense:
        array = ref.dense()[start:stop]
        with np.errstate(over="ignore"):
            narrow = array.astype(DTYPES[dtype])
        if not np.isfinite(narrow).all():
            raise RunFailed(f"{tensor}: its values do not fit {dtype}; export with --dtype float32")
        return Dense(narrow)

    return WeightRef(tensor, type, load, ref.source)


def absorb(graph: Graph) -> Graph:
    """Returns a graph of the same function without the nodes of `rotate`.

    Those of the stream are multiplied into a rotated embedding E R and a head E diag(g) R of its
    own, R the rotation of the stream and g the gain of the final norm; Hadamard transforms into the
    linears that read them. All of these become dense f32.
    """
    return _absorb_stream(graph.with_units(tuple(map(_absorb_transforms, graph.units))))


def _absorb_transforms(block: Block) -> Block:
    """The block without Hadamard transforms: W (H x) = (W H) x."""
    for node in [node for node in block.nodes if node.op == "hadamard"]:
        readers = block.readers(node.name)
        if not readers or any(n.op != "linear" or "weight" not in n.weights for n in readers):
            raise BadInput(
                f"{block.full_name(node)} is a Hadamard transform that is not read by linears "
                "alone, and dense checkpoints have no such op"
            )
        for reader in readers:
            matrix = reader.weights["weight"]
            rotation = block_rotation(np.ones(matrix.type.shape[1]), node.attrs["block"])

            def turned(array: np.ndarray, rotation=rotation) -> np.ndarray:
                return by_rows(rotation.apply, array, DTYPES["f32"])

            inputs = tuple(node.inputs[0] if v == node.name else v for v in reader.inputs)
            reader = replace(reader, inputs=inputs)
            block = block.replace_node(with_weight(reader, map_array(matrix, "f32", turned)))
        block = _without_nodes(block, node.name)
    return block


def _absorb_stream(graph: Graph) -> Graph:
    """The graph without the nodes that turn the stream into another basis and back."""
    prologue, epilogue = graph.prologue, graph.epilogue
    if not any(node.name == OUT for node in epilogue.nodes):
        return graph
    embed, into, out = prologue.nodes[0], prologue.nodes[-1], epilogue.node(OUT)
    rotated = into.name != IN  # the embedding already
    (norm,) = epilogue.readers(OUT)
    (head,) = epilogue.readers(HEAD if rotated else norm.name)
    embedding, gain = embed.weights["weight"], norm.weights["weight"]

    def rotated_table(table: np.ndarray) -> np.ndarray:
        return table if rotated else _times(table, into.weights["weight"].dense().T)

    def head_matrix(table: np.ndarray) -> np.ndarray:
        rotation = out.weights["weight"].dense()  # R: x W^T = x R^T
        matrix = gain.dense()[:, None] * rotation
        return _times(table, rotation.T @ matrix if rotated else matrix)

    own = replace(
        map_array(embedding, "f32", head_matrix), tensor=f"{epilogue.full_name(head)}.weight"
    )
    head = replace(head, inputs=(norm.name,), attrs=without(head.attrs, "tied_to"))
    embed = with_weight(embed, map_array(embedding, "f32", rotated_table))
    norm = replace(unit_gain(norm), inputs=("x",))
    epilogue = epilogue.replace_node(with_weight(head, own)).replace_node(norm)
    return replace(
        graph,
        config=graph.config | {"tie_word_embeddings": False},
        prologue=_without_nodes(prologue.replace_node(embed), IN),
        epilogue=_without_nodes(epilogue, OUT, HEAD),
    )


def _times(rows: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """rows @ matrix, some rows at a time."""
    return by_rows(lambda part: part @ matrix, rows, DTYPES["f32"])


def _without_nodes(unit: Block, *names: str) -> Block:
    """The unit but for the nodes of these names."""
    return replace(unit, nodes=tuple(node for node in unit.nodes if node.name not in names))
