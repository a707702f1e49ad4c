"""What exporters of plain linears share: checkpoints of bitnet lose their rounding, and say so."""

from pathlib import Path

import pytest

from atd.errors import BadInput
from atd.exports.gguf import export_gguf
from atd.exports.hf import export_hf

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.mark.parametrize(("export", "name"), [(export_hf, "out"), (export_gguf, "out.gguf")])
def test_the_rounding_of_inputs_is_left_out_and_norms_of_linears_are_refused(
    tmp_path, export, name
):
    said: list[str] = []
    export(GOLDEN / "bitnet_llama", tmp_path / name, say=said.append)
    assert "the exported one does not" in "\n".join(said)
    with pytest.raises(BadInput, match=r"q_proj.rms_norm is a norm of one linear"):
        export(GOLDEN / "bitnet_norms", tmp_path / f"norms_{name}", say=said.append)
    assert [path.name for path in tmp_path.iterdir()] == [name]
