"""equalize: features that linears read are scaled, W x = (W diag(s)) (x / s), so that those with
large values get the finer weights. The function stays the same: the division goes where it costs
nothing (AWQ, 2306.00978).

    norm -> q, k, v and norm -> gate, up    g -> g / s
    v -> o                                  rows and bias of v / s; with grouped queries all heads of a group share their s
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
3. Measured on stories15M (16 windows of 256 to calibrate, 8 to evaluate): KL to the dense model
   .576 -> .486 for als with two bases in groups of 128. On top of error feedback, which weighs
   errors with H by itself, no effect was resolved."""

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
from atd.ir import Block, Graph, Node, WeightRef
from atd.pipeline import Context, Pass
from atd.weights import Dense, DenseType, TernaryType, canonical_group, combine

# of the root mean square over all features: one that is hardly ever there gets no boundless scale
LEAST = 1e-3


@dataclass(frozen=True)
class Site:
    """A value that linears alone read, and the norm or linear that its scales are divided out of."""

    writer: str
    readers: tuple[str, ...]
    heads: tuple[int, int] = (
        1,
        1,
    )  # query heads and key-value heads: the value holds each of the writer's heads repeatedly


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
    grid: tuple[float, ...] = (
        0.0,
        0.125,
        0.25,
        0.5,
    )  # exponents tried, or the one to take; 0: leave the site
    tokens: int = 16384  # of the calibration text, at most

    def __post_init__(self):
        if not self.grid or not all(isinstance(a, int | float) and 0 <= a <= 1 for a in self.grid):
            raise BadInput(f"equalize.grid must be exponents from 0 to 1, not {list(self.grid)}")
        if not 1 <= self.bases <= 4 or self.scales not in ("free", "tied") or self.tokens < 1:
            raise BadInput(
                "equalize: bases must be 1 to 4, scales 'free' or 'tied', tokens at least 1"
            )
        if self.group not in ("row", "tensor") and (isinstance(self.group, str) or self.group < 32):
            raise BadInput(
                f"equalize.group must be a size of at least 32, 'row' or 'tensor', not {self.group!r}"
            )

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
        if (
            context.calibration is None
        ):  # preflight: what types there would be, were all sites scaled
            blocks = [
                _scaled_block(block, [(site, None) for site in sites(block)])
                for block in graph.blocks
            ]
            return replace(graph, blocks=tuple(blocks))
        tokens = context.calibration.tokens
        windows = tokens[: max(1, self.tokens // tokens.shape[1])]
        asked = {
            block.full_name(block.node(site.readers[0]))
            for block in graph.blocks
            for site in sites(block)
        }
        blocks, chosen, losses = [], Counter(), np.zeros(2)
        units = islice(dense_moments(graph, windows, asked), 1, None)  # the prologue has no sites
        for block, (_, _, _, moments) in zip(
            graph.blocks, units, strict=False
        ):  # nor has the epilogue
            found = []
            for site in sites(block):
                a, scale, loss = self._search(block, site, moments)
                chosen[a] += 1
                losses += loss
                for reader in site.readers:
                    context.record(block.full_name(block.node(reader)), exponent=a)
                if scale is not None:
                    found.append((site, scale))
            blocks.append(_scaled_block(block, found))
        line = (
            "equalize: exponent "
            + ", ".join(f"{a:g} at {count}" for a, count in sorted(chosen.items()))
            + " sites"
        )
        if losses[0]:
            line += f"; output error of a plain decomposition {losses[1] / losses[0] - 1:+.1%}"
        context.say(line)
        return replace(graph, blocks=tuple(blocks))

    def _search(
        self, block: Block, site: Site, moments: Mapping[str, np.ndarray]
    ) -> tuple[float, np.ndarray | None, tuple[float, float]]:
        """(a, s float32 [in], or None for a = 0, (loss for a = 0, loss for a), zeros where nothing
        was searched).
        """
        nodes = [block.node(name) for name in site.readers]
        hessian = moments[nodes[0].inputs[0]]
        if len(self.grid) == 1:
            (a,) = self.grid
            return a, None if a == 0 else scales_of(np.diagonal(hessian), a, site.heads), (0.0, 0.0)
        weights = [node.weights["weight"].dense() for node in nodes]

        def loss(a: float) -> float:
            scale = scales_of(np.diagonal(hessian), a, site.heads)
            return sum(
                float(proxy_loss(self._error(weight, scale), hessian).sum()) for weight in weights
            )

        plain = loss(0.0)
        losses = [(plain if a == 0 else loss(a), a) for a in self.grid]
        best, a = min(losses)  # of equal ones the smaller a
        return a, None if a == 0 else scales_of(np.diagonal(hessian), a, site.heads), (plain, best)

    def _error(self, weight: np.ndarray, scale: np.ndarray) -> np.ndarray:
        """als(W diag(s)) diag(1/s) - W, float32 [out, in]."""
        inputs = weight.shape[1]
        group = canonical_group(self.group, inputs)
        type = TernaryType(weight.shape, self.bases, group, self.scales == "tied", "f16")
        trits, scales = least_squares.als(weight * scale, self.bases, group, type.tied, np.float16)
        return np.asarray(combine(trits, scales, type), np.float32) / scale - weight


# --- sites ----------------------------------------------------------------------------------------


def sites(block: Block) -> list[Site]:
    """Where scales can be divided out for nothing, in order of execution."""
    by_name, found = {node.name: node for node in block.nodes}, []

    def readers(value: str) -> list[Node]:
        return [node for node in block.nodes if value in node.inputs]

    for node in block.nodes[:-1]:
        linears = readers(node.name)
        if not linears or any(
            reader.op != "linear" or "weight" not in reader.weights for reader in linears
        ):
            continue
        heads = (1, 1)
        if node.op == "rms_norm" and "head_dim" not in node.attrs:
            writer = node
        elif node.op in ("attention", "silu_mul"):
            writer = by_name.get(node.inputs[-1])  # v, up
            if writer is None or writer.op != "linear" or readers(writer.name) != [node]:
                continue
            if node.inputs.count(writer.name) > 1 or "weight" not in writer.weights:
                continue
            if node.op == "attention":
                heads = (node.attrs["heads"], node.attrs["kv_heads"])
        else:
            continue
        found.append(Site(writer.name, tuple(reader.name for reader in linears), heads))
    return found


def scales_of(squares: np.ndarray, a: float, heads: tuple[int, int] = (1, 1)) -> np.ndarray:
    """s float32 [in] from E[x^2] [in]: E[x^2]^(a/2) over its geometric mean. `heads` query heads to
    key-value heads: E[x^2] is averaged over the query heads that read the same values, which
    therefore share s."""
    queries, keys = heads
    shared = squares.astype(np.float64).reshape(
        keys, queries // keys, -1
    )  # [kv_heads, group, head_dim]
    shared = np.broadcast_to(shared.mean(axis=1, keepdims=True), shared.shape).reshape(-1)
    if not shared.any():
        return np.ones(len(squares), np.float32)
    logs = a / 2 * np.log(np.maximum(shared, LEAST**2 * shared.mean()))
    return np.exp(logs - logs.mean()).astype(np.float32)


# --- rewriting ------------------------------------------------------------------------------------


def _scaled_block(block: Block, found: list[tuple[Site, np.ndarray | None]]) -> Block:
    """The block with the scales multiplied into readers and divided out of writers; None: any, for
    the sake of the types.
    """
    for site, scale in found:
        for name in site.readers:
            node = block.node(name)
            weight = _mapped(node.weights["weight"], scale, lambda array, s: array * s)
            block = block.replace_node(replace(node, weights=node.weights | {"weight": weight}))
        node = block.node(site.writer)
        attrs = {key: value for key, value in node.attrs.items() if key != "unit_gain"}
        own = None if scale is None else _own(scale, site.heads)
        weights = {slot: _mapped(ref, own, _divided) for slot, ref in node.weights.items()}
        block = block.replace_node(replace(node, weights=weights, attrs=attrs))
    return block


def _own(scale: np.ndarray, heads: tuple[int, int]) -> np.ndarray:
    """The scales of the writer's features: one of the query heads of each group."""
    queries, keys = heads
    return scale.reshape(keys, queries // keys, -1)[:, 0].reshape(
        -1
    )  # [kv_heads, group, head_dim] -> [kv_heads head_dim]


def _divided(array: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Rows of a matrix, or entries of a gain or bias."""
    return array / (scale[:, None] if array.ndim == 2 else scale)


def _mapped(
    ref: WeightRef,
    scale: np.ndarray | None,
    function: Callable[[np.ndarray, np.ndarray], np.ndarray],
) -> WeightRef:
    """function(array, scale) as dense f32."""
    digest = "" if scale is None else hashlib.sha256(scale.tobytes()).hexdigest()[:16]

    def load() -> Dense:
        assert scale is not None, f"{ref.tensor} is read before its scales are known"
        return Dense(function(ref.dense(), scale))

    return WeightRef(
        ref.tensor, DenseType(ref.type.shape, "f32"), load, f"{ref.source} equalized {digest}"
    )
