"""The architecture: folders import what stands below them and nothing else, in no circle;
`kernels/` needs jax and numpy.

All import statements count, those inside functions and under `if __name__ == "__main__"` as well.
"""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# from the ground up: a folder (or a module that stands alone) imports those on lower floors
FLOORS = [
    {"errors", "host", "progress", "version"},
    {"weights"},
    {"ir", "kernels"},
    {"parallel"},
    {"decomposition"},
    {"checkpoint"},
    {"models"},
    {"calibration", "runtime"},
    {"pipeline", "reports"},
    {"exports", "lm_eval", "passes", "study"},
    {"cli"},
    {"__init__", "__main__", "convert_adaptive"},
    {"benchmarks", "examples", "hf"},
]
FLOOR = {room: i for i, floor in enumerate(FLOORS) for room in floor}


def module_of(path: Path) -> str:
    """atd/models/ops.py -> "atd.models.ops", kernels/xla.py -> "atd.kernels.xla",
    benchmarks/decode.py as it is.
    """
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = ("atd", *parts) if parts[0] in ("passes", "kernels") else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def sources() -> dict[str, Path]:
    found = [
        path
        for folder in ("passes", "kernels", "benchmarks", "examples")
        for path in (ROOT / folder).rglob("*.py")
    ]
    linked = (ROOT / "atd" / "passes", ROOT / "atd" / "kernels")
    found += [
        path
        for path in (ROOT / "atd").rglob("*.py")
        if not any(path.is_relative_to(link) for link in linked)
    ]
    return {module_of(path): path for path in found}


SOURCES = sources()


def room(module: str) -> str:
    parts = module.split(".")
    return parts[0] if parts[0] != "atd" else parts[1] if len(parts) > 1 else "__init__"


def names_imported(path: Path) -> set[str]:
    """Every dotted name that the file imports, what `from` takes included."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative imports hide which folder they mean"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def modules_imported(path: Path) -> set[str]:
    """The modules of this repository that the file imports."""

    def module(name: str) -> str | None:
        while name and name not in SOURCES:
            name = name.rpartition(".")[0]
        return name or None

    return {found for name in names_imported(path) if (found := module(name))}


@pytest.mark.parametrize("module", SOURCES)
def test_imports_go_downward(module):
    assert room(module) in FLOOR, f"{room(module)} has no floor"
    for imported in modules_imported(SOURCES[module]):
        mine, theirs = room(module), room(imported)
        assert mine == theirs or FLOOR[theirs] < FLOOR[mine], (
            f"{module} imports {imported}, which is not below it"
        )


def test_no_module_imports_itself_by_way_of_others():
    graph = {module: modules_imported(path) - {module} for module, path in SOURCES.items()}
    done: set[str] = set()

    def visit(module: str, way: tuple[str, ...]) -> None:
        assert module not in way, " -> ".join([*way[way.index(module) :], module])
        if module not in done:
            for imported in sorted(graph[module]):
                visit(imported, (*way, module))
            done.add(module)

    for module in graph:
        visit(module, ())


def test_kernels_need_jax_and_numpy_alone():
    allowed = {"jax", "numpy", "atd"} | set(sys.stdlib_module_names)
    for module, path in SOURCES.items():
        if room(module) == "kernels":
            for name in names_imported(path):
                assert name.split(".")[0] in allowed, f"{module} imports {name}"
                assert not name.startswith("atd.") or name.split(".")[1] in (
                    "errors",
                    "kernels",
                    "weights",
                ), f"{module}: {name}"


def test_importing_kernels_loads_nothing_else():
    heavy = [
        "flax",
        "safetensors",
        "tokenizers",
        "gguf",
        "rich",
        "tyro",
        "optax",
        "matplotlib",
        "transformers",
    ]
    code = f"import sys, atd.kernels.matmul; print([m for m in {heavy!r} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert done.stdout.strip() == "[]"


def test_package_links_survive():
    for name in ("passes", "kernels", "configs"):
        assert (ROOT / "atd" / name).resolve() == ROOT / name
        assert not (ROOT / name / "__init__.py").exists()
