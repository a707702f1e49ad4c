"""calibrate: scales, norm gains and codes of a decomposed model follow a gradient to the dense one.

1. Takes the converted model as it was written, and the dense model in front of the first pass that
   changes its function.
2. `against = "logits"`: KL(dense || converted) of the next tokens, over all blocks at once
   (`atd.calibration.end_to_end`). `against = "block"`: the square error of each block's output, one
   block after the other (`atd.calibration.block_by_block`).
3. What is trained (`atd.calibration.trainable`): `scales` by relative steps, `gains` of RMS norms,
   and `codes`, latent weights of linears, straight through. Adam for scales and gains, Adafactor
   for codes; a few warm-up steps, then a cosine to zero (`atd.calibration.training`).
4. Every eighth calibration window is held out. Its loss is looked at every few steps until it has
   improved, and then so often that all steps would make `checks` times. Where it got worse, the run
   goes back to the best state and on at half the rates, at a quarter as long as nothing has
   improved: how high rates may be depends on the depth of a model and on its error. After
   `patience` such checks in a row it stops. A run that improved nothing says so and leaves the
   model as it was.
"""

from dataclasses import dataclass

from atd.calibration.block_by_block import train_block_by_block
from atd.calibration.end_to_end import train_end_to_end
from atd.calibration.training import HELD_OUT, Training, split_text
from atd.calibration.work import Text, Work, training_work
from atd.errors import BadInput
from atd.ir import ROTATIONS, Graph
from atd.pipeline import Context, Pass, checks
from atd.weights import DenseType

AGAINST = ("logits", "block")


@dataclass(frozen=True, kw_only=True)
class Calibrate(Pass):
    """Options: see the fields."""

    name = "calibrate"
    scope = "graph"
    least_windows = HELD_OUT

    against: str = "logits"  # or "block"
    scales: bool = True
    gains: bool = True
    codes: bool = True
    steps: int = 112  # of the optimizer, with "block" for each block; 0 leaves the model as it is
    batch: int = 512  # tokens per step, at least one window
    learning_rate: float = 4e-4  # of scales and gains, relative to their size
    codes_learning_rate: float = 0.02  # of latent weights, in levels
    checks: int = 6  # of the held-out loss, once it has improved
    patience: int = 3  # checks in a row without improvement that end the run

    def __post_init__(self):
        checks.check_known("calibrate.against", self.against, AGAINST)
        if not (self.scales or self.gains or self.codes):
            raise BadInput(
                "calibrate with scales, gains and codes all off has nothing to move; leave it out"
            )
        if self.steps < 0 or min(self.batch, self.checks, self.patience) < 1:
            raise BadInput(
                "calibrate: steps must be 0 or more, batch, checks and patience at least 1"
            )
        if min(self.learning_rate, self.codes_learning_rate) <= 0:
            raise BadInput("calibrate: learning rates must be above 0")

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"activations", "written"})

    def requires(self, graph: Graph) -> str | None:
        decomposed = (node for _, node in graph.nodes() if node.name not in ROTATIONS)
        if all(
            isinstance(ref.type, DenseType) for node in decomposed for ref in node.weights.values()
        ):
            return "there is no ternary weight to calibrate; put decompose before it"
        return None

    def rewrite(self, graph: Graph, context: Context) -> Graph | None:
        if context.calibration is None or context.dense is None:
            raise BadInput(
                "pass calibrate needs calibration text and the dense model: "
                "it runs within atd.convert"
            )
        if not self.steps:
            return None
        windows = context.calibration.tokens
        if len(windows) < HELD_OUT:
            raise BadInput(
                f"pass calibrate holds one window in {HELD_OUT} out: {len(windows)} windows of "
                f"{windows.shape[1]} tokens are too few; "
                f"give at least {HELD_OUT * windows.shape[1]:,} tokens"
            )
        train = train_end_to_end if self.against == "logits" else train_block_by_block
        text = split_text(windows, self.batch, context.seed)
        sinks = {"say": context.say, "progress": context.progress}
        return train(self.training(), graph, context.dense, text, **sinks)

    def work(self, before: Graph, after: Graph, text: Text) -> Work:
        held_out = text.tokens // HELD_OUT
        return training_work(
            before, self.steps, max(self.batch, text.context), (self.checks + 2) * held_out
        )

    def training(self) -> Training:
        """Returns what is trained, as the options have it."""
        return Training(
            scales=self.scales,
            gains=self.gains,
            codes=self.codes,
            steps=self.steps,
            learning_rate=self.learning_rate,
            codes_learning_rate=self.codes_learning_rate,
            checks=self.checks,
            patience=self.patience,
        )
