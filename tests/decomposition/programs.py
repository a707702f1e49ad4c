"""What programs compiled for GPUs that are not here launch."""

import re
from collections.abc import Callable

from atd.kernels.tuning import aot


def loops_of(function: Callable, *shapes) -> list[tuple[int, int]]:
    """(rounds, kernels and copies of a round) of each loop of a function compiled for an H200.

    That their number of rounds is known is asserted: of such a loop the host launches kernels one
    after the other, of another it waits for the condition in each round. Kernels of a loop inside
    are not counted.
    """
    text = aot.program_for("H200", function, *shapes).as_text() or ""
    assert " conditional(" not in text
    bodies = {part.lstrip().split(" ")[0]: part for part in text.split("\n\n")}
    loops = []
    for line in text.splitlines():
        if " while(" in line:
            body, rounds = (
                re.search(pattern, line)
                for pattern in (r"body=(%[\w.]+)", r'"known_trip_count":{"n":"(\d+)"}')
            )
            assert body, line
            assert rounds, f"the host waits for {line}"
            kernels = re.findall(r" (?:fusion|custom-call|copy)\(", bodies[body[1]])
            loops.append((int(rounds[1]), len(kernels)))
    return sorted(loops)
