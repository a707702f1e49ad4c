"""decompose: turns a dense matrix into a sum of N ternary bases, `w = sum_i s_i t_i`.

1. Takes every `linear` and `embed` whose full name matches `nodes` and whose weight is dense; norms
   and biases stay.
2. The methods:
   `als`      scales fitted jointly, per group, with exhaustive re-assignment
              (`atd.decomposition.least_squares.als`)
   `greedy`   a baseline: base by base on the residual, scale = mean |residual|; one scale per
              tensor with `group = "tensor"` (`atd.decomposition.greedy`)
   `hessian`  calibrated: scales under the second moments of the inputs, error feedback, coordinate
              descent, refits (`atd.decomposition.error_feedback`); the target is corrected for what
              the layers before have changed (GPTAQ)
3. `trellis = "default"` (or "fast", "best") takes a trellis code of N bases and one scale per row:
   half the error at the same bytes for weights that are nearly Gaussian, as rotated ones are
   (`atd.decomposition.trellis`). `als` then looks for the nearest weights, `hessian` works as
   without.
4. Embedding tables read no activations: `hessian` decomposes them under the moments that `allocate`
   noted at them (the attr `moments`), and by als where there are none.
5. Where `allocate` has noted a decision (the attr `ternary`), that alone says which nodes are
   decomposed, and into which bases, groups, scales or code, and dtype: rules are refused. The
   method is still this pass's. All notes are taken away.
6. Rows that share the trits of a trellis code count by the squared gradients at their outputs,
   where `allocate` noted them (the attr `fisher`); `fisher = false` lets all count alike.
7. With `uncertainty`, second moments weigh tokens by how uncertain the dense model is of the next
   one (`atd.calibration.uncertainty`); all count alike without.
8. `als` weights errors with `context.feature_weights[node]` where there are any.
"""

import re
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from atd.calibration import work
from atd.calibration.streams import Moments, added_to
from atd.calibration.work import Text, Work
from atd.decomposition import error_feedback, quantize, trellis_codes
from atd.decomposition.correction import asymmetric_target
from atd.decomposition.greedy import greedy
from atd.decomposition.options import decided_type, trellis_type
from atd.decomposition.rmse import relative_error
from atd.errors import BadInput, about
from atd.ir import Graph, Node, WeightRef
from atd.ir.notes import DECISION, FISHER, MOMENTS, SecondMoments, without
from atd.ir.rewrite import with_weight
from atd.pipeline import Context, Pass, checks
from atd.weights import (
    DTYPES,
    Dense,
    Ternary,
    TernaryType,
    Trellis,
    TrellisType,
    canonical_group,
)

METHODS = ("als", "greedy", "hessian")
FLOOR = 0.1  # of the mean E[g^2], which is added for each row: an estimate of some thousand tokens
TOLERATED = 1.5  # times the error on Gaussians, before a code's error is worth a warning


@dataclass(frozen=True, kw_only=True)
class Decompose(Pass):
    """Options: see the fields. Group sizes run from 32 up; "row" is one group per row, "tensor" one
    for the whole matrix.
    """

    name = "decompose"
    scope = "node"

    method: str = "als"
    bases: int | float = 2  # N: 1..4; with a trellis code 1.25, 1.5, 1.75, 2, 2.5 or 3
    group: int | str = 128  # inputs that share their scales
    scales: str = "free"  # or "tied": s_i = s_0 / 3^i, one stored scale per group
    trellis: str = ""  # a trellis code: "fast", "default" or "best"; it has one scale per row
    dtype: str = "f16"  # of the stored scales
    # Which matrices, by whole names; ".*" takes model.embed_tokens and lm_head as well.
    nodes: str = r"model\.layers\..*"
    # Of hessian alone:
    sweeps: int = 2  # of coordinate descent after the error feedback
    refits: int = 0  # rounds of (scales in closed form, one more sweep)
    # Of the second moments, relative to their mean diagonal: in feedback, scales and correction.
    damping: float = 0.3
    order: bool = True  # visit inputs by descending second moment (act-order)
    asymmetric: float = 1.0  # share of the correction toward the dense model's outputs; 0: none
    residual: bool = True  # o and down correct what the residual stream lacks by then as well
    uncertainty: bool = False  # tokens count by how uncertain the dense model is of the next one
    fisher: bool = True  # rows that share trits weigh E[g^2] of their outputs, as allocate noted it

    def __post_init__(self):
        checks.check_known("decompose.method", self.method, METHODS)
        if self.trellis:
            self._check_trellis()
        elif self.bases not in (1, 2, 3, 4):
            raise BadInput(
                f"decompose.bases must be 1, 2, 3 or 4, not {self.bases}; "
                "decompose.trellis has codes for some numbers between"
            )
        checks.check_group("decompose.group", self.group)
        checks.check_dtype("decompose.dtype", self.dtype)
        checks.check_pattern("decompose.nodes", self.nodes)
        if self.scales not in ("free", "tied"):
            raise BadInput(f"decompose.scales must be 'free' or 'tied', not {self.scales!r}")
        if self.method == "greedy" and self.scales == "tied":
            raise BadInput(
                "decompose.method greedy fits free scales only; use method als for tied ones"
            )
        if self.method == "hessian" and self.group == "tensor":
            raise BadInput(
                "decompose.method hessian works on rows: "
                "group must be a size or 'row', not 'tensor'"
            )
        if min(self.sweeps, self.refits) < 0 or self.damping < 0 or not 0 <= self.asymmetric <= 1:
            raise BadInput(
                "decompose: sweeps, refits and damping must be 0 or more, asymmetric from 0 to 1"
            )

    def _check_trellis(self) -> None:
        trellis_codes.known_code(self.bases, self.trellis)
        if self.method == "greedy":
            raise BadInput("decompose.method greedy has no trellis codes; use als or hessian")
        if self.group != "row":
            raise BadInput(
                f"decompose.trellis has one scale per row: group must be 'row', not {self.group!r}"
            )

    @property
    def needs(self) -> frozenset[str]:
        own = self.method, self.uncertainty
        rules = (dict(rule.options) for rule in self.rules)
        ways = [own, *((r.get("method", own[0]), r.get("uncertainty", own[1])) for r in rules)]
        counted = [uncertainty for method, uncertainty in ways if method == "hessian"]
        asked = {"activations", "counts"} if any(counted) else {"activations"}
        return frozenset(asked if counted else ())

    @property
    def _adds(self) -> bool:
        """Whether outputs make up for what the residual stream lacks."""
        return self.residual and self.asymmetric > 0

    def requires(self, graph: Graph) -> str | None:
        dense = [name for name, node in graph.nodes() if node.is_dense_matrix]
        if not dense:
            return "no dense matrix is left to decompose (is the model converted already?)"
        if any(DECISION in node.attrs for _, node in graph.nodes()):
            if self.rules:
                return (
                    "allocate has decided on every matrix, and the rule "
                    f"{self.rules[0].match!r} would have no say; take the rules out, "
                    "or leave the choice to them and take allocate out"
                )
            return self._beyond_greedy(graph) if self.method == "greedy" else None
        if not any(re.fullmatch(self.nodes, name) for name in dense):
            return (
                f"nodes = {self.nodes!r} matches none of the dense matrices; "
                f"names are like {dense[0]!r}"
            )
        mine = [name for name in dense if re.fullmatch(self.nodes, name)]
        for rule in self.rules:
            if not any(re.fullmatch(rule.match, name) for name in mine):
                return (
                    f"rule {rule.match!r} matches no dense matrix among those that "
                    f"nodes = {self.nodes!r} lets through"
                )
        return None

    def work(self, before: Graph, after: Graph, text: Text) -> Work:
        found, kept = Work(), {name: node.weights.get("weight") for name, node in after.nodes()}
        programs: set[tuple] = set()
        for unit in before.units:
            # Values whose moments are asked for -> their features, and the products that they take
            read: dict[str, tuple[int, float]] = {}
            for node in unit.nodes:
                name = unit.full_name(node)
                ref, step = kept[name], self.for_node(name)
                if not node.is_dense_matrix or ref is None or not isinstance(step, Decompose):
                    continue
                if not isinstance(ref.type, TernaryType | TrellisType):
                    continue
                asked = step.method == "hessian" and node.op == "linear"
                found += work.matrix_work(ref.type)
                programs |= work.programs(ref.type, asked)
                if not asked:
                    found += work.nearest_work(ref.type)
                    continue
                out, inputs = ref.type.shape
                added = step._adds and added_to(unit, node)
                products = 1 + work.half(inputs) + (out / inputs if added else 0)
                read[node.inputs[0]] = inputs, products
                found += work.visits_work(ref.type, step.sweeps, step.refits)
                found += work.corrected_work(out, inputs) if step.asymmetric else Work()
            for inputs, products in read.values():
                found += work.moments_work("moments", inputs, text.tokens, products)
                found += work.factor_work(inputs)
        if text.tokens and "counts" in self.needs:
            found += work.forward_work("how much tokens count", before, text.tokens)
        return found + work.compiled_work(programs)

    def _beyond_greedy(self, graph: Graph) -> str | None:
        """Why greedy cannot do what `allocate` decided: it has no codes and no tied scales."""
        for name, node in graph.nodes():
            if DECISION in node.attrs:
                decided = node.attrs[DECISION]
                type = decided_type(decided, node.weights["weight"].type.shape)
                if isinstance(type, TrellisType) or (type and type.tied and type.bases > 1):
                    return (
                        f"method greedy fits free scales without a trellis code, and allocate has "
                        f"decided on {decided!r} for {name}; use method als or hessian, or set "
                        "allocate.trellis='' and allocate.scales=['free']"
                    )
        return None

    def rewrite(self, name: str, node: Node, context: Context) -> Node | None:
        if DECISION in node.attrs:
            return self._as_decided(name, node, context)
        if not node.is_dense_matrix or not re.fullmatch(self.nodes, name):
            return None
        return self._decomposed(name, node, self._type(name, node), context)

    def _as_decided(self, name: str, node: Node, context: Context) -> Node:
        """What `allocate` decided for the node; its notes are taken away."""
        type = decided_type(node.attrs[DECISION], node.weights["weight"].type.shape)
        if type is None:
            return replace(node, attrs=without(node.attrs, DECISION, MOMENTS, FISHER))
        return self._decomposed(name, node, type, context)

    def _type(self, name: str, node: Node) -> TernaryType | TrellisType:
        """What the options make of a node's matrix."""
        out, inputs = node.weights["weight"].type.shape
        if not self.trellis:
            group, tied = canonical_group(self.group, inputs), self.scales == "tied"
            return TernaryType((out, inputs), int(self.bases), group, tied, self.dtype)
        code = trellis_codes.known_code(self.bases, self.trellis)
        if (type := trellis_type((out, inputs), code, self.dtype)) is None:
            raise BadInput(
                f"{name}: {out} rows are too few for this trellis code, or no multiple of "
                f"{code.period}; give it another N or trellis = '' with a rule"
            )
        return type

    def _decomposed(
        self, name: str, node: Node, type: TernaryType | TrellisType, context: Context
    ) -> Node:
        """The node with a ternary weight of this type; its notes are taken away."""
        ref, moments = node.weights["weight"], node.attrs.get(MOMENTS)
        importance = _importance(node.attrs.get(FISHER)) if self.fisher else None

        def load() -> Ternary | Trellis:
            dense = ref.load()
            assert isinstance(dense, Dense)
            weight = np.asarray(dense.array).astype(np.float32)
            with about(name):
                if self.method == "greedy":
                    assert isinstance(type, TernaryType)  # `requires` has refused codes
                    found = greedy(weight, type.bases, DTYPES[type.dtype], type.group)
                    made = Ternary(*found, type)
                elif self.method == "hessian" and (node.op == "linear" or moments is not None):
                    made = self._calibrated(name, weight, type, moments, importance, context)
                else:
                    made = quantize.nearest(weight, type, context.feature_weights.get(name))
            if isinstance(type, TrellisType):
                _warn_of_other_weights(name, weight, type, context)
            context.record(name, error=relative_error(weight, made))
            return made

        weight = WeightRef(ref.tensor, type, load, ref.source)
        return replace(
            with_weight(node, weight), attrs=without(node.attrs, DECISION, MOMENTS, FISHER)
        )

    def _calibrated(
        self,
        name: str,
        weight: np.ndarray,
        type: TernaryType | TrellisType,
        given: SecondMoments | None,
        importance: np.ndarray | None,
        context: Context,
    ) -> Ternary | Trellis:
        """The weight under the given moments, or those of the node's inputs."""
        target = weight
        if given is not None:
            hessian = given.matrix
            factor = error_feedback.factor(hessian, self.damping, self.order)
        elif context.calibration is None:
            raise BadInput(
                "decompose.method hessian needs calibration text: convert with --calib FILE"
            )
        else:
            moments = context.calibration.moments(name, self.uncertainty, self._adds)
            hessian, factor = moments.hessian, _factor(moments, self.damping, self.order)
            if self.asymmetric:
                moved = moments.cross, factor, moments.residual
                corrected = asymmetric_target(weight, hessian, *moved)
                target = weight + self.asymmetric * (corrected - weight)
        visits = self.sweeps, self.refits
        made = quantize.calibrated(target, type, factor, hessian, *visits, importance)
        if factor.damping > self.damping:
            context.record(name, damping=factor.damping)
        return made


def _importance(squares: SecondMoments | None) -> np.ndarray | None:
    """What errors of each row cost, float32 [out]: E[g^2] + FLOOR of its mean, or None."""
    return None if squares is None else squares.matrix + FLOOR * squares.matrix.mean()


def _warn_of_other_weights(
    name: str, weight: np.ndarray, type: TrellisType, context: Context
) -> None:
    """Says where a code is worse than it should be, because the weights are far from Gaussian."""
    expected = trellis_codes.gaussian_error(type.code)
    (found,) = quantize.code_errors(weight, [type])
    if found > TOLERATED * expected:
        context.say(
            f"decompose: {name}: the trellis code leaves {found:.4f} of its energy, not "
            f"{expected:.4f} as on Gaussian weights (excess kurtosis "
            f"{quantize.excess_kurtosis(weight):.1f}): put rotate in front, or leave the code out "
            "with a rule"
        )


@lru_cache(maxsize=1)
def _factor(moments: Moments, damping: float, order: bool) -> error_feedback.Factor:
    """The factor of these moments, kept for the next linear, which often shares the input."""
    return error_feedback.factor(moments.hessian, damping, order)
