"""Compares models by bits and KL divergence: which of them no other beats, and a picture."""

import itertools
import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from atd.errors import BadInput
from atd.reports.plots import new_figure, save_figure

# Okabe and Ito's colours, which differ for every kind of colour vision, each with a marker.
_LOOKS = (
    ("#0072B2", "o"),
    ("#D55E00", "s"),
    ("#009E73", "^"),
    ("#CC79A7", "D"),
    ("#E69F00", "v"),
    ("#56B4E9", "P"),
    ("#000000", "X"),
)
_LEAST = 1e-8  # nats: what float32 logits cannot tell from 0, which a log axis has no place for
_DISTANCES = (5, 8, 13, 20, 30, 42, 58)  # of a label from its point, in typographic points
_NEAR = 13  # labels that are further away are tied to their points
_ANGLES = (45, 0, 315, 135, 180, 225, 90, 270, 22, 338, 158, 202, 68, 112, 248, 292)


@dataclass(frozen=True)
class Mark:
    """A model in the picture."""

    bits: float  # per weight
    kl: float  # KL(dense || model) in nats
    label: str  # stands beside the mark
    kind: str = ""  # decides on the colour


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Returns the indices of the (bits, KL) on the Pareto front, by rising bits.

    A point is on it if no other is as good in both figures and better in one. Equal points are on
    it together; a KL that is no finite number never is.
    """
    finite = [i for i, (bits, kl) in enumerate(points) if math.isfinite(bits) and math.isfinite(kl)]

    def beaten(i: int) -> bool:
        return any(
            points[j] != points[i] and all(map(operator.le, points[j], points[i])) for j in finite
        )

    return sorted((i for i in finite if not beaten(i)), key=lambda i: points[i])


def pareto_picture(panels: Mapping[str, Sequence[Mark]], path: str | Path, note: str = "") -> None:
    """Writes `pareto_figure` to a file.

    Raises BadInput as that does, and where the file cannot be written.
    """
    save_figure(pareto_figure(panels, note), path)


def pareto_figure(panels: Mapping[str, Sequence[Mark]], note: str = "") -> Any:
    """Draws KL (logarithmic) over bits per weight, the front as stairs, a label at each point.

    A label that finds no free place is left out; those of the front find theirs first.

    Args:
      panels: title -> marks.
      note: stands below, to say what the labels mean.

    Returns a matplotlib Figure. Raises BadInput where matplotlib is missing or a panel has no
    finite KL.
    """
    shown = {
        title: [mark for mark in marks if math.isfinite(mark.kl)] for title, marks in panels.items()
    }
    if not shown or not all(shown.values()):
        raise BadInput("no model with a finite KL divergence: nothing to draw")
    most = max(map(len, shown.values()))
    kinds = list(dict.fromkeys(mark.kind for marks in shown.values() for mark in marks))
    width, height = min(11, 6.5 + 0.08 * most), min(8, 4.5 + 0.06 * most)
    drawn = new_figure(width * len(shown), height)
    axes = drawn.subplots(1, len(shown), squeeze=False)[0]
    lines = []
    for axis, (title, marks) in zip(axes, shown.items(), strict=True):
        lines.append(_draw(axis, marks, kinds))
        axis.set_title(title, loc="left", fontsize=10)
    if len(kinds) > 1:
        axes[-1].legend(loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False)
    if note:
        drawn.supxlabel(note, fontsize=9, color="#555555", x=0.01, ha="left")
    drawn.canvas.draw()  # places are final from here on, so that labels can be put between them
    drawn.set_layout_engine("none")
    for axis, marks, line in zip(axes, shown.values(), lines, strict=True):
        _label(axis, drawn.canvas.get_renderer(), marks, line, kinds)
    return drawn


def _draw(axis: Any, marks: Sequence[Mark], kinds: Sequence[str]) -> list[int]:
    """Draws points and the line of the front; returns the front."""
    from matplotlib.ticker import LogFormatter

    class Plain(LogFormatter):
        """0.1 rather than 10^-1; which ticks are labelled stays matplotlib's choice."""

        def __call__(self, x, pos=None):
            return f"{x:g}" if super().__call__(x, pos) else ""

    kl = [max(mark.kl, _LEAST) for mark in marks]
    line = front([(mark.bits, mark.kl) for mark in marks])
    steps = [marks[i].bits for i in line], [kl[i] for i in line]
    axis.plot(*steps, color="#333333", linewidth=1, drawstyle="steps-post", label="front")
    for n, kind in enumerate(kinds):
        colour, marker = _LOOKS[n % len(_LOOKS)]
        mine = [i for i, mark in enumerate(marks) if mark.kind == kind]
        axis.plot(
            [marks[i].bits for i in mine],
            [kl[i] for i in mine],
            color=colour,
            marker=marker,
            markersize=6,
            markeredgecolor="white",
            markeredgewidth=0.4,
            linestyle="none",
            label=kind,
        )
    axis.set_yscale("log")
    for set_formatter in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
        set_formatter(Plain())
    axis.margins(0.12)  # room for labels
    axis.set_xlabel("bits per weight")
    axis.set_ylabel("KL(dense || converted), nats")
    axis.grid(which="major", color="#DDDDDD", linewidth=0.6)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    return line


def _label(
    axis: Any, renderer: Any, marks: Sequence[Mark], line: Sequence[int], kinds: Sequence[str]
) -> None:
    """Puts each label near its point, where it covers no point, no other label and no line."""
    space = _Space(axis, renderer, marks, line)
    for i in [*line, *(i for i in range(len(marks)) if i not in line)]:
        place = space.take(i, marks[i])
        if place is None:
            continue
        offset, far = place
        # A label that stands far off is tied to its point.
        tie = {"arrowstyle": "-", "color": "#999999", "linewidth": 0.5, "shrinkA": 0, "shrinkB": 3}
        axis.annotate(
            marks[i].label,
            _position(marks[i]),
            xytext=offset,
            textcoords="offset points",
            ha="center",
            va="center",
            fontsize=8,
            color=_ink(marks[i].kind, kinds),
            fontweight="bold" if i in line else "normal",
            arrowprops=tie if far else None,
        )


def _position(mark: Mark) -> tuple[float, float]:
    return mark.bits, max(mark.kl, _LEAST)


class _Space:
    """The space around the points in which labels find their places, in pixels."""

    def __init__(self, axis: Any, renderer: Any, marks: Sequence[Mark], line: Sequence[int]):
        from matplotlib.path import Path as Outline
        from matplotlib.transforms import Bbox

        self.axis, self.renderer = axis, renderer
        self.pixels = renderer.points_to_pixels(1)
        self.reach = 4.5 * self.pixels  # half a marker and a little air
        self.at = axis.transData.transform([_position(mark) for mark in marks])
        self.frame = axis.get_window_extent(renderer)
        self.taken = [
            Bbox.from_extents(*(point - self.reach), *(point + self.reach)) for point in self.at
        ]
        stair = [
            corner
            for a, b in itertools.pairwise(line)
            for corner in (self.at[a], (self.at[b][0], self.at[a][1]), self.at[b])
        ]
        self.strokes = [Outline(stair)] if stair else []

    def take(self, i: int, mark: Mark) -> tuple[tuple[float, float], bool] | None:
        """Takes the best free place: (offset of its middle in points, whether it is far off)."""
        text = self.axis.annotate(mark.label, _position(mark), fontsize=8)
        size = text.get_window_extent(self.renderer)
        text.remove()
        places = itertools.product(_DISTANCES, _ANGLES)
        found = [place for d, a in places if (place := self._place(i, size, d, a))]
        if not found:
            return None
        _, box, leader, middle, distance = min(found, key=lambda place: place[0])
        self.taken.append(box)
        if distance > _NEAR:
            self.strokes.append(leader)
        x, y = (middle - self.at[i]) / self.pixels
        return (x, y), distance > _NEAR

    def _place(self, i: int, size: Any, distance: float, angle: float):
        """(cost, box, line to the point, middle, distance) of a label; None without room for it."""
        from matplotlib.path import Path as Outline
        from matplotlib.transforms import Bbox

        # The middle of the box is half a box further along x and y, so that its edge is `distance`
        # away.
        right, up = math.cos(math.radians(angle)), math.sin(math.radians(angle))
        away = distance * self.pixels + self.reach / 2
        shift = (
            away * right + size.width / 2 * _towards(right),
            away * up + size.height / 2 * _towards(up),
        )
        middle = self.at[i] + shift
        corner = middle[0] - size.width / 2, middle[1] - size.height / 2
        box = Bbox.from_bounds(*corner, size.width, size.height).padded(1.2 * self.pixels)
        if not _inside(box, self.frame) or any(box.overlaps(other) for other in self.taken):
            return None
        leader = Outline([self.at[i], middle])
        others = [box for k, box in enumerate(self.taken) if k != i]
        crossed = sum(stroke.intersects_bbox(box, filled=False) for stroke in self.strokes)
        crossed += sum(leader.intersects_bbox(other, filled=False) for other in others)
        gaps = [_gap(box, point) for point in self.at]
        doubtful = sum(gap < 1.5 * gaps[i] for k, gap in enumerate(gaps) if k != i)  # whose is it?
        return distance + 25 * crossed + 15 * doubtful, box, leader, middle, distance


def _ink(kind: str, kinds: Sequence[str]) -> Any:
    """The kind's colour, dark enough to be read as text; black where there is only one kind."""
    from matplotlib.colors import to_rgb

    colour = to_rgb(_LOOKS[kinds.index(kind) % len(_LOOKS)][0])
    return tuple(0.62 * part for part in colour) if len(kinds) > 1 else "black"


def _gap(box: Any, point: Any) -> float:
    """Distance of a point from a box, in pixels."""
    x, y = point
    return math.hypot(max(box.x0 - x, 0, x - box.x1), max(box.y0 - y, 0, y - box.y1))


def _towards(share: float) -> float:
    """-1, 0 or 1 for a box that lies to the one side, across, or to the other."""
    return 0.0 if abs(share) < 0.3 else math.copysign(1, share)


def _inside(box: Any, frame: Any) -> bool:
    return frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1
