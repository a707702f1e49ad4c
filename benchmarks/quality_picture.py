"""Draws KL divergence over bits per weight, from a table of measured figures.

    python benchmarks/quality_picture.py docs/results/quality.json docs/results/pictures/quality.png

The table holds, by model and by series, points [bits per weight, KL in nats].
`benchmarks/quality.py` measures those of atd; docs/results/quality.md has the settings and where
the others come from.
"""

import argparse
import json
from pathlib import Path

from atd.reports.plots import check_picture, new_figure, save_figure

# Okabe and Ito's colours, which differ for every kind of colour vision, each with a marker.
STYLES = {
    "llama.cpp, importance matrix": ("#000000", "s", "none"),
    "atd, without codes": ("#56B4E9", "o", "--"),
    "atd, recipe as it is": ("#CC79A7", "D", "-"),
    "atd, fast codes": ("#009E73", "^", ":"),
    "atd, default codes": ("#0072B2", "o", "-"),
    "atd, best codes": ("#D55E00", "v", ":"),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("figures", type=Path, help="a .json file")
    parser.add_argument("picture", type=Path, help="a .png, .svg or .pdf file")
    arguments = parser.parse_args()
    check_picture(arguments.picture)
    models = json.loads(arguments.figures.read_text())
    figure = new_figure(5.2 * len(models), 4.2)
    axes = figure.subplots(1, len(models), squeeze=False)[0]
    for axis, (model, series) in zip(axes, models.items(), strict=True):
        for name, points in series.items():
            colour, marker, line = STYLES[name]
            bits, kl = zip(*points, strict=True)
            axis.plot(bits, kl, color=colour, marker=marker, linestyle=line, label=name)
        axis.set_yscale("log")
        axis.set_title(model, loc="left", fontsize=10)
        axis.set_xlabel("bits per weight of the decoder's linears")
        axis.grid(which="both", alpha=0.25)
        axis.legend(frameon=False, fontsize=8)
    axes[0].set_ylabel("KL(dense || converted), nats")
    save_figure(figure, arguments.picture)


if __name__ == "__main__":
    main()
