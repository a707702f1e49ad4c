"""verify: reads back what was written and compares it with what was in memory.

1. Every stored tensor is read again; its bytes must have the digest they had when they were
   written.
2. Packed codes must be codes of their layout; trits must lie in {-1, 0, 1}; scales and dense
   tensors must be finite.
"""

from dataclasses import dataclass

from atd.calibration.work import Text, Work
from atd.checkpoint.writer import digest
from atd.errors import RunFailed
from atd.ir import Graph
from atd.pipeline import Context, Pass
from atd.weights import stored
from atd.weights.values import broken


@dataclass(frozen=True, kw_only=True)
class Verify(Pass):
    """Has no options. Raises RunFailed naming the first tensor that is not what was written."""

    name = "verify"
    scope = "graph"
    rewrites = False

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"written"})

    def work(self, before: Graph, after: Graph, text: Text) -> Work:
        written = sum(ref.type.nbytes for _, ref in after.weights())
        return Work({("verifying", "byte"): float(written)})

    def rewrite(self, graph: Graph, context: Context) -> Graph | None:
        for _, ref in graph.weights():
            weight = ref.load()
            for field, (name, _, _) in stored(ref.tensor, ref.type).items():
                if digest(getattr(weight, field)) != context.written_digests.get(name):
                    raise RunFailed(
                        f"pass verify: tensor {name} read back from the disk is not what was "
                        "written; the disk or its memory is failing"
                    )
            if problem := broken(weight):
                raise RunFailed(f"pass verify: tensor {ref.tensor}: {problem}")
        return None
