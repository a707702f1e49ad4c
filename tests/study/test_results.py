"""The table of a study."""

import io
import re

from rich.console import Console

from atd.study.results import number, study_table


def test_the_table_is_sorted_and_marks_the_front(studied):
    beaten = studied[1][1] | {
        "recipe": "worse",
        "folder": "z",
        "kl_mean:start": "99",
        "kl_mean:end": "0.0001",
    }
    text = io.StringIO()
    Console(width=160, file=text).print(study_table([beaten, studied[1][1], studied[1][0]]))
    one, two, worse = (
        line for line in text.getvalue().splitlines() if re.match("fast|worse", line)
    )
    assert one.split()[:2] == ["fast", "1"]
    assert two.split()[:2] == ["fast", "2"]
    assert (one.count("●"), two.count("●"), worse.count("●")) == (2, 1, 1)
    assert "4 windows of 64 tokens, no BOS, 252 positions scored" in " ".join(
        text.getvalue().split()
    )


def test_a_table_of_one_text_fits_80_columns(studied):
    row = {c: v for c, v in studied[1][1].items() if not c.endswith(":end")} | {
        "decompose.group": "tensor"
    }
    text = io.StringIO()
    Console(width=80, file=text).print(study_table([row]))
    assert f"{number(row, 'top1:start'):.1%}" in text.getvalue()
    assert "fast" in text.getvalue()
