"""Export: the dequantized weights of any model as a dense Hugging Face folder, so that any other tool can judge them."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from atd.checkpoint.folder import MANIFEST, check_space, check_target, finish, open_partial
from atd.checkpoint.safetensors import INDEX
from atd.checkpoint.writer import file_digest, write_file, write_shard
from atd.decomposition.rotations import by_rows
from atd.errors import RunFailed
from atd.ir import ROTATIONS, Block, Graph, Node, WeightRef
from atd.ir.rewrite import unit_gain
from atd.models import frontend
from atd.pipeline.convert import tokenizer_files
from atd.progress import Progress
from atd.weights import DTYPES, Dense, DenseType

IN, OUT, HEAD = ROTATIONS
TORCH_DTYPES = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}


def export_hf(
    model: str | Path,
    out: str | Path,
    *,
    dtype: str = "float32",
    overwrite: bool = False,
    say: Callable[[str], None] = print,
    progress: Callable[[Progress], None] = lambda progress: None,
) -> Path:
    """Writes `out`: config.json, dense safetensors of `dtype` (float32, float16, bfloat16) under their Hugging Face
    names, tokenizer.

    float32 holds every ternary sum exactly as the runtime computes it. Raises RunFailed where a narrower dtype
    overflows.
    """
    source, target = Path(model), Path(out).absolute()
    graph = absorb(
        frontend.open(source)
    )  # a rotated stream behind a tied head has nodes that other tools do not know
    check_target(target, source, overwrite)
    tokenizer = tokenizer_files(source, say)
    config = {
        key: value
        for key, value in graph.config.items()
        if key not in ("quantization_config", "dtype")
    } | {"torch_dtype": dtype}
    units = [
        [ref for node in unit.nodes for ref in _dense(unit, node, TORCH_DTYPES[dtype])]
        for unit in graph.units
    ]
    total = sum(ref.type.nbytes for refs in units for ref in refs)
    with open_partial(target) as partial:
        check_space(partial, total)
        weight_map, done = {}, 0
        for i, refs in enumerate(units):
            shard = f"model-{i + 1:05d}-of-{len(units):05d}.safetensors"
            weight_map |= dict.fromkeys(write_shard(partial / shard, refs), shard)
            done += sum(ref.type.nbytes for ref in refs)
            progress(Progress("exporting", done, total, "bytes", graph.units[i].name or "epilogue"))
        files = {
            "config.json": json.dumps(config, indent=2) + "\n",
            INDEX: json.dumps(
                {"metadata": {"total_size": total}, "weight_map": weight_map},
                indent=1,
                sort_keys=True,
            )
            + "\n",
            **tokenizer,
        }
        for name, content in files.items():
            write_file(partial / name, content)
        digests = {
            name: file_digest(partial / name) for name in sorted({*files, *weight_map.values()})
        }
        write_file(
            partial / MANIFEST, json.dumps({"export": "hf", "files": digests}, indent=1) + "\n"
        )
        finish(target, partial, [*digests, MANIFEST])
    return target


def _dense(unit: Block, node: Node, dtype: str) -> list[WeightRef]:
    """Dense weights of the node under their Hugging Face names; a joined linear is taken apart by the slices that read it."""
    parts = [part for part in unit.nodes if part.op == "slice" and part.inputs == (node.name,)]
    refs = []
    for slot, ref in node.weights.items():
        if not parts:
            refs.append(_dense_rows(ref, ref.tensor, 0, ref.type.shape[0], dtype))
        for part in parts:
            refs.append(
                _dense_rows(
                    ref,
                    f"{unit.full_name(part)}.{slot}",
                    part.attrs["start"],
                    part.attrs["stop"],
                    dtype,
                )
            )
    return refs


def _dense_rows(ref: WeightRef, tensor: str, start, stop, dtype: str) -> WeightRef:
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
    """The same function without rotate's nodes: multiplied into a rotated embedding E R1 and a head E diag(g) R1 of its
    own, both dense f32. The same graph where it has no such nodes."""
    prologue, epilogue = graph.prologue, graph.epilogue
    if not any(node.name == OUT for node in epilogue.nodes):
        return graph
    embed, into, out = prologue.nodes[0], prologue.nodes[-1], epilogue.node(OUT)
    rotated = into.name != IN  # the embedding already
    norm = next(node for node in epilogue.nodes if node.inputs == (OUT,))
    head = next(node for node in epilogue.nodes if node.inputs == (HEAD if rotated else norm.name,))
    embedding, gain = embed.weights["weight"], norm.weights["weight"]
    type = DenseType(embedding.type.shape, "f32")

    def load_embedding() -> Dense:
        if rotated:
            return Dense(embedding.dense())
        matrix = into.weights["weight"].dense().T
        return Dense(by_rows(lambda rows: rows @ matrix, embedding.dense(), DTYPES["f32"]))

    def load_head() -> Dense:
        rotation = out.weights["weight"].dense()  # R: x W^T = x R^T
        matrix = gain.dense()[:, None] * rotation
        matrix = rotation.T @ matrix if rotated else matrix
        return Dense(by_rows(lambda rows: rows @ matrix, embedding.dense(), DTYPES["f32"]))

    tensor = f"{epilogue.full_name(head)}.weight"
    attrs = {key: value for key, value in head.attrs.items() if key != "tied_to"}
    embed = replace(embed, weights={"weight": replace(embedding, type=type, load=load_embedding)})
    head_weight = WeightRef(tensor, type, load_head, embedding.source)
    head = replace(head, weights=head.weights | {"weight": head_weight}, attrs=attrs)
    head = replace(head, inputs=(norm.name,))
    norm = replace(unit_gain(norm), inputs=("x",))
    nodes = (
        head if n.name == head.name else norm if n.name == norm.name else n for n in epilogue.nodes
    )
    return replace(
        graph,
        config=graph.config | {"tie_word_embeddings": False},
        prologue=replace(
            prologue,
            nodes=tuple(
                embed if n.name == embed.name else n for n in prologue.nodes if n.name != IN
            ),
        ),
        epilogue=replace(epilogue, nodes=tuple(n for n in nodes if n.name not in (OUT, HEAD))),
    )
