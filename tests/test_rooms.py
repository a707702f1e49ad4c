"""The house of DESIGN.md: imports go downward only, and kernels/ needs jax and numpy alone."""

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
FLOORS = [  # from the ground up; a module imports from floors below its own, or from its own
    {"layout", "errors", "memory", "__init__"},
    {"weights"},
    {"ir", "levels"},
    {"ternary", "allocation"},
    {"kernels", "store", "gguf_header", "gguf_source", "output"},
    {"models", "tokenizer", "gguf_tokenizer"},
    {"calibration", "feedback", "tuning", "sampling", "sensitivity"},
    {"pipeline"},
    {"passes", "recipe"},
    {"sweep"},
    {"calibration_text"},
    {"convert_adaptive", "evaluate", "generate", "report", "experiments", "pareto", "bench"},
    {"results", "allocation_report"},
    {"export"},
    {"demo", "grid"},
    {"commands"},
    {"commands_convert", "commands_run"},
    {"cli"},
]
FLOOR = {room: i for i, floor in enumerate(FLOORS) for room in floor}
SOURCES = [*ROOT.glob("atd/*.py"), *ROOT.glob("atd/models/*.py"), *ROOT.glob("passes/*.py"), *ROOT.glob("kernels/*.py")]


def room(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[1] if parts[0] == "atd" else parts[0]


def imports(path: Path):
    tree = ast.parse(path.read_text())
    tree.body = [node for node in tree.body if not (isinstance(node, ast.If) and "__name__" in ast.unparse(node.test))]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            yield from (
                (f"{module}.{alias.name}" for alias in node.names) if module in ("atd", "atd.models") else [module]
            )


def test_imports_go_downward():
    upward = []
    for path in SOURCES:
        for name in imports(path):
            parts = (name or "").split(".")
            if parts[0] == "atd" and len(parts) > 1 and parts[1] in FLOOR and FLOOR[parts[1]] > FLOOR[room(path)]:
                upward.append(f"{path.relative_to(ROOT)} imports {name}")
    assert not upward, upward


def test_every_room_has_a_floor():
    assert {room(path) for path in SOURCES} <= set(FLOOR)


def test_kernels_need_jax_and_numpy_alone():
    allowed = {"jax", "numpy", "atd"} | set(sys.stdlib_module_names)
    for path in ROOT.glob("kernels/*.py"):
        for name in imports(path):
            assert name.split(".")[0] in allowed, f"{path.name} imports {name}"
            assert not name.startswith("atd.") or name.split(".")[1] in ("kernels", "layout", "weights"), (
                f"{path.name} imports {name}"
            )


def test_importing_kernels_loads_nothing_else():
    heavy = ["flax", "safetensors", "tokenizers", "gguf", "rich", "tyro", "optax", "matplotlib", "transformers"]
    code = f"import sys, atd.kernels.matmul; print([m for m in {heavy!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"


def test_package_links_survive():
    for name in ("passes", "kernels", "configs"):
        assert (ROOT / "atd" / name).resolve() == ROOT / name
        assert not (ROOT / name / "__init__.py").exists()
