"""Exports a model as one GGUF file, which llama.cpp and what is built on it run.

Weights on a uniform grid keep their integers and scales, so that nothing is lost; all else is
rounded, and how much is measured and said before the file gets its name.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from gguf import GGML_QUANT_SIZES, GGUFWriter

from atd.checkpoint.folder import check_space, open_result
from atd.checkpoint.gguf import permuted_heads
from atd.checkpoint.gguf_file import check_file, finish_file, write_gguf
from atd.checkpoint.gguf_rope import DIVISORS
from atd.checkpoint.hub import local
from atd.checkpoint.reader import open_tokenizer
from atd.checkpoint.tokenizer import Tokenizer
from atd.errors import BadInput
from atd.exports.absorb import absorb
from atd.exports.gguf_metadata import add_file_type, add_metadata, architecture_of
from atd.exports.gguf_tensors import ROUNDED, Encoded, Plan, encode, plan
from atd.exports.gguf_vocabulary import add_vocabulary
from atd.exports.parts import check_inputs
from atd.models import frontend
from atd.progress import Progress, Report, Say, unheard


def export_gguf(
    model: str | Path,
    out: str | Path,
    *,
    dtype: str = "q8_0",
    overwrite: bool = False,
    ignore_extra: bool = False,
    say: Say = print,
    progress: Report = unheard,
) -> Path:
    """Writes a model as a GGUF file and returns that file.

    Args:
      model: a folder that atd made, or any other checkpoint.
      out: the file to write, NAME.gguf.
      dtype: of weights that no block of ggml holds exactly: q8_0, float16, bfloat16 or float32.
      overwrite: replace `out` if atd made it.
      ignore_extra: leave out tensors of `model` that are not part of its architecture.

    Raises BadInput for a model that llama.cpp does not compute, a tokenizer that has no form in
    GGUF, or an output that may not be written; RunFailed where a value does not fit the dtype.
    """
    source, target = Path(model), Path(out).absolute()
    _check_options(target, dtype)
    graph = absorb(frontend.open(source, ignore_extra=ignore_extra))
    check_inputs(graph, say)
    architecture, config = architecture_of(graph)
    check_file(target, local(source), overwrite)
    writer = GGUFWriter(None, architecture)
    divisors = add_metadata(writer, graph, config, source.name.removesuffix(".gguf"), say)
    tokenizer = _tokenizer(source, say)
    if tokenizer is None:
        writer.add_tokenizer_model("no_vocab")
    else:
        add_vocabulary(writer, tokenizer, graph.vocabulary)
    plans = plan(graph, dtype, permuted_heads(graph.config))
    sizes = [_add_tensors(writer, p) for p in plans]
    if divisors is not None:
        writer.add_tensor_info(DIVISORS, divisors.shape, divisors.dtype, divisors.nbytes)
    add_file_type(writer, [(p.quantization, int(np.prod(p.ref.type.shape))) for p in plans])
    say(_kinds(plans))
    errors: list[Encoded] = []  # without their data
    with open_result(target) as result:
        check_space(result, sum(sizes))
        data = _data(plans, sizes, divisors, errors, progress)
        write_gguf(result / target.name, writer, data)
        if line := _errors(errors):
            say(line)
        finish_file(target, result / target.name, overwrite)
    return target


def _check_options(target: Path, dtype: str) -> None:
    if dtype not in ROUNDED:
        raise BadInput(f"--dtype {dtype} is none of --to gguf: {', '.join(ROUNDED)}")
    if target.suffix != ".gguf":
        example = target / "model.gguf" if target.is_dir() else f"{target}.gguf"
        raise BadInput(
            f"{target}: a GGUF export is one file; give it a name that ends with .gguf, such as "
            f"{example}"
        )


def _tokenizer(source: Path, say: Say) -> Tokenizer | None:
    try:
        return open_tokenizer(source)
    except BadInput as error:
        say(f"warning: {error}. The GGUF file will have no vocabulary")
        return None


def _add_tensors(writer: GGUFWriter, plan: Plan) -> int:
    """Tells a writer of the tensors that a weight becomes; returns their bytes."""
    block, block_bytes = GGML_QUANT_SIZES[plan.quantization]
    total = 0
    for part in plan.parts:
        shape = plan.shape(part)
        nbytes = int(np.prod(shape)) // block * block_bytes
        # Not uint8, whose shapes would be taken for those of bytes.
        writer.add_tensor_info(part.name, shape, np.dtype(np.int8), nbytes, plan.quantization)
        total += nbytes
    return total


def _data(
    plans: Sequence[Plan],
    sizes: Sequence[int],
    divisors: np.ndarray | None,
    errors: list[Encoded],
    progress: Report,
) -> Iterator[np.ndarray]:
    """Yields the data of all tensors; what is rounded is noted in `errors`."""
    done, total = 0, sum(sizes)
    for p, size in zip(plans, sizes, strict=True):
        for encoded in encode(p):
            assert encoded.data is not None
            yield encoded.data
            if encoded.total:
                errors.append(replace(encoded, data=None))
        done += size
        progress(Progress("exporting", done, total, "bytes", p.ref.tensor))
    if divisors is not None:
        yield divisors


def _kinds(plans: Sequence[Plan]) -> str:
    """Which weights are exact, and why others are not."""
    matrices = [p for p in plans if len(p.ref.type.shape) > 1 for _ in p.parts]
    exact = Counter(p.quantization.name for p in matrices if not p.rounded)
    rounded = Counter((p.quantization.name, p.rounded) for p in matrices if p.rounded)
    said = [f"{count} in {kind}" for kind, count in sorted(exact.items())]
    line = f"matrices held exactly: {', '.join(said) or 'none'}"
    if rounded:
        said = [f"{count} to {kind} ({why})" for (kind, why), count in sorted(rounded.items())]
        line += f"; rounded: {', '.join(said)}"
    return line


def _errors(errors: Sequence[Encoded]) -> str:
    """What rounding costs; empty where nothing is rounded."""
    if not errors:
        return ""
    whole = (sum(e.error for e in errors) / sum(e.total for e in errors)) ** 0.5
    worst = max(errors, key=lambda e: e.error / e.total)
    return (
        f"relative rmse of the rounded matrices: {whole:.2%}; the largest, of {worst.part.name}: "
        f"{(worst.error / worst.total) ** 0.5:.2%}"
    )
