"""Counts the work of a conversion from shapes, so that its time can be said before it begins.

An amount of work has a part of the conversion, which people read, and a kind, whose seconds a
machine is asked for (`atd.calibration.rates`):

    product   operations of large matrix products      cholesky  of factorisations
    panel     of products of 64 columns in sweeps      solve     of triangular solves
    moment    of products X'Y over positions
    column    weights that a sweep passes              path      ways into states of a trellis
    fit       weights in a pass of least squares       sum       elements added to moments
    score     operations of attention                  element   values of other nodes
    page      bytes of memory that is new              unpack    weights of ternary ones made dense
    rotate    weights rotated
    judge     weights whose error is looked at         byte      read or written, and digested
    program   compiled                                 search    programs with a trellis, compiled

An operation is an addition or a multiplication.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from math import ceil, prod

from atd.calibration.sensitivity import ROWS
from atd.calibration.streams import BATCH
from atd.decomposition.least_squares import GRIDS, START_RATIOS
from atd.decomposition.options import Candidate
from atd.decomposition.second_moments import LEAST_STRIP, STRIPS
from atd.decomposition.trellis import SEAM_ROWS, phases
from atd.decomposition.trellis_feedback import row_chunks
from atd.ir import Block, Graph, Node
from atd.models.execute import needed
from atd.weights import Code, TernaryType, TrellisType, ternary_of

ITERATIONS = 8  # of `als`, from each start
KEPT = 32 << 20  # bytes of an array that glibc may keep for the next one
# Bytes of memory that each weight of a large matrix takes anew, in all steps of a part: by the page
# faults of matrices of 14336 x 4096.
PAGES = {"weights made dense": 70, "error of each matrix": 28, "reading and writing": 25}
LANES = 8  # segments that a vector of the processor holds
# Products of matrices with few rows or columns take longer, by this over their number; decoding a
# step multiplies few positions by all weights, and reads all keys and values. Fitted to stories15M
# and SmolLM2-135M.
NARROW, FEW_POSITIONS, CACHED = 200, 2, 9
OPTIMIZER = 20  # passes over all weights in a step: deltas, their gradients, moments of those
# Programs that are compiled: in any conversion, with each search of its own shapes, and of a search
# those that find seams and keep them, in programs that keep them.
ANY, SMALL, CALIBRATED, NEAREST = 40, 20, 4.5, 2.0


class Work(dict[tuple[str, str], float]):
    """Amounts of work, (part, kind) -> amount; of what is not there there is none."""

    def __missing__(self, key: tuple[str, str]) -> float:
        return 0.0

    def __add__(self, other: "Work") -> "Work":
        return Work({key: self[key] + other[key] for key in {**self, **other}})


@dataclass(frozen=True)
class Text:
    """The calibration text, and how much of what it makes is kept."""

    tokens: int  # 0: none is read
    context: int = 1  # tokens per window
    written: int = 0  # tokens of it that the model writes itself
    kept: bool = True  # whether values inside a unit are, or computed again for each reader


def times(work: Work, count: float) -> Work:
    """Returns the work done `count` times."""
    return Work({key: count * amount for key, amount in work.items()})


def half(inputs: int) -> float:
    """Returns the share of a symmetric matrix [in, in] that strips from its diagonal on have."""
    strips = max(1, min(STRIPS, inputs // LEAST_STRIP))
    return (strips + 1) / (2 * strips)


def matrices(unit: Block) -> list[tuple[Node, int, int]]:
    """Returns (linear, out, in) of a unit's linears with a weight."""
    linears = [node for node in unit.nodes if node.op == "linear" and "weight" in node.weights]
    shapes = (node.weights["weight"].type.shape for node in linears)
    return [(node, out, inputs) for node, (out, inputs) in zip(linears, shapes, strict=True)]


def _new(bytes: float, largest: float) -> float:
    """Bytes of memory that are new each time: malloc gives larger arrays back to the system."""
    return bytes if largest > KEPT else 0.0


# --- one matrix -----------------------------------------------------------------------------------


def paths(code: Code) -> float:
    """Returns ways into states that a search compares, per row."""
    steps = phases(code)
    return sum(step.head.size * len(step.new) for step in steps) / len(steps)


def fit_passes(type: TernaryType) -> int:
    """Returns how often least squares passes over the weights."""
    grids = GRIDS[type.bases]
    if type.tied:
        return grids + ITERATIONS
    levels = (3**type.bases + 1) // 2
    return grids + ITERATIONS * len(START_RATIOS[type.bases]) * levels


def nearest_work(type: TernaryType | TrellisType) -> Work:
    """Counts `quantize.nearest`."""
    part, size = "least squares", prod(type.shape)
    if isinstance(type, TernaryType):
        return Work({(part, "fit"): size * fit_passes(type)})
    return Work({(part, "path"): 2 * size * paths(type.code) * _seams(type, 2)})


def visits_work(type: TernaryType | TrellisType, sweeps: int, refits: int) -> Work:
    """Counts `quantize.calibrated`, second moments and factor at hand."""
    (out, inputs), visits = type.shape, 1 + sweeps + refits
    product = 2 * out * inputs * inputs
    work = Work({("sweeps", "panel"): visits * product})
    work["sweeps", "column"] = visits * out * inputs
    if isinstance(type, TrellisType):
        searched = visits * out * inputs * _seams(type, visits) * _idle_lanes(type)
        work["sweeps", "path"] = searched * paths(type.code)
        work["refits", "product"] = product * (1 + (refits + 1) * half(inputs))
        return work
    work["first scales", "fit"] = out * inputs * fit_passes(type)
    work["refits", "product"] = product * refits * (1 + (1 if type.tied else type.bases))
    return work


def _seams(type: TrellisType, visits: int) -> float:
    """What finding the seams in the first of some visits adds to their searches, as a factor."""
    return 1 + min(2 * SEAM_ROWS, type.segment) / type.segment / visits


def _idle_lanes(type: TrellisType) -> float:
    """What a search costs where a chunk's segments are fewer than the lanes of a vector."""
    (rows, *_) = _chunk_rows(type)
    segments = max(1, rows // type.segment)
    return ceil(segments / LANES) * LANES / segments


def _chunk_rows(type: TrellisType) -> list[int]:
    """How many rows the chunks of a matrix have."""
    return [chunk.stop - chunk.start for chunk in row_chunks(type.shape[0], type.segment)]


def corrected_work(out: int, inputs: int) -> Work:
    """Counts `correction.asymmetric_target`."""
    product = 2 * out * inputs * inputs
    return Work({("target correction", kind): product for kind in ("product", "solve")})


# --- a unit ---------------------------------------------------------------------------------------


def moments_work(part: str, inputs: int, tokens: int, products: float, batch: int = BATCH) -> Work:
    """Counts moments of inputs; `products` with n features are made of them for each batch: half,
    or 1 + half, and more where outputs are added to a stream.
    """
    elements, batches = inputs * inputs * products, ceil(tokens / batch)
    work = Work({(part, "moment"): 2 * tokens * elements})
    work[part, "sum"] = (batches + 2) * elements  # and once to divide, once to round
    work[part, "page"] = _new((4 * batches + 8 + 4) * elements, 4 * elements)
    return work


def factor_work(inputs: int) -> Work:
    """Counts `error_feedback.factor`."""
    return Work({("factorisation", "cholesky"): inputs**3 / 3})


def run_work(unit: Block, width: int, text: Text, asked: Collection[str]) -> Work:
    """Counts the nodes of a unit that a value needs, over all tokens.

    Args:
        unit: its input is `width` features wide.
        text: its tokens.
        asked: names of values that are found together, each node once.
    """
    work = Work()
    widths = {"x": width}
    ran = {node.name for node in needed(unit, {"x"}, [*asked])}
    for node in unit.nodes:
        widths[node.name] = widths[node.inputs[0]]
        operations, kind = widths[node.name], "element"
        if node.op in ("linear", "embed") and "weight" in node.weights:
            out, inputs = node.weights["weight"].type.shape
            widths[node.name] = out if node.op == "linear" else inputs
            if node.op == "linear":
                operations, kind = 2 * slowed(out, inputs), "product"
        elif node.op == "attention":
            seen = min(text.context, node.attrs["window"] or text.context) / 2
            operations, kind = 4 * node.attrs["heads"] * node.attrs["head_dim"] * seen, "score"
        elif node.op == "slice":
            widths[node.name] = operations = node.attrs["stop"] - node.attrs["start"]
        if node.name in ran:
            work["forward", kind] += text.tokens * operations
    return work


def stream_work(unit: Block, width: int, text: Text) -> Work:
    """Counts a stream's way through a unit: to what linears read, and to its output."""
    asked = [*dict.fromkeys(node.inputs[0] for node, _, _ in matrices(unit)), unit.output]
    if text.kept:
        return run_work(unit, width, text, asked)
    return sum((run_work(unit, width, text, [value]) for value in asked), Work())


# --- a model --------------------------------------------------------------------------------------


def slowed(out: int, inputs: int) -> float:
    """Returns the weights of a matrix, more where it is narrow and products take longer."""
    return out * inputs * (1 + NARROW / min(out, inputs))


def self_text_work(graph: Graph, tokens: int, length: int) -> Work:
    """Counts `self_text` of `length` tokens a text: products of few positions, and a draw from all
    logits.
    """
    weights = sum(out * inputs for unit in graph.units for _, out, inputs in matrices(unit))
    if graph.is_tied:
        weights += prod(graph.prologue.nodes[0].weights["weight"].type.shape)
    part = "writing calibration text"
    work = Work({(part, "panel"): 2 * FEW_POSITIONS * tokens * weights})
    work[part, "element"] = 4 * tokens * graph.vocabulary
    for node in (node for unit in graph.units for node in unit.nodes if node.op == "attention"):
        seen = min(length, node.attrs["window"] or length) / 2
        width = node.attrs["heads"] * node.attrs["head_dim"]
        work[part, "score"] += CACHED * 4 * tokens * width * seen
    return work


def gradient_work(part: str, graph: Graph, tokens: int) -> Work:
    """Counts a pass forward and one back, units computed again."""
    inner, head = _weights(graph)
    return Work({(part, "product"): 2 * tokens * (4 * inner + 3 * head)})


def forward_work(part: str, graph: Graph, tokens: int) -> Work:
    """Counts a pass forward, logits included."""
    return Work({(part, "product"): 2 * tokens * sum(_weights(graph))})


def sensitivity_work(
    graph: Graph, candidates: Mapping[str, Sequence[Candidate]], seen: int, tokens: int
) -> Work:
    """Counts `fisher_losses`: moments on `seen` tokens, gradients on `tokens` of them."""
    part, (inner, _) = "sensitivities", _weights(graph)
    work = Work({(part, "product"): 2 * seen * inner})
    work += gradient_work(part, graph, min(tokens, seen))
    for unit in graph.units:
        linears = matrices(unit)
        for inputs in {node.inputs[0]: inputs for node, _, inputs in linears}.values():
            work += moments_work(part, inputs, seen, half(inputs), batch=2048)
            work[part, "cholesky"] += inputs**3 / 3
        for node, out, inputs in linears:
            for type in candidates.get(unit.full_name(node), ()):
                if isinstance(type, TernaryType):
                    work[part, "fit"] += min(out, ROWS) * inputs * fit_passes(type)
    return work


def training_work(graph: Graph, steps: int, batch: int, held_out: int) -> Work:
    """Counts `train_end_to_end`: steps of a batch of tokens, looks at `held_out` tokens in all."""
    part, (inner, head) = "following the gradient", _weights(graph)
    work = gradient_work(part, graph, steps * batch)
    coded = sum(
        slowed(out, inputs)
        for unit in graph.units
        for node, out, inputs in matrices(unit)
        if isinstance(ternary_of(node.weights["weight"].type), TrellisType)
    )
    work[part, "product"] -= 2 * steps * batch * coded  # scales of rows: no gradient by the weight
    # The dense model's hidden states once, both models' logits at each look.
    work[part, "product"] += 2 * (held_out * (inner + 2 * head) + steps * batch * inner)
    work[part, "element"] = OPTIMIZER * steps * (inner + head)
    return work if steps else Work()


def _weights(graph: Graph) -> tuple[float, float]:
    """(weights of the linears in front of the epilogue, of the head), as `slowed` has them."""
    inner = sum(
        slowed(out, inputs) for unit in graph.units[:-1] for _, out, inputs in matrices(unit)
    )
    width = graph.prologue.nodes[0].weights["weight"].type.shape[1]
    return inner, slowed(graph.vocabulary, width)


# --- what happens to every weight -----------------------------------------------------------------


def matrix_work(type: TernaryType | TrellisType) -> Work:
    """Counts what becomes of a matrix besides its search: it is read, made dense again for the
    quantized stream, and compared.
    """
    weights = prod(type.shape)
    work = Work({(part, "page"): _new(each * weights, 4 * weights) for part, each in PAGES.items()})
    work["weights made dense", "unpack"] = weights
    work["error of each matrix", "judge"] = weights
    work["error of each matrix", "unpack"] = weights
    return work


def rotation_work(weights: int, text: Text) -> Work:
    """Counts rotations of weights, as often as they are loaded: to be searched, and for the dense
    stream.
    """
    return Work({("rotation", "rotate"): weights * (2 if text.tokens else 1)})


def programs(type: TernaryType | TrellisType, asked: bool) -> set[tuple]:
    """Returns what is compiled for a matrix, equal for those that share it: shapes, and last how
    many programs search a trellis.
    """
    inputs = type.shape[1]
    if isinstance(type, TernaryType):
        sizes = {min(type.group_size, inputs)} if not asked else {inputs}
        return {(type.bases, type.group, type.tied, size, 0) for size in sizes}
    searches = type.code.period * (CALIBRATED if asked else NEAREST)
    return {(type.code, rows, inputs, searches) for rows in _chunk_rows(type)}


def compiled_work(programs: Collection[tuple]) -> Work:
    """Counts programs that searches of matrices have compiled."""
    work = Work({("compiling", "program"): ANY + SMALL * len(programs)})
    work["compiling", "search"] = sum(program[-1] for program in programs)
    return work
