"""Conversions and exports that are killed, or find the disk full, at any moment: the same command
ends in the same bytes, and there is nothing at OUT until it is whole.
"""

import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from random import Random

from atd.checkpoint.folder import MANIFEST, partial_folder, read_manifest
from atd.errors import RunFailed
from atd.exports.hf import export_hf
from atd.pipeline.convert import convert
from atd.pipeline.integrity import verify_checkpoint
from atd.pipeline.recipe import read_recipe, recipe_names
from tests.fuzz.failing_disk import Killed, full_disk, killed
from tests.fuzz.kinds import Kind, golden, tokenizer
from tests.fuzz.mutate import Mutator
from tests.fuzz.watch import Fault

EXPORT = "export"
MOMENT = "moment.json"  # what is run, and the number of the call where it ends
OVERRIDES = {  # a budget for a model of this size, and steps for its sake
    "adaptive": ("calibrate.steps=4",),
    "llama3-8b-4gb": ("calibrate.steps=4", "allocate.budget=60KB"),
}


def run(folder: Path, what: str, out: str) -> Path:
    """Converts `source` by the recipe of this name, or exports it."""
    if what == EXPORT:
        return export_hf(folder / "source", folder / out, say=_quiet)
    recipe = read_recipe(what, OVERRIDES.get(what, ()))
    recipe = replace(recipe, calibration_tokens=256, calibration_context=16)
    return convert(folder / "source", folder / out, recipe, cache=folder / "cache", say=_quiet)


def _quiet(line: str) -> None:
    pass


def _moments(limit: Callable, names: list[str]) -> Callable[[Path], dict[str, Mutator]]:
    """Makes a source and a whole output of each recipe, and chooses moments at random."""

    def make(folder: Path) -> dict[str, Mutator]:
        golden(folder / "source", "llama_gqa")
        tokenizer(folder / "source")
        calls = {}
        for name in names:
            with limit() as counter:
                run(folder, name, f"sound-{name}")
            calls[name] = counter.count
        (folder / MOMENT).write_text("{}")

        def change(random: Random, data: bytes) -> bytes:
            name = random.choice(names)
            return json.dumps([name, random.randrange(calls[name])]).encode()

        return {MOMENT: change}

    return make


def _cut_off(limit: Callable) -> Callable[[Path], None]:
    def read(folder: Path) -> None:
        name, moment = json.loads((folder / MOMENT).read_bytes())
        out, sound = folder / "out", folder / f"sound-{name}"
        for left in (out, partial_folder(out)):
            shutil.rmtree(left, ignore_errors=True)
        with suppress(Killed), limit(moment):
            try:
                run(folder, name, out.name)
            except RunFailed as error:
                if "the disk is full" not in str(error):
                    raise Fault(f"{name}, call {moment}: {error}") from None
        if out.exists() and not (out / MANIFEST).exists():
            raise Fault(f"{name}, call {moment}: a part of the output is at OUT")
        if not out.exists():
            run(folder, name, out.name)
        verify_checkpoint(out)
        if read_manifest(out) != read_manifest(sound):
            raise Fault(f"{name}, call {moment}: it ends in other bytes")
        beside = {path.name for path in folder.iterdir() if path.name.startswith(".")}
        if not beside <= {partial_folder(out).name}:
            raise Fault(f"{name}, call {moment}: {beside} are left")

    return read


def kinds(names: list[str]) -> list[Kind]:
    """Returns the two kinds for these recipes, or EXPORT."""
    limits = {"killed": killed, "disk full": full_disk}
    return [
        Kind(name, _moments(limit, names), _cut_off(limit), writes=True, seconds=120)
        for name, limit in limits.items()
    ]


KINDS = kinds([*recipe_names(), EXPORT])
