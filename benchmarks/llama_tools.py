"""What `benchmarks/cpu.py` needs of llama.cpp: its tools, files of its types, and their speed.

`make llama-cpp` builds the tools in .llama-cpp; they are also looked for in $ATD_LLAMA_CPP and on
PATH.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from atd.errors import RunFailed
from atd.progress import Say

TYPES = ("Q4_0", "Q4_K_M", "Q3_K_M", "IQ3_S", "TQ1_0")
HOME = Path(__file__).parents[1] / ".llama-cpp"
TOOLS = HOME / "build" / "bin"
ABSENT = f"its tools are not in $ATD_LLAMA_CPP, {TOOLS} or PATH; `make llama-cpp` builds them"
# Runs a command and says its peak memory, from a small process: a child's peak begins with what its
# parent holds when it starts it.
WITH_PEAK = """
import resource, subprocess, sys
code = subprocess.run(sys.argv[1:]).returncode
peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
print(peak if sys.platform == "darwin" else 1024 * peak, file=sys.stderr)
sys.exit(code)
"""


@dataclass(frozen=True)
class Speed:
    """What `llama-bench` finds of a file.

    Attributes:
        weights_bytes: of all tensors.
        peak_bytes: the most memory that it held while it decoded, pages of the file included.
    """

    weights_bytes: int
    peak_bytes: int
    prompt_tokens_per_second: float
    decode_tokens_per_second: float


def find(name: str) -> str | None:
    """Returns the path of a tool of llama.cpp, None where there is none."""
    folders = [os.environ.get("ATD_LLAMA_CPP"), str(TOOLS), os.environ.get("PATH")]
    return shutil.which(name, path=os.pathsep.join(filter(None, folders)))


def run(tool: str, *arguments: str | Path | int) -> tuple[str, int]:
    """Returns what a tool prints, and the most memory that it held, in bytes.

    Raises:
        RunFailed: it failed, with its last lines.
    """
    command = [sys.executable, "-c", WITH_PEAK, tool, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    *said, peak = done.stderr.splitlines() or [""]
    if done.returncode:
        last = "\n".join([*done.stdout.splitlines(), *said][-5:])
        raise RunFailed(f"{Path(tool).name} failed ({done.returncode}):\n{last}")
    return done.stdout, int(peak)


def make(
    quantize: str, files: Mapping[str, Path], source: Path | dict, threads: int, say: Say
) -> None:
    """Writes GGUF files of a model, by way of one in float16.

    Args:
        quantize: the path of `llama-quantize`.
        files: the file of each type, all in one folder, which is made.
        source: a checkpoint; or a config.json, for random weights in its shapes.
        threads: of `llama-quantize`.
        say: hears what is written.
    """
    # Here, so that the processes that measure a model do not hold them.
    from random_checkpoint import write_checkpoint

    from atd.exports.gguf import export_gguf

    folder = next(iter(files.values())).parent
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        model, dense = Path(scratch) / "model", Path(scratch) / "dense.gguf"
        if isinstance(source, dict):
            write_checkpoint(model, source)
        else:
            model = source
        export_gguf(model, dense, dtype="float16", say=say)
        for type, file in files.items():
            say(f"quantizing to {file}")
            made = Path(scratch) / file.name
            run(quantize, dense, made, type, threads)
            made.rename(file)


def measure(tool: str, file: Path, threads: int, *, prompt: int, context: int, steps: int) -> Speed:
    """Runs `llama-bench`, which runs each test once before it is timed.

    Args:
        tool: its path.
        file: a GGUF file.
        threads: that it uses.
        prompt: tokens of the prompt.
        context: tokens in front of the first that is decoded.
        steps: tokens that are decoded.
    """

    def test(*sizes: str | int) -> tuple[dict, int]:
        printed, peak = run(tool, "-m", file, "-t", threads, "-r", 1, "-o", "json", *sizes)
        (found,) = json.loads(printed)
        return found, peak

    decoded, peak = test("-p", 0, "-n", steps, "-d", context)
    read, _ = test("-p", prompt, "-n", 0)
    return Speed(decoded["model_size"], peak, read["avg_ts"], decoded["avg_ts"])
