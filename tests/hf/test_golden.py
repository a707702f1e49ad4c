"""Folders of atd's in PyTorch: the same logits as in JAX. Where torch and transformers are not
here, golden files say so.
"""
# pyright: reportMissingImports=false

import copy
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.golden.make_hf_golden import MODELS, OUT

WHY = "torch and transformers are not here (extra hf)"


@pytest.fixture(params=MODELS)
def name(request) -> str:
    return request.param


@pytest.fixture
def arrays(name) -> dict[str, np.ndarray]:
    return dict(np.load(OUT / f"{name}.npz"))


@pytest.fixture
def torch():
    found = pytest.importorskip("torch", reason=WHY)
    pytest.importorskip("transformers", reason=WHY)
    import atd.hf  # noqa: F401  registers the format

    return found


def loaded(folder: Path, **options):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, **options)


def logits(torch, model, tokens: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(torch.from_numpy(tokens).long()).logits.float().numpy()


def test_golden_logits_are_those_of_atd(name, arrays):
    flax = pytest.importorskip("flax", reason="flax is not here")
    del flax
    import atd

    found = np.asarray(atd.load(OUT / name, backend="xla-unpacked")(arrays["tokens"]))
    np.testing.assert_allclose(found, arrays["atd"], atol=1e-4)
    np.testing.assert_allclose(arrays["transformers"], arrays["atd"], atol=1e-4)


def test_transformers_computes_the_same(torch, name, arrays):
    model, info = loaded(OUT / name, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values())
    np.testing.assert_allclose(logits(torch, model, arrays["tokens"]), arrays["atd"], atol=1e-4)


def test_codes_stay_packed(torch, name):
    from atd.hf.modules import PackedLinear

    model = loaded(OUT / name, dtype="auto")
    stored = sum(path.stat().st_size for path in (OUT / name).glob("*.safetensors"))
    held = sum(p.numel() * p.element_size() for p in {*model.parameters()})
    assert held < stored  # whose headers count
    linears = [m for m in model.model.layers.modules() if hasattr(m, "in_features")]
    assert all(isinstance(linear, PackedLinear) for linear in linears)
    assert len(linears) == 7 * len(model.model.layers)
    assert not any(p.requires_grad for m in linears for p in (m.scales,))


def test_pieces_of_rows_make_the_whole(torch, name, arrays, monkeypatch):
    from atd.hf import modules

    monkeypatch.setattr(modules, "UNPACKED", 1)
    model = loaded(OUT / name, dtype=torch.float32)
    np.testing.assert_allclose(logits(torch, model, arrays["tokens"]), arrays["atd"], atol=1e-4)


def test_a_copy_computes_the_same(torch, arrays, name):
    model = copy.deepcopy(loaded(OUT / name, dtype=torch.float32))
    np.testing.assert_allclose(logits(torch, model, arrays["tokens"]), arrays["atd"], atol=1e-4)


def test_bfloat16_is_near(torch, arrays, name):
    model = loaded(OUT / name, dtype=torch.bfloat16)
    found = logits(torch, model, arrays["tokens"])
    assert np.abs(found - arrays["atd"]).mean() < 0.05 * np.abs(arrays["atd"]).mean()


def test_it_generates(torch, arrays, name):
    model = loaded(OUT / name, dtype=torch.float32)
    tokens = torch.from_numpy(arrays["tokens"]).long()
    new = model.generate(tokens, max_new_tokens=3, do_sample=False, eos_token_id=None)
    assert new.shape[1] == tokens.shape[1] + 3
    assert new[0, tokens.shape[1]] == arrays["atd"][0, -1].argmax()


# --- what is refused ------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path) -> Path:
    return shutil.copytree(OUT / "rotated", tmp_path / "rotated")


def changed(file: Path, change) -> None:
    data = json.loads(file.read_text())
    change(data)
    file.write_text(json.dumps(data))


def test_a_model_without_a_head_is_refused(torch, folder):
    from transformers import AutoModel

    from atd.errors import BadInput

    with pytest.raises(BadInput, match="load it by AutoModelForCausalLM"):
        AutoModel.from_pretrained(folder)


def test_a_graph_of_its_own_is_refused(torch, folder):
    from atd.errors import BadInput

    def other_window(graph):
        node = next(n for n in graph["blocks"][1]["nodes"] if n["op"] == "attention")
        node["attrs"]["window"] = 4

    changed(folder / "atd_graph.json", other_window)
    with pytest.raises(BadInput, match=r"layers\.1: .*window=4 in place of .*window=0"):
        loaded(folder)


def test_a_newer_format_is_refused(torch, folder):
    from atd.errors import BadInput

    changed(
        folder / "config.json", lambda data: data["quantization_config"].update(format_version=2)
    )
    with pytest.raises(BadInput, match="format_version is 2"):
        loaded(folder)


def test_it_is_not_saved(torch, folder, tmp_path):
    model = loaded(folder)
    with pytest.raises(ValueError, match="not serializable"):
        model.save_pretrained(tmp_path / "again")
