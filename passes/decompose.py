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
3. Embedding tables read no activations: `hessian` decomposes them under the moments that `allocate`
   noted at them (the attr `moments`), and by als where there are none.
4. Where `allocate` has noted a decision (the attr `ternary`), that alone says which nodes are
   decomposed, and into which bases, groups, scales and dtype: rules are refused. The method is
   still this pass's. Both notes are taken away.
5. `als` weights errors with `context.feature_weights[node]` where there are any.
"""

import re
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from atd.calibration.streams import Moments
from atd.decomposition import error_feedback
from atd.decomposition.greedy import greedy
from atd.decomposition.least_squares import als
from atd.decomposition.options import decided_type
from atd.decomposition.rmse import decomposition_rmse
from atd.decomposition.second_moments import asymmetric_target
from atd.errors import BadInput
from atd.ir import Graph, Node, WeightRef
from atd.ir.notes import DECISION, MOMENTS, SecondMoments, without
from atd.ir.rewrite import with_weight
from atd.pipeline import Context, Pass, checks
from atd.weights import DTYPES, Dense, Group, Ternary, TernaryType, canonical_group

METHODS = ("als", "greedy", "hessian")


@dataclass(frozen=True, kw_only=True)
class Decompose(Pass):
    """Options: see the fields. Group sizes run from 32 up; "row" is one group per row, "tensor" one
    for the whole matrix.
    """

    name = "decompose"
    scope = "node"

    method: str = "als"
    bases: int = 2  # N, 1..4
    group: int | str = 128  # inputs that share their scales
    scales: str = "free"  # or "tied": s_i = s_0 / 3^i, one stored scale per group
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

    def __post_init__(self):
        checks.check_known("decompose.method", self.method, METHODS)
        if not 1 <= self.bases <= 4:
            raise BadInput(f"decompose.bases must be 1, 2, 3 or 4, not {self.bases}")
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

    @property
    def needs(self) -> frozenset[str]:
        methods = {self.method, *(dict(rule.options).get("method") for rule in self.rules)}
        return frozenset({"activations"}) if "hessian" in methods else frozenset()

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
            return None
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

    def rewrite(self, name: str, node: Node, context: Context) -> Node | None:
        if DECISION in node.attrs:
            return self._as_decided(name, node, context)
        if not node.is_dense_matrix or not re.fullmatch(self.nodes, name):
            return None
        return self._decomposed(name, node, context)

    def _as_decided(self, name: str, node: Node, context: Context) -> Node:
        """What `allocate` decided for the node; its notes are taken away."""
        type = decided_type(node.attrs[DECISION], node.weights["weight"].type.shape)
        if type is None:
            return replace(node, attrs=without(node.attrs, DECISION, MOMENTS))
        scales = "tied" if type.tied else "free"
        step = replace(
            self, bases=type.bases, group=type.group, scales=scales, dtype=type.dtype, rules=()
        )
        return step._decomposed(name, node, context)

    def _decomposed(self, name: str, node: Node, context: Context) -> Node:
        """The node with a ternary weight; its notes are taken away."""
        ref, moments = node.weights["weight"], node.attrs.get(MOMENTS)
        out, inputs = ref.type.shape
        group = canonical_group(self.group, inputs)
        type = TernaryType((out, inputs), self.bases, group, self.scales == "tied", self.dtype)

        def load() -> Ternary:
            dense = ref.load()
            assert isinstance(dense, Dense)
            weight = np.asarray(dense.array).astype(np.float32)
            if self.method == "greedy":
                trits, scales = greedy(weight, self.bases, DTYPES[self.dtype], group)
            elif self.method == "hessian" and (node.op == "linear" or moments is not None):
                trits, scales = self._calibrated(name, weight, group, moments, context)
            else:
                features = context.feature_weights.get(name)
                trits, scales = als(
                    weight,
                    self.bases,
                    group,
                    type.tied,
                    DTYPES[self.dtype],
                    feature_weights=features,
                )
            context.record(name, error=decomposition_rmse(weight, trits, scales, group))
            return Ternary(trits, scales, type)

        weight = WeightRef(ref.tensor, type, load, ref.source)
        return replace(with_weight(node, weight), attrs=without(node.attrs, DECISION, MOMENTS))

    def _calibrated(
        self,
        name: str,
        weight: np.ndarray,
        group: Group,
        given: SecondMoments | None,
        context: Context,
    ) -> tuple[np.ndarray, np.ndarray]:
        """(trits, scales) under the given moments, or those of the node's inputs."""
        target = weight
        if given is not None:
            hessian = given.matrix
            factor = error_feedback.factor(hessian, self.damping, self.order)
        elif context.calibration is None:
            raise BadInput(
                f"{name}: decompose.method hessian needs calibration text: "
                "convert with --calib FILE"
            )
        else:
            moments = context.calibration.moments(name)
            hessian, factor = moments.hessian, _factor(moments, self.damping, self.order)
            if self.asymmetric:
                corrected = asymmetric_target(weight, hessian, moments.cross, self.damping)
                target = weight + self.asymmetric * (np.asarray(corrected) - weight)
        trits, scales = error_feedback.decompose(
            target,
            factor,
            hessian,
            bases=self.bases,
            group=group,
            tied=self.scales == "tied",
            dtype=DTYPES[self.dtype],
            sweeps=self.sweeps,
            refits=self.refits,
        )
        if factor.damping > self.damping:
            context.record(name, damping=factor.damping)
        return trits, scales


@lru_cache(maxsize=1)
def _factor(moments: Moments, damping: float, order: bool) -> error_feedback.Factor:
    """The factor of these moments, kept for the next linear, which often shares the input."""
    return error_feedback.factor(moments.hessian, damping, order)
