"""Ahead-of-time compilation of Pallas kernels for NVIDIA GPUs on a machine without one.

It gives a kernel's PTX, its machine code, and its registers. XLA compiles for a described device
where the CUDA plugin is installed (extra gpu-check), and dumps the PTX. ptxas turns that into
machine code and names registers and spills; nvdisasm lists it.
"""

import importlib
import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from unittest import mock

import jax
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

from atd.errors import RunFailed


@dataclass(frozen=True)
class Device:
    """A GPU to compile for.

    Attributes:
        capability: compute capability, (8, 0) for 8.0.
        bandwidth: of its memory, bytes/s.
    """

    name: str
    capability: tuple[int, int]
    multiprocessors: int
    shared_bytes_per_multiprocessor: int
    bandwidth: float
    memory_bytes: float
    l2_bytes: int

    def target_config(self) -> str:
        """Returns XLA's GpuTargetConfigProto as text."""
        major, minor = self.capability
        threads = 1536 if (major, minor) in {(8, 6), (8, 9), (12, 0)} else 2048
        return f"""
            platform_name: "CUDA"
            device_description_str: "{self.name}"
            dnn_version_info {{ major: 9 minor: 12 }}
            runtime_version {{ major: 13 minor: 0 patch: 0 }}
            gpu_device_info {{
                cuda_compute_capability {{ major: {major} minor: {minor} }}
                core_count: {self.multiprocessors}
                fpus_per_core: 128
                threads_per_block_limit: 1024
                threads_per_warp: 32
                threads_per_core_limit: {threads}
                registers_per_core_limit: 65536
                registers_per_block_limit: 65536
                shared_memory_per_block: 49152
                shared_memory_per_block_optin: {self.shared_bytes_per_multiprocessor - 1024}
                shared_memory_per_core: {self.shared_bytes_per_multiprocessor}
                block_dim_limit_x: 2147483647
                block_dim_limit_y: 65535
                block_dim_limit_z: 65535
                memory_bandwidth: {self.bandwidth:.0f}
                device_memory_size: {self.memory_bytes:.0f}
                l2_cache_size: {self.l2_bytes}
                clock_rate_ghz: 1.7
            }}"""


DEVICES = {
    "A100": Device("NVIDIA A100-SXM4-80GB", (8, 0), 108, 164 << 10, 2.0e12, 80e9, 40 << 20),
    "A10": Device("NVIDIA A10", (8, 6), 72, 100 << 10, 6.0e11, 24e9, 6 << 20),
    "RTX 3050": Device("NVIDIA GeForce RTX 3050", (8, 6), 20, 100 << 10, 2.24e11, 8e9, 2 << 20),
    "L4": Device("NVIDIA L4", (8, 9), 58, 100 << 10, 3.0e11, 24e9, 48 << 20),
    "H100": Device("NVIDIA H100 80GB HBM3", (9, 0), 132, 228 << 10, 3.35e12, 80e9, 50 << 20),
    "H200": Device("NVIDIA H200", (9, 0), 132, 228 << 10, 4.8e12, 141e9, 50 << 20),
}


@dataclass(frozen=True)
class Compiled:
    """A compiled kernel.

    Attributes:
        registers: per thread.
        spill_bytes: of stores and loads together.
        shared_bytes: asked for at launch; what the PTX itself declares is on top.
        grid: (0, 0, 0) for Mosaic's kernels, which keep it, and what they ask for, to themselves.
    """

    name: str
    ptx: str
    sass: str
    registers: int
    spill_bytes: int
    shared_bytes: int
    grid: tuple[int, int, int]


def missing() -> str | None:
    """Returns why nothing can be compiled here, or None."""
    plugin = _plugin()
    if plugin is None:
        return "needs the CUDA plugin of jax: pip install 'atd-jax[gpu-check]'"
    version = metadata.version(f"jax-{plugin.removeprefix('jax_plugins.xla_')}-plugin")
    if version != jax.__version__:
        return f"needs the CUDA plugin of jax {jax.__version__}, not of {version}"
    for tool in ("ptxas", "nvdisasm"):
        if _find(tool) is None:
            return f"needs {tool}: pip install 'atd-jax[gpu-check]', or a CUDA toolkit on PATH"
    return None


def compile_for(
    device: str, function: Callable, *shapes: jax.ShapeDtypeStruct, kernel: str | None = None
) -> Compiled:
    """Compiles one kernel of a function for DEVICES[device].

    Args:
        shapes: of the function's arguments, and their dtypes.
        kernel: the name of the kernel: that of the `pallas_call`, or of the function within; Mosaic
            adds "_mosaic_gpu_kernel". It may be left out where XLA makes no other.

    Raises:
        RunFailed: the tools are not there, or did not do what is expected of them.
    """
    if reason := missing():
        raise RunFailed(reason)
    mesh = _mesh(device)
    whole = NamedSharding(mesh, PartitionSpec())
    arguments = [jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=whole) for shape in shapes]
    with (
        tempfile.TemporaryDirectory() as folder,
        jax.sharding.set_mesh(mesh),
        mock.patch.dict(os.environ, MOSAIC_GPU_DUMP_PTX="1", MOSAIC_GPU_DUMP_TO=folder),
    ):
        lowered = jax.jit(function).trace(*arguments).lower()
        lowered.compile(
            compiler_options=_options()
            | {
                "xla_dump_to": folder,
                "xla_dump_emitter_re": "ptx",  # ".*" dumps Triton's passes too, which takes 4 s
            }
        )
        modules = [path.read_text() for path in sorted(Path(folder).glob("*.ptx"))]
        launches = "".join(path.read_text() for path in Path(folder).glob("*.thunk_sequence.txt"))
    entries = {name: ptx for ptx in modules for name in re.findall(r"\.entry\s+(\w+)", ptx)}
    chosen = [name for name in entries if kernel in (None, name)]
    if len(chosen) != 1:
        raise RunFailed(f"which kernel is {kernel}? There are: {[*entries]}")
    name, ptx = chosen[0], entries[chosen[0]]
    sass, registers, spill_bytes = _assemble(ptx, name)
    grid, shared_bytes = _launch(launches, name)
    return Compiled(name, ptx, sass, registers, spill_bytes, shared_bytes, grid)


def program_for(device: str, function: Callable, *arguments, **options) -> jax.stages.Compiled:
    """Compiles a whole function for DEVICES[device], to look at its launches and buffers.

    Args:
        arguments: trees of shapes and dtypes.
        options: of jax.jit.
    """
    mesh = _mesh(device)
    whole = NamedSharding(mesh, PartitionSpec())
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), arguments
    )
    with jax.sharding.set_mesh(mesh):
        lowered = jax.jit(function, **options).trace(*shapes).lower()
        return lowered.compile(compiler_options=_options())


def launches(program: str) -> list[tuple[int, int]]:
    """Returns (rounds, kernels and copies of a round) of each loop of a program, fewest rounds
    first; kernels of a loop inside are not counted.

    Args:
        program: the text of what `program_for` returns.

    Raises:
        RunFailed: the number of rounds of a loop is not known. The host then waits in each round
            for the condition; of other loops it launches kernels one after the other.
    """
    bodies = {part.lstrip().split(" ")[0]: part for part in program.split("\n\n")}
    found = []
    for line in program.splitlines():
        if not re.search(r" (while|conditional)\(", line):
            continue
        body = re.search(r"body=(%[\w.]+)", line)
        rounds = re.search(r'"known_trip_count":{"n":"(\d+)"}', line)
        if not body or not rounds:
            raise RunFailed(f"the host waits in a loop: {line.strip()}")
        kernels = re.findall(r" (?:fusion|custom-call|copy)\(", bodies[body[1]])
        found.append((int(rounds[1]), len(kernels)))
    return sorted(found)


def main_loop_instructions(sass: str) -> Counter[str]:
    """Counts the instructions ("LDG.E.128", "IMAD", ...) of the longest loop, or of all the code.

    A loop is what lies between the target of a backward branch and the branch.
    """
    instructions, loops = _loops(sass)
    start, end = max(loops, key=lambda loop: loop[1] - loop[0], default=(0, len(instructions)))
    return _counted(instructions[start:end])


def inner_loops_instructions(sass: str) -> list[Counter[str]]:
    """Counts the instructions of each loop that has no other inside."""
    instructions, loops = _loops(sass)
    return [
        _counted(instructions[start:end])
        for start, end in loops
        if not any(start <= a and b <= end for a, b in loops if (a, b) != (start, end))
    ]


def _counted(instructions: list[str]) -> Counter[str]:
    return Counter(opcode for opcode in instructions if opcode != "NOP")


def _loops(sass: str) -> tuple[list[str], list[tuple[int, int]]]:
    """The instructions, and where loops of theirs begin and end."""
    instructions: list[str] = []
    labels: dict[str, int] = {}
    loops = []
    for line in sass.splitlines():
        if label := re.match(r"\s*(\.L_\w+):", line):
            labels[label[1]] = len(instructions)
        elif instruction := re.search(
            r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*)", line
        ):
            instructions.append(instruction[1])
            if not instruction[1].startswith("BRA"):
                continue
            target, end = re.search(r"`\((\.L_\w+)\)", instruction[2]), len(instructions)
            start = labels.get(target[1], end) if target else end
            if end - start > 1:  # a branch to itself is the trap behind the last EXIT
                loops.append((start, end))
    return instructions, loops


def _plugin() -> str | None:
    """The module of jax's CUDA plugin, where one is installed."""
    for module in ("jax_plugins.xla_cuda13", "jax_plugins.xla_cuda12"):
        try:
            if importlib.util.find_spec(module):
                return module
        except ModuleNotFoundError:  # no jax_plugins at all
            return None
    return None


def _options() -> dict[str, str | int]:
    """XLA's own level of optimisation, whatever XLA_FLAGS says, and where ptxas is."""
    return {
        "xla_backend_optimization_level": 3,
        "xla_gpu_cuda_data_dir": str(_tool("ptxas").parents[1]),
    }


@cache
def _mesh(device: str) -> jax.sharding.Mesh:
    # cuDNN and its like are not needed to compile.
    os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"
    options = {"target_config": DEVICES[device].target_config(), "topology": "1x1x1"}
    try:
        topology = topologies.get_topology_desc(device, platform="cuda", **options)
    except NotImplementedError:  # jax looked for plugins before that was set, and left this one out
        plugin = _plugin()
        assert plugin
        importlib.import_module(plugin).initialize()
        topology = topologies.get_topology_desc(device, platform="cuda", **options)
    return topologies.make_mesh(topology, (1,), ("x",))


def _find(tool: str) -> Path | None:
    """Where a tool is: in the pip packages, on PATH, or in a CUDA toolkit."""
    packages = importlib.util.find_spec("nvidia")
    roots = [Path(root) for root in (packages.submodule_search_locations or [])] if packages else []
    candidates = [
        root / folder / "bin" / tool
        for root in roots
        for folder in ("cu13", "cuda_nvcc", "cuda_nvdisasm")
    ]
    candidates += [Path(found)] if (found := shutil.which(tool)) else []
    candidates += [Path("/usr/local/cuda/bin") / tool]
    return next((path for path in candidates if path.is_file()), None)


def _tool(name: str) -> Path:
    path = _find(name)
    if path is None:
        raise RunFailed(f"{name} is not there")
    return path


def _run(*command: str | Path) -> str:
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RunFailed(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def _assemble(ptx: str, kernel: str) -> tuple[str, int, int]:
    """Returns (machine code, registers, bytes spilled)."""
    target = re.search(r"\.target\s+(\w+)", ptx)
    assert target
    with tempfile.TemporaryDirectory() as folder:
        source, binary = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        source.write_text(ptx)
        report = _run(_tool("ptxas"), "-v", f"-arch={target[1]}", source, "-o", binary)
        sass = _run(_tool("nvdisasm"), "-c", binary)
    of_kernel = re.search(rf"entry function '{kernel}'.*?Used (\d+) registers", report, re.DOTALL)
    of_section = re.search(rf"\.text\.{kernel}:.*?(?=\.section|\Z)", sass, re.DOTALL)
    if not of_kernel or not of_section:
        raise RunFailed(f"no {kernel} in what ptxas and nvdisasm say:\n{report}")
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", of_kernel[0])
    return of_section[0], int(of_kernel[1]), sum(map(int, spills))


def _launch(launches: str, kernel: str) -> tuple[tuple[int, int, int], int]:
    """Returns (grid, bytes of shared memory)."""
    if kernel.endswith("_mosaic_gpu_kernel"):
        return (0, 0, 0), 0
    line = next((line for line in launches.splitlines() if re.search(rf"\b{kernel}\b", line)), "")
    grid = re.search(r"grid: \[(\d+), (\d+), (\d+)\]", line)
    shared = re.search(r"shared_memory: (\d+)", line)
    if not grid or not shared:
        raise RunFailed(f"no launch of {kernel} in XLA's list of thunks:\n{launches}")
    x, y, z = map(int, grid.groups())
    return (x, y, z), int(shared[1])
