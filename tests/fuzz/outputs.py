"""What atd writes and reads again, changed: converted folders, journals, the cache, results."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random

import numpy as np
import pytest

from atd.checkpoint.cache import Cache
from atd.checkpoint.folder import (
    CARD,
    GRAPH,
    MANIFEST,
    REPORT,
    partial_folder,
    read_manifest,
    read_report,
    result_folder,
)
from atd.checkpoint.gguf_file import foreign_file
from atd.checkpoint.journal import journal_file
from atd.checkpoint.safetensors import INDEX
from atd.exports.gguf import export_gguf
from atd.pipeline import convert as conversion
from atd.pipeline.integrity import verify_checkpoint
from atd.study.results import RESULTS, number, read_results
from tests.fuzz.kinds import Kind, change_safetensors, golden, read_model, run_model, tokenizer
from tests.fuzz.mutate import Mutator, change_bytes, change_json
from tests.fuzz.watch import Fault


def converted(folder: Path) -> None:
    """Writes a converted model with a tokenizer into `out`, and leaves its source."""
    source = folder / "source"
    golden(source, "llama_gqa")
    tokenizer(source)
    convert(folder)


def convert(folder: Path, **options) -> Path:
    """Converts `source` into `out`."""
    return conversion.convert(
        folder / "source",
        folder / "out",
        "datafree2",
        cache=folder / "cache",
        say=_quiet,
        **options,
    )


def _quiet(line: str) -> None:
    pass


def _in_output(names: Callable[[Path], list[str]], change: Mutator):
    """Makes an output of which some files are changed."""

    def make(folder: Path) -> dict[str, Mutator]:
        converted(folder)
        shutil.copytree(folder / "out", folder / "sound")
        return {f"out/{name}": change for name in names(folder / "out")}

    return make


def _shards(out: Path) -> list[str]:
    return sorted(path.name for path in out.glob("*.safetensors"))


def _files(out: Path) -> list[str]:
    return sorted(path.name for path in out.iterdir() if path.name != CARD)


def verify(folder: Path) -> None:
    """Verifies an output, and raises Fault where a file is another, but for times of the report and
    the layout of the manifest. A manifest that lost both of its own digests is taken for an early
    one.
    """
    verify_checkpoint(folder / "out")
    early = json.loads((folder / "out" / MANIFEST).read_bytes()).keys().isdisjoint(_DIGESTS)
    for file in sorted((folder / "sound").iterdir()):
        compared = not early or file.name not in (MANIFEST, REPORT)
        if compared and _said(file) != _said(folder / "out" / file.name):
            raise Fault(f"verify does not find that {file.name} was changed")


_DIGESTS = {"report", "sha256"}


def _said(file: Path) -> object:
    """What a file says that counts."""
    if file.name == MANIFEST:
        return json.loads(file.read_bytes())
    content = file.read_bytes()
    return re.sub(rb'("seconds": )[-+.\deE]+', b"", content) if file.name == REPORT else content


def read_summary(folder: Path) -> None:
    """Reads manifest and report."""
    read_report(folder / "out")
    verify(folder)


def _journal(folder: Path) -> dict[str, Mutator]:
    """A conversion of which nothing but the name of its folder is missing."""
    converted(folder)
    (folder / "out").rename(folder / "sound")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(conversion, "finish", _stop)
        with pytest.raises(KeyboardInterrupt):
            convert(folder)
    partial_folder(folder / "out").rename(folder / "partial")
    journal = journal_file(result_folder(folder / "out")).name
    return {f"partial/{journal}": change_journal}


def _stop(*_) -> None:
    raise KeyboardInterrupt


def change_journal(random: Random, data: bytes) -> bytes:
    """Changes values or bytes of one of the lines; now and then doubles or moves one."""
    lines = data.splitlines(keepends=True)
    at = random.randrange(len(lines))
    digest, _, text = lines[at].partition(b" ")
    lines[at] = digest + b" " + change_json(random, text) + b"\n"
    if random.random() < 0.2:
        lines.insert(random.randrange(len(lines)), random.choice(lines))
    return change_bytes(random, b"".join(lines)) if random.random() < 0.2 else b"".join(lines)


def resume(folder: Path) -> None:
    """Goes on with a conversion; raises Fault where it does not end in the same bytes."""
    shutil.rmtree(folder / "out", ignore_errors=True)
    shutil.rmtree(partial_folder(folder / "out"), ignore_errors=True)
    shutil.copytree(folder / "partial", partial_folder(folder / "out"))
    if read_manifest(convert(folder)) != read_manifest(folder / "sound"):
        raise Fault("it ends in other bytes")
    verify_checkpoint(folder / "out")
    rows = [
        [{key: value for key, value in row.items() if key != "seconds"} for row in read_report(out)]
        for out in (folder / "out", folder / "sound")
    ]
    if rows[0] != rows[1]:
        raise Fault("it ends in another report")


ARRAYS = {"tokens": np.arange(100, dtype=np.int32), "losses": np.ones((3, 4))}


def _cache(folder: Path) -> dict[str, Mutator]:
    Cache(folder).save("entry", ARRAYS)
    return {"entry.npz": change_bytes}


def read_cache(folder: Path) -> None:
    """Reads an entry of the cache: all of what was stored, or nothing."""
    found = Cache(folder).load("entry")
    if found is not None and (
        found.keys() != ARRAYS.keys()
        or any(
            found[n].dtype != a.dtype or not np.array_equal(found[n], a) for n, a in ARRAYS.items()
        )
    ):
        raise Fault("a changed entry is taken for what was stored")


def _results(folder: Path) -> dict[str, Mutator]:
    (folder / RESULTS).write_text(
        "recipe,decompose.bases,bytes,kl_mean:text,error,folder,setting,key\n"
        'ternary2,2,12345,0.5,,a,s,k\n"ternary3",3,23456,1e-3,"disk full, sorry",b,s,l\n'
    )
    return {RESULTS: change_bytes}


def read_study(folder: Path) -> None:
    """Reads the results of a study."""
    for row in read_results(folder / RESULTS):
        number(row, "bytes")


def _gguf(folder: Path) -> dict[str, Mutator]:
    """An export to GGUF with blocks of integers."""
    golden(folder / "source", "llama_gqa")
    out = convert(folder, overrides=["decompose.scales=tied", "decompose.group=32"])
    file = export_gguf(out, folder / "model.gguf", say=_quiet)
    shutil.copy(file, folder / "sound.gguf")
    return {file.name: change_bytes}


def read_gguf(folder: Path) -> None:
    """Reads an export, and raises Fault where a changed one is taken for what atd wrote."""
    file = folder / "model.gguf"
    is_sound = file.read_bytes() == (folder / "sound.gguf").read_bytes()
    if (foreign_file(file) is None) != is_sound:
        raise Fault("a changed file is taken for what was written")
    read_model(file)


def _out(read: Callable[[Path], object]) -> Callable[[Path], object]:
    return lambda folder: read(folder / "out")


KINDS = (
    Kind("stored graph", _in_output(lambda out: [GRAPH], change_json), _out(run_model)),
    Kind("its config", _in_output(lambda out: ["config.json"], change_json), _out(run_model)),
    Kind("its index", _in_output(lambda out: [INDEX], change_json), _out(read_model)),
    Kind("packed codes", _in_output(_shards, change_safetensors), _out(read_model)),
    Kind("files of an output", _in_output(_files, change_bytes), verify),
    Kind("manifest, report", _in_output(lambda out: [MANIFEST, REPORT], change_json), read_summary),
    Kind("exported GGUF", _gguf, read_gguf),
    Kind("journal", _journal, resume, writes=True),
    Kind("cache", _cache, read_cache, writes=True),
    Kind("results.csv", _results, read_study),
)
