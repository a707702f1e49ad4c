"""equalize: scales features that linears read, W x = (W diag(s)) (x / s), the function stays.

Features with large values get the finer weights, and the division goes where it costs nothing:

    norm -> q, k, v and norm -> gate, up    g -> g / s
    v -> o                                  rows and bias of v / s; with grouped queries all heads
                                            of a group share their s
    up -> down                              rows and bias of up / s; silu(gate) * up is linear in up

s_j = (E[x_j^2])^(a/2) over its geometric mean. The exponent a is searched site by site: for each of
`grid` the readers W diag(s) are decomposed by als, without error feedback, and the a of the least
tr(dW H dW') stays, dW the error of W and H = E[x x'] the second moment of x in the dense model.
Where that is a = 0 the site stays as it is. Scaled weights become dense f32.

1. Needs dense weights: equalize stands before decompose. Behind fuse, v and up are joined with
   others, and norms alone are left.
2. fold_norms multiplies gains into the linears, and so takes back what was done at norms before it:
   put equalize behind it. Behind rotate it works in the rotated basis. A norm that gets a gain
   loses its attr `unit_gain`, hence rotate refuses to follow.
3. It helps als: on stories15M, with two bases in groups of 128, the KL to the dense model falls
   from 0.576 to 0.486. Beside error feedback, which weighs errors with H by itself, no effect was
   resolved.

Source: AWQ (2306.00978).
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np

from atd.calibration.moments import dense_moments
from atd.decomposition import least_squares
from atd.decomposition.second_moments import proxy_loss
from atd.errors import BadInput
from atd.ir import GATED, Block, Graph, Node, WeightRef
from atd.ir.notes import UNIT_GAIN, without
from atd.ir.rewrite import map_array, with_weight
from atd.pipeline import Context, Pass, checks
from atd.progress import Progress
from atd.weights import DenseType, TernaryType, canonical_group, combine

# Of the root mean square over all features: one that is hardly ever there gets no boundless scale.
LEAST = 1e-3


@dataclass(frozen=True)
class Site:
    """A value that linears alone read, and the node that its scales are divided out of."""

    writer: str
    readers: tuple[str, ...]
    # Query heads and key-value heads: the value holds each of the writer's heads repeatedly.
    heads: tuple[int, int] = (1, 1)


@dataclass(frozen=True)
class Found:
    """What was found for a site. Losses are tr(dW H dW'), or 0 where nothing was searched."""

    exponent: float
    scale: np.ndarray | None  # s float32 [in]; None for a = 0
    plain: float = 0.0  # loss for a = 0
    best: float = 0.0  # loss for this exponent


@dataclass(frozen=True, kw_only=True)
class Equalize(Pass):
    """Options: see the fields. Those of the decomposition are as in `decompose`, which should
    follow with the same.
    """

    name = "equalize"
    scope = "graph"

    bases: int = 2
    group: int | str = 128
    scales: str = "free"
    grid: tuple[float, ...] = (0.0, 0.125, 0.25, 0.5)  # exponents to try, or the one to take
    tokens: int = 16384  # of the calibration text, at most

    def __post_init__(self):
        if not self.grid or not all(isinstance(a, int | float) and 0 <= a <= 1 for a in self.grid):
            raise BadInput(f"equalize.grid must be exponents from 0 to 1, not {list(self.grid)}")
        if not 1 <= self.bases <= 4 or self.scales not in ("free", "tied") or self.tokens < 1:
            raise BadInput(
                "equalize: bases must be 1 to 4, scales 'free' or 'tied', tokens at least 1"
            )
        checks.check_group("equalize.group", self.group)

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"activations"})

    def requires(self, graph: Graph) -> str | None:
        found = [(block, site) for block in graph.blocks for site in sites(block)]
        if not found:
            return "there is no norm, v or up that a scale could be divided out of"
        for block, site in found:
            for name in (site.writer, *site.readers):
                node = block.node(name)
                if not isinstance(type := node.weights["weight"].type, DenseType):
                    return (
                        f"{block.full_name(node)} is {type}, and only dense weights can be scaled; "
                        "put equalize before decompose"
                    )
        return None

    def rewrite(self, graph: Graph, context: Context) -> Graph | None:
        if context.calibration is None:  # what types there would be, were all sites scaled
            blocks = (_scaled(block, dict.fromkeys(sites(block))) for block in graph.blocks)
            return replace(graph, blocks=tuple(blocks))
        tokens = context.calibration.tokens
        windows = tokens[: max(1, self.tokens // tokens.shape[1])]
        asked = {
            block.full_name(block.node(site.readers[0]))
            for block in graph.blocks
            for site in sites(block)
        }
        # Neither the prologue nor the epilogue has sites.
        units = islice(dense_moments(graph, windows, asked), 1, None)
        blocks, all_found = [], []
        for block, (_, _, _, moments) in zip(graph.blocks, units, strict=False):
            found = {site: self._search(block, site, moments) for site in sites(block)}
            for site, one in found.items():
                for reader in site.readers:
                    context.record(block.full_name(block.node(reader)), exponent=one.exponent)
            scales = {site: f.scale for site, f in found.items() if f.scale is not None}
            blocks.append(_scaled(block, scales))
            all_found += found.values()
            at = len(blocks), len(graph.blocks), "blocks", block.name
            context.progress(Progress("equalizing", *at))
        context.say(_summary(all_found))
        return replace(graph, blocks=tuple(blocks))

    def _search(self, block: Block, site: Site, moments: Mapping[str, np.ndarray]) -> Found:
        """The exponent of the least loss; of equal ones the smallest."""
        nodes = [block.node(name) for name in site.readers]
        hessian = moments[nodes[0].inputs[0]]

        def scale_at(a: float) -> np.ndarray:
            return scales_of(np.diagonal(hessian), a, site.heads)

        if len(self.grid) == 1:
            (a,) = self.grid
            return Found(a, scale_at(a) if a else None)
        weights = [node.weights["weight"].dense() for node in nodes]

        def loss(a: float) -> float:
            errors = (self._error(weight, scale_at(a)) for weight in weights)
            return sum(float(proxy_loss(error, hessian).sum()) for error in errors)

        plain = loss(0.0)
        best, a = min((plain if a == 0 else loss(a), a) for a in self.grid)
        return Found(a, scale_at(a) if a else None, plain, best)

    def _error(self, weight: np.ndarray, scale: np.ndarray) -> np.ndarray:
        """als(W diag(s)) diag(1/s) - W, float32 [out, in]."""
        group = canonical_group(self.group, weight.shape[1])
        type = TernaryType(weight.shape, self.bases, group, self.scales == "tied", "f16")
        trits, scales = least_squares.als(weight * scale, self.bases, group, type.tied, np.float16)
        return np.asarray(combine(trits, scales, type), np.float32) / scale - weight


def _summary(found: list[Found]) -> str:
    """A line for people: which exponents were chosen, and what they gain."""
    counts = sorted(Counter(one.exponent for one in found).items())
    line = f"equalize: exponent {', '.join(f'{a:g} at {count}' for a, count in counts)} sites"
    plain, best = (sum(losses) for losses in zip(*((f.plain, f.best) for f in found), strict=True))
    if plain:
        line += f"; output error of a plain decomposition {best / plain - 1:+.1%}"
    return line


# --- sites ----------------------------------------------------------------------------------------


def sites(block: Block) -> list[Site]:
    """Lists where scales can be divided out for nothing, in order of execution."""
    found = []
    for node in block.nodes[:-1]:
        linears, writer = block.readers(node.name), _writer(block, node)
        own = all(reader.op == "linear" and "weight" in reader.weights for reader in linears)
        if not linears or not own or writer is None:
            continue
        heads = (1, 1)
        if node.op == "attention":
            heads = (node.attrs["heads"], node.attrs["kv_heads"])
        found.append(Site(writer.name, tuple(reader.name for reader in linears), heads))
    return found


def _writer(block: Block, node: Node) -> Node | None:
    """The node that a scale of this node's output can be divided out of."""
    if node.op == "rms_norm" and "head_dim" not in node.attrs:
        return node
    if node.op not in ("attention", *GATED):
        return None
    value = node.inputs[-1]  # v, up
    writer = next((writer for writer in block.nodes if writer.name == value), None)
    if writer is None or writer.op != "linear" or "weight" not in writer.weights:
        return None
    alone = block.readers(value) == [node] and node.inputs.count(value) == 1
    return writer if alone else None


def scales_of(squares: np.ndarray, a: float, heads: tuple[int, int] = (1, 1)) -> np.ndarray:
    """Returns s = E[x^2]^(a/2) over its geometric mean, float32 [in].

    Args:
        squares: E[x^2], [in].
        a: the exponent.
        heads: query heads and key-value heads. E[x^2] is averaged over the query heads that read
            the same values, which therefore share s.
    """
    queries, keys = heads
    shared = squares.astype(np.float64).reshape(keys, queries // keys, -1)  # [.., .., head_dim]
    shared = np.broadcast_to(shared.mean(axis=1, keepdims=True), shared.shape).reshape(-1)
    if not shared.any():
        return np.ones(len(squares), np.float32)
    logs = a / 2 * np.log(np.maximum(shared, LEAST**2 * shared.mean()))
    return np.exp(logs - logs.mean()).astype(np.float32)


# --- rewriting ------------------------------------------------------------------------------------


def _scaled(block: Block, scales: Mapping[Site, np.ndarray | None]) -> Block:
    """The block with the scales multiplied into readers and divided out of writers; None: any, for
    the sake of the types.
    """
    for site, scale in scales.items():
        for name in site.readers:
            node = block.node(name)
            weight = _mapped(node.weights["weight"], scale, lambda array, s: array * s)
            block = block.replace_node(with_weight(node, weight))
        node = block.node(site.writer)
        own = None if scale is None else _own(scale, site.heads)
        weights = {slot: _mapped(ref, own, _divided) for slot, ref in node.weights.items()}
        attrs = without(node.attrs, UNIT_GAIN)
        block = block.replace_node(replace(node, weights=weights, attrs=attrs))
    return block


def _own(scale: np.ndarray, heads: tuple[int, int]) -> np.ndarray:
    """The scales of the writer's features: those of one query head of each group."""
    queries, keys = heads
    return scale.reshape(keys, queries // keys, -1)[:, 0].reshape(-1)


def _divided(array: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Rows of a matrix, or entries of a gain or bias, over the scale."""
    return array / (scale[:, None] if array.ndim == 2 else scale)


def _mapped(
    ref: WeightRef,
    scale: np.ndarray | None,
    function: Callable[[np.ndarray, np.ndarray], np.ndarray],
) -> WeightRef:
    """function(array, scale) as dense f32."""

    def mapped(array: np.ndarray) -> np.ndarray:
        assert scale is not None, f"{ref.tensor} is read before its scales are known"
        return function(array, scale)

    digest = "" if scale is None else hashlib.sha256(scale.tobytes()).hexdigest()[:16]
    return map_array(ref, "f32", mapped, f"{ref.source} equalized {digest}")
