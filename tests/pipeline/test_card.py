"""Model cards of output folders."""

import shutil
from pathlib import Path

import pytest
from huggingface_hub import metadata_load

from atd.checkpoint.folder import foreign, read_manifest
from atd.checkpoint.hub import local
from atd.errors import BadInput
from atd.exports.bit_ttt import export_bit_ttt
from atd.exports.bitnet import export_bitnet
from atd.exports.hf import export_hf
from atd.models import frontend
from atd.pipeline.card import dense_card
from atd.pipeline.convert import convert
from atd.pipeline.integrity import verify_checkpoint
from tests.checkpoint.fake_hub import Repo, used


def quiet(line: str) -> None:
    """Says nothing."""


@pytest.fixture(scope="module")
def made(packaged, tmp_path_factory) -> Path:
    return convert(packaged.folder, tmp_path_factory.mktemp("card") / "out", "datafree2", say=quiet)


@pytest.fixture
def source(packaged, tmp_path) -> Path:
    return shutil.copytree(packaged.folder, tmp_path / "source")


def test_it_says_what_the_folder_holds_and_how_to_load_it(made):
    card = (made / "README.md").read_text()
    data = metadata_load(made / "README.md")
    assert data == {
        "library_name": "atd-jax",
        "pipeline_tag": "text-generation",
        "tags": ["atd", "ternary", "quantized"],
    }
    for part in ("`decompose`", "| bits per weight | 3.", "atd generate MODEL", "atd.load("):
        assert part in card
    assert card.index("import atd.hf") < card.index("AutoModelForCausalLM.from_pretrained")
    assert all(len(line) <= 100 for line in card.splitlines())


def test_a_dense_export_has_a_card_of_its_own(made, tmp_path):
    out = export_hf(made, tmp_path / "dense", say=quiet)
    assert (metadata_load(out / "README.md") or {})["library_name"] == "transformers"
    card = (out / "README.md").read_text()
    assert "dense float32" in card
    assert "import atd.hf" not in card
    verify_checkpoint(out)


def test_ternary_exports_say_how_they_are_loaded(packaged, tmp_path):
    overrides = ["decompose.bases=1"]
    model = convert(packaged.folder, tmp_path / "n1", "greedy3", overrides=overrides, say=quiet)
    bitnet = export_bitnet(model, tmp_path / "bitnet", say=quiet)
    bit_ttt = export_bit_ttt(model, tmp_path / "bit-ttt", say=quiet)
    libraries = {bitnet: "transformers", bit_ttt: "bit-ttt-engine"}
    for out, library in libraries.items():
        assert (metadata_load(out / "README.md") or {})["library_name"] == library
        card = (out / "README.md").read_text()
        assert "| bits per weight | 2.00, of" in card
        assert "import atd.hf" not in card
        assert all(len(line) <= 100 for line in card.splitlines())
        verify_checkpoint(out)
    assert "accelerate" in (bitnet / "README.md").read_text()
    assert "Bit-TTT-Engine](https://" in (bit_ttt / "README.md").read_text()


def test_the_license_is_that_of_the_source(source, tmp_path):
    (source / "README.md").write_text(
        "---\nlicense: other\nlicense_name: mine\nlicense_link: LICENSE\ntags: [a]\n---\ntext\n"
    )
    (tmp_path / "card").write_text(dense_card(source, frontend.open(source), "float32"))
    data = metadata_load(tmp_path / "card") or {}
    assert (data["license"], data["license_name"]) == ("other", "mine")
    assert "license_link" not in data  # of a file that is not here


@pytest.mark.parametrize("text", ["---\n: [\n---\n", "none", "---\n- 1\n---\n", "\udcff"])
def test_a_card_that_cannot_be_read_says_nothing(source, tmp_path, text):
    (source / "README.md").write_bytes(text.encode(errors="surrogateescape"))
    assert "license" not in dense_card(source, frontend.open(source), "float32").partition("# ")[0]


def test_the_base_model_is_named_where_it_is_of_the_hub(packaged, tmp_path, monkeypatch):
    files = {path.name: path.read_bytes() for path in packaged.folder.iterdir() if path.is_file()}
    with used(monkeypatch, tmp_path) as hub:
        hub.repos["user/stories"] = Repo(
            {"main": files | {"README.md": b"---\nlicense: mit\n---\n"}}
        )
        out = convert("user/stories", tmp_path / "out", "datafree2", say=quiet)
        data = metadata_load(out / "README.md") or {}
        assert (data["base_model"], data["license"]) == ("user/stories", "mit")
        assert "# stories, ternary" in (out / "README.md").read_text()
        with pytest.raises(BadInput, match="must lie outside the model's folder"):
            convert("user/stories", local("user/stories") / "out", "datafree2", say=quiet)


def test_a_changed_card_is_sound_and_is_not_overwritten(made, source, tmp_path):
    out = shutil.copytree(made, tmp_path / "out")
    assert foreign(out) is None
    (out / "README.md").write_text("# Mine\n")
    verify_checkpoint(out)
    assert foreign(out) == "its README.md was changed since atd wrote it"
    with pytest.raises(BadInput, match=r"README\.md was changed"):
        convert(source, out, "datafree2", overwrite=True, say=quiet)
    (out / "README.md").unlink()
    verify_checkpoint(out)
    assert "README.md" in read_manifest(out)
