"""Fixes what the points of a study are compared on: one model, its texts, how it is evaluated."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import jax
import numpy as np

from atd.calibration.text import SELF
from atd.checkpoint.files import read_text
from atd.checkpoint.reader import checkpoint_contents, open_tokenizer
from atd.checkpoint.writer import digest, file_digest
from atd.errors import BadInput, about
from atd.models import frontend
from atd.models.numerics import numerics
from atd.models.tokens import check_tokens
from atd.runtime.compare import read_tokens
from atd.runtime.evaluate import cut
from atd.study.points import Point, digest_of
from atd.study.results import StudyRow
from atd.version import __version__


@dataclass(frozen=True)
class Text:
    """A text that the points are evaluated on."""

    tokens: np.ndarray  # int32 [n]
    sha256: str  # of the file


@dataclass(frozen=True)
class Setting:
    """A model and what its conversions are compared on."""

    model: Path
    identity: str  # hash of its tensors, its config and the settings of jax
    texts: dict[str, Text]
    context: int
    tokens: int | None
    calib: tuple[str, ...]  # calibration texts; none: those of each recipe
    ignore_extra: bool  # tensors of the model that are not part of its architecture
    calib_sha256: dict[str, str]  # calibration text -> sha256 of the file, or SELF

    @cached_property
    def digest(self) -> str:
        """Hash of the setting; rows that have the same one can be compared."""
        texts = [(name, digest(text.tokens)) for name, text in self.texts.items()]
        return digest_of(json.dumps([self.identity, self.context, __version__, *texts]))

    def calibration(self, point: Point) -> tuple[str, ...]:
        """Returns the texts that a point is calibrated on; none where it is not calibrated."""
        return (self.calib or point.recipe.calibration) if point.calibrated else ()

    def calibration_digests(self, point: Point) -> str:
        """Returns the digests of these texts."""
        return " ".join(self.calib_sha256[text] for text in self.calibration(point))

    def key(self, point: Point) -> str:
        """Returns the key of a point's row: a hash of all that its figures depend on."""
        return digest_of(self.digest, point.digest, self.calibration_digests(point))

    def folder(self, point: Point) -> str:
        """Names the point's folder: its label, and a digest of what its weights depend on."""
        made_of = self.identity, point.digest, self.calibration_digests(point), __version__
        label = re.sub(r"[^\w.=+-]+", "_", point.label.replace(" ", "-")).strip("._")[:120]
        return f"{label}-{digest_of(*made_of)[:8]}"

    def row(self, point: Point) -> StudyRow:
        """Returns the columns of a point's row that are known before its conversion."""
        return {
            "key": self.key(point),
            "setting": self.digest,
            "recipe": point.name,
            **point.values,
            "error": "",
            "folder": self.folder(point),
            "recipe_sha256": point.digest,
            "model": self.model.name,
            "context": str(self.context),
            "tokens": str(self.tokens or ""),
            "bos": "no",
            "calib": " + ".join(Path(text).name for text in self.calibration(point)),
            "calib_sha256": self.calibration_digests(point),
            "atd": __version__,
            "jax": jax.__version__,
        }


def read_setting(
    model: Path,
    points: Sequence[Point],
    *,
    data: Sequence[Path],
    calib: tuple[str, ...],
    context: int,
    tokens: int | None,
    ignore_extra: bool = False,
) -> Setting:
    """Reads the model, for its digest, and the texts.

    Raises BadInput for what no point could be evaluated on: no text, texts that are too short or
    have the same name, a context that the model was not made for.
    """
    if not data:
        raise BadInput("a study needs a text to evaluate on: --data TEXT")
    digests = checkpoint_contents(model).digests
    graph = frontend.open(model, ignore_extra=ignore_extra, digests=digests)
    limit = graph.max_context
    if limit is not None and context > limit:
        raise BadInput(
            f"a context of {context} is beyond the {limit} positions the model was made for"
        )
    tokenizer, texts = open_tokenizer(model), {}
    for path in data:
        text = Text(read_tokens(path, tokenizer, tokens), file_digest(path))
        with about(str(path)):
            check_tokens(text.tokens, graph.vocabulary)
        if path.stem in texts:
            raise BadInput(
                f"two texts are called {path.stem}, as their columns would be; rename one"
            )
        cut(text.tokens, context, None)
        texts[path.stem] = text
    of_recipes = [text for p in points if p.calibrated for text in p.recipe.calibration]
    calib_sha256 = {SELF: SELF}
    for name in dict.fromkeys([*calib, *of_recipes]):
        if name != SELF:
            read_text(name)  # refused now rather than at each point
            calib_sha256[name] = file_digest(Path(name))
    sources = [ref.source for _, ref in graph.weights()]
    made_of = [sources, graph.to_json(), graph.config, numerics()]
    identity = digest_of(json.dumps(made_of, sort_keys=True))
    return Setting(model, identity, texts, context, tokens, calib, ignore_extra, calib_sha256)
