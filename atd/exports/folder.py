"""Writes the folder of an export, whole or not at all."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from atd.checkpoint.folder import MANIFEST, check_space, finish, open_result, write_manifest
from atd.checkpoint.safetensors import INDEX, SINGLE, shard_name
from atd.checkpoint.writer import Entry, file_digest, write_file, write_shard
from atd.ir import WeightRef
from atd.pipeline.output import index_text
from atd.progress import Progress, Report


def write_folder(
    target: Path,
    kind: str,
    shards: Sequence[tuple[str, Sequence[WeightRef | Entry]]],
    files: Mapping[str, str | bytes],
    *,
    overwrite: bool,
    progress: Report,
) -> None:
    """Writes shards of weights, other files and the manifest of an export.

    Args:
      target: the folder, which `atd.checkpoint.folder.check_target` has let pass.
      kind: the format, for the manifest.
      shards: (name for the progress, weights) of each; more than one get an index.
      files: name -> content of all other files.
      overwrite: replace `target` if atd made it.
      progress: is told of each shard.
    """
    total = sum(_size(refs) for _, refs in shards)
    with open_result(target) as result:
        check_space(result, total)
        weight_map, done = {}, 0
        for i, (name, refs) in enumerate(shards):
            shard = SINGLE if len(shards) == 1 else shard_name(i, len(shards))
            weight_map |= dict.fromkeys(write_shard(result / shard, refs), shard)
            done += _size(refs)
            progress(Progress("exporting", done, total, "bytes", name))
        index = {INDEX: index_text(total, weight_map)} if len(shards) > 1 else {}
        files = {**files, **index}
        for name, content in files.items():
            write_file(result / name, content)
        written = sorted({*files, *weight_map.values()})
        digests = {name: file_digest(result / name) for name in written}
        write_manifest(result, {"export": kind}, digests)
        finish(target, result, [*digests, MANIFEST], overwrite)


def _size(refs: Sequence[WeightRef | Entry]) -> int:
    """The bytes of weights in a file."""
    return sum(ref.nbytes if isinstance(ref, Entry) else ref.type.nbytes for ref in refs)
