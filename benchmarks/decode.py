"""Tokens/s, time to first token and peak memory of whole models: packed, against 16 or 32 bits.

    python benchmarks/decode.py MODEL                    converts it first (--recipe)
    python benchmarks/decode.py MODEL --converted OUT    measures a converted folder
    python benchmarks/decode.py --random llama3-8b       random weights, made on the device
    python benchmarks/decode.py --random tiny --tiny     whether it runs, anywhere

On a CPU the packed model is also measured unpacked at load. --random needs jax, numpy and flax;
MODEL also what reads checkpoints. How each figure is measured: `atd.runtime.bench`. By default
dense matrices and the cache are in bfloat16 on a GPU, float32 on a CPU.
"""

import argparse
import sys
import tempfile
from dataclasses import asdict
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import jax

from atd.checkpoint.files import write_json
from atd.errors import AtdError
from atd.models.model import Model, load
from atd.models.random_model import SHAPES, random_graph
from atd.progress import Progress
from atd.runtime import bench

DENSE = "dense"


def variants(source, packed, dtype: str, backend: str, dense: bool) -> dict[str, partial[Model]]:
    """How to load each model, the smallest first. source, packed: paths or graphs."""
    models = {f"packed ({backend})": partial(load, packed, backend=backend, dtype=dtype)}
    if dense:
        models[DENSE] = partial(load, source, dtype=dtype)
    if jax.default_backend() == "cpu" and backend != "xla-unpacked":
        models["unpacked at load"] = partial(load, packed, backend="xla-unpacked", dtype=dtype)
    return models


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "model", type=Path, nargs="?", help="dense Hugging Face folder or .gguf file"
    )
    parser.add_argument(
        "--random", choices=list(SHAPES), help="instead of a model: random weights in these shapes"
    )
    parser.add_argument(
        "--bases", type=int, default=2, help="N of --random, tied, one scale per row (2)"
    )
    parser.add_argument("--recipe", default="datafree2", help="how to convert MODEL (datafree2)")
    parser.add_argument("--converted", type=Path, help="a converted folder, instead")
    parser.add_argument("--backend", help="of the packed model (triton on a GPU, xla on a CPU)")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="of dense matrices and the cache",
    )
    parser.add_argument(
        "--no-dense",
        action="store_true",
        help="measure the packed model alone",
    )
    parser.add_argument("--prompt", type=int, default=128, help="tokens of the prompt (128)")
    parser.add_argument("--steps", type=int, default=64, help="tokens decoded after it (64)")
    parser.add_argument(
        "--repeats", type=int, default=5, help="measured rounds over all models (5)"
    )
    parser.add_argument("--one-jit", action=argparse.BooleanOptionalAction, default=None,
                        help="the steps compiled as one as well (on a GPU yes)")  # fmt: skip
    parser.add_argument("--json", type=Path, help="write the figures there as well")
    parser.add_argument("--tiny", action="store_true", help="16 tokens, 8 steps, one round")
    options = parser.parse_args()
    if (options.model is None) == (options.random is None):
        parser.error("give a MODEL or --random")
    on_cpu = jax.default_backend() == "cpu"
    options.backend = options.backend or ("xla" if on_cpu else "triton")
    options.dtype = options.dtype or ("float32" if on_cpu else "bfloat16")
    options.one_jit = not on_cpu if options.one_jit is None else options.one_jit
    if options.tiny:
        options.prompt, options.steps, options.repeats = 16, 8, 1
    return options


def told(now: Progress) -> None:
    print(f"{now.task} {now.at}: {now.done} of {now.total} {now.unit}", file=sys.stderr, flush=True)


def run(options: argparse.Namespace) -> list[bench.Speed]:
    def measured(source, packed) -> list[bench.Speed]:
        models = variants(source, packed, options.dtype, options.backend, not options.no_dense)
        sizes = {"prompt": options.prompt, "steps": options.steps, "repeats": options.repeats}
        return bench.measure(models, **sizes, one_jit=options.one_jit, progress=told)

    if options.random:
        shape = SHAPES[options.random]
        return measured(random_graph(shape), random_graph(shape, options.bases))
    if options.converted:
        return measured(options.model, options.converted)
    from atd.pipeline.convert import convert  # needs more packages than measuring does

    with tempfile.TemporaryDirectory() as scratch:
        converted = Path(scratch) / "converted"
        print(f"converting {options.model} by recipe {options.recipe}", file=sys.stderr)
        convert(options.model, converted, options.recipe)
        return measured(options.model, converted)


def main() -> None:
    options = parse()
    try:
        rows = run(options)
    except AtdError as error:
        sys.exit(f"error: {error}")
    device, name = jax.devices()[0].device_kind, options.random or options.model.name
    sizes = f"prompt {options.prompt}, {options.steps} tokens, median of {options.repeats}"
    print(f"{name}, {sizes}, {options.dtype}, {device}, jax {jax.__version__}")
    print(bench.speed_table(rows, DENSE))
    if options.json:
        figures = {
            "source": options.random or str(options.model),
            "device": device,
            "jax": jax.__version__,
            "dtype": options.dtype,
            "prompt": options.prompt,
            "steps": options.steps,
            "repeats": options.repeats,
            "rows": [asdict(row) for row in rows],
        }
        write_json(options.json, figures)


if __name__ == "__main__":
    main()
