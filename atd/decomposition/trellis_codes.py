"""The trellis codes that are known by name: three kinds for each N, universal constants made for a
Gaussian.

    fast       the fewest states
    default    what recipes take
    best       the least error, at several times the work of the search

The codes of N = 2 are Barker sequences: +++-+ and +++--+-, whose shifted copies hardly correlate,
so that the sum of the shifted trits has a nearly white spectrum. The others were found by descent
on the mean square error from random starts. Taps are rounded to three digits, which costs nothing;
they are stored with every weight, so that a file can be read without this table."""

from dataclasses import dataclass

from atd.errors import BadInput
from atd.weights.codes import Code, parse_code

KINDS = ("fast", "default", "best")


@dataclass(frozen=True)
class Known:
    """A code of the table. `error`: mean square error of a long row of Gaussians of variance 1."""

    bases: float
    kind: str
    error: float
    text: str

    @property
    def code(self) -> Code:
        return parse_code(self.text)


TABLE = (
    Known(
        1.25,
        "fast",
        0.10236,
        (
            "0.564,-0.787,-0.819/"
            "0.809,-0.966,0.369/"
            "0.707,0.457,-0.909/"
            "0.387,0.967,0.71|1.156,0.096,-0.398"
        ),
    ),
    Known(
        1.25,
        "default",
        0.09753,
        (
            "0.853,0.57,0.55,0.45/"
            "1.001,-0.54,-0.487,-0.108/"
            "1.027,-0.556,-0.23,-0.266/"
            "0.72,0.686,-0.673,-0.304|0.857,-0.794,0.17,0.389"
        ),
    ),
    Known(1.5, "fast", 0.05412, "0.484,0.312,-0.651,-0.725|0.765,-0.715,0.588/0.943,0.689"),
    Known(
        1.5,
        "default",
        0.05078,
        ("0.659,-0.317,0.113,0.887|0.85,0.291,0.395,-0.676/0.657,0.499,0.468,-0.683"),
    ),
    Known(
        1.75,
        "default",
        0.0317,
        (
            "1.069,-0.346,-0.544|0.624,-0.185,0.812/"
            "1.043,-0.294,0.496|0.62,0.385,-0.915/"
            "0.898,0.678,-0.414|0.503,-0.494,-0.804/"
            "0.636,0.319,0.741"
        ),
    ),
    Known(2, "fast", 0.01871, "0.442,0.588,-0.438|1.284"),
    Known(2, "default", 0.01654, "0.42,0.42,0.42,-0.42,0.42|1.1"),
    Known(2, "best", 0.01561, "0.38,0.38,0.38,-0.38,-0.38,0.38,-0.38|1.04"),
    Known(
        2.5,
        "default",
        0.00612,
        ("0.258,-0.394,-0.16,-0.697|0.79|1.184/0.627,0.334,-0.475,0.508|1.026"),
    ),
    Known(
        2.5,
        "best",
        0.00571,
        ("0.221,-0.479,0.289,-0.514,-0.288|0.774|1.173/0.362,-0.266,-0.334,-0.342,-0.377|1.103"),
    ),
    Known(3, "fast", 0.00224, "0.522,0.354,0.53|0.789|1.177"),
    Known(3, "default", 0.002, "0.486,-0.408,-0.32,-0.475|0.703|1.067"),
    Known(3, "best", 0.00187, "0.354,-0.264,0.408,0.279,0.328|1.041|0.81"),
)
BASES = tuple(dict.fromkeys(known.bases for known in TABLE))


def known_code(bases: float, kind: str = "default") -> Code:
    """Returns the code for N trits per weight; where N has none of this kind, its default one.

    Raises BadInput for an N without codes, and for another kind.
    """
    if kind not in KINDS:
        raise BadInput(f"trellis {kind!r} is unknown; known: {', '.join(KINDS)}")
    found = {known.kind: known.code for known in TABLE if known.bases == bases}
    if not found:
        raise BadInput(
            f"there is no trellis code for N = {bases:g}; "
            f"known: {', '.join(f'{n:g}' for n in BASES)}"
        )
    return found.get(kind, found["default"])


def gaussian_error(code: Code) -> float:
    """Returns the mean square error on a long row of Gaussians of variance 1, for a code of the
    table.
    """
    return next(known.error for known in TABLE if known.code == code)


def bound(bases: float) -> float:
    """Returns 3^(-2N): no code of N trits per weight has a smaller mean square error on Gaussians
    of variance 1.
    """
    return 3.0 ** (-2 * bases)
