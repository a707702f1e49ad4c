"""Passes that are not atd's: what one left is taken up until its code is edited."""

import importlib.util
import os
import sys
from pathlib import Path

import pytest

from atd.checkpoint.folder import read_manifest, result_folder
from atd.passes.pack import Pack
from atd.pipeline import Pass, Pipeline
from atd.pipeline import convert as conversion
from atd.pipeline.base import identity
from atd.pipeline.code import code_digest
from atd.pipeline.recipe import Recipe
from atd.study.points import Point

MODEL = Path(__file__).parents[1] / "golden" / "llama_gqa"
SOURCE = """
from dataclasses import dataclass, replace
import atd
from atd.weights import Dense, DenseType

@dataclass(frozen=True, kw_only=True)
class Scale(atd.Pass):
    name = "scale"
    scope = "node"

    def rewrite(self, name, node, context):
        if node.op != "linear" or not node.is_dense_matrix:
            return None
        ref = node.weights["weight"]
        load = lambda: Dense(FACTOR * ref.load().dequantize())
        made = replace(ref, type=DenseType(ref.type.shape, "f32"), load=load)
        return replace(node, weights=node.weights | {"weight": made})
"""


@pytest.fixture
def scale(tmp_path, monkeypatch):
    """Writes a module with a pass that multiplies by a factor, imports it, and makes the pass."""

    def made(factor: str) -> Pass:
        file = tmp_path / "scale.py"
        file.write_text(SOURCE.replace("FACTOR", factor))
        return imported(file, monkeypatch).Scale()

    return made


def imported(file: Path, monkeypatch):
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, file.stem, module)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    spec.loader.exec_module(module)
    return module


def test_an_edited_pass_does_not_go_on_with_what_it_left(tmp_path, scale, monkeypatch):
    def convert(step: Pass, out: str) -> Path:
        made_by = Pipeline([step, "decompose", "pack"])
        return conversion.convert(MODEL, tmp_path / out, made_by, say=lambda line: None)

    def cut_off(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(conversion, "finish", cut_off)
        with pytest.raises(KeyboardInterrupt):
            convert(scale("0.5"), "cut_off")
        kept = inodes(result_folder(tmp_path / "cut_off"))
        with pytest.raises(KeyboardInterrupt):
            convert(scale("0.5"), "cut_off")
        assert inodes(result_folder(tmp_path / "cut_off")) == kept
    edited = scale("0.25")
    assert read_manifest(convert(edited, "cut_off")) == read_manifest(convert(edited, "whole"))


def inodes(folder: Path) -> dict[str, int]:
    return {path.name: os.stat(path).st_ino for path in folder.glob("*.safetensors")}


def test_the_identity_of_a_pass_is_its_text_and_foreign_code(scale):
    assert identity(Pack()) == str(Pack())
    first = scale("0.5")
    assert identity(first).startswith(f"{first} ")
    assert identity(scale("0.5")) == identity(first)
    assert identity(scale("0.25")) != identity(first)
    points = [Point("r", {}, Recipe(Pipeline([scale(by)]))) for by in ("0.5", "0.5", "0.25")]
    assert points[0].digest == points[1].digest != points[2].digest


def test_a_subclass_has_the_code_of_its_base_too(scale):
    def subclass(of: type[Pass]) -> Pass:
        class Derived(of):
            name = "derived"

        return Derived()

    codes = {identity(subclass(type(scale(factor)))) for factor in ("0.5", "0.5", "0.25")}
    assert len(codes) == 2


def test_the_code_of_a_module_is_that_of_its_package(tmp_path, monkeypatch):
    inner = tmp_path / "package" / "inner"
    inner.mkdir(parents=True)
    for file in (inner.parent / "__init__.py", inner / "__init__.py", inner / "one.py"):
        file.write_text("")
    imported(inner / "one.py", monkeypatch)
    before = code_digest("one")
    (tmp_path / "beside.py").write_text("")
    assert code_digest("one") == before
    (inner.parent / "helper.py").write_text("")
    assert code_digest("one") != before


def test_modules_without_a_file_are_never_the_same(monkeypatch):
    monkeypatch.setitem(sys.modules, "notebook", type(sys)("notebook"))
    assert code_digest("notebook") != code_digest("notebook")
