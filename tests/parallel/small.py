"""A model that is converted in a moment: the first layer of the packaged one."""

import json
from pathlib import Path

from tests.conftest import GOLDEN


def one_layer(folder: Path) -> Path:
    """Makes the folder of the model, to be opened with `ignore_extra`, and returns it."""
    source = GOLDEN / "stories"
    for file in source.iterdir():
        (folder / file.name).symlink_to(file)
    config = json.loads((source / "config.json").read_text())
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    return folder
