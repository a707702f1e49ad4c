"""What the commands share: the table that they enter, and the types of options that several have."""

from pathlib import Path
from typing import Annotated, Literal

import tyro
from tyro.conf import Positional

BACKEND_HELP = (
    "xla keeps weights packed in memory, xla-unpacked unpacks them once at load (faster on CPUs), triton keeps them "
    "packed and is fast on NVIDIA GPUs, mosaic is the same for Hopper. auto: triton on a GPU that has it, xla-unpacked "
    "on a CPU."
)
Backend = Annotated[
    Literal["auto", "xla", "xla-unpacked", "triton", "mosaic"], tyro.conf.arg(help=BACKEND_HELP)
]
Model = Annotated[Positional[Path], tyro.conf.arg(metavar="MODEL")]
app = tyro.extras.SubcommandApp()
