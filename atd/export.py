"""Export: the dequantized weights of any model as a dense Hugging Face folder, so that any other tool can judge them."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from atd import output
from atd.convert_adaptive import tokenizer_files
from atd.errors import RunFailed
from atd.ir import Block, Node, WeightRef
from atd.models import frontend
from atd.passes.rotate import absorb
from atd.store import INDEX
from atd.sweep import Progress
from atd.weights import DTYPES, Dense, DenseType

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
    graph = absorb(frontend.open(source))  # a rotated stream behind a tied head has nodes that other tools do not know
    output.check_target(target, source, overwrite)
    tokenizer = tokenizer_files(source, say)
    config = {key: value for key, value in graph.config.items() if key not in ("quantization_config", "dtype")} | {
        "torch_dtype": dtype
    }
    units = [[ref for node in unit.nodes for ref in _dense(unit, node, TORCH_DTYPES[dtype])] for unit in graph.units]
    total = sum(ref.type.nbytes for refs in units for ref in refs)
    with output.open_partial(target) as partial:
        output.check_space(partial, total)
        weight_map, done = {}, 0
        for i, refs in enumerate(units):
            shard = f"model-{i + 1:05d}-of-{len(units):05d}.safetensors"
            weight_map |= dict.fromkeys(output.write_shard(partial / shard, refs), shard)
            done += sum(ref.type.nbytes for ref in refs)
            progress(Progress(done, total, graph.units[i].name or "epilogue"))
        files = {
            "config.json": json.dumps(config, indent=2) + "\n",
            INDEX: json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=1, sort_keys=True)
            + "\n",
            **tokenizer,
        }
        for name, content in files.items():
            output.write_file(partial / name, content)
        digests = {name: output.file_digest(partial / name) for name in sorted({*files, *weight_map.values()})}
        output.write_file(partial / output.MANIFEST, json.dumps({"export": "hf", "files": digests}, indent=1) + "\n")
        output.finish(target, partial, [*digests, output.MANIFEST])
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
                _dense_rows(ref, f"{unit.full_name(part)}.{slot}", part.attrs["start"], part.attrs["stop"], dtype)
            )
    return refs


def _dense_rows(ref: WeightRef, tensor: str, start, stop, dtype: str) -> WeightRef:
    type = DenseType((stop - start, *ref.type.shape[1:]), dtype)

    def load() -> Dense:
        array = np.asarray(ref.load().dequantize(np.float32))[start:stop]
        with np.errstate(over="ignore"):
            narrow = array.astype(DTYPES[dtype])
        if not np.isfinite(narrow).all():
            raise RunFailed(f"{tensor}: its values do not fit {dtype}; export with --dtype float32")
        return Dense(narrow)

    return WeightRef(tensor, type, load, ref.source)
