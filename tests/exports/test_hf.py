"""Export to a dense Hugging Face folder: the same values, under the names that other tools know."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from atd.errors import BadInput, RunFailed
from atd.exports.hf import export_hf
from atd.models import frontend
from atd.models.model import load
from atd.pipeline.convert import convert


def quiet(line: str) -> None:
    pass


def tensors(folder) -> dict:
    return {
        name: array
        for file in sorted(folder.glob("*.safetensors"))
        for name, array in load_file(file).items()
    }


@pytest.mark.parametrize("recipe", ["datafree2", "greedy3"])
def test_export_is_the_converted_model(stories260k, tmp_path, recipe):
    converted = convert(stories260k, tmp_path / "converted", recipe, say=quiet)
    exported = export_hf(converted, tmp_path / "dense", say=quiet)
    original, dense = tensors(stories260k), tensors(exported)
    assert {name: a.shape for name, a in dense.items()} == {
        name: a.shape for name, a in original.items()
    }
    assert all(array.dtype == np.float32 for array in dense.values())
    assert not np.array_equal(
        dense["model.layers.0.self_attn.k_proj.weight"],
        original["model.layers.0.self_attn.k_proj.weight"],
    )
    config = json.loads((exported / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["torch_dtype"] == config["dtype"] == "float32"
    assert (exported / "tokenizer.json").exists()
    tokens = np.arange(40, dtype=np.int32).reshape(2, 20)
    np.testing.assert_allclose(load(exported)(tokens), load(converted)(tokens), atol=1e-4)


def test_narrow_dtypes(stories260k, tmp_path):
    exported = export_hf(stories260k, tmp_path / "bf16", dtype="bfloat16", say=quiet)
    assert {str(ref.type).split("[")[0] for _, ref in frontend.open(exported).weights()} == {
        "dense bf16"
    }
    with pytest.raises(BadInput, match="exists"):
        export_hf(stories260k, tmp_path / "bf16", say=quiet)


def test_values_that_do_not_fit_are_not_written_as_infinity(stories260k, tmp_path):
    folder = tmp_path / "large"
    folder.mkdir()
    large = {name: array.astype(np.float32) for name, array in tensors(stories260k).items()}
    large["model.norm.weight"] = large["model.norm.weight"] * np.float32(1e6)
    save_file(large, folder / "model.safetensors")
    (folder / "config.json").write_bytes((stories260k / "config.json").read_bytes())
    with pytest.raises(RunFailed, match=r"model\.norm\.weight: its values do not fit f16"):
        export_hf(folder, tmp_path / "out", dtype="float16", say=quiet)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_appears_at_the_output_during_an_export_stays(stories260k, tmp_path, overwrite):
    out = tmp_path / "out"

    def thesis(now) -> None:
        out.write_text("years of work")

    with pytest.raises(BadInput, match=r"exists|is no folder"):
        export_hf(stories260k, out, overwrite=overwrite, say=quiet, progress=thesis)
    assert out.read_text() == "years of work"
    out.unlink()
    export_hf(stories260k, out, say=quiet)
    (out / "config.json").write_text("{}")
    with pytest.raises(BadInput, match=r"its config\.json was changed since atd wrote it"):
        export_hf(stories260k, out, overwrite=True, say=quiet)
