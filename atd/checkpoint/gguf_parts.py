"""Reads the headers of a GGUF file and of the parts that it was split into.

`llama-gguf-split` names the parts NAME-00001-of-0000N.gguf. The first one has the metadata; each
says in `split.no` which one it is (from 0), in `split.count` how many there are, and in
`split.tensors.count` how many tensors they have together.
"""

import re
from pathlib import Path
from typing import Any

from atd.checkpoint.files import path_exists
from atd.checkpoint.gguf_header import GGUFTensor, read_header
from atd.errors import BadInput

_NAME = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL)


def read_parts(path: Path) -> tuple[dict[str, Any], dict[str, GGUFTensor]]:
    """Reads the header of a GGUF file, and those of its other parts: (metadata, tensors by name).

    Args:
        path: the file, or the first of its parts.

    Raises:
        BadInput: a part is absent or damaged, belongs to another file, or has a tensor that is in
            another part too; or `path` is not the first one.
    """
    metadata, tensors = read_header(path)
    count = metadata.get("split.count", 0)
    if count in (0, 1):
        return metadata, tensors
    paths = _part_paths(path, count)
    if (number := metadata.get("split.no")) != 0:
        raise BadInput(
            f"{path}: split.no is {number!r}, so it is not the first part of a split GGUF file; "
            f"give {paths[0].name}"
        )
    if absent := [part.name for part in paths if not path_exists(part)]:
        raise BadInput(
            f"{path}: the first of {count} parts of a split GGUF file, and "
            f"{', '.join(absent[:3])}{f' and {len(absent) - 3} more' if absent[3:] else ''} "
            "is missing beside it; download it again"
        )
    total = metadata.get("split.tensors.count")
    for i, part in enumerate(paths[1:], 1):
        of_part, more = read_header(part)
        expected = {"split.no": i, "split.count": count, "split.tensors.count": total}
        for key, value in expected.items():
            if of_part.get(key) != value:
                raise BadInput(
                    f"{part}: {key} is {of_part.get(key)!r}, expected {value!r} as part {i + 1} "
                    f"of {paths[0].name}; the parts are not of one file"
                )
        if twice := tensors.keys() & more.keys():
            name = min(twice)
            raise BadInput(f"{part}: tensor {name} is in {tensors[name].file.name} too")
        tensors |= more
    if total is not None and total != len(tensors):
        raise BadInput(
            f"{path}: split.tensors.count is {total!r}, but its {count} parts have {len(tensors)} "
            "tensors; download them again"
        )
    return metadata, tensors


def _part_paths(path: Path, count: object) -> list[Path]:
    """The paths of all parts of a split file, of which `path` is one."""
    match = _NAME.fullmatch(path.name)
    if type(count) is not int or match is None or int(match["count"]) != count:
        raise BadInput(
            f"{path}: one of {count!r} parts of a split GGUF file (split.count), which are read "
            "under the names NAME-00001-of-0000N.gguf alone; rename them, or join them with "
            "llama-gguf-split --merge"
        )
    return [
        path.with_name(f"{match['stem']}-{i:05d}-of-{count:05d}.gguf") for i in range(1, count + 1)
    ]
